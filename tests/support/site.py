"""Is the API in the site that was built, by its public names only? Its argument is the site."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def main(site: Path) -> None:
    """AssertionError if it is not."""
    built = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        assert f'id="{name}"' in built, f"{name} is not in the page"
    shown = html.unescape(re.sub(r"<[^>]+>", "", built))
    private = sorted(set(re.findall(r"ghostpool\.(?:testing\.)?_[a-z]\w*", shown)))
    assert not private, f"shown, and private: {', '.join(private)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

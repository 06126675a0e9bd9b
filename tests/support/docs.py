"""The examples of the documentation, taken out of their pages and run.

An example is a fenced block of Python. It runs as a program of its own, in a directory that the
test prepares (image directories, say). One whose first line is a comment with the name of a file,
`# agent.py`, is that file, so that later ones can import it. A block of `text` right after it is
what it prints; a line of "…" there stands for any lines, and "…" in a line for any characters.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
RUN_S = 60
_FENCE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_FILE = re.compile(r"# ([\w.-]+\.py)\n")
_ANY_LINES = "…\n"


class Example(NamedTuple):
    """One block of Python."""

    page: str
    line: int
    """Where its code begins in the page."""
    code: str
    output: str | None
    """What the page says that it prints; None: it does not say."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: str) -> list[Example]:
    """The blocks of a page of docs/, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Example(page, text.count("\n", 0, match.start()) + 2, match["code"], match["output"])
        for match in _FENCE.finditer(text)
    ]


def run_example(example: Example, directory: Path, replace: Mapping[str, str] | None = None) -> str:
    """Run it in `directory`; what it printed, which is what the page says.

    `replace`: what stands in the page for something that only the test knows, a pid say.
    """
    code = example.code
    for here, there in (replace or {}).items():
        code = code.replace(here, there)
    match = _FILE.match(code)
    file = directory / (match[1] if match else f"example_{example.line}.py")
    # Where it stands in the page, so that a traceback leads there.
    file.write_text("\n" * (example.line - 1) * (match is None) + code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, f"{example}: {done.stderr}"
    if example.output is not None:
        assert matches(example.output, done.stdout), f"{example} printed:\n{done.stdout}"
    return done.stdout


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is what a page says, but for what its "…" stand for."""
    expression = "".join(
        "(?:.*\n)*" if line == _ANY_LINES else re.escape(line).replace("…", ".*")
        for line in pattern.splitlines(keepends=True)
    )
    return re.fullmatch(expression, text) is not None

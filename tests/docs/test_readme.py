"""The example of the README, as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.crash import children, journals
from tests.support.docs import DOCS, examples, run_example
from tests.support.live import Live


@pytest.mark.needs_mount_ns
def test_as_a_library(target: Live, tmp_path: Path) -> None:
    (example,) = examples("../README.md")
    assert example.output is not None
    before = target.snapshot().without_directory_times()
    run_example(example, tmp_path, {"4242": str(target.pid), "images/": "img"})
    assert target.snapshot().without_directory_times() == before
    assert not children()
    assert journals() == []


def test_it_leads_to_the_pages() -> None:
    """Every page of docs/ is to be found from the README, or from the index of docs/."""
    pointing = (DOCS.parent / "README.md").read_text() + (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"{page.name})" in pointing, page.name

"""The examples of "The parts alone", as they stand in the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostpool import Attr
from tests.support.crash import children, journals
from tests.support.docs import Example, examples, run_example
from tests.support.imagewriter import ghosts_on
from tests.support.live import Live, live, read_only

pytestmark = pytest.mark.needs_mount_ns
FLAGS = int(Attr.RDONLY | Attr.NOSUID)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Live]:
    """The process that the page calls 4242, and its dump in `img`."""
    ghosts_on("/data", ["d/scratch", "d/log"], b"content").write(tmp_path / "img")
    with live([read_only(2, b"/data", "d/", attributes=FLAGS)]) as (one,):
        before = one.snapshot()
        yield one
        assert one.snapshot() == before


@pytest.mark.parametrize("example", examples("parts.md"), ids=str)
def test_example(example: Example, target: Live, tmp_path: Path) -> None:
    told = example._replace(output=example.output and example.output.replace("4242", "…"))
    run_example(told, tmp_path, {"4242": str(target.pid)})
    assert not children()
    assert journals() == []

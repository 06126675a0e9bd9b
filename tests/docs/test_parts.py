"""The examples of "The parts alone", as they stand in the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.crash import children, journals
from tests.support.docs import Example, examples, run_example
from tests.support.live import Live

pytestmark = pytest.mark.needs_mount_ns


@pytest.mark.parametrize("example", examples("parts.md"), ids=str)
def test_example(example: Example, target: Live, tmp_path: Path) -> None:
    told = example._replace(output=example.output and example.output.replace("4242", "…"))
    before = target.snapshot()
    run_example(told, tmp_path, {"4242": str(target.pid)})
    assert target.snapshot() == before
    assert not children()
    assert journals() == []

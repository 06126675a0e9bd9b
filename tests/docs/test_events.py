"""The example of "Events", as it stands in the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.docs import Example, examples, run_example
from tests.support.scene import scene

pytestmark = pytest.mark.needs_mount_ns


@pytest.mark.parametrize("example", examples("events.md"), ids=str)
def test_example(example: Example, tmp_path: Path) -> None:
    with scene(tmp_path / "img", namespaces=1, tasks=2) as made:
        run_example(example, tmp_path, {"4242": str(made.namespaces[10])})

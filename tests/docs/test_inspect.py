"""The examples of docs/inspect.md, as they stand there."""

from __future__ import annotations

from pathlib import Path

from tests.support.docs import examples, type_example
from tests.support.imagewriter import ghosts_on


def test_what_is_typed(tmp_path: Path) -> None:
    ghosts_on("/data", ["d/scratch", "d/log"], b"content").write(tmp_path / "img")
    found = examples("inspect.md", "sh")
    assert found
    for example in found:
        assert example.output is not None
        type_example(example, tmp_path)

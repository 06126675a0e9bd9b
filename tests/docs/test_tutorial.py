"""The tutorial, followed to the end: what it says is typed, and it prints what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.crash import children, journals
from tests.support.docs import DOCS, examples, second_terminal, type_example, write_example

PAGE = "tutorial.md"


@pytest.mark.needs_mount_ns
def test_the_tutorial(tmp_path: Path) -> None:
    """In the order of the page; only that the container is there from the start."""
    # Where the reader is: beside the clone, with the dump unpacked.
    (tmp_path / "ghostpool").symlink_to(DOCS.parent)
    directory = tmp_path / "agent"
    directory.mkdir()
    unpack = next(line for line in (DOCS / PAGE).read_text().splitlines() if "--unpack" in line)
    for program in examples(PAGE):
        write_example(program, directory)
    typed = examples(PAGE, "sh")
    (container,) = (one for one in typed if "second terminal" in one.code)
    type_example(container._replace(code=unpack, output=""), directory)
    with second_terminal(container, directory):
        for one in typed:
            if one is not container:
                type_example(one, directory)
    shutil.rmtree(directory)
    assert not children()
    assert journals() == []


def test_it_is_as_long_as_it_says() -> None:
    """The agent's number of lines."""
    (agent,) = (one for one in examples(PAGE) if one.code.startswith("# agent.py"))
    lines = len(agent.code.splitlines()) - 1  # less the one with its name
    assert f"of {lines} lines" in (DOCS / PAGE).read_text().replace("\n", " ")

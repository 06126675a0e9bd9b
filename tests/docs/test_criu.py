"""Each difference that docs/criu.md claims has a test that is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "criu.md"


def rows() -> list[list[str]]:
    """The cells of each row, without heads and rules."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "CRIU" and not row[0].startswith("---")]


@cache
def names_of(name: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(name)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}


def test_the_rows_are_found() -> None:
    assert len(rows()) >= 10
    assert all(len(row) == 3 for row in rows())


@pytest.mark.parametrize("test", [row[-1] for row in rows()])
def test_the_test_is_there(test: str) -> None:
    found = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", test)
    assert found, test
    assert found[2] in names_of(found[1])

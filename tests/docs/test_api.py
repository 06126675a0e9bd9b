"""The page of the API has every public name, and every public name says what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ghostpool
import ghostpool.testing
from tests.support.docs import DOCS

SOURCE = Path(ghostpool.__file__).parent
NAMES = [f"ghostpool.{name}" for name in ghostpool.__all__]
SAME = {"MountSpec", "NamespaceSpec", "Node"}
"""In both packages; described once."""
NAMES += [f"ghostpool.testing.{name}" for name in ghostpool.testing.__all__ if name not in SAME]
NUMBERS = re.compile(r"\b(?:int|float)\b")
"""In an annotation: says neither a unit nor what is counted."""


def test_the_page_has_every_name_once() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: (\S+)$", page, re.MULTILINE)) == sorted(NAMES)
    for name in SAME:
        assert getattr(ghostpool.testing, name) is getattr(ghostpool, name)


@cache
def module_of(path: str) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


def home(name: str) -> str:
    """The file, below the package, in which a public name is defined."""
    package, _, short = name.rpartition(".")
    if short == "__version__":
        return "__init__.py"
    if package == "ghostpool":
        return ghostpool._HOME_OF[short] + ".py"
    module = ghostpool.testing._HOME_OF[short]
    return module.removeprefix("ghostpool.").replace(".", "/") + ".py"


def described(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Each name that is defined in `body`, and whether it has a docstring."""
    for statement, after in zip(body, [*body[1:], None], strict=True):
        match statement:
            case ast.ClassDef(name) | ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                yield name, statement, bool(ast.get_docstring(statement))
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                match after:
                    case ast.Expr(ast.Constant(str())):
                        yield name, statement, True
                    case _:
                        yield name, statement, False
            case _:
                pass


def silent(name: str) -> Iterator[str]:
    """What of a public name has no docstring: itself, its methods, its fields that are numbers."""
    short = name.rpartition(".")[2]
    found = [one for one in described(module_of(home(name)).body) if one[0] == short]
    assert len(found) == 1, f"{name} is defined {len(found)} times"
    _, statement, has_docstring = found[0]
    if not has_docstring:
        yield name
    if isinstance(statement, ast.ClassDef):
        for member, inner, has_docstring in described(statement.body):
            if member.startswith("_") or has_docstring:
                continue
            match inner:
                case ast.AnnAssign(annotation=annotation):
                    speaks = not NUMBERS.search(ast.unparse(annotation))
                case ast.Assign():  # the members of an enumeration, and what a base describes
                    speaks = True
                case _:
                    speaks = False
            if not speaks:
                yield f"{name}.{member}"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_says_what_it_is(name: str) -> None:
    assert list(silent(name)) == []

"""Imports point down: docs/design.md draws the layers, this holds the code to them."""

from __future__ import annotations

import ast
from pathlib import Path

import ghostpool

SOURCES = Path(ghostpool.__file__).parent

# From the top; a module imports only from lines below its own (or earlier ones of its line: none).
LAYERS = [
    "__main__ __init__",
    "_cli",
    "_demo _fetch _options _serve",
    "_deliver _makeplan _show",
    "_openimages _openleases _opensandbox _run",
    "_leftovers",
    "_recover _report _restore _signals",
    "_undoing",
    "_survey",
    "_ledger _mountkernel",
    "_guard _mend",
    "_pool testing",
    "_barrier _lease _memory _plan",
    "_admission _holders _lease_table _room _slots",
    "_listener _needs _planned",
    "_match _sandbox _workerclient",
    "_namespaces _process _reader _reading _rundir _targets",
    "_imagerows _images _startreader _userns",
    "_remaps",
    "_filetable _ghostfile",
    "_imagemounts",
    "_channel _imagefile _launch _stall",
    "_imagesource _schema",
    "_limits _model _mounttable _paths _rlimit",
    "_forkserver",
    "_build _command _guardian",
    "_worker",
    "_buildfiles _creating _descriptors _mountwork _opening _removing",
    "_directories _journal",
    "_failed",
    "_confine _protocol",
    "_buildspec _capabilities _identity _mountinfo _seal",
    "_errors _linux",
]
CHILD_SIDE = """
    _forkserver _guardian _build _command _descriptors _worker
    _buildfiles _creating _mountwork _opening _removing
    _directories _failed _journal _protocol _confine _buildspec _identity _mountinfo
    _capabilities _seal
"""


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "ghostpool":
                found |= {alias.name for alias in node.names if alias.name.startswith("_")}
            elif node.module.startswith("ghostpool."):
                found.add(node.module.removeprefix("ghostpool."))
    return found - {"__version__"}


def test_every_module_has_its_layer() -> None:
    listed = [name for line in LAYERS for name in line.split()]
    assert sorted(listed) == sorted(path.stem for path in SOURCES.glob("*.py"))


def test_imports_point_down() -> None:
    level = {name: n for n, line in enumerate(LAYERS) for name in line.split()}
    upward = [
        f"{path.stem} imports {other}"
        for path in sorted(SOURCES.glob("*.py"))
        for other in sorted(imports_of(path))
        if level[other] <= level[path.stem]
    ]
    assert upward == []


def test_the_children_import_only_their_side() -> None:
    allowed = {*CHILD_SIDE.split(), "_linux"}
    for name in CHILD_SIDE.split():
        assert imports_of(SOURCES / f"{name}.py") <= allowed, name

"""Imports point down: docs/design.md draws the layers, this holds the code to them."""

from __future__ import annotations

import ast
from pathlib import Path

import ghostpool

SOURCES = Path(ghostpool.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts): path
    for path in sorted(SOURCES.rglob("*.py"))
}
"""By name below the package."""

# From the top; a module imports only from lines below its own (or earlier ones of its line: none).
LAYERS = [
    "__main__ __init__",
    "testing.pytest_plugin",
    "testing.__init__",
    "testing._faults testing._missing testing._targets",
    "testing._fake testing._namespace",
    "testing._faultserver testing._forked testing._snapshot",
    "testing._act",
    "testing._area",
    "_cli",
    "_cleancommand _demo _fetch _imagecommands",
    "_options _outcome _showimages",
    "_blocking",
    "_deliver _makeplan _openrestore _show",
    "_openpool",
    "_request",
    "_clean _extract _openimages _openleases _opensandbox _run",
    "_leftovers",
    "_recover _report _restore _signals",
    "_undoing",
    "_consuming _createghosts _openfiles _survey",
    "_fifos _sockets",
    "_batches _covered _ledger _mountkernel _restored",
    "_guard _mend",
    "_lending",
    "_pool _serve",
    "_barrier _lease _memory _plan",
    "_keys _linkremaps",
    "_admission _contents _holders _inspection _lease_table _room _slots",
    "_ownership",
    "_claims _listener _needs _planned _pod",
    "_match _owners _sandbox _unpacking _workerclient",
    "_namespaces _process _reader _reading _rundir _targets _unpacker",
    "_images _rebuild _startreader _userns",
    "_imagerows _remaps _skipping",
    "_archive _contentsreader _devshm _filetable _ghostfile",
    "_imagemounts",
    "_channel _consumer _imagefile _launch _stall _tar",
    "_eventfile _imagesource _listenfds _machine _progress _said _schema _tracing _unpack",
    "_apart _followers _unbroken _limits _model _mounttable _pipelimit _rlimit",
    "_columns _paths",
    "_events",
    "_forkserver",
    "_build _command _guardian _usermaps",
    "_worker",
    "_uncovering",
    """_binding _buildfiles _creating _descriptors _filling _finding _mountwork _opening _removing
    _sweeping""",
    "_directories _journal",
    "_failed",
    "_confine _protocol",
    "_buildspec _capabilities _identity _mountinfo _seal",
    "_errors _linux",
]
CHILD_SIDE = """
    _forkserver _guardian _usermaps _build _command _descriptors _worker
    _binding _buildfiles _creating _filling _finding _mountwork _opening _removing
    _sweeping _uncovering
    _directories _failed _journal _protocol _confine _buildspec _identity _mountinfo
    _capabilities _seal
"""
OBSERVED = "testing._faultserver testing._act testing._area"
"""What a fork server under test has besides."""


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "ghostpool":
                found |= {alias.name for alias in node.names if alias.name.startswith("_")}
            elif node.module == "ghostpool.testing":
                names = {f"testing.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES else "testing.__init__" for name in names}
            elif node.module.startswith("ghostpool."):
                found.add(node.module.removeprefix("ghostpool."))
    return found - {"__version__"}


def test_every_module_has_its_layer() -> None:
    listed = [name for line in LAYERS for name in line.split()]
    assert sorted(listed) == sorted(MODULES)


def test_imports_point_down() -> None:
    level = {name: n for n, line in enumerate(LAYERS) for name in line.split()}
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in sorted(imports_of(path))
        if level[other] <= level[name]
    ]
    assert upward == []


def test_the_children_import_only_their_side() -> None:
    allowed = {*CHILD_SIDE.split(), "_linux"}
    for name in CHILD_SIDE.split():
        assert imports_of(MODULES[name]) <= allowed, name
    for name in OBSERVED.split():
        assert imports_of(MODULES[name]) <= {*allowed, *OBSERVED.split()}, name


def test_nothing_that_runs_for_real_imports_what_is_for_tests() -> None:
    """Faults in particular: only who imports ghostpool.testing can have them."""
    for name, path in MODULES.items():
        if not name.startswith("testing."):
            tests = {other for other in imports_of(path) if other.startswith("testing")}
            assert not tests, name
            assert "ghostpool.testing" not in path.read_text(encoding="utf-8"), name

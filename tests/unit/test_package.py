"""The package as such: what importing it costs, and what it exports."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from typing import NewType

import pytest

import ghostpool
from ghostpool import _errors

HEAVY = ["trio", "anyio", "google.protobuf", "psutil", "click", "rich", "asyncio", "typing"]
SOURCE = Path(ghostpool.__file__)
ABOVE = str(SOURCE.parent.parent)


def run_isolated(code: str) -> str:
    """Run `code` without site-packages, as a worker may be: only the package can be found."""
    prologue = f"import sys; sys.path.insert(0, {ABOVE!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prologue + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    """`import ghostpool` alone loads no dependency, nor its own modules."""
    loaded = run_isolated("import ghostpool; print(*sys.modules)").split()
    assert [name for name in HEAVY if name in loaded] == []
    assert [name for name in loaded if name.startswith("ghostpool.")] == []


@pytest.mark.parametrize(
    "module",
    [
        *("_errors", "_linux", "_model", "_protocol", "_worker", "_forkserver", "_startreader"),
        "testing._faultserver",
    ],
)
def test_the_worker_side_needs_only_the_standard_library(module: str) -> None:
    """What a worker imports loads where there are no site-packages, and without an event loop."""
    loaded = run_isolated(f"import ghostpool.{module}; print(*sys.modules)").split()
    assert f"ghostpool.{module}" in loaded
    assert [name for name in HEAVY[:-1] if name in loaded] == []


def test_the_pytest_plugin_imports_nothing_but_pytest() -> None:
    """Every run of pytest loads it, of whatever project: before its coverage is measured, too."""
    code = "import pytest, sys; b = set(sys.modules); import ghostpool.testing.pytest_plugin\n"
    code += "print(*sorted(set(sys.modules) - b))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    names = ["ghostpool", "ghostpool.testing", "ghostpool.testing.pytest_plugin"]
    assert done.stdout.split() == names


def test_what_is_for_tests_needs_no_pytest() -> None:
    """pytest is no dependency; and every name of `ghostpool.testing` is there."""
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import ghostpool.testing as t; print(*(getattr(t, name).__name__ for name in dir(t)\n"
        "    if name in t.__all__ and isinstance(getattr(t, name), type)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert {"FakeKernel", "Faults", "Namespace", "Targets"} <= set(done.stdout.split())


def test_the_coordinator_does_not_load_the_parser() -> None:
    """Images are parsed elsewhere: neither protobuf nor the readers are in this process."""
    code = "import ghostpool._cli, ghostpool._run, ghostpool._deliver, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = done.stdout.split()
    assert "ghostpool._reading" in loaded
    for absent in ("google.protobuf", "ghostpool._schema", "ghostpool._images"):
        assert absent not in loaded


def test_only_the_command_goes_without_garbage_collection() -> None:
    """It ends when its run does; in a program that embeds a restore that is not ours to say."""
    code = (
        "import gc, ghostpool._cli as cli, ghostpool._openrestore, ghostpool.__main__\n"
        "print(gc.isenabled())\n"
        "cli.exit_status_of_cli = lambda: print(gc.isenabled()) or 0\n"
        "ghostpool.__main__.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["True", "False"]


def test_a_child_can_load_nothing_any_more() -> None:
    """After the seal an import fails, wherever sys.path points: it would be the container's."""
    said = run_isolated(
        "from ghostpool import _forkserver\n"
        "_forkserver.seal_imports()\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "try:\n"
        "    import json\n"
        "except ImportError:\n"
        "    print('sealed')"
    )
    assert said == "sealed"


def test_the_fork_server_seals_before_it_serves() -> None:
    said = run_isolated(
        "from ghostpool import _forkserver\n"
        "def serve(self):\n"
        "    try:\n"
        "        import json\n"
        "    except ImportError:\n"
        "        print('sealed')\n"
        "_forkserver.ForkServer.serve = serve\n"
        "_forkserver.ForkServer.__init__ = lambda self, channel: None\n"
        "_forkserver.BlockingChannel = lambda fd: None\n"
        "_forkserver.main(3)"
    )
    assert said == "sealed"


def test_every_error_is_exported() -> None:
    """All errors that a user can catch are found at the top, and are the very classes."""
    assert set(_errors.__all__) <= set(ghostpool.__all__)
    for name in _errors.__all__:
        assert getattr(ghostpool, name) is getattr(_errors, name)


def seen_by_type_checkers() -> dict[str, str]:
    """The names that are imported where only type checkers look, and their modules."""
    (block,) = (node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        for alias in node.names:
            assert alias.asname is None
            found[alias.name] = node.module.removeprefix("ghostpool.")
    return found


def test_every_exported_name_exists() -> None:
    """`__all__`, `dir()`, the lazy table and what type checkers see agree."""
    table = ghostpool._HOME_OF
    assert table == seen_by_type_checkers()
    assert sorted(ghostpool.__all__) == sorted([*table, "__version__"])
    assert set(ghostpool.__all__) <= set(dir(ghostpool))
    for name in ghostpool.__all__:
        assert getattr(ghostpool, name) is not None


def test_every_public_name_is_documented() -> None:
    """With words of its own; but numbers with a name (NewType) have no place for them."""
    for name in set(ghostpool.__all__) - {"__version__"}:
        value = getattr(ghostpool, name)
        if isinstance(value, NewType):
            continue
        words = inspect.getdoc(value)
        assert words, name
        assert not words.startswith(f"{name}("), f"{name}: that is its fields, made by Python"
        for member, one in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isroutine(one):
                assert inspect.getdoc(one), f"{name}.{member}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does for any module."""
    with pytest.raises(AttributeError, match="'ghostpool' has no attribute 'Ghostpol'"):
        getattr(ghostpool, "Ghostpol")  # noqa: B009  a type checker would refuse the plain form


def test_the_version_is_that_of_the_distribution() -> None:
    """What `ghostpool.__version__` says is what was installed."""
    try:
        installed = importlib.metadata.version("ghostpool")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree, not installed")
    assert ghostpool.__version__ == installed

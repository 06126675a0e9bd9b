"""The step matrix: that its list of steps is whole, and (long) a part of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import matrix
from tests.faults import steps
from tests.faults.errnos import ERRNOS
from tests.faults.running import Outcome, differences
from tests.faults.scenes import definitions, standing
from tests.matrix import Matrix
from tests.unit.test_layers import CHILD_SIDE

SAMPLE = 5
"""One cell out of so many; all of them take a quarter of an hour: `python -m tests.matrix`."""


def scanned(source: str) -> list[str]:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    return steps.scan_function("module", function)[1]


def test_every_system_call_has_its_step_before_it() -> None:
    found = steps.scan()
    assert found.missing == ()
    assert len(found.steps) >= 70


def test_a_call_without_its_step_is_found() -> None:
    assert scanned("def f(self):\n    self._step = 'linkat'\n    os.link(a, b)") == []
    assert scanned("def f(self):\n    os.link(a, b)") == ["module:2: os.link after the step ''"]
    other = "def f(self):\n    self._step = 'linkat'\n    os.link(a, b)\n    os.unlink(a)"
    assert scanned(other) == ["module:4: os.unlink after the step 'linkat'"]
    unknown = "def f(self):\n    self._step = 'bpf'\n    _linux.bpf(1)"
    assert scanned(unknown) == ["module:3: _linux.bpf is not in the table of calls"]


def test_every_module_of_the_children_is_scanned_or_says_why_not() -> None:
    listed = {*steps.SCANNED, *steps.NOT_SCANNED}
    assert not set(steps.SCANNED) & set(steps.NOT_SCANNED)
    assert set(CHILD_SIDE.split()) <= listed


def test_every_step_has_its_errnos() -> None:
    assert {step.name for step in steps.scan().steps} <= set(ERRNOS)


@pytest.mark.needs_mount_ns
def test_what_is_left_is_seen(tmp_path: Path) -> None:
    """A file, a file that is only held open, a writable mount: a matrix that can not see is green
    for ever."""
    definition = definitions()[1]
    with standing(definition, tmp_path / "images") as scene:
        assert differences(scene, scene.look(), Outcome()) == []
        (before,) = scene.before
        table, files = scene.look()[0]
        writable = table.replace(b" /data ro,", b" /data rw,")
        assert writable != table
        assert "mounts" in differences(scene, [(writable, files)], Outcome())[0]
        for wrong in (
            {**files, "/data/.ghostpool-1": files["/data/taken"]},
            {**files, "/data (counts)": (1, 2)},
            {path: file for path, file in files.items() if path != "/data/taken"},
        ):
            assert "files" in differences(scene, [(before[0], wrong)], Outcome())[0]


def red(done: Matrix) -> list[tuple[str, list[str]]]:
    return [(result.cell, result.red) for result in done.red]


@pytest.mark.needs_mount_ns
@pytest.mark.long
def test_sample_of_the_matrix() -> None:
    done = Matrix(every=SAMPLE)
    done.run()
    assert red(done) == []
    assert not {step for step in matrix.UNREACHED if step in done.reached}
    assert done.summary()["runs"] >= 1000

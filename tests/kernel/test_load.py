"""Many namespaces and many ghosts in one run: it works, or is refused in the plan, in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.load import CASES, run, scratch

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]

LIMIT_S = 120
"""Far above what it takes (see `python -m tests.load`), and far below what is quadratic."""
ANYHOW = {"50,000 ghosts, kept", "50,000 ghosts, kept, 1024 descriptors"}
"""What must work on every machine."""


@pytest.mark.parametrize("name", CASES)
def test_load(name: str) -> None:
    case = CASES[name]
    with scratch() as directory:
        outcome = run(case, Path(directory))
    assert outcome.elapsed_s < LIMIT_S
    assert outcome.untouched
    if outcome.status == 0:
        assert outcome.report["restored"]
        assert outcome.report["ghosts"] == case.shape.ghosts
        assert outcome.err == ""
        return
    assert name not in ANYHOW, outcome
    # Three for each namespace, or one for each file.
    assert case.descriptors < 3 * case.shape.namespaces + case.shape.ghosts, outcome
    assert outcome.status == 2, outcome
    assert "descriptors at once" in outcome.err
    assert len(outcome.err.splitlines()) == 1

"""Random restores under random kills leave nothing; see tests/soak.py."""

from __future__ import annotations

import pytest

from tests.soak import run_all

pytestmark = pytest.mark.needs_mount_ns


def test_a_few_restores() -> None:
    """Whoever breaks the soak itself learns it early."""
    soak = run_all(6, 1)
    assert soak.restores == 6
    assert soak.leftovers == []


@pytest.mark.long
def test_hundred_restores() -> None:
    soak = run_all(100, 2)
    assert soak.restores == 100
    assert soak.leftovers == []
    assert soak.ends["restored"] >= 10
    assert sum(soak.faults.values()) >= 40

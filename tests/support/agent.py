"""A program that uses ghostpool, to be tested by tests of its own: copied beside these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ghostpool import GhostpoolError, run_restore


def bring_back(images: Path, namespaces: Mapping[int, int], stall_s: float = 15.0) -> bool:
    """Restore into the namespaces, by number and pid; whether it could be done."""
    try:
        with run_restore(images, namespaces=namespaces, jobs=1, stall_s=stall_s):
            done = True
    except* GhostpoolError:
        done = False
    return done

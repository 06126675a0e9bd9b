"""A program that uses ghostpool, to be tested by tests of its own: copied beside these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anyio

from ghostpool import GhostpoolError, _deliver, _run
from ghostpool._launch import launch
from ghostpool._model import NsId
from ghostpool._report import Report


def bring_back(images: Path, namespaces: Mapping[int, int], stall_s: float = 15.0) -> bool:
    """Restore into the namespaces, by number and pid; whether it could be done."""
    where = {NsId(number): str(pid) for number, pid in namespaces.items()}
    request = _run.Request(str(images), 1, namespaces=where, stall_s=stall_s)

    async def story() -> None:
        await _run.run_restore(request, launch(), Report(), _deliver.discard)

    done = True
    try:
        anyio.run(story)
    except* GhostpoolError:
        done = False
    return done

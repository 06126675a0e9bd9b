"""What dead runs still owe is undone before anything else is changed."""

from __future__ import annotations

import os

from ghostpool import _journal
from ghostpool._process import ForkServer
from ghostpool._rundir import open_run_directory


async def undo_leftovers(server: ForkServer, run_dir: str | None) -> None:
    """Undo it, and say so in the log; what can not be undone is left with its journal, and said.

    Nothing is imported for it where there is no journal. PlanError: no usable run directory.
    """
    directory = open_run_directory(run_dir)
    try:
        if _journal.pending(directory):
            from ghostpool._recover import recover_pending

            await recover_pending(server, directory)
    finally:
        os.close(directory)


__all__ = ["undo_leftovers"]

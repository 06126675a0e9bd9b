"""Requests of a worker, made by hand, for the unlikely moments between two system calls."""

from __future__ import annotations

import os
from pathlib import Path

from ghostpool._protocol import OpenOp


def opening_of(path: Path, flags: int = os.O_RDONLY) -> OpenOp:
    """Open `path`, as the file that it is now, in the directory of mount 0 that holds it."""
    status = path.stat()
    return OpenOp(
        link=0,
        temp_directory=b"",
        temp_name=b"",
        link_directory=b"",
        live=0,
        live_directory=b"",
        names=(path.name.encode(),),
        flags=flags,
        position=-1,
        device=status.st_dev,
        inode=status.st_ino,
        mode=status.st_mode,
        size=-1,
        keep=False,
    )

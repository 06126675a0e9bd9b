"""The run directory: where journals and sockets of runs lie, and nobody else can reach.

GHOSTPOOL_RUN_DIR names it; else it is /run/ghostpool for root, and for whom that is not writable
(ordinary users, root of a user namespace) one of their own below XDG_RUNTIME_DIR or /tmp.
"""

from __future__ import annotations

import os
import stat

from ghostpool._errors import PlanError
from ghostpool._userns import outside_uid

VARIABLE = "GHOSTPOOL_RUN_DIR"
_ROOTS = "/run/ghostpool"
_REMEDY = f"name a directory of your own with {VARIABLE}"


def run_directory() -> str:
    """Path of the run directory, which is there and ours alone. PlanError: it is not."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return _made(os.path.abspath(chosen))
    above = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"  # noqa: S108  it is checked
    own = os.path.join(above, f"ghostpool-{outside_uid()}")
    if os.geteuid() == 0 and (os.path.isdir(_ROOTS) or os.access(os.path.dirname(_ROOTS), os.W_OK)):
        return _made(_ROOTS)
    return _made(own)


def _made(path: str) -> str:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise PlanError(f"the run directory {path}: {error.strerror}: {_REMEDY}") from error
    _check(path, status)
    return path


def _check(path: str, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise PlanError(f"the run directory {path} is not a directory: {_REMEDY}")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PlanError(f"the run directory {path} is open to others: {_REMEDY}")


def open_run_directory(path: str | None = None) -> int:
    """Descriptor of the run directory, or of another one in its place. PlanError."""
    path = run_directory() if path is None else _made(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PlanError(f"the run directory {path}: {error.strerror}: {_REMEDY}") from error
    try:
        _check(path, os.fstat(fd))  # what was opened, whoever exchanges names in /tmp
    except BaseException:
        os.close(fd)
        raise
    return fd

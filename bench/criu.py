"""CRIU as a rival, where it is on the PATH and works: a real dump, restored by criu itself.

criu restores the process with its ghosts, one after the other, so only the slope over the number
of ghosts may be compared: the memory, namespaces and start of a process that does nothing cost the
same whatever it has open. The read-only mounts are binds of one file system: criu starts a tar for
each tmpfs in the images, whose fork copies the mapping of every ghost, and that is no price of
ghosts. The restored process ends at once, so that a run leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.rivals import run
from bench.scene import BenchError

_SOURCE = Path(__file__).with_name("holder.c")
_LIMIT_S = 60.0
# What it learns about the kernel goes into /run, and would be left there.
_CRIU = ("unshare", "-m", "sh", "-ec", 'mount -t tmpfs run /run; exec criu "$@"', "criu")


class Absent(Exception):
    """There is no criu here, or it does not work."""


@contextmanager
def dumped(home: Path, ghosts: int, mounts: int) -> Iterator[Callable[[], None]]:
    """Dump a process that holds so many ghosts, to be restored as often as wanted. Absent."""
    if shutil.which("criu") is None:
        raise Absent("there is no criu on the PATH")
    home.mkdir()
    root, images = home / "root", home / "images"
    root.mkdir()
    images.mkdir()
    try:
        run(["cc", "-O2", "-static", "-o", str(root / "holder"), str(_SOURCE)])
        _dump(root, images, ghosts, mounts)
        (root / "go").touch()
        restore = partial(_restore, root, images, mounts)
        restore()
    except BenchError as error:
        raise Absent(f"{_version()} does not work here, {error}") from error
    yield restore


def _version() -> str:
    done = subprocess.run(["criu", "--version"], capture_output=True, text=True, check=False)
    return "criu " + " ".join(done.stdout.split()[1:2])


def _criu(action: str, *arguments: str) -> None:
    try:
        run([*_CRIU, action, "-v0", *arguments])
    except BenchError as error:
        raise BenchError(f"criu {action} failed") from error


def _dump(root: Path, images: Path, ghosts: int, mounts: int) -> None:
    command = [str(root / "holder"), str(root), str(ghosts), str(mounts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline() or 0)
        try:
            deadline = time.monotonic() + _LIMIT_S
            while not (root / "ready").exists():
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise BenchError("the process that is to be dumped did not come up")
                time.sleep(0.01)
            # It ends with the dump, and with it whoever waits for it.
            _criu("dump", "-D", str(images), "-t", str(pid))
        finally:
            if pid and holder.poll() is None:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def _restore(root: Path, images: Path, mounts: int) -> None:
    _criu("restore", "-D", str(images), "--root", str(root))
    for number in range(mounts):
        if found := os.listdir(root / f"m{number}"):
            raise BenchError(f"criu left {found[:3]}")

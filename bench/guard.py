"""What safety costs, and how soon it acts: journal, guardian and verification.

The same restore with the journal on a disk, with the journal on tmpfs (where run directories
usually are), with neither journal nor guardian being told anything, and besides without any check
of what is opened, removed and left: what no user can have.
Then the time from the SIGKILL of a coordinator, whose ghosts are all there and whose mounts are
writable at that moment, until its guardian has put the last mount back and removed the last name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, ratio, spread
from bench.scene import BenchError, live_namespace, read_mountinfo, workplace

_MOUNTS = 10
_UNSAFE = "neither, and nothing verified"
_NEITHER = "neither told anything"
_DISK = "journal on disk"
_TMPFS = "journal on tmpfs"
_MOUNT_BACK = "after a kill: last mount back"
_NAME_GONE = "after a kill: last name gone"
_LIMIT_S = 10.0

# What is patched must be there: a name that has changed would leave safety in, unseen.
_SWAP = """
def swap(owner, name, function):
    assert hasattr(owner, name), "%s has no %s any more" % (owner.__name__, name)
    setattr(owner, name, function)
"""

_UNGUARDED = (
    _SWAP
    + """
import sys
from ghostpool import _guard
async def nothing(*_, **__):
    pass
swap(_guard.Guard, "owe", nothing)
swap(_guard.Guard, "settle", nothing)
"""
)
_MAIN = """
from ghostpool._cli import main
main()
"""

# In the fork server, and so in every worker: names are opened and removed as they come. No braces:
# this goes where a path is filled in.
_WORKERS_UNCHECKED = (
    _SWAP
    + """
import os
from ghostpool import _opening, _removing
from ghostpool._protocol import REMOVED, Removed, RemoveOp
def open_unchecked(self, operation, directory, name):
    fd = os.open(name, operation.flags, dir_fd=directory)
    os.lseek(fd, operation.position, os.SEEK_SET)
    return fd
swap(_opening.OpenWork, "_open_checked", open_unchecked)
swap(_opening.OpenWork, "_has_identity", lambda *_: True)
def remove_unchecked(self, operation):
    directory = self._directories.open(operation.mount, operation.directory)
    try:
        os.unlink(operation.name, dir_fd=directory)
    except FileNotFoundError:
        pass
    return Removed(0, "", (), REMOVED)
swap(_removing.RemoveWork, "_remove", remove_unchecked)
"""
)
_UNCHECKED = f"""
from ghostpool import _launch, _restored
swap(_restored.Restored, "verify", lambda self: None)
boot, _, serve = _launch._BOOT.rpartition(";")
assert "from ghostpool" in boot, boot
swap(_launch, "_BOOT", boot + "; exec(" + repr({_WORKERS_UNCHECKED!r}) + ");" + serve)
"""

# Stops itself as soon as its mounts are writable, to be killed at that moment.
_VICTIM = """
import os, signal
from ghostpool._workerclient import WorkerClient
call = WorkerClient.call
async def stopping(self, request, *arguments, **keywords):
    answer = await call(self, request, *arguments, **keywords)
    if request == "make_writable":
        os.kill(os.getpid(), signal.SIGSTOP)
    return answer
WorkerClient.call = stopping
from ghostpool._cli import main
main()
"""


def measure(setting: Setting) -> Answer:
    """Whole commands over many ghosts, and milliseconds after a kill."""
    count = 2_000 if setting.quick else 10_000
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "guard"))
        shape = Shape(count, mounts=_MOUNTS, base=bytes(home / "live"))
        images = home / "images"
        write_images(images, shape)
        pid = stack.enter_context(live_namespace(shape))
        disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="ghostpool-bench-run-"))
        places = {_DISK: disk, _TMPFS: str(home / "run")}
        command = rivals.ghostpool(images, jobs=1, pid=pid)
        arguments = command[command.index("restore") :]
        runs: dict[str, Run] = {}
        for name, program in (
            (_UNSAFE, _UNGUARDED + _UNCHECKED + _MAIN),
            (_NEITHER, _UNGUARDED + _MAIN),
        ):
            patched = [sys.executable, "-c", program, *arguments]
            runs[name] = partial(_run, patched, places[_TMPFS])
        for name, place in places.items():
            runs[name] = partial(_run, command, place)
        samples = alternate("guard", runs, setting.rounds)
        victim = [sys.executable, "-c", _VICTIM, *arguments]
        kills = [_kill(victim, pid, places[_TMPFS]) for _ in range(setting.rounds)]
        samples[_MOUNT_BACK], samples[_NAME_GONE] = map(list, zip(*kills, strict=True))
    return _answer(samples, count)


def _run(command: list[str], run_dir: str) -> None:
    rivals.run(["env", f"GHOSTPOOL_RUN_DIR={run_dir}", *command])


def _writable(pid: int) -> int:
    return sum(b" rw," in line.partition(b" - ")[0] for line in read_mountinfo(pid).splitlines())


def _kill(command: list[str], pid: int, run_dir: str) -> tuple[float, float]:
    """Seconds from the kill until no mount is writable by the run's doing, and no name owed."""
    before = _writable(pid)
    environment = {**os.environ, "GHOSTPOOL_RUN_DIR": run_dir}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            # Not that it has ended: it stops itself at the moment that is wanted.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if _writable(pid) <= before:
                raise BenchError("the victim did not come to the moment of its death")
        finally:
            begun = time.perf_counter()
            process.send_signal(signal.SIGKILL)
    mounts = _seconds_until(lambda: _writable(pid) <= before, begun)
    # Its journal goes last.
    return mounts, _seconds_until(lambda: not os.listdir(run_dir), begun)


def _seconds_until(condition: Callable[[], bool], begun: float) -> float:
    while not condition():
        if time.perf_counter() - begun > _LIMIT_S:
            raise BenchError(f"not everything is undone {_LIMIT_S:g} s after the kill")
    return time.perf_counter() - begun


def _answer(samples: dict[str, list[float]], count: int) -> Answer:
    reference = median(samples[_UNSAFE])
    rows = [
        (
            ratio(median(samples[name]), reference),
            name,
            spread(samples[name], 1e3),
            f"{(median(samples[name]) - reference) / count * 1e6:,.1f}",
        )
        for name in (_UNSAFE, _NEITHER, _DISK, _TMPFS)
    ]
    rows += [("–", name, spread(samples[name], 1e3), "–") for name in (_MOUNT_BACK, _NAME_GONE)]
    return Answer(
        "guard",
        f"what safety costs, {count:,} ghosts of 4 KiB on {_MOUNTS} read-only mounts, 1 job",
        ("over the unsafe", "whole command", "ms (min–max)", "further µs per ghost"),
        rows,
        samples,
        figures={
            "share of safety": _share(samples[_TMPFS], samples[_UNSAFE]),
            "share of safety, journal on disk": _share(samples[_DISK], samples[_UNSAFE]),
        },
    )


def _share(safe: list[float], unsafe: list[float]) -> float:
    """The part of a run that safety takes, of the median round."""
    return median(1 - less / more for less, more in zip(unsafe, safe, strict=True))

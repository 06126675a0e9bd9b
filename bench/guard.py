"""What safety costs, and how soon it acts: journal and guardian.

The same restore with the journal on a disk, with the journal on tmpfs (where run directories
usually are), and with neither journal nor guardian being told anything, which no user can have.
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
from bench.scene import BenchError, live_namespace, read_mountinfo

_MOUNTS = 10
_NEITHER = "neither told anything"
_DISK = "journal on disk"
_TMPFS = "journal on tmpfs"
_MOUNT_BACK = "after a kill: last mount back"
_NAME_GONE = "after a kill: last name gone"
_LIMIT_S = 10.0

_UNGUARDED = """
import sys
from ghostpool import _guard
async def nothing(*_, **__):
    pass
_guard.Guard.owe = _guard.Guard.settle = nothing
from ghostpool._cli import main
main()
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
    home = setting.scratch / "guard"
    home.mkdir()
    shape = Shape(count, mounts=_MOUNTS, base=bytes(home / "live"))
    images = home / "images"
    write_images(images, shape)
    with ExitStack() as stack:
        pid = stack.enter_context(live_namespace(shape))
        disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="ghostpool-bench-run-"))
        places = {_DISK: disk, _TMPFS: str(home / "run")}
        command = rivals.ghostpool(images, jobs=1, pid=pid)
        arguments = command[command.index("restore") :]
        unguarded = [sys.executable, "-c", _UNGUARDED, *arguments]
        runs: dict[str, Run] = {_NEITHER: partial(_run, unguarded, places[_TMPFS])}
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
    reference = median(samples[_NEITHER])
    rows = [
        (
            ratio(median(samples[name]), reference),
            name,
            spread(samples[name], 1e3),
            f"{(median(samples[name]) - reference) / count * 1e6:,.1f}",
        )
        for name in (_NEITHER, _DISK, _TMPFS)
    ]
    rows += [("–", name, spread(samples[name], 1e3), "–") for name in (_MOUNT_BACK, _NAME_GONE)]
    return Answer(
        "guard",
        f"journal and guardian, {count:,} ghosts of 4 KiB on {_MOUNTS} read-only mounts, 1 job",
        ("over neither", "whole command", "ms (min–max)", "further µs per ghost"),
        rows,
        samples,
    )

"""A program under asyncio that embeds a restore and must stay responsive; started by a test.

It has signal handlers and child processes of its own, and a heartbeat of 1 ms. What is printed is
the longest time, in milliseconds, that the event loop kept a beat waiting, less the time that the
thread waited for a CPU, which is the machine's doing: /proc/thread-self/schedstat, second field.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import ghostpool

BEAT_S = 0.001


class Heart:
    """Notes the longest gap between two beats, and when it was."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.where = ""
        self.beats = 0
        self.event = "start"

    def send_nowait(self, event: ghostpool.Event) -> None:
        """What has happened last, to know where a gap was."""
        self.event = event.kind

    async def beat(self) -> None:
        waited = waited_s()
        last = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S)
            now, waits = time.monotonic(), waited_s()
            gap_s = now - last - BEAT_S - (waits - waited)
            if gap_s > self.worst_s:
                self.worst_s, self.where = gap_s, self.event
            last, waited = now, waits
            self.beats += 1


def waited_s() -> float:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def reap(number: int, frame: object) -> None:
    """What a program does that has many children: take the status of whichever has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


async def restore(images: str, pid: int, heart: Heart) -> int:
    """A whole restore, whose descriptors are taken."""
    async with ghostpool.restore(images, namespaces={10: pid}, jobs=2, events=heart) as restored:
        heart.event = "taking"
        taken = 0
        for task in restored.tasks.values():
            taken += len(await task.take_fds())
        heart.event = "closing"
    return taken


async def undo(images: str, pid: int, heart: Heart) -> int:
    """Tasks of the program's own, the last of which fails when it has its files."""
    opened: list[int] = []

    async def bring_up(pool: ghostpool.GhostPool, number: int) -> None:
        async with pool.task(number) as task:
            opened.extend(await task.open_files())
            if len(opened) == sum(len(one.opens) for one in pool.tasks.values()):
                heart.event = "undoing"
                raise LookupError

    try:
        async with (
            ghostpool.open_pool(images, namespaces={10: pid}, jobs=2, events=heart) as pool,
            asyncio.TaskGroup() as group,
        ):
            for number in pool.tasks:
                group.create_task(bring_up(pool, number))
    except* LookupError:
        pass
    return len(opened)


async def main(mode: str, images: str, pid: int) -> None:
    heart = Heart()
    got: list[str] = []
    loop = asyncio.get_running_loop()
    statuses: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, got.append, number.name)
    if mode == "reaping":
        signal.signal(signal.SIGCHLD, reap)
    elif mode == "ignoring":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    else:
        children = [await asyncio.create_subprocess_exec("sleep", "0.2") for _ in range(3)]
    beating = asyncio.create_task(heart.beat())
    files = await (undo if mode == "undoing" else restore)(images, pid, heart)
    signal.raise_signal(signal.SIGUSR1)
    if mode in ("restoring", "undoing"):
        statuses = [await child.wait() for child in children]
    await asyncio.sleep(0.05)
    beating.cancel()
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.01)
    result = {
        "worst_ms": round(heart.worst_s * 1000, 1),
        "where": heart.where,
        "beats": heart.beats,
        "files": files,
        "signals": got,
        "children": statuses,
    }
    print(json.dumps(result))


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))

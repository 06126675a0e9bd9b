"""How long a task's mount is writable under the remount strategy, and that it is not too early.

From ghostpool's own events: a mount's window is the time from `mount_writable` to `reverted`, and
no mount should be made writable before the first of its ghosts is ready to be opened. One task
has all files, so each window lasts from its first open on a mount to its last on any.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Setting, spread
from bench.scene import BenchError, live_namespace, workplace

_FIGURE = "made writable before its first ghost is ready"


class Windows(NamedTuple):
    """What the events of one run say."""

    seconds: list[float]
    """How long each mount was writable."""
    early: int
    """Mounts that were made writable when none of their ghosts was there."""


def measure(setting: Setting) -> Answer:
    """Milliseconds for which each mount was writable."""
    shapes = (
        ((10, 200), (100, 1_000)) if setting.quick else ((10, 1_000), (10, 10_000), (100, 10_000))
    )
    samples: dict[str, list[float]] = {}
    early = 0
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "writable"))
        for mounts, ghosts in shapes:
            shape = Shape(ghosts, mounts=mounts, base=bytes(home / f"live-{mounts}-{ghosts}"))
            images = home / f"images-{mounts}-{ghosts}"
            write_images(images, shape)
            with live_namespace(shape) as pid:
                command = rivals.ghostpool(images, jobs=1, pid=pid)
                for _ in range(min(setting.rounds, 5)):
                    rivals.run([*command, "--events", str(home / "events")])
                    windows = windows_of(home / "events", mounts)
                    name = f"{mounts} mounts, {ghosts} ghosts"
                    samples.setdefault(name, []).extend(windows.seconds)
                    early += windows.early
    rows = [(name, spread(values, 1e3)) for name, values in samples.items()]
    first = next(iter(samples.values()))
    return Answer(
        "writable",
        "how long a mount is writable for its task, remount strategy, 1 task, 1 job",
        ("one task", "ms over all mounts of all runs (min–max)"),
        rows,
        samples,
        [f"Mounts that were made writable before their first ghost was there: {early}."],
        {"median ms": median(first) * 1e3, _FIGURE: early},
    )


def windows_of(events: Path, mounts: int) -> Windows:
    """From a file of events. BenchError: not all of so many mounts were made writable, and back."""
    ready: set[str] = set()
    since: dict[str, float] = {}
    seconds: list[float] = []
    early = 0
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "ghost_created":
            ready.add(event["mountpoint"])
        elif event["event"] == "mount_writable":
            early += event["mountpoint"] not in ready
            since[event["mountpoint"]] = event["at"]
        elif event["event"] == "reverted":
            seconds.append(event["at"] - since.pop(event["mountpoint"]))
    if len(seconds) != mounts or since:
        raise BenchError(f"{len(seconds)} of {mounts} mounts were made writable and put back")
    return Windows(seconds, early)

"""How the cost grows with one thing at a time: ghosts, mounts, namespaces, tasks, jobs.

Each sweep restores the same kind of images in larger and larger sizes, into live namespaces, by
whole commands that take turns. The slope between two neighbouring sizes is what one further unit
costs there. It is flat if a unit of the last step costs at most 1.25 times what a unit costs from
the smallest size up to there (mostly the decade before): a cost that grows with the size, as of a
list that is searched for each, would make it some ten times as much. Jobs have no such unit: they
are flat if the most jobs take at most 1.25 times as long as the fastest number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, spread
from bench.scene import live_namespaces, read_mountinfo, workplace

FLAT = 1.25
"""How many times as much a unit of the last step may cost."""
FIGURE = "last step over those below"
_JOBS = 2
_SLOW_ROUNDS = 3
_UNSEEN = 16
"""Room for mounts that count although no mountinfo shows them, as the root below the root."""
_HOLDING = 10
"""Mounts with ghosts, among those that the sweep of mounts adds."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One thing that grows."""

    name: str
    what: str
    sizes: Sequence[int]
    quick: Sequence[int]
    shape: Callable[[int], Shape]
    jobs: Callable[[int], int] = lambda size: _JOBS
    slow: int = 1 << 30
    """Sizes from this one on are run in a few rounds only."""


GHOSTS = Sweep(
    "ghosts",
    "ghosts of 4 KiB on 10 read-only mounts of one namespace",
    (100, 1_000, 10_000, 100_000),
    (100, 1_000, 5_000),
    lambda size: Shape(size, mounts=10),
    slow=100_000,
)
MOUNTS = Sweep(
    "mounts",
    "mounts besides the machine's own, 10 of which hold a ghost",
    (10, 100, 1_000, 10_000, 100_000),
    (10, 100, 1_000, 5_000),
    lambda size: Shape(_HOLDING, mounts=_HOLDING, further_mounts=size - _HOLDING),
    slow=50_000,
)
NAMESPACES = Sweep(
    "namespaces",
    "namespaces, each with 10 ghosts on a read-only mount",
    (1, 10, 100, 1_000),
    (1, 10, 100),
    lambda size: Shape(10 * size, namespaces=size, mounts=1),
    slow=1_000,
)
TASKS = Sweep(
    "tasks",
    "tasks that share 1,000 ghosts on 10 read-only mounts",
    (1, 10, 100, 1_000),
    (1, 10, 100),
    lambda size: Shape(1_000, mounts=10, tasks=size),
)
JOBS = Sweep(
    "jobs",
    "jobs, for 5,000 ghosts on 16 read-only mounts",
    (1, 2, 4, 8, 16),
    (1, 2, 16),
    lambda size: Shape(5_000, mounts=16),
    jobs=lambda size: size,
)
SWEEPS = (GHOSTS, MOUNTS, NAMESPACES, TASKS, JOBS)


def sizes_of(sweep: Sweep, quick: bool) -> list[int]:
    """The sizes to be run; of mounts, no more than the kernel lets a namespace have."""
    sizes = sweep.quick if quick else sweep.sizes
    if sweep is not MOUNTS:
        return [*sizes]
    with open("/proc/sys/fs/mount-max", encoding="ascii") as file:
        room = int(file.read()) - read_mountinfo(os.getpid()).count(b"\n") - _UNSEEN
    return sorted({min(size, room) for size in sizes})


def measure(sweep: Sweep, setting: Setting) -> Answer:
    """Whole commands over the sizes of a sweep, and whether the slope is flat."""
    sizes = sizes_of(sweep, setting.quick)
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, f"sweep-{sweep.name}"))
        runs = _runs(sweep, sizes, home, stack)
        few = {key(size): _SLOW_ROUNDS for size in sizes if size >= sweep.slow}
        samples = alternate(f"sweep of {sweep.name}", runs, setting.rounds, at_most=few)
    return answer(sweep, {size: samples[key(size)] for size in sizes})


def _runs(sweep: Sweep, sizes: Sequence[int], home: Path, stack: ExitStack) -> dict[str, Run]:
    base = bytes(home / "live")
    largest = replace(sweep.shape(max(sizes)), base=base, further_mounts=0)
    everywhere = stack.enter_context(live_namespaces(largest))
    runs: dict[str, Run] = {}
    written: dict[Shape, Path] = {}
    for size in sizes:
        shape = replace(sweep.shape(size), base=base)
        pids = everywhere[: shape.namespaces]
        if shape.further_mounts:
            pids = stack.enter_context(live_namespaces(shape))
        if shape not in written:
            written[shape] = home / f"images-{size}"
            write_images(written[shape], shape)
        command = rivals.ghostpool(written[shape], jobs=sweep.jobs(size), pids=pids)
        runs[key(size)] = partial(rivals.run, command)
    return runs


def key(size: int) -> str:
    """A size in the samples."""
    return str(size)


# What it came to.


def answer(sweep: Sweep, samples: dict[int, list[float]]) -> Answer:
    """Table, slopes and verdict of a sweep, from the seconds by size."""
    middle = {size: median(values) for size, values in samples.items()}
    noise = _quartiles_apart(samples[min(samples)])
    third, last, grown, note = _jobs(middle) if sweep is JOBS else _slopes(middle, noise)
    return Answer(
        f"sweep-{sweep.name}",
        f"more and more {sweep.what}",
        (sweep.name, "whole command, ms (min–max)", third),
        [(f"{size:,}", spread(samples[size], 1e3), cell) for size, cell in last.items()],
        {key(size): values for size, values in samples.items()},
        [note],
        {} if grown is None else {FIGURE: grown},
    )


_Result = tuple[str, dict[int, str], float | None, str]
"""Title and cells of the third column, by size; the figure, and what it means."""


def _quartiles_apart(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _slopes(seconds: dict[int, float], noise: float) -> _Result:
    cells = dict.fromkeys(seconds, "–")
    for few, many in pairwise(seconds):
        cells[many] = f"{_per_unit(seconds, few, many) * 1e6:,.1f}"
    title = "µs per further one"
    first, *_, before, last = seconds
    slope, reference = _per_unit(seconds, before, last), _per_unit(seconds, first, before)
    below = seconds[before] - seconds[first]
    if below <= noise:
        lost = (
            f"{before:,} cost {below * 1e3:,.1f} ms more than {first:,}, while the middle half of "
            f"the samples is {noise * 1e3:,.1f} ms wide: lost in the noise, no verdict."
        )
        return title, cells, None, lost
    grown = max(slope, 0.0) / reference
    note = (
        f"A further one costs {slope * 1e6:,.1f} µs from {before:,} to {last:,}, and "
        f"{reference * 1e6:,.1f} µs from {first:,} to {before:,}: {grown:.2f} times as much, "
        f"{_verdict(grown)}."
    )
    return title, cells, grown, note


def _per_unit(seconds: dict[int, float], few: int, many: int) -> float:
    return (seconds[many] - seconds[few]) / (many - few)


def _jobs(seconds: dict[int, float]) -> _Result:
    best, most = min(seconds, key=seconds.__getitem__), max(seconds)
    cells = {size: f"{one / seconds[best]:.2f}" for size, one in seconds.items()}
    grown = seconds[most] / seconds[best]
    note = f"{most} jobs take {grown:.2f} times as long as {best}: {_verdict(grown)}."
    return "over the fastest", cells, grown, note


def _verdict(grown: float) -> str:
    return "flat" if grown <= FLAT else f"**not flat** (at most {FLAT} is)"

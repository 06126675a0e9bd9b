"""Whether a ghost costs more when more mounts are leased: the slope over ten mounts and over many.

Every mount has ghosts, so that all of them are made writable in every run and what a mount costs
is in the fewer ghosts as in the more; what is left is the cost of a further ghost while so many
mounts are leased: ten thousand, or as many as the limit of descriptors allows.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate
from bench.ratios import known, median_ratio, shown, slopes
from bench.scene import live_namespace, most_mounts, workplace

_FEW_MOUNTS = 10
_ROUNDS = 5
"""At most: each takes half a minute."""
_NAMES = ("C, one process", "ghostpool, 1 job", "ghostpool, 1 job, detached")


def measure(setting: Setting) -> Answer:
    """Microseconds per further ghost."""
    mounts = (_FEW_MOUNTS, 400 if setting.quick else min(10_000, most_mounts(1)))
    few, many = (400, 3_200) if setting.quick else (10_000, 30_000)
    program = rivals.compile_c(setting.scratch)
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "leased"))
        for count in mounts:
            base = bytes(home / f"live-{count}")
            pid = stack.enter_context(live_namespace(Shape(0, mounts=count, base=base)))
            for ghosts in (few, many):
                images = home / f"images-{count}-{ghosts}"
                write_images(images, Shape(ghosts, mounts=count, base=base))
                commands = (
                    rivals.c(program, images, pid=pid),
                    rivals.ghostpool(images, jobs=1, pid=pid),
                    rivals.ghostpool(images, jobs=1, pid=pid, strategy="detached"),
                )
                for name, command in zip(_NAMES, commands, strict=True):
                    runs[_key(name, count, ghosts)] = partial(rivals.run, command)
        samples = alternate("leased", runs, min(setting.rounds, _ROUNDS))
    return _answer(samples, mounts, (few, many))


def _key(name: str, mounts: int, ghosts: int) -> str:
    return f"{name}: {mounts} mounts, {ghosts} ghosts"


def _answer(
    samples: dict[str, list[float]], mounts: tuple[int, int], ghosts: tuple[int, int]
) -> Answer:
    few, many = ghosts
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    for name in _NAMES:
        low, high = (
            slopes(samples[_key(name, count, few)], samples[_key(name, count, many)], many - few)
            for count in mounts
        )
        ratios[name] = median_ratio(high, low)
        each = (f"{median(values) * 1e6:,.1f}" for values in (low, high))
        whole = median(samples[_key(name, mounts[1], few)])
        rows.append((shown(ratios[name]), name, *each, f"{whole:,.2f}"))
    figure = "many mounts over few"
    figures = {
        figure: ratios["ghostpool, 1 job"],
        f"{figure}, detached": ratios["ghostpool, 1 job, detached"],
    }
    return Answer(
        "leased",
        f"microseconds per further ghost, {few:,} → {many:,}, with {mounts[0]} and with "
        f"{mounts[1]:,} read-only mounts leased",
        (
            f"{mounts[1]:,} over {mounts[0]}",
            "rival",
            f"µs, {mounts[0]} mounts",
            f"µs, {mounts[1]:,} mounts",
            f"whole command, {mounts[1]:,} mounts, {few:,} ghosts, s",
        ),
        rows,
        samples,
        figures=known(figures),
    )

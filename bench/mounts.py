"""What a large namespace costs: ten ghosts among more and more mounts that hold none.

Whatever looks into a namespace reads its mount table once; so that, from Python, is what the
whole command is compared with. Below it the growth alone, from the fewest to the most mounts,
without the command's start. The images list all mounts, as those of a real dump do.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, ratio, spread
from bench.ratios import median_ratio
from bench.scene import live_namespace, read_mountinfo, workplace

_GHOSTS = 10
_SPARE = 16
"""Of the mounts that a namespace may have: for what a run mounts there and does not show."""


def measure(setting: Setting) -> Answer:
    """Milliseconds of whole commands, and of reading mountinfo."""
    counts = (10, 5_000) if setting.quick else (10, 1_000, 10_000, _most())
    runs: dict[str, Run] = {}
    lines: dict[int, int] = {}
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "mounts"))
        base = bytes(home / "live")
        for count in counts:
            shape = Shape(_GHOSTS, mounts=_GHOSTS, further_mounts=count, base=base)
            images = home / f"images-{count}"
            write_images(images, shape)
            pid = stack.enter_context(live_namespace(shape))
            lines[count] = read_mountinfo(pid).count(b"\n")
            command = rivals.ghostpool(images, jobs=1, pid=pid)
            runs[_command(count)] = partial(rivals.run, command)
            runs[_read(count)] = partial(read_mountinfo, pid)
        samples = alternate("mounts", runs, setting.rounds)
    return _answer(samples, lines)


def _most() -> int:
    """Further mounts that a namespace can have, up to 100,000 mounts in all."""
    limit = int(Path("/proc/sys/fs/mount-max").read_text(encoding="ascii"))
    return min(100_000, limit) - read_mountinfo(os.getpid()).count(b"\n") - _GHOSTS - _SPARE


def _command(count: int) -> str:
    return f"ghostpool, 1 job: {count} further mounts"


def _read(count: int) -> str:
    return f"reading mountinfo: {count} further mounts"


def _answer(samples: dict[str, list[float]], lines: dict[int, int]) -> Answer:
    rows: list[tuple[str, ...]] = []
    for count, total in lines.items():
        command, read = samples[_command(count)], samples[_read(count)]
        rows.append(
            (
                ratio(median(command), median(read)),
                f"{total:,} in all, {count:,} of them further",
                spread(command, 1e3) + " ms",
                spread(read, 1e3, 2) + " ms",
            )
        )
    few, many = min(lines), max(lines)
    grown = [
        (median(samples[kind(many)]) - median(samples[kind(few)])) / (many - few) * 1e6
        for kind in (_command, _read)
    ]
    rows.append(
        (
            ratio(*grown),
            f"each further mount, {few:,} → {many:,}",
            *(f"{value:,.2f} µs" for value in grown),
        )
    )
    answer = Answer(
        "mounts",
        f"{_GHOSTS} ghosts on {_GHOSTS} read-only mounts, among further mounts",
        ("over reading", "mounts", "ghostpool, whole command (min–max)", "reading mountinfo"),
        rows,
        samples,
    )
    over = median_ratio(samples[_command(many)], samples[_read(many)])
    answer.figures["command over mountinfo"] = over
    return answer

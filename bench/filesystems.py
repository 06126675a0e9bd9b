"""What a further ghost costs on other file systems: fresh ext4 with a journal, xfs and btrfs.

Each is in a file on a tmpfs, behind a loop device, so that no disk takes part. The device is
detached by the kernel when its last mount goes (mount(8), "loop"), which is at the latest when the
benchmark's mount namespace ends, however it ends. ext4 must have a journal: without one it takes
ten times as long to make a file where thousands were removed in the last minutes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate
from bench.ratios import known, median_ratio, shown, slopes
from bench.scene import BenchError, live_namespace, workplace

_MAKERS: Mapping[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-O", "has_journal"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
_SIZE = 2 << 30
_MOUNTS = 10
_ROUNDS = 5
_C = "C, one process"
_NAMES = (_C, "ghostpool, 1 job", "ghostpool, 2 jobs")


class Absent(Exception):
    """This machine has no such file system."""


@contextmanager
def file_system(kind: str, home: Path) -> Iterator[Path]:
    """The root of a fresh one, in a private mount namespace. Absent: it can not be made here."""
    image, root = home / f"{kind}.image", home / kind
    maker, *options = _MAKERS[kind]
    if shutil.which(maker) is None:
        raise Absent(f"there is no {maker}")
    image.touch()
    os.truncate(image, _SIZE)
    root.mkdir()
    rivals.run([maker, *options, str(image)])
    try:
        rivals.run(["mount", "-t", kind, "-o", "loop", str(image), str(root)])
    except BenchError as error:
        raise Absent(f"it can not be mounted: {error}") from error
    try:
        yield root
    finally:
        rivals.run(["umount", str(root)])


def measure(setting: Setting) -> Answer:
    """Microseconds per further ghost of 4 KiB."""
    counts = (200, 1_200) if setting.quick else (500, 5_000)
    samples: dict[str, list[float]] = {}
    notes: list[str] = []
    with workplace(setting.scratch, "filesystems") as home:
        for kind in _MAKERS:
            try:
                samples |= _on(kind, setting, home, counts)
            except Absent as reason:
                notes.append(f"{kind} is left out: {reason}.")
                print(f"bench: {notes[-1]}", flush=True)
    return _answer(samples, counts, notes)


def _on(kind: str, setting: Setting, home: Path, counts: tuple[int, int]) -> dict[str, list[float]]:
    program = rivals.compile_c(setting.scratch)
    base = bytes(home / f"live-{kind}")
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        backing = stack.enter_context(file_system(kind, home))
        pid = stack.enter_context(live_namespace(Shape(0, mounts=_MOUNTS, base=base), backing))
        for ghosts in counts:
            images = home / f"images-{kind}-{ghosts}"
            write_images(images, Shape(ghosts, mounts=_MOUNTS, base=base))
            commands = [rivals.c(program, images, pid=pid)]
            commands += [rivals.ghostpool(images, jobs=jobs, pid=pid) for jobs in (1, 2)]
            for name, command in zip(_NAMES, commands, strict=True):
                runs[_key(kind, name, ghosts)] = partial(rivals.run, command)
        return alternate(f"filesystems, {kind}", runs, min(setting.rounds, _ROUNDS))


def _key(kind: str, name: str, ghosts: int) -> str:
    return f"{kind}, {name}: {ghosts} ghosts"


def _answer(samples: dict[str, list[float]], counts: tuple[int, int], notes: list[str]) -> Answer:
    few, many = counts
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    for kind in _MAKERS:
        if _key(kind, _C, few) not in samples:
            continue
        by_round = {
            name: slopes(
                samples[_key(kind, name, few)], samples[_key(kind, name, many)], many - few
            )
            for name in _NAMES
        }
        for name, values in by_round.items():
            over = median_ratio(values, by_round[_C])
            micros = [value * 1e6 for value in values]
            each = f"{median(micros):,.1f} ({min(micros):,.1f}–{max(micros):,.1f})"
            rows.append((shown(over), kind, name, each))
            if name != _C:
                figures[f"{name.partition(', ')[2]} over C, {kind}"] = over
    return Answer(
        "filesystems",
        f"microseconds per further ghost of 4 KiB, {few:,} → {many:,}, on {_MOUNTS} read-only "
        "binds of one file system",
        (f"over {_C}", "file system", "rival", "µs per ghost (of single rounds)"),
        rows,
        samples,
        notes,
        known(figures),
    )

"""What one further ghost costs: the difference between many and few, over the same mounts.

A whole command has a start that does not grow with the ghosts and would hide what does. So each
rival restores few ghosts and many into one live namespace, and the slope between the two is
compared: difference of the medians over difference of the counts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, ratio
from bench.scene import live_namespace

_MOUNTS = 10
_REFERENCE = "ghostpool, 1 job"


def measure(setting: Setting) -> Answer:
    """Microseconds per further ghost of 4 KiB."""
    few, many = setting.ghosts or ((500, 5_000) if setting.quick else (500, 10_000))
    # One process for each ghost takes too long for thousands, and needs none of them.
    one_by_one = (10, 10 + min(10 if setting.quick else 40, many - few))
    home = setting.scratch / "slope"
    home.mkdir()
    base = bytes(home / "live")
    with live_namespace(Shape(0, mounts=_MOUNTS, base=base)) as pid:
        runs: dict[str, Run] = {}
        counts: dict[str, tuple[int, int]] = {}
        for ghosts in (few, many):
            shape = Shape(ghosts, mounts=_MOUNTS, base=base)
            images = home / f"images-{ghosts}"
            write_images(images, shape)
            files = rivals.write_files(home / f"files-{ghosts}", shape)
            for jobs in (1, 2):
                name = _REFERENCE if jobs == 1 else f"ghostpool, {jobs} jobs"
                counts[name] = (few, many)
                command = rivals.ghostpool(images, jobs=jobs, pid=pid)
                runs[_key(name, ghosts)] = partial(rivals.run, command)
            counts["shell, bulk"] = (few, many)
            command = rivals.shell_bulk(pid, shape, files)
            runs[_key("shell, bulk", ghosts)] = partial(rivals.run, command)
        counts["shell, one by one"] = one_by_one
        for ghosts in one_by_one:
            runs[_key("shell, one by one", ghosts)] = _one_by_one(pid, home, base, ghosts)
        samples = alternate("slope", runs, setting.rounds)
    return _answer(samples, counts)


def _one_by_one(pid: int, home: Path, base: bytes, ghosts: int) -> Run:
    shape = Shape(ghosts, mounts=_MOUNTS, base=base)
    files = rivals.write_files(home / f"one-by-one-{ghosts}", shape)
    return partial(rivals.run, rivals.shell_one_by_one(pid, shape, files))


def _key(rival: str, ghosts: int) -> str:
    return f"{rival}: {ghosts} ghosts"


def _answer(samples: dict[str, list[float]], counts: dict[str, tuple[int, int]]) -> Answer:
    slopes: dict[str, float] = {}
    by_round: dict[str, list[float]] = {}
    for name, (few, many) in counts.items():
        low, high = samples[_key(name, few)], samples[_key(name, many)]
        slopes[name] = (median(high) - median(low)) / (many - few) * 1e6
        by_round[name] = [(h - lo) / (many - few) * 1e6 for lo, h in zip(low, high, strict=True)]
    rows = [
        (
            ratio(slopes[name], slopes[_REFERENCE]),
            name,
            f"{slopes[name]:,.1f} ({min(by_round[name]):,.1f}–{max(by_round[name]):,.1f})",
            f"{few:,} → {many:,}",
        )
        for name, (few, many) in counts.items()
    ]
    return Answer(
        "slope",
        f"microseconds per further ghost of 4 KiB on {_MOUNTS} read-only tmpfs mounts",
        (f"over {_REFERENCE}", "rival", "µs per ghost (of single rounds)", "ghosts"),
        rows,
        samples,
        ["The shell has its files at hand outside of images, and holds nothing open."],
    )

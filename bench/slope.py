"""What one further ghost costs: the difference between many and few, over the same mounts.

A whole command has a start that does not grow with the ghosts and would hide what does. So each
rival restores few ghosts and many into one live namespace, and the slope between the two is
compared: difference of the medians over difference of the counts, and for the figures the median
of the ratios of single rounds. With CRIU nothing else could be compared: bench/criu.py says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from bench import criu, rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate
from bench.ratios import known, median_ratio, shown, slopes
from bench.scene import live_namespace, workplace

_MOUNTS = 10
_REFERENCE = "C, one process"
_REMOUNTING = "C, one process, remounting"
_C_KEPT = "C, one process, kept and removed by find"
_KEPT = "ghostpool, 1 job, kept and removed by find"
_CRIU = "criu restore"
_BULK = "shell, bulk"
_ONE_BY_ONE = "shell, one by one"


@dataclass(frozen=True, slots=True)
class _Ghostpool:
    """One way of running it."""

    jobs: int
    strategy: str = "remount"
    backend: str | None = None
    """Event loop of a program that uses the library; None: the command."""

    @property
    def name(self) -> str:
        """As in the tables."""
        number = f"{self.jobs} job{'s' if self.jobs > 1 else ''}"
        what = "ghostpool" if self.backend is None else f"library on {self.backend}"
        return f"{what}, {number}" + (", detached" if self.strategy == "detached" else "")

    def command(self, images: Path, pid: int) -> list[str]:
        """What restores the images."""
        if self.backend is None:
            return rivals.ghostpool(images, jobs=self.jobs, pid=pid, strategy=self.strategy)
        return rivals.library(
            images, jobs=self.jobs, pid=pid, backend=self.backend, strategy=self.strategy
        )


def _ways(quick: bool) -> Iterator[_Ghostpool]:
    for strategy in ("remount", "detached"):
        for jobs in (1, 2) if quick else (1, 2, 4, 16):
            yield _Ghostpool(jobs, strategy)
    if not quick:
        yield _Ghostpool(1, backend="trio")
        yield _Ghostpool(1, backend="asyncio")


def measure(setting: Setting) -> Answer:
    """Microseconds per further ghost of 4 KiB."""
    few, many = setting.ghosts or ((500, 5_000) if setting.quick else (500, 10_000))
    # One process for each ghost takes too long for thousands, and needs none of them.
    one_by_one = (10, 10 + min(10 if setting.quick else 40, many - few))
    program = rivals.compile_c(setting.scratch)
    notes = ["The shell has its files at hand outside of images, and holds nothing open."]
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "slope"))
        base = bytes(home / "live")
        pid = stack.enter_context(live_namespace(Shape(0, mounts=_MOUNTS, base=base)))
        runs: dict[str, Run] = {}
        counts: dict[str, tuple[int, int]] = {}
        for ghosts in (few, many):
            shape = Shape(ghosts, mounts=_MOUNTS, base=base)
            images = home / f"images-{ghosts}"
            write_images(images, shape)
            files = rivals.write_files(home / f"files-{ghosts}", shape)
            commands = {
                _REFERENCE: rivals.c(program, images, pid=pid),
                _REMOUNTING: rivals.c(program, images, pid=pid, strategy="remount"),
            }
            for way in _ways(setting.quick):
                commands[way.name] = way.command(images, pid)
            kept = {
                _C_KEPT: rivals.c(program, images, pid=pid, keep=True),
                _KEPT: rivals.ghostpool(images, jobs=1, pid=pid, keep=True),
            }
            for name, command in kept.items():
                commands[name] = rivals.cleaned(command, pid, shape)
            commands[_BULK] = rivals.shell_bulk(pid, shape, files)
            for name, command in commands.items():
                counts[name] = (few, many)
                runs[_key(name, ghosts)] = partial(rivals.run, command)
        counts[_ONE_BY_ONE] = one_by_one
        for ghosts in one_by_one:
            runs[_key(_ONE_BY_ONE, ghosts)] = _one_by_one(pid, home, base, ghosts)
        notes.append(_add_criu(stack, home, (few, many), runs, counts))
        samples = alternate("slope", runs, setting.rounds)
    return _answer(samples, counts, notes)


def _add_criu(
    stack: ExitStack,
    home: Path,
    ghosts: tuple[int, int],
    runs: dict[str, Run],
    counts: dict[str, tuple[int, int]],
) -> str:
    """A further rival, if it is there; a note about it."""
    try:
        restores = {
            _key(_CRIU, count): stack.enter_context(
                criu.dumped(home / f"criu-{count}", count, _MOUNTS)
            )
            for count in ghosts
        }
    except criu.Absent as reason:
        return f"CRIU is no rival in this run: {reason}."
    runs |= restores
    counts[_CRIU] = ghosts
    return "CRIU restores the process too, and its mounts are binds of one tmpfs."


def _one_by_one(pid: int, home: Path, base: bytes, ghosts: int) -> Run:
    shape = Shape(ghosts, mounts=_MOUNTS, base=base)
    files = rivals.write_files(home / f"one-by-one-{ghosts}", shape)
    return partial(rivals.run, rivals.shell_one_by_one(pid, shape, files))


def _key(rival: str, ghosts: int) -> str:
    return f"{rival}: {ghosts} ghosts"


def _answer(
    samples: dict[str, list[float]], counts: dict[str, tuple[int, int]], notes: list[str]
) -> Answer:
    by_round = {
        name: slopes(samples[_key(name, few)], samples[_key(name, many)], many - few)
        for name, (few, many) in counts.items()
    }
    ratios = {name: median_ratio(values, by_round[_REFERENCE]) for name, values in by_round.items()}
    rows = []
    for name, (few, many) in counts.items():
        singles = [value * 1e6 for value in by_round[name]]
        slope = _slope(samples, name, few, many) * 1e6
        rows.append(
            (
                shown(ratios[name]),
                name,
                f"{slope:,.1f} ({min(singles):,.1f}–{max(singles):,.1f})",
                f"{few:,} → {many:,}",
            )
        )
    ours = [name for name in ratios if name.startswith("ghostpool, ") and name != _KEPT]
    kept = {"1 job over C, kept": median_ratio(by_round[_KEPT], by_round[_C_KEPT])}
    figures = {_figure(name, "C"): ratios[name] for name in ours}
    if _CRIU in by_round:
        criu_s = by_round[_CRIU]
        figures |= {_figure(name, "criu"): median_ratio(by_round[name], criu_s) for name in ours}
    return Answer(
        "slope",
        f"microseconds per further ghost of 4 KiB on {_MOUNTS} read-only tmpfs mounts",
        (f"over {_REFERENCE}", "rival", "µs per ghost (of single rounds)", "ghosts"),
        rows,
        samples,
        notes,
        known(figures | kept),
    )


def _figure(name: str, rival: str) -> str:
    """Of a way to run ghostpool: "2 jobs over C, detached"."""
    jobs, _, strategy = name.removeprefix("ghostpool, ").partition(", ")
    return f"{jobs} over {rival}" + (strategy and f", {strategy}")


def _slope(samples: dict[str, list[float]], name: str, few: int, many: int) -> float:
    low, high = samples[_key(name, few)], samples[_key(name, many)]
    return (median(high) - median(low)) / (many - few)

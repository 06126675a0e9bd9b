"""What a hundred thousand ghosts cost: whole commands, over a few namespaces and over many.

Each namespace has ten read-only mounts of its own, or as many as the limit of descriptors allows
where there are many namespaces, and the ghosts are spread evenly. One process in C does the same;
ghostpool has two workers. Files are closed once they are verified, since no process may have so
many.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from statistics import median

from bench import rivals
from bench.images import Shape
from bench.measure import Answer, Run, Setting, alternate, spread
from bench.ratios import median_ratio, shown
from bench.scene import most_mounts, restorable, workplace

_MOUNTS = 10
_FEW = 16
_JOBS = 2
_ROUNDS = 5
"""At most: each takes half a minute."""


def measure(setting: Setting) -> Answer:
    """Seconds of whole commands."""
    ghosts, many = (3_200, 100) if setting.quick else (100_000, 1_000)
    counts = (_FEW, many)
    program = rivals.compile_c(setting.scratch)
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "many"))
        for count in counts:
            mounts = min(_MOUNTS, most_mounts(count) // count)
            shape = Shape(ghosts, namespaces=count, mounts=mounts, base=bytes(home / "live"))
            images = home / f"images-{count}"
            pids = stack.enter_context(restorable(images, shape))
            for name, command in (
                (_c(count), rivals.c(program, images, pids=pids)),
                (_ours(count), rivals.ghostpool(images, jobs=_JOBS, pids=pids)),
                (
                    _ours(count, "detached"),
                    rivals.ghostpool(images, jobs=_JOBS, pids=pids, strategy="detached"),
                ),
            ):
                runs[name] = partial(rivals.run, command)
        samples = alternate("many", runs, min(setting.rounds, _ROUNDS))
    return _answer(samples, ghosts, counts)


def _c(namespaces: int) -> str:
    return f"C, one process: {namespaces} namespaces"


def _ours(namespaces: int, strategy: str = "") -> str:
    return f"ghostpool, {_JOBS} jobs{strategy and ', ' + strategy}: {namespaces} namespaces"


def _answer(samples: dict[str, list[float]], ghosts: int, counts: tuple[int, int]) -> Answer:
    few, many = counts
    rows = [
        (
            shown(median_ratio(values, samples[_c(few)])),
            name,
            spread(values, 1, 2),
            f"{median(values) / ghosts * 1e6:,.1f}",
        )
        for name, values in samples.items()
    ]
    figures: dict[str, float] = {}
    for strategy in ("", "detached"):
        ours, more = samples[_ours(few, strategy)], samples[_ours(many, strategy)]
        end = strategy and f", {strategy}"
        figures[f"{few} namespaces over C{end}"] = median_ratio(ours, samples[_c(few)])
        figures[f"many namespaces over few{end}"] = median_ratio(more, ours)
    return Answer(
        "many",
        f"{ghosts:,} ghosts of 4 KiB on {_MOUNTS} read-only mounts in each of {few} namespaces, on "
        f"{min(_MOUNTS, most_mounts(many) // many)} in each of {many:,}",
        (f"over {_c(few)}", "whole command", "seconds (min–max)", "µs per ghost"),
        rows,
        samples,
        figures=figures,
    )

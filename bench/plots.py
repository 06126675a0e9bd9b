"""The pictures of docs/performance.md, as SVG: from a run's answers alone, the same each time.

Text stays text, nothing says when it was drawn, and ids come from a fixed salt: a picture changes
only when its numbers do. matplotlib is needed to draw, and not to know what there is to draw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import profile, sweeps, targets
from bench.measure import Answer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGETS = "targets"
_WIDTH, _ROW = 8.0, 0.32
_BLUE, _ORANGE, _GREY = "#33658a", "#d1603d", "#777777"
_PHASE_COLOURS = (
    "#9aa5b1", "#c3cbd3", "#86bbd8", "#33658a", "#2f4858",
    "#f6ae2d", "#f26419", "#d1603d", "#8d6b94", "#b8a1bd",
)  # fmt: skip
_SETTINGS: dict[Any, Any] = {  # matplotlib types each of its names, in some versions
    "svg.fonttype": "none",
    "svg.hashsalt": "ghostpool",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
}
_GHOSTS = re.compile(r"(?P<rival>.+): (?P<count>\d+) ghosts")
_BESIDE = 20
"""Times the cheapest: rivals above it are left out, or nobody could tell the others apart."""


def names(answers: Sequence[Answer]) -> dict[str, str]:
    """What each picture says in words, by its name: that of its answer, or TARGETS."""
    found: dict[str, str] = {}
    if any(verdict.value for verdict in targets.judge(answers)):
        found[TARGETS] = "each target: what was measured over its limit"
    for answer in answers:
        if answer.name == "profile":
            found[answer.name] = "the phases of whole commands, as bars that follow one another"
        elif answer.name.startswith("sweep-"):
            found[answer.name] = f"time of the whole command over {answer.columns[0]}"
        elif answer.name == "writable":
            found[answer.name] = "how many mounts were writable for how long"
        elif answer.name == "slope":
            found[answer.name] = "microseconds per further ghost, by rival"
    return found


def draw(answers: Sequence[Answer], directory: Path) -> None:
    """Write all pictures; `directory` is made if it is not there."""
    from matplotlib import rc_context

    directory.mkdir(parents=True, exist_ok=True)
    by_name = {answer.name: answer for answer in answers}
    with rc_context(_SETTINGS):
        for name in names(answers):
            if name == TARGETS:
                figure = _targets(answers)
            else:
                figure = _KINDS[name.partition("-")[0]](by_name[name])
            figure.savefig(
                directory / f"{name}.svg",
                format="svg",
                metadata={"Date": None, "Creator": None},
                bbox_inches="tight",
            )


def _figure(height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _targets(answers: Sequence[Answer]) -> Figure:
    """Bars of what was measured over its limit; a limit of nothing has no such bar."""
    judged = [one for one in targets.judge(answers) if one.value is not None and one.target.limit]
    judged.reverse()  # the first at the top
    figure, (axes,) = _figure(0.8 + _ROW * len(judged))
    for row, one in enumerate(judged):
        assert one.value is not None
        over = one.value / one.target.limit
        axes.barh(row, over, color=_BLUE if one.met else _ORANGE)
        axes.annotate(f"{over:.2f}", (over, row), (3, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(judged)), [f"{one.target.answer}: {one.target.figure}" for one in judged]
    )
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("measured over the limit; up to 1 is met")
    return figure


def _profile(answer: Answer) -> Figure:
    """A bar for each run, its phases one after the other."""
    runs = list(answer.columns[1:])[::-1]
    figure, (axes,) = _figure(1.6 + _ROW * len(runs))
    for row, run in enumerate(runs):
        left = 0.0
        for phase, colour in zip(profile.PHASES, _PHASE_COLOURS, strict=True):
            width = median(answer.samples[f"{run}: {phase.name}"]) * 1e3
            label = phase.name if row == 0 else None
            axes.barh(row, width, left=left, color=colour, label=label)
            left += width
    axes.set_yticks(range(len(runs)), runs)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, frameon=False)
    return figure


def _sweep(answer: Answer) -> Figure:
    """Times with their spread, and the line that the first slope would go on."""
    sizes = [int(size) for size in answer.samples]
    values = [[second * 1e3 for second in seconds] for seconds in answer.samples.values()]
    middle = [median(ones) for ones in values]
    figure, (axes,) = _figure(3.0)
    spread = (
        [one - min(ones) for one, ones in zip(middle, values, strict=True)],
        [max(ones) - one for one, ones in zip(middle, values, strict=True)],
    )
    axes.errorbar(sizes, middle, yerr=spread, marker="o", color=_BLUE, capsize=3, label="measured")
    if answer.name != f"sweep-{sweeps.JOBS.name}":
        straight = list(_straight(sizes, middle))
        axes.plot(sizes, straight, color=_GREY, linestyle=":", label="straight, but for the last")
        axes.set_yscale("log")
        axes.legend(frameon=False)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(answer.columns[0])
    axes.set_ylabel("whole command, ms")
    return figure


def _straight(sizes: Sequence[int], values: Sequence[float]) -> Iterator[float]:
    """The line through the smallest size and the last but one, at each size."""
    slope = (values[-2] - values[0]) / (sizes[-2] - sizes[0])
    for size in sizes:
        yield values[0] + slope * (size - sizes[0])


def _writable(answer: Answer) -> Figure:
    """A histogram for each kind of restore."""
    figure, many = _figure(2.6, len(answer.samples))
    for axes, (name, seconds) in zip(many, answer.samples.items(), strict=True):
        axes.hist([second * 1e3 for second in seconds], bins=30, color=_BLUE)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("ms")
    many[0].set_ylabel("mounts")
    return figure


def _slope(answer: Answer) -> Figure:
    """A bar for each rival, but for those that are far away."""
    found: dict[str, dict[int, float]] = {}
    for name, seconds in answer.samples.items():
        if match := _GHOSTS.fullmatch(name):
            found.setdefault(match["rival"], {})[int(match["count"])] = median(seconds)
    each: dict[str, float] = {}
    for rival, by_count in found.items():
        few, many = min(by_count), max(by_count)
        each[rival] = (by_count[many] - by_count[few]) / max(1, many - few) * 1e6
    least = min((value for value in each.values() if value > 0), default=math.inf)
    shown = {rival: value for rival, value in each.items() if value <= _BESIDE * least}
    order = sorted(shown, key=shown.__getitem__, reverse=True)
    figure, (axes,) = _figure(0.8 + _ROW * len(order))
    for row, rival in enumerate(order):
        axes.barh(row, shown[rival], color=_BLUE if "job" in rival else _GREY)
    axes.set_yticks(range(len(order)), order)
    axes.grid(visible=False, axis="y")
    left_out = ", ".join(f"{rival} ({each[rival]:,.0f})" for rival in each if rival not in shown)
    axes.set_xlabel("µs per further ghost" + (left_out and f"; not shown: {left_out}"))
    return figure


_KINDS: dict[str, Callable[[Answer], Figure]] = {
    "profile": _profile,
    "sweep": _sweep,
    "writable": _writable,
    "slope": _slope,
}

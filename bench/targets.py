"""What ghostpool is to cost at most, as ratios of one run, and whether it does.

Each target names the figure that it is judged by: of a question's answer, measured beside its
rival. A limit is the project's promise: it is never moved to where a measurement is. A figure that
was not measured is neither met nor missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure import Answer


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for one figure."""

    measure: str
    answer: str
    """Name of the question."""
    figure: str
    limit: float
    unit: str = ""
    """Of figure and limit; "" for a ratio, "%" for a share of 1."""
    run: str = ""
    """What of the profile shows where its time goes: "1 ghost", or many ghosts with "1 job"."""
    further: bool = False
    """It is about what each further ghost costs, so the phases that do not grow are not."""

    def shown(self, value: float) -> str:
        """A figure as it stands in tables."""
        if self.unit == "%":
            return f"{value:.0%}"
        digits = 2 if not self.unit else 0 if value == int(value) else 1
        return f"{value:,.{digits}f}{self.unit and ' ' + self.unit}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a target."""

    target: Target
    value: float | None
    """None: it was not measured."""
    detached: float | None = None
    """The same with the detached strategy, where it was measured too."""

    @property
    def met(self) -> bool | None:
        """None: nobody knows."""
        return None if self.value is None else self.value <= self.target.limit

    @property
    def word(self) -> str:
        """For a table."""
        return {None: "not measured", True: "met", False: "**missed**"}[self.met]

    @property
    def over(self) -> str:
        """By how much it was missed."""
        if self.value is None or self.met:
            return ""
        if not self.target.limit:
            return f"{self.target.shown(self.value)} where none is allowed"
        times = self.value / self.target.limit
        return f"{times - 1:.0%} over it" if times < 2 else f"{times:.1f} times that"


_FURTHER = "further ghost of 4 KiB, tmpfs, against C (one process, the whole job)"

TARGETS = (
    Target(f"{_FURTHER}: 1 job", "slope", "1 job over C", 1.5, run="1 job", further=True),
    Target(f"{_FURTHER}: 2 jobs", "slope", "2 jobs over C", 0.85, run="2 jobs", further=True),
    Target(
        "100,000 ghosts, 16 namespaces × 10 mounts, whole command, 2 jobs, against C (one process)",
        "many",
        "16 namespaces over C",
        1.2,
        run="2 jobs",
        further=True,
    ),
    Target(
        "100,000 ghosts over 1,000 namespaces, against the same over 16",
        "many",
        "many namespaces over few",
        1.3,
        run="2 jobs",
    ),
    Target(
        "further ghost with 10,000 read-only mounts leased, against 10",
        "leased",
        "many mounts over few",
        1.15,
        run="1 job",
        further=True,
    ),
    Target(
        "10 ghosts in a namespace with 100,000 mounts, whole command, against reading its "
        "mountinfo once from Python",
        "mounts",
        "command over mountinfo",
        2.5,
        run="1 ghost",
    ),
    Target(
        'one ghost, whole command, against `python -c "import trio, anyio"`',
        "start",
        "command over imports",
        1.5,
        run="1 ghost",
    ),
    Target("ghost of 1 GiB, against `cp` of the same bytes", "big", "over cp", 1.05),
    Target(
        "sparse ghost, against `cp` of as many bytes as it has data", "big", "sparse over cp", 1.1
    ),
    Target(
        "journal, guardian and verification together, of the run",
        "guard",
        "share of safety",
        0.15,
        "%",
        run="1 job",
    ),
    Target("coordinator's memory at 100,000 ghosts", "memory", "coordinator MiB", 120, "MiB"),
    Target("a worker's memory (PSS)", "memory", "worker PSS MiB", 6, "MiB"),
    Target(
        "mounts made writable before their first ghost is ready",
        "writable",
        "made writable before its first ghost is ready",
        0,
        "mounts",
    ),
    Target(
        "event loop of a program that embeds it: the longest time that it was kept",
        "loop",
        "worst gap ms",
        50,
        "ms",
    ),
)


def judge(answers: Sequence[Answer]) -> list[Verdict]:
    """Every target, in order."""
    figures = {answer.name: answer.figures for answer in answers}

    def measured(target: Target, suffix: str = "") -> float | None:
        value = figures.get(target.answer, {}).get(target.figure + suffix)
        return None if value is None or math.isnan(value) else value

    return [Verdict(one, measured(one), measured(one, ", detached")) for one in TARGETS]

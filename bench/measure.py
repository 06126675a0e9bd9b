"""Samples: rivals take turns, and what is compared comes from one run.

Each rival runs once unmeasured (byte code, caches), then once a round; every other round goes
through them backwards, so that a machine that gets slower wrongs none of them. A median stands
for the samples and the smallest and largest beside it; no sample is dropped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is to be measured."""

    scratch: Path
    """A tmpfs."""
    rounds: int
    quick: bool
    ghosts: tuple[int, int] | None = None
    """The two counts of the question slope, if the user has said them."""


@dataclass(slots=True)
class Answer:
    """What a question came to."""

    name: str
    question: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    samples: dict[str, list[float]]
    """Seconds, by rival, in the order in which they were taken."""
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """The named numbers that targets are judged by; see bench/targets.py."""
    load: Sequence[float] = ()
    """The load averages of a minute before it was asked and after."""
    elapsed_s: float = 0.0
    """How long it took to answer."""

    def markdown(self) -> str:
        """A heading and a table."""
        lines = [f"### {self.name}: {self.question}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        notes = list(self.notes)
        if self.load:
            load = " → ".join(f"{value:.2f}" for value in self.load)
            notes.append(f"({self.elapsed_s:,.0f} s; load average {load})")
        lines += [f"\n{note}" for note in notes]
        return "\n".join(lines) + "\n"

    def document(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "name": self.name,
            "question": self.question,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "notes": self.notes,
            "figures": {n: value for n, value in self.figures.items() if math.isfinite(value)},
            "load": list(self.load),
            "elapsed_s": self.elapsed_s,
            "seconds": self.samples,
        }

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Answer:
        """The answer that `document` was made of."""
        fields = dict(document)
        return cls(samples=fields.pop("seconds"), **fields)


def alternate(
    title: str,
    rivals: Mapping[str, Run],
    rounds: int,
    *,
    at_most: Mapping[str, int] | None = None,
    before: Run = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run of each rival; those in `at_most` have so many of the rounds only.

    `before` is called before each, unmeasured.
    """
    print(f"{title}: unmeasured round", file=sys.stderr, flush=True)
    for run in rivals.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for number in range(rounds):
        print(f"{title}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name in order:
            if at_most and number >= at_most.get(name, rounds):
                continue
            before()
            begun = time.perf_counter()
            rivals[name]()
            samples[name].append(time.perf_counter() - begun)
        order.reverse()
    return samples


def spread(values: Sequence[float], scale: float, digits: int = 1) -> str:
    """Median, and smallest to largest in brackets, each multiplied by `scale`."""
    shown = (f"{value * scale:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return "{} ({}–{})".format(*shown)


def ratio(value: float, reference: float) -> str:
    """One number over another; what noise has made senseless is not shown as a ratio."""
    return f"{value / reference:.2f}" if value > 0 and reference > 0 else "–"

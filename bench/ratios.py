"""Ratios round by round: rivals of one round are neighbours in time, so a busy moment hits both.

A figure that a target is judged by is the median of these, and not the ratio of two medians,
each of which may come from another part of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median


def slopes(low: Sequence[float], high: Sequence[float], further: int) -> list[float]:
    """Seconds for one of `further` things more, of each round."""
    return [(h - lo) / further for lo, h in zip(low, high, strict=True)]


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """The median of what each value is over the reference of its round.

    A slope may be below zero when the machine was disturbed; such a round says nothing. NaN if
    no round does.
    """
    pairs = zip(values, references, strict=True)
    found = [value / reference for value, reference in pairs if value > 0 and reference > 0]
    return median(found) if found else float("nan")


def shown(ratio: float) -> str:
    """For a table; what noise has made senseless is not shown as a number."""
    return "–" if math.isnan(ratio) else f"{ratio:.2f}"


def known(figures: dict[str, float]) -> dict[str, float]:
    """Those figures that are numbers."""
    return {name: value for name, value in figures.items() if not math.isnan(value)}

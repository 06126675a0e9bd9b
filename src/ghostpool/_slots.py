"""Which worker does what: directories are spread over worker slots; pure."""

from __future__ import annotations

from collections.abc import Iterable


def assign_slots(
    weights: Iterable[tuple[tuple[int, int], int, int]], jobs: int
) -> dict[tuple[int, int], int]:
    """Spread directories over worker slots: group to slot.

    `weights`: for each piece of work its directory, its target's index and its cost. A directory
    belongs to one slot (several workers in one directory wait for its lock, and could meet each
    other's names); the heaviest go first, each to the slot with the least, and among equals to one
    that serves the same namespace already.
    """
    totals: dict[tuple[int, int], int] = {}
    targets: dict[tuple[int, int], int] = {}
    for group, target, cost in weights:
        if group in totals:
            totals[group] += cost
        else:
            totals[group] = cost
            targets[group] = target
    load = [0] * max(1, min(jobs, len(totals)))
    serves: list[set[int]] = [set() for _ in load]
    slots: dict[tuple[int, int], int] = {}
    for group in sorted(totals, key=lambda g: (-totals[g], g)):
        target = targets[group]
        slot = min(range(len(load)), key=lambda s: (load[s], target not in serves[s], s))
        slots[group] = slot
        load[slot] += totals[group]
        serves[slot].add(target)
    return slots

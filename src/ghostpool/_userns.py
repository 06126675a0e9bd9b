"""Which owners exist in this process's user namespace: user_namespaces(7), uid_map."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache


def _extents(name: str) -> list[tuple[int, int, int]]:
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        return [(int(a), int(b), int(c)) for a, b, c in map(str.split, file)]


def outside_uid() -> int:
    """The effective user id as the parent user namespace has it, where it is nobody else's."""
    uid = os.geteuid()
    for first, outside, count in _extents("uid_map"):
        if first <= uid < first + count:
            return outside + uid - first
    return uid


def maps_owner() -> Callable[[int, int], bool]:
    """A test for (uid, gid): both have a mapping, so a file can be given to them."""
    uids, gids = _extents("uid_map"), _extents("gid_map")

    @lru_cache(maxsize=1024)  # asked for each ghost, and most have the same owner
    def mapped(uid: int, gid: int) -> bool:
        return any(first <= uid < first + count for first, _, count in uids) and any(
            first <= gid < first + count for first, _, count in gids
        )

    return mapped

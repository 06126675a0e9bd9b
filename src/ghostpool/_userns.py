"""Which owners exist in this process's user namespace: user_namespaces(7), uid_map."""

from __future__ import annotations

from collections.abc import Callable


def _extents(name: str) -> list[tuple[int, int]]:
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        rows = [line.split() for line in file]
    return [(int(first), int(count)) for first, _, count in rows]


def maps_owner() -> Callable[[int, int], bool]:
    """A test for (uid, gid): both have a mapping, so a file can be given to them."""
    uids, gids = _extents("uid_map"), _extents("gid_map")

    def mapped(uid: int, gid: int) -> bool:
        return any(first <= uid < first + count for first, count in uids) and any(
            first <= gid < first + count for first, count in gids
        )

    return mapped

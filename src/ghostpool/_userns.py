"""Which ids a user namespace maps: user_namespaces(7), uid_map and gid_map.

Pure but for what reads this process's own maps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

_NOBODY = 0xFFFFFFFF
"""What the kernel shows for an id that the reader's namespace does not have."""
_SHOWN = 4
"""Extents that a message names before it counts the rest."""


class IdMap(NamedTuple):
    """Ids of one kind, inside and outside: a uid_map, a gid_map, or that of an idmapped mount."""

    extents: tuple[tuple[int, int, int], ...]
    """First id inside, first id outside, how many."""

    @classmethod
    def parse(cls, text: str) -> IdMap:
        """Of lines "INSIDE OUTSIDE COUNT". ValueError for others."""
        rows = [tuple(map(int, line.split())) for line in text.splitlines() if line.strip()]
        if any(len(row) != 3 for row in rows):
            raise ValueError(f"not a map of ids: {text!r}")
        return cls(tuple((a, b, c) for a, b, c in rows if b != _NOBODY))

    def outside(self, inside: int) -> int | None:
        """The id outside that one is; None: it has none."""
        for first, outer, count in self.extents:
            if first <= inside < first + count:
                return outer + inside - first
        return None

    def inside(self, outside: int) -> int | None:
        """The other way round."""
        for first, outer, count in self.extents:
            if outer <= outside < outer + count:
                return first + outside - outer
        return None

    def __str__(self) -> str:
        shown = [f"{_range(a, n)} are {_range(b, n)}" for a, b, n in self.extents[:_SHOWN]]
        more = len(self.extents) - _SHOWN
        return ", ".join(shown + [f"and {more} more"] * (more > 0)) or "none"


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


class IdMaps(NamedTuple):
    """The maps of one user namespace, or of one idmapped mount."""

    uids: IdMap
    gids: IdMap

    def outside(self, uid: int, gid: int) -> tuple[int, int] | None:
        """The owner outside that one is; None if one of its ids has none."""
        outer = self.uids.outside(uid), self.gids.outside(gid)
        return None if outer[0] is None or outer[1] is None else (outer[0], outer[1])

    def inside(self, uid: int, gid: int) -> tuple[int, int] | None:
        """The other way round."""
        inner = self.uids.inside(uid), self.gids.inside(gid)
        return None if inner[0] is None or inner[1] is None else (inner[0], inner[1])

    @property
    def first(self) -> tuple[int, int] | None:
        """The root of it as seen from outside, or whoever comes first; None: it maps nobody."""
        if not self.uids.extents or not self.gids.extents:
            return None
        root = self.uids.outside(0), self.gids.outside(0)
        uid = self.uids.extents[0][1] if root[0] is None else root[0]
        gid = self.gids.extents[0][1] if root[1] is None else root[1]
        return uid, gid

    def __str__(self) -> str:
        return f"uids {self.uids}; gids {self.gids}"


def _own(name: str) -> IdMap:
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        rows = [tuple(map(int, line.split())) for line in file]
    return IdMap(tuple((a, b, c) for a, b, c in rows))


def outside_uid() -> int:
    """The effective user id as the parent user namespace has it, where it is nobody else's."""
    uid = os.geteuid()
    outside = _own("uid_map").outside(uid)
    return uid if outside is None else outside


def maps_owner() -> Callable[[int, int], bool]:
    """A test for (uid, gid): both have a mapping, so a file can be given to them."""
    own = IdMaps(_own("uid_map"), _own("gid_map"))

    @lru_cache(maxsize=1024)  # asked for each ghost, and most have the same owner
    def mapped(uid: int, gid: int) -> bool:
        return own.outside(uid, gid) is not None

    return mapped

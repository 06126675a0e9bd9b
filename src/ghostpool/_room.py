"""Whether what a plan makes fits its file systems: blocks and inodes, by superblock; pure.

What is written is rounded to blocks; every ghost takes an inode, and so does every missing parent
for as long as it is there, and on tmpfs every further name (tmpfs(5), nr_inodes). What a file
system needs for itself is not known here: a plan that passes may still meet ENOSPC, as it may if
somebody else fills the disk meanwhile. What is reserved for root is nobody's here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from ghostpool._errors import PlanError
from ghostpool._model import Extent, Ghost
from ghostpool._paths import join
from ghostpool._planned import Plan, PlannedGhost, PlannedMount, PlannedOpen
from ghostpool._protocol import Room

_INLINE_SYMLINK = {"tmpfs": 127}
"""Longest target that needs no block; elsewhere about what fits the inode."""
_INLINE_ELSEWHERE = 59


@dataclass(eq=False, repr=False, slots=True)
class Part:
    """What of a plan comes to lie on one superblock."""

    mount: PlannedMount
    """One through which it is seen."""
    ghosts: list[PlannedGhost] = field(default_factory=list)
    opens: list[PlannedOpen] = field(default_factory=list)


def parts_of(plan: Plan) -> list[Part]:
    """The plan by superblock."""
    found: dict[int, Part] = {}
    for ghost in plan.ghosts.values():
        device = ghost.mount.mount.device
        if device not in found:
            found[device] = Part(ghost.mount)
        found[device].ghosts.append(ghost)
    for link in plan.links.values():
        found.setdefault(link.mount.mount.device, Part(link.mount))
    for one in plan.opens:
        # All names of a ghost are on its superblock.
        found[one.opening.mount.mount.device].opens.append(one)
    return list(found.values())


def refusal(part: Part, room: Room, jobs: int, *, keep: bool) -> str | None:
    """Why there is no room for a part; None: there is."""
    ghosts, opens, fstype = part.ghosts, part.opens, part.mount.mount.fstype
    parents = _parents(ghosts, opens, jobs, keep=keep)
    inodes = len(ghosts) + parents
    if fstype == "tmpfs":
        inodes += _names(opens, jobs, keep=keep)
        parents = 0
    blocks = parents + sum(_blocks_of(one.ghost, fstype, room.block) for one in ghosts)
    # A total of 0: it does not say, or has no limit (tmpfs with size=0, inodes of btrfs).
    if room.blocks and blocks > room.free_blocks:
        return (
            f"{len(ghosts)} ghosts need {blocks * room.block} bytes, but only "
            f"{room.free_blocks * room.block} are free on it"
        )
    if room.inodes and inodes > room.free_inodes:
        return (
            f"{len(ghosts)} ghosts need {inodes} inodes (with their parents, and names on tmpfs), "
            f"but only {room.free_inodes} are free on it"
        )
    return None


def no_room(reason: str) -> PlanError:
    """The error of a refusal."""
    return PlanError(f"{reason}: make room, or restore fewer tasks")


def _blocks_of(ghost: Ghost, fstype: str, size: int) -> int:
    kind = stat.S_IFMT(ghost.mode)
    if kind == stat.S_IFREG:
        return blocks_of(ghost.extents, size)
    if kind == stat.S_IFLNK:
        return len(ghost.target or b"") > _INLINE_SYMLINK.get(fstype, _INLINE_ELSEWHERE)
    return kind == stat.S_IFDIR and fstype != "tmpfs"


def blocks_of(extents: Iterable[Extent], size: int) -> int:
    """Blocks of `size` bytes that content touches; what no extent covers takes none."""
    total, last = 0, -1
    for extent in extents:
        if extent.length:
            first = extent.offset // size
            end = (extent.offset + extent.length - 1) // size
            total += end - first + (first != last)
            last = end
    return total


def _names(opens: Iterable[PlannedOpen], jobs: int, *, keep: bool) -> int:
    """Old names that are there at one time, besides the temporary ones."""
    if keep:
        return sum(1 for _ in opens)
    return min(jobs, len({one.group for one in opens}))


def _parents(
    ghosts: Iterable[PlannedGhost], opens: Iterable[PlannedOpen], jobs: int, *, keep: bool
) -> int:
    """Missing directories that are there at one time."""
    stay = {
        b"/".join(one.final_directory.split(b"/")[: len(one.final_directory.split(b"/")) - n])
        for one in ghosts
        if one.final
        for n in range(len(one.parents))
    }
    deepest: dict[tuple[int, int], int] = {}
    for one in opens:
        if not one.missing:
            continue
        if keep:
            components = join(one.opening.mount.root, one.opening.directory).split(b"/")
            stay |= {b"/".join(components[: len(components) - n]) for n in range(one.missing)}
        else:
            deepest[one.group] = max(deepest.get(one.group, 0), one.missing)
    # A worker makes those of one file at a time.
    return len(stay) + sum(sorted(deepest.values(), reverse=True)[:jobs])

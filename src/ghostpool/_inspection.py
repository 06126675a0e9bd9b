"""What images hold, as one document: tasks, ghosts, who holds them, and what else was removed.

Pure. The document is what `inspect --json` prints, and the tables are made of it too;
docs/inspect.md describes it. Whatever came from the images as bytes is text in it that a terminal
can show.
"""

from __future__ import annotations

import os
import stat
from binascii import b2a_base64
from collections.abc import Container, Sequence
from typing import Any, Final

from ghostpool._errors import PlanError
from ghostpool._linux import MS_RDONLY
from ghostpool._model import (
    HOST_NS,
    Descriptor,
    Ghost,
    GhostId,
    ImageMount,
    Images,
    MntId,
    RegId,
    Remap,
    Task,
)
from ghostpool._paths import text

SCHEMA: Final = 1
MOST_HOLDERS: Final = 1_000_000
"""Tasks may share one table of descriptors: a few images could say a billion holders."""

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char device",
    stat.S_IFBLK: "block device",
}


def kind_of(mode: int) -> str:
    """One word for the type bits of a mode."""
    return _KINDS.get(stat.S_IFMT(mode), "?")


def inspection(images: Images) -> dict[str, Any]:
    """The document of images. PlanError: they name more holders than anybody would read."""
    mounts = {mount.id: mount for table in images.mounts.values() for mount in table}
    held = _Held(images)
    by_kind: dict[str, list[Remap]] = {"ghost": [], "linked": [], "procfs": []}
    for remap in images.remaps:
        by_kind[remap.kind].append(remap)
    names: dict[GhostId, list[Remap]] = {}
    for remap in by_kind["ghost"]:
        names.setdefault(GhostId(remap.target), []).append(remap)

    def name_of(remap: Remap) -> dict[str, Any]:
        file = images.files[remap.origin]
        return {
            **spelled("path", file.name),
            "file": file.id,
            "position": file.position,
            **_flags(file.flags),
            **_mount(mounts, file.mnt_id),
            "held_by": held.by(file.id),
        }

    return {
        "schema": SCHEMA,
        "images": text(os.fsencode(images.directory)),
        "root_namespace": images.root_namespace or None,
        "own_user_namespace": images.own_user_namespace,
        "tasks": [_task(task, held) for task in images.tasks],
        "ghosts": [
            _ghost(images.ghosts[ghost], [name_of(remap) for remap in names.get(ghost, ())])
            for ghost in sorted(images.ghosts)
        ],
        "link_remaps": [
            {**name_of(remap), **spelled("hidden", images.files[RegId(remap.target)].name)}
            for remap in by_kind["linked"]
        ],
        "procfs": [{**name_of(remap), "pid": remap.target} for remap in by_kind["procfs"]],
        "deleted_sockets": _socket_names(images),
    }


class _Held:
    """Which tasks hold which of the files that were removed, and as what."""

    def __init__(self, images: Images) -> None:
        remapped = {remap.origin for remap in images.remaps}
        self._images = images
        self._numbers: dict[int, dict[RegId, list[int]]] = {}
        self._by: dict[RegId, list[dict[str, Any]]] = {}
        count = 0
        for task in images.tasks:
            table = self._table(task.descriptors, remapped)
            found: list[tuple[RegId, dict[str, Any]]] = [
                (reg, {"descriptor": number}) for reg, some in table.items() for number in some
            ]
            found += [
                (holder.reg_id, {"as": holder.key})
                for holder in task.holders
                if holder.reg_id in remapped
            ]
            count += len(found)
            if count > MOST_HOLDERS:
                raise PlanError(
                    f"{images.directory}: more than {MOST_HOLDERS:,} descriptors and mappings of "
                    "removed files: too many to list"
                )
            for reg, what in found:
                self._by.setdefault(reg, []).append({"task": task.pid, **what})

    def _table(
        self, descriptors: Sequence[Descriptor], remapped: Container[RegId]
    ) -> dict[RegId, list[int]]:
        """Numbers by file; once for all the tasks that share the table."""
        known = self._numbers.get(id(descriptors))
        if known is None:
            known = self._numbers[id(descriptors)] = {}
            for row in descriptors:
                if row.reg_id in remapped:
                    known.setdefault(row.reg_id, []).append(row.number)
        return known

    def by(self, reg: RegId) -> list[dict[str, Any]]:
        """The holders of a file."""
        return self._by.get(reg, [])

    def count(self, task: Task) -> int:
        """How many removed files' descriptors a task has."""
        return sum(map(len, self._numbers[id(task.descriptors)].values())) + len(task.holders)


def _task(task: Task, held: _Held) -> dict[str, Any]:
    return {
        "pid": task.pid,
        "parent": task.parent or None,
        "namespace": task.namespace if task.namespace != HOST_NS else None,
        "holds": held.count(task),
    }


def _ghost(ghost: Ghost, names: list[dict[str, Any]]) -> dict[str, Any]:
    document = {
        "id": ghost.id,
        "file": ghost.file,
        "kind": kind_of(ghost.mode),
        "mode": f"{stat.S_IMODE(ghost.mode):04o}",
        "owner": [ghost.uid, ghost.gid],
        "size": ghost.size,
        "content": sum(extent.length for extent in ghost.extents),
        "atime": _seconds(ghost.atime),
        "mtime": _seconds(ghost.mtime),
        "names": names,
    }
    if ghost.target is not None:
        document.update(spelled("target", ghost.target))
    if ghost.rdev is not None:
        document["device"] = [os.major(ghost.rdev), os.minor(ghost.rdev)]
    return document


def spelled(key: str, path: bytes) -> dict[str, str]:
    """A path as text; and as it is, where a terminal could not show that."""
    shown = text(path)
    if shown.encode() == path:
        return {key: shown}
    return {key: shown, f"{key}_base64": b2a_base64(path, newline=False).decode()}


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1_000_000


def _flags(flags: int) -> dict[str, Any]:
    """Of open(2), as far as they matter to a reader."""
    if flags & os.O_PATH:
        access = "path"
    else:
        access = ("read", "write", "read and write", "none")[flags & os.O_ACCMODE]
    return {"access": access, "flags": f"{flags:#o}"}


def _mount(mounts: dict[MntId, ImageMount], number: MntId | None) -> dict[str, Any]:
    mount = None if number is None else mounts.get(number)
    if mount is None:
        return {"namespace": None, "mountpoint": None, "read_only": None}
    return {
        "namespace": mount.namespace,
        "mountpoint": text(mount.mountpoint),
        "read_only": bool((mount.flags | mount.superblock_flags) & MS_RDONLY),
    }


def _socket_names(images: Images) -> list[str]:
    return [text(socket.path) for socket in images.sockets.values()]


__all__ = ["MOST_HOLDERS", "SCHEMA", "inspection", "kind_of", "spelled"]

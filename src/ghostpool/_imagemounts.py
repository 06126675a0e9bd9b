"""Mount entries of the images: one mount namespace of the dump, parents before children.

CRIU writes the mounts of a namespace in reverse order of mountinfo, so children come before
their parents; the tree is built by ids, and siblings keep the order in which the dumping kernel
listed them. The root is the mount at "/" whose parent is not in the image (or is itself): a
mount may be stacked over "/", so the mount point alone does not tell.

A namespace of 100,000 mounts has files open on a few. Unless it is rebuilt, only these matter, and
what shares a mount point with one of them: the records of the others are parsed, the tree that they
make is checked, and that is all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container, Mapping
from typing import Any, Final

from ghostpool import _linux
from ghostpool._errors import ImageError
from ghostpool._imagefile import ImageDirectory
from ghostpool._limits import TEXT_LIMIT, beyond
from ghostpool._model import ImageMount, MntId, NsId
from ghostpool._paths import is_image_path
from ghostpool._schema import message_class

_PROPAGATION: Final = _linux.MS_UNBINDABLE | _linux.MS_PRIVATE | _linux.MS_SLAVE | _linux.MS_SHARED
_MS_SYNCHRONOUS: Final = 16
_MS_DIRSYNC: Final = 0x80
_SYNC_IN_IMAGES: Final = 4  # CRIU stores "sync" as 4, which is NODEV among per-mount flags
_FSTYPE_AUTO: Final = 16
_FSTYPES: Final = {
    1: "proc",
    2: "sysfs",
    3: "devtmpfs",
    4: "binfmt_misc",
    5: "tmpfs",
    6: "devpts",
    7: "simfs",
    8: "pstore",
    9: "securityfs",
    10: "fusectl",
    11: "debugfs",
    12: "cgroup",
    13: "aufs",
    14: "mqueue",
    15: "fuse",
    17: "overlay",
    18: "autofs",
    19: "tracefs",
    23: "cgroup2",
}


_TEXTS: Final = ("root", "source", "options", "fsname", "ext_key")


def read_mounts(
    source: ImageDirectory,
    namespace: NsId,
    homes: dict[MntId, NsId],
    used: Container[MntId | None] | None = None,
    *,
    task: int,
) -> tuple[ImageMount, ...]:
    """The mounts of one namespace, which `task` (a pid) lives in; parents before children.

    With `used`, the root, those that are in it, and all on their mount points, in the same order.
    `homes` are the namespaces of all mounts that were read, and those of this one go into it.
    """
    name = f"mountpoints-{namespace}.img"
    made: dict[MntId, ImageMount] = {}
    others: dict[MntId, bytes] = {}
    parents: dict[MntId, MntId] = {}
    points: dict[MntId, bytes] = {}
    for number, entry in enumerate(source.records(name, "mountpoints")):
        ident, parent, point = entry.mnt_id, entry.parent_mnt_id, entry.mountpoint
        if not is_image_path(point):
            raise ImageError(name, number, f"{point!r} is no mount point")
        if used is None or ident in used:
            mount = _mount(name, number, namespace, entry)
            ident, parent, point = mount.id, mount.parent, mount.mountpoint  # not twice in memory
            made[ident] = mount
        else:
            others[ident] = entry.SerializeToString()  # a fifth of what the message takes
        if ident in parents:
            raise ImageError(name, number, f"repeats mnt_id {ident}")
        parents[ident] = parent
        points[ident] = point
    if not parents:
        state = "holds no mount" if name in source.names else "is missing"
        raise ImageError(name, None, f"{state}, but task {task} lives in that mount namespace")
    ordered = _in_order(name, parents, points)
    _settle(name, namespace, parents, homes)
    if others:
        parse = message_class("mnt_entry").FromString
        numbers = {ident: number for number, ident in enumerate(parents)}
        shared = {mount.mountpoint for mount in made.values()}
        ordered = [i for i in ordered if i in made or i == ordered[0] or points[i] in shared]
        for ident in ordered:
            if ident in others:
                made[ident] = _mount(name, numbers[ident], namespace, parse(others[ident]))
    return tuple([made[ident] for ident in ordered])


def _settle(
    name: str, namespace: NsId, mounts: Mapping[MntId, object], homes: dict[MntId, NsId]
) -> None:
    """Note where these mounts are; no other namespace has them."""
    if not homes.keys().isdisjoint(mounts):
        ident = next(ident for ident in mounts if ident in homes)
        problem = f"repeats mnt_id {ident} of mountpoints-{homes[ident]}.img"
        raise ImageError(name, None, problem)
    homes.update(dict.fromkeys(mounts, namespace))


def _mount(name: str, number: int, namespace: NsId, entry: Any) -> ImageMount:
    for field in _TEXTS:
        value = getattr(entry, field)
        if len(value) > TEXT_LIMIT:
            what = f"a mount whose {field} has {len(value):,} bytes"
            raise beyond(name, number, what, f"{TEXT_LIMIT:,}", "no kernel shows so much of one")
        if b"\0" in value:
            raise ImageError(name, number, f"{field} {value[:80]!r} holds a NUL")
    external: str | None = None
    if entry.HasField("ext_key"):
        external = _text(entry.ext_key)
    elif entry.ext_mount:  # before CRIU 3.0 the key took the place of the root
        external = _text(entry.root)
    flags, sb_flags = _flags(entry)
    return ImageMount(
        id=MntId(entry.mnt_id),
        parent=MntId(entry.parent_mnt_id),
        namespace=namespace,
        fstype=_text(entry.fsname)
        if entry.fstype == _FSTYPE_AUTO
        else _FSTYPES.get(entry.fstype, ""),
        # The kernel's own encoding: major << 20 | minor.
        device=os.makedev(entry.root_dev >> 20, entry.root_dev & 0xFFFFF),
        root=entry.root,
        mountpoint=entry.mountpoint,
        source=_text(entry.source),
        options=_text(entry.options),
        flags=flags & ~_PROPAGATION,
        superblock_flags=(sb_flags & (_linux.MS_RDONLY | _MS_SYNCHRONOUS | _MS_DIRSYNC))
        | (_MS_SYNCHRONOUS if sb_flags & _SYNC_IN_IMAGES else 0),
        shared_group=entry.shared_id,
        master_group=entry.master_id,
        unbindable=bool(flags & _linux.MS_UNBINDABLE),
        external_key=external,
        deleted_root=entry.deleted,
    )


def _flags(entry: Any) -> tuple[int, int]:
    """Flags of the mount and of its superblock, both as the images have them.

    Before CRIU 1.8 they were one number. CRIU takes read-only for the superblock's then, and fails
    on such mounts; but no superblock could become read-only while a ghost was open on it, so it is
    the mount's, which keeps the same from being changed. A live mount has its own flags anyway.
    """
    flags: int = entry.flags
    if entry.HasField("sb_flags"):
        return flags, entry.sb_flags
    superblock = flags & (_MS_SYNCHRONOUS | _MS_DIRSYNC)
    return flags & ~superblock, superblock


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _in_order(name: str, parents: dict[MntId, MntId], points: Mapping[MntId, bytes]) -> list[MntId]:
    """The mounts of a tree, parents first; `parents` are in the order of the image."""

    def wrong(ident: MntId, problem: str) -> ImageError:
        return ImageError(name, list(parents).index(ident), problem)

    root: MntId | None = None
    for ident, parent in reversed(parents.items()):
        if parent in parents and parent != ident:
            continue
        if points[ident] != b"/":
            raise wrong(
                ident,
                f"mount {ident} at {points[ident]!r} has parent {parent}, "
                "which the image does not hold: is it cut?",
            )
        if root is not None:
            raise wrong(ident, f"mounts {root} and {ident} are both the root")
        root = ident
    if root is None:
        raise ImageError(name, None, 'no mount is the root "/": is it cut?')
    # In the kernel's order as long as that has parents first; a child that was listed before
    # its parent (a moved mount) waits for it.
    ordered: dict[MntId, None] = {}
    waiting: dict[MntId, list[MntId]] = {}
    for ident, parent in reversed(parents.items()):
        if parent not in ordered and ident != root:
            waiting.setdefault(parent, []).append(ident)
            continue
        ordered[ident] = None
        ready = deque(waiting.pop(ident, ()))
        while ready:
            now = ready.popleft()
            ordered[now] = None
            ready.extend(waiting.pop(now, ()))
    for left in waiting.values():
        raise wrong(left[0], f"mount {left[0]} is among its own ancestors or below them")
    return list(ordered)


__all__ = ["read_mounts"]

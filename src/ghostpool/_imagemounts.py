"""Mount entries of the images: one mount namespace of the dump, parents before children.

CRIU writes the mounts of a namespace in reverse order of mountinfo, so children come before
their parents; the tree is built by ids, and siblings keep the order in which the dumping kernel
listed them. The root is the mount at "/" whose parent is not in the image (or is itself): a
mount may be stacked over "/", so the mount point alone does not tell.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any, Final

from ghostpool import _linux
from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._imagefile import ImageDirectory
from ghostpool._limits import TEXT_LIMIT, beyond
from ghostpool._model import ImageMount, MntId, NsId
from ghostpool._paths import is_image_path

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


def read_mounts(source: ImageDirectory, namespace: NsId, *, task: int) -> tuple[ImageMount, ...]:
    """The mounts of one namespace, which `task` (a pid) lives in; parents before children."""
    name = f"mountpoints-{namespace}.img"
    mounts: dict[MntId, ImageMount] = {}
    numbers: dict[MntId, int] = {}
    for number, entry in enumerate(source.records(name, "mountpoints")):
        mount = _mount(name, number, namespace, entry)
        if mount.id in mounts:
            raise ImageError(name, number, f"repeats mnt_id {mount.id}")
        mounts[mount.id] = mount
        numbers[mount.id] = number
    if not mounts:
        state = "holds no mount" if name in source.names else "is missing"
        raise ImageError(name, None, f"{state}, but task {task} lives in that mount namespace")
    return _in_order(name, mounts, numbers)


def _mount(name: str, number: int, namespace: NsId, entry: Any) -> ImageMount:
    if not entry.HasField("sb_flags"):
        raise UnsupportedError(
            f"{name}, record {number}: no superblock flags: images of a CRIU older than 1.8 "
            "are not supported"
        )
    if not is_image_path(entry.mountpoint):
        raise ImageError(name, number, f"{entry.mountpoint!r} is no mount point")
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
    sb_flags = entry.sb_flags
    flags = entry.flags
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


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _in_order(
    name: str, mounts: dict[MntId, ImageMount], numbers: dict[MntId, int]
) -> tuple[ImageMount, ...]:
    root: ImageMount | None = None
    for mount in reversed(mounts.values()):
        if mount.parent in mounts and mount.parent != mount.id:
            continue
        number = numbers[mount.id]
        if mount.mountpoint != b"/":
            raise ImageError(
                name,
                number,
                f"mount {mount.id} at {mount.mountpoint!r} has parent {mount.parent}, "
                "which the image does not hold: is it cut?",
            )
        if root is not None:
            raise ImageError(name, number, f"mounts {root.id} and {mount.id} are both the root")
        root = mount
    if root is None:
        raise ImageError(name, None, 'no mount is the root "/": is it cut?')
    # In the kernel's order as long as that has parents first; a child that was listed before
    # its parent (a moved mount) waits for it.
    ordered: list[ImageMount] = []
    placed: set[MntId] = set()
    waiting: dict[MntId, list[ImageMount]] = {}
    for mount in reversed(mounts.values()):
        if mount is not root and mount.parent not in placed:
            waiting.setdefault(mount.parent, []).append(mount)
            continue
        ready = deque([mount])
        while ready:
            now = ready.popleft()
            ordered.append(now)
            placed.add(now.id)
            ready.extend(waiting.pop(now.id, ()))
    for left in waiting.values():
        stuck = left[0]
        raise ImageError(
            name, numbers[stuck.id], f"mount {stuck.id} is among its own ancestors or below them"
        )
    return tuple(ordered)


__all__ = ["read_mounts"]

"""The mounts and files of a corpus case, from its truth.json and never from its images.

What is built this way shares no code with the image reader, so a test that restores into it
checks the reader as well. What is in it is what the functions below take out of it.
"""

from __future__ import annotations

import base64
import os
import stat
from typing import Any

from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._linux import Attr

_FLAGS = {
    "ro": Attr.RDONLY,
    "nosuid": Attr.NOSUID,
    "nodev": Attr.NODEV,
    "noexec": Attr.NOEXEC,
    "noatime": Attr.NOATIME,
    "nodiratime": Attr.NODIRATIME,
    "nosymfollow": Attr.NOSYMFOLLOW,
}
_KINDS = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "lnk": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
    "sock": stat.S_IFSOCK,
}


def specs_from_truth(truth: dict[str, Any]) -> tuple[NamespaceSpec, ...]:
    """What to build for every mount namespace of the case; ids are those of truth.json.

    A mount that the dump left to the outside becomes a tmpfs.
    """
    namespaces: dict[int, list[MountSpec]] = {}
    for mount in truth["mounts"]:
        namespaces.setdefault(mount["ns"], []).append(_mount(mount))
    return tuple(NamespaceSpec(number, tuple(mounts)) for number, mounts in namespaces.items())


def attributes_of(flags: list[str]) -> int:
    """MOUNT_ATTR_* of a list of option names; no atime mode among them is strictatime."""
    bits = sum(int(_FLAGS[name]) for name in flags if name != "relatime")
    if not {"noatime", "relatime"} & set(flags):
        bits |= int(Attr.STRICTATIME)
    return bits


def _mount(mount: dict[str, Any]) -> MountSpec:
    build = mount["build"]
    external = build["op"] == "external"
    options = build.get("options", "" if mount["fstype"] == "proc" else mount["sb_options"])
    major, _, minor = mount["dev"].partition(":")
    propagation = mount["propagation"].split("+")
    contents = mount.get("contents") or []
    root = mount["root"].encode()
    return MountSpec(
        id=mount["mnt_id"],
        parent=mount["parent_mnt_id"],
        mountpoint=mount["mountpoint"].encode(),
        superblock=os.makedev(int(major), int(minor)),
        fstype="tmpfs" if external else build.get("type", mount["fstype"]),
        source=build.get("source", mount["source"]),
        options="" if external else options,
        root=root,
        attributes=attributes_of(mount["flags"]),
        read_only_superblock=mount["sb"] == "ro",
        shared_group=mount.get("peer_group") or 0,
        master_group=mount.get("master_group") or 0,
        unbindable="unbindable" in propagation,
        is_file=any(
            entry["path"] == mount["mountpoint"] and entry["kind"] != "dir" for entry in contents
        ),
        nodes=tuple(_node(entry) for entry in contents),
    )


def _node(entry: dict[str, Any]) -> Node:
    mtime = entry.get("mtime")
    target = entry.get("target")
    linked = entry.get("hardlink_to")
    data = entry.get("content_b64")
    return Node(
        path=entry["path"].encode(),
        mode=_KINDS[entry["kind"]] | entry["mode"],
        uid=entry["uid"],
        gid=entry["gid"],
        # Any file will do where the content is not given.
        data=base64.b64decode(data) if data is not None else bytes(entry.get("size", 0)),
        target=None if target is None else target.encode(),
        rdev=os.makedev(*entry["rdev"]) if "rdev" in entry else 0,
        mtime_ns=None if mtime is None else mtime[0] * 10**9 + mtime[1],
        hard_link_of=None if linked is None else linked.encode(),
    )

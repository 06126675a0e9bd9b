"""The image reader on real dumps: what CRIU stored against what the tasks saw."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._images import read_images
from ghostpool._model import Extent, Images, RegFile, Remap, Task
from tests.support.corpus import CASES, CORPUS, content, corpus

FORMATS = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "lnk": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
}
FLAGS = {
    "ro": _linux.MS_RDONLY,
    "nosuid": _linux.MS_NOSUID,
    "nodev": _linux.MS_NODEV,
    "noexec": _linux.MS_NOEXEC,
    "noatime": _linux.MS_NOATIME,
    "nodiratime": _linux.MS_NODIRATIME,
    "relatime": _linux.MS_RELATIME,
}


def remap_of(images: Images, reg: RegFile) -> Remap | None:
    return next((remap for remap in images.remaps if remap.origin == reg.id), None)


def microseconds(when: list[int]) -> int:
    return when[0] * 1_000_000 + when[1] // 1000


def described(images: Images, truth: dict[str, Any]) -> Iterator[tuple[Task, Any, RegFile]]:
    """Every descriptor of the truth, with its task and the reg file that the images give it."""
    for seen in truth["tasks"]:
        task = next(task for task in images.tasks if task.pid == seen["pid"])
        by_number = {row.number: row for row in task.descriptors}
        for fd in seen["fds"]:
            if fd["kind"] == "sock":
                assert fd["fd"] not in by_number
                continue
            row = by_number.pop(fd["fd"])
            assert row.close_on_exec == fd["cloexec"]
            assert row.fifo == (fd["kind"] == "fifo")
            yield task, fd, images.files[row.reg_id]
        assert not by_number


@pytest.mark.parametrize("case", CASES)
class TestCorpus:
    """What CRIU 4.2 wrote is read as what the tasks saw of themselves before the dump."""

    def test_descriptors(self, case: str) -> None:
        images, truth = corpus(case)
        count = 0
        for _, fd, reg in described(images, truth):
            count += 1
            assert reg.name == fd["path"].encode()
            assert reg.mnt_id == fd["mnt_id"]
            assert reg.flags == fd["flags"]
            assert reg.position == fd["pos"]
            remap = remap_of(images, reg)
            assert (remap.kind if remap else "none") == fd["remap"]
            assert reg.mode == FORMATS[fd["kind"]] | fd["mode"]
            if fd["kind"] == "reg" and reg.size is not None:
                assert reg.size == fd["size"]
        assert count

    def test_ghosts(self, case: str) -> None:
        images, truth = corpus(case)
        files = [(fd, reg) for _, fd, reg in described(images, truth)]
        for seen in truth["tasks"]:
            task = next(task for task in images.tasks if task.pid == seen["pid"])
            maps = [holder for holder in task.holders if holder.key.startswith("map:")]
            for mapping in seen["maps"]:
                length = mapping["length"]
                found = [
                    images.files[holder.reg_id]
                    for holder in maps
                    if images.files[holder.reg_id].name == mapping["path"].encode()
                    and length == _length(holder.key)
                ]
                assert found
                files.append((mapping, found[0]))
        checked = set()
        for fd, reg in files:
            if fd["remap"] != "ghost":
                continue
            remap = remap_of(images, reg)
            assert remap is not None
            ghost = next(ghost for ghost in images.ghosts.values() if ghost.id == remap.target)
            checked.add(ghost.id)
            assert ghost.mode == FORMATS[fd["kind"]] | fd["mode"]
            assert (ghost.uid, ghost.gid) == (fd["uid"], fd["gid"])
            assert ghost.mtime == microseconds(fd["mtime"])
            assert ghost.atime == microseconds(fd["atime"])
            assert ghost.target == (fd["target"].encode() if "target" in fd else None)
            assert ghost.rdev == (os.makedev(*fd["rdev"]) if "rdev" in fd else None)
            if fd["kind"] != "reg":
                assert ghost.size == 0
                assert ghost.extents == ()
                continue
            assert ghost.size == fd["size"]
            digest = hashlib.sha256()
            for part in content(CORPUS / case / "images", ghost):
                digest.update(part)
            assert digest.hexdigest() == fd["sha256"]
        assert checked == set(images.ghosts)

    def test_holes(self, case: str) -> None:
        """Where the dump stored chunks, all that SEEK_DATA found lies in an extent."""
        images, truth = corpus(case)
        for _, fd, reg in described(images, truth):
            remap = remap_of(images, reg)
            if fd["remap"] != "ghost" or "data" not in fd or fd["size"] < 12288:
                continue
            assert remap is not None
            ghost = next(ghost for ghost in images.ghosts.values() if ghost.id == remap.target)
            stored = {
                at for extent in ghost.extents for at in range(extent.offset // 4096, _end(extent))
            }
            data = {
                at
                for offset, length in fd["data"]
                for at in range(offset // 4096, _pages(offset, length))
            }
            assert stored >= data
            assert len(stored) * 4096 < fd["size"] or not ghost.size

    def test_shared_inodes_and_open_files(self, case: str) -> None:
        """One inode is one ghost, one open file is one reg id, and never the other way."""
        images, truth = corpus(case)
        inodes: dict[str, set[int]] = {}
        groups: dict[int, set[str]] = {}
        opens: dict[str, set[int]] = {}
        users: dict[int, set[str | None]] = {}
        for _, fd, reg in described(images, truth):
            if fd["remap"] != "ghost":
                continue
            remap = remap_of(images, reg)
            assert remap is not None
            inodes.setdefault(fd["group"], set()).add(remap.target)
            groups.setdefault(remap.target, set()).add(fd["group"])
            users.setdefault(reg.id, set()).add(fd.get("open_file"))
            if "open_file" in fd:
                opens.setdefault(fd["open_file"], set()).add(reg.id)
        assert {len(ghosts) for ghosts in inodes.values()} <= {1}
        assert {len(inode) for inode in groups.values()} <= {1}
        assert {len(regs) for regs in opens.values()} <= {1}
        assert {len(open_file) for open_file in users.values()} <= {1}

    def test_mounts(self, case: str) -> None:
        images, truth = corpus(case)
        namespaces = {
            seen["mntns"]: task.namespace
            for seen in truth["tasks"]
            for task in images.tasks
            if task.pid == seen["pid"]
        }
        assert images.root_namespace == namespaces[0]
        assert set(images.mounts) == set(namespaces.values())
        for ns, namespace in namespaces.items():
            mounts = images.mounts[namespace]
            places = {mount.id: place for place, mount in enumerate(mounts)}
            assert all(places[mount.parent] < places[mount.id] for mount in mounts[1:])
            known = {mount.id: mount for mount in mounts}
            seen = [mount for mount in truth["mounts"] if mount["ns"] == ns]
            for expected in seen:
                mount = known.pop(expected["mnt_id"])
                assert mount.namespace == namespace
                assert mount.parent == expected["parent_mnt_id"]
                assert mount.mountpoint == expected["mountpoint"].encode()
                assert mount.root == expected["root"].encode()
                if expected["build"]["op"] != "external":
                    assert mount.fstype == expected["fstype"]
                    assert mount.source == expected["source"]
                major, minor = map(int, expected["dev"].split(":"))
                assert mount.device == os.makedev(major, minor)
                strict = {"relatime", "noatime"}.isdisjoint(expected["flags"])
                assert mount.flags == sum(FLAGS[flag] for flag in expected["flags"]) + (
                    _linux.MS_STRICTATIME if strict else 0
                )
                assert mount.superblock_flags == (expected["sb"] == "ro")
                assert bool(mount.shared_group) == ("shared" in expected["propagation"])
                assert bool(mount.master_group) == ("slave" in expected["propagation"])
                assert (mount.external_key is not None) == (expected["build"]["op"] == "external")
            assert not known

    def test_tasks(self, case: str) -> None:
        images, truth = corpus(case)
        assert [(task.pid, task.parent) for task in images.tasks] == [
            (seen["pid"], seen["ppid"]) for seen in truth["tasks"]
        ]
        assert not images.own_user_namespace
        assert not images.sockets

    def test_pending_bytes(self, case: str) -> None:
        images, truth = corpus(case)
        pending = {
            reg.id: fd["pending"] for _, fd, reg in described(images, truth) if fd.get("pending")
        }
        found = {reg: data.length for reg, data in images.fifo_data.items() if data.length}
        assert found == pending


def _length(key: str) -> int:
    start, end = key.removeprefix("map:").split("-")
    return int(end, 16) - int(start, 16)


def _pages(offset: int, length: int) -> int:
    return -(-(offset + length) // 4096)


def _end(extent: Extent) -> int:
    return _pages(extent.offset, extent.length)


def test_link_remaps_lead_to_the_hidden_name() -> None:
    images, _ = corpus("05-link-remap")
    linked = [remap for remap in images.remaps if remap.kind == "linked"]
    assert linked
    for remap in linked:
        target = next(reg for reg in images.files.values() if reg.id == remap.target)
        assert target.name.endswith(b"/link_remap.%d" % target.id)
        assert target.mnt_id is None
        assert target.mode is None


def test_an_open_directory_is_not_closed() -> None:
    path = CORPUS / "01-ro-basic" / "images"
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        images = read_images("as the user said", directory_fd=fd)
        assert images.directory == "as the user said"
        assert images.ghosts == corpus("01-ro-basic")[0].ghosts
        assert os.fstat(fd)
    finally:
        os.close(fd)

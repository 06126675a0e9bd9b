"""Who keeps a mount busy, found in a namespace that is not ours."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from pathlib import Path

import pytest

from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._holders import holders
from ghostpool.testing._targets import built
from tests.support.namespaces import inside, mountinfo
from tests.support.restore import live, mount_tmpfs

pytestmark = pytest.mark.needs_mount_ns


def hold(how: str) -> None:
    """In the live process: a fresh mount, and a file of it held in some way for good."""
    mount_tmpfs(Path("/mnt"))
    path = "/mnt/file"
    Path(path).write_bytes(bytes(8192))
    if how == "fifo":
        os.unlink(path)
        os.mkfifo(path)
    flags = {"reader": os.O_RDONLY, "path": os.O_PATH}.get(how, os.O_RDWR)
    fd = os.open(path, flags)
    if how.startswith("map"):
        # Not by the mmap module, whose objects keep a descriptor besides.
        sharing = mmap.MAP_PRIVATE if how == "map private" else mmap.MAP_SHARED
        mapper = ctypes.CDLL(None).mmap
        mapper.restype = ctypes.c_void_p
        length, both = ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE
        assert mapper(None, length, both, sharing, fd, ctypes.c_long(0)) != 2**64 - 1
        os.close(fd)
    if how == "unlinked":
        os.unlink(path)


@pytest.mark.parametrize("how", ["writer", "unlinked", "map shared", "map private"])
def test_writers_are_found(how: str) -> None:
    with live(lambda: hold(how)) as target:
        (mount,) = [m for m in mountinfo(target.fd) if m.mountpoint == b"/mnt"]
        (found,) = holders(mount.mnt_id)
    assert found.pid == target.pid
    assert found.path == "/mnt/file" + (" (deleted)" if how == "unlinked" else "")
    assert found.key.startswith("map " if how.startswith("map") else "fd ")


@pytest.mark.parametrize("how", ["reader", "path", "fifo"])
def test_who_can_not_write_is_not_named(how: str) -> None:
    with live(lambda: hold(how)) as target:
        (mount,) = [m for m in mountinfo(target.fd) if m.mountpoint == b"/mnt"]
        assert holders(mount.mnt_id) == []


def in_mount(namespace: int, path: bytes) -> int:
    """A descriptor of this process, opened for writing in a namespace."""
    here, there = socket.socketpair()
    with here, there:

        def child() -> None:
            socket.send_fds(there, [b"."], [os.open(path, os.O_RDWR)])

        inside(namespace, child)
        return socket.recv_fds(here, 1, 1)[1][0]


def test_another_mount_of_the_superblock_is_not_held() -> None:
    root = MountSpec(1, 0, b"/", 1, "tmpfs", "root", "", b"/", 0)
    node = Node(b"/a/file", 0o100644)
    first = MountSpec(2, 1, b"/a", 2, "tmpfs", "x", "", b"/", 0, nodes=(node,))
    second = MountSpec(3, 1, b"/b", 2, "tmpfs", "x", "", b"/", 0)
    with built([NamespaceSpec(10, (root, first, second))]) as (fd,):
        mounts = {m.mountpoint: m.mnt_id for m in mountinfo(fd)}
        writer = in_mount(fd, b"/a/file")
        try:
            assert [found.path for found in holders(mounts[b"/a"])] == ["/a/file"]
            assert holders(mounts[b"/b"]) == []
        finally:
            os.close(writer)

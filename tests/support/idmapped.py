"""Real idmapped mounts: mount_setattr(2), MOUNT_ATTR_IDMAP; of a tmpfs from Linux 6.3 on."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ghostpool import _linux
from ghostpool.testing._forked import in_child, staying
from ghostpool.testing._namespace import leave_privately
from tests.support.usernamespaces import Maps, enter_new_user_namespace

_IDMAP = 0x100000
_SYS_MOUNT_SETATTR = 442
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def user_namespace(maps: Maps) -> Iterator[int]:
    """Descriptor of one with these maps, which nobody else is in."""
    with staying(lambda: enter_new_user_namespace(maps)) as pid:
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def mount_idmapped(source: bytes, point: bytes, owner: int, *, read_only: bool = True) -> None:
    """Mount what is at `source` once more, with the ids that the user namespace maps them to."""
    clone = _linux.open_tree(_linux.AT_FDCWD, source, _linux.OPEN_TREE_CLONE)
    attributes = struct.pack("QQQQ", _IDMAP | int(read_only), 0, 0, owner)
    size = ctypes.c_size_t(32)
    flags = ctypes.c_uint(0x1000)  # AT_EMPTY_PATH
    if _libc.syscall(_SYS_MOUNT_SETATTR, clone, b"", flags, attributes, size) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    _linux.move_mount(clone, _linux.AT_FDCWD, point)
    os.close(clone)


def lacks() -> str | None:
    """What is missing for idmapped mounts of a tmpfs whose ids the kernel tells."""

    def probe() -> bool:
        leave_privately()
        _linux.mount(b"probe", b"/tmp", b"tmpfs", 0)
        os.mkdir("/tmp/point")
        mount_idmapped(b"/tmp", b"/tmp/point", owner)
        fd = os.open("/tmp/point", os.O_PATH)
        identity = _linux.mount_identity(fd)
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        return _linux.idmap_of(identity.unique_id, _linux.mount_namespace_id(namespace)) is not None

    try:
        with user_namespace(("0 1000 1", "0 1000 1")) as owner:
            told = in_child(probe)
    except (OSError, AssertionError) as error:
        return f"idmapped mounts of a tmpfs, Linux 6.3 ({str(error).splitlines()[0]})"
    return None if told else "a kernel that tells the ids of idmapped mounts, Linux 6.15"

"""Files on a mount that is known by its descriptor, made while nothing covers them yet.

A place is looked up below the root of the one mount it is meant to be on, crossing neither links
nor mounts, and what is missing is made one component at a time: no path of the specs can lead
elsewhere. For `_build` only; errors are plain OSError that carry the name of their system call.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, Node
from ghostpool._linux import INSIDE

_T = TypeVar("_T")


def call(name: str, function: Callable[..., _T], *args: Any, **keywords: Any) -> _T:
    """`function`, with the name of its system call put on the error, as `_linux` does."""
    try:
        return function(*args, **keywords)
    except OSError as error:
        error.syscall = name  # type: ignore[attr-defined]  # read by build()
        raise


def refuse(syscall: str, code: int) -> OSError:
    error = OSError(code, os.strerror(code))
    error.syscall = syscall  # type: ignore[attr-defined]  # read by build()
    return error


def relative(path: bytes, base: bytes) -> bytes:
    """`path` below `base`, b"" if they are equal."""
    base = base.rstrip(b"/")
    if path.rstrip(b"/") != base and not path.startswith(base + b"/"):
        raise refuse("move_mount", errno.EINVAL)
    return path[len(base) :].strip(b"/")


def reach(base: int, path: bytes, create: bool, directory: bool) -> int:
    """Descriptor of `path` below `base`, on the same mount; what is missing is made."""
    try:
        return _linux.openat2(base, path or b".", os.O_PATH, INSIDE)
    except FileNotFoundError:
        if not create:
            raise
    here = os.dup(base)
    parts = [part for part in path.split(b"/") if part]
    for left, part in enumerate(parts, 1 - len(parts)):
        try:
            below = _linux.openat2(here, part, os.O_PATH, INSIDE)
        except FileNotFoundError:
            if left or directory:
                call("mkdirat", os.mkdir, part, 0o755, dir_fd=here)
            else:
                call("mknodat", os.mknod, part, stat.S_IFREG | 0o644, dir_fd=here)
            below = _linux.openat2(here, part, os.O_PATH, INSIDE)
        os.close(here)
        here = below
    return here


def make_nodes(mount: MountSpec, fd: int, at: Callable[[MountSpec, bytes], None]) -> None:
    """All nodes of a mount that carries no other one yet; directory times last."""
    for node in mount.nodes:
        at(mount, node.path)
        inner = relative(node.path, mount.mountpoint)
        directory, _, name = inner.rpartition(b"/")
        parent = reach(fd, directory, True, True)
        try:
            if node.hard_link_of is None:
                _make_node(node, name or b".", parent)
            else:
                old = relative(node.hard_link_of, mount.mountpoint)
                call(
                    "linkat", os.link, old, name, src_dir_fd=fd, dst_dir_fd=parent,
                    follow_symlinks=False,
                )  # fmt: skip
        finally:
            os.close(parent)
    for node in reversed(mount.nodes):
        if node.mtime_ns is not None and stat.S_ISDIR(node.mode):
            inner = relative(node.path, mount.mountpoint) or b"."
            times = (node.mtime_ns, node.mtime_ns)
            call("utimensat", os.utime, inner, ns=times, dir_fd=fd, follow_symlinks=False)


def _make_node(node: Node, name: bytes, parent: int) -> None:
    kind = stat.S_IFMT(node.mode)
    if kind == stat.S_IFDIR:
        try:
            call("mkdirat", os.mkdir, name, 0o755, dir_fd=parent)
        except FileExistsError:
            pass  # made as the root of a bind mount, or the root of this mount
    elif kind == stat.S_IFREG:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        file = call("openat", os.open, name, flags, 0o600, dir_fd=parent)
        try:
            call("pwrite", _linux.write_all, file, node.data, 0)
        finally:
            os.close(file)
    elif kind == stat.S_IFLNK:
        call("symlinkat", os.symlink, node.target or b"", name, dir_fd=parent)
    else:
        call("mknodat", os.mknod, name, kind | 0o600, node.rdev, dir_fd=parent)
    # Owner before mode: a change of owner takes setuid and setgid away.
    owner = (node.uid, node.gid)
    call("fchownat", os.chown, name, *owner, dir_fd=parent, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        call("fchmodat", os.chmod, name, stat.S_IMODE(node.mode), dir_fd=parent)
    if node.mtime_ns is not None and kind != stat.S_IFDIR:
        times = (node.mtime_ns, node.mtime_ns)
        call("utimensat", os.utime, name, ns=times, dir_fd=parent, follow_symlinks=False)

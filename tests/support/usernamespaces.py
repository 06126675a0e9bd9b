"""Targets that belong to a user namespace, and descriptors as the tasks of such a target see them.

Two kinds: `container` mounts its file systems inside, so that it owns them too; `copied` copies the
mounts of another target, as an unprivileged container does with the host's: those stay the host's,
and their flags are locked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, NamespaceSpec
from ghostpool.testing import Namespace
from ghostpool.testing._forked import fork, in_child, staying
from ghostpool.testing._namespace import enter, opened
from ghostpool.testing._targets import built
from tests.support.live import ROOT

MAP = "0 100000 65536"
"""As container engines map: root, and everybody that an image may name."""
Maps = tuple[str, str]


def enter_new_user_namespace(maps: Maps, source: int = -1) -> None:
    """Become root of a new one with these maps (in a child only).

    With `source`, also in a copy of that mount namespace.
    """
    here, there = os.pipe(), os.pipe()
    proc = os.open(f"/proc/{os.getpid()}", os.O_PATH)
    if source >= 0:
        enter(source)
    helper = fork()
    if helper == 0:
        # Maps of more than oneself are written by somebody above.
        os.read(here[0], 1)
        for name, text in zip(("uid_map", "gid_map"), maps, strict=True):
            with open(os.open(name, os.O_WRONLY, dir_fd=proc), "wb", buffering=0) as file:
                file.write(text.encode())
        os.write(there[1], b".")
        os._exit(0)
    _linux.unshare(_linux.CLONE_NEWUSER | (_linux.CLONE_NEWNS if source >= 0 else 0))
    os.write(here[1], b".")
    os.waitpid(helper, 0)
    assert os.read(there[0], 1) == b"."
    _linux.close_all((*here, *there, proc))
    _become_root()


def _become_root() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def join(namespace: int) -> None:
    """Become root of the container whose mount namespace this is (in a child only)."""
    owner = _linux.owning_user_namespace(namespace)
    enter(namespace)
    _linux.setns(owner, _linux.CLONE_NEWUSER)
    _become_root()


@contextmanager
def container(*mounts: MountSpec, maps: Maps = (MAP, MAP)) -> Iterator[Namespace]:
    """A process as root in a user namespace, in a mount namespace that it has made itself."""
    specs = [NamespaceSpec(10, (ROOT, *mounts))]
    with (
        built(specs, before=lambda: enter_new_user_namespace(maps)) as (fd,),
        staying(lambda: join(fd)) as pid,
    ):
        yield Namespace(pid, fd)


@contextmanager
def copied(
    source: Namespace, maps: Maps = (MAP, MAP), setup: Callable[[], object] | None = None
) -> Iterator[Namespace]:
    """A process as root in a user namespace with a copy of the mounts of `source`.

    `setup` is called there.
    """

    def prepare() -> None:
        enter_new_user_namespace(maps, source.fd)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        if setup is not None:
            setup()

    with staying(prepare) as pid, opened(pid) as namespace:
        yield namespace


def seen_inside(namespace: Namespace, fds: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    """What the container's root sees of descriptors that it has been given, by number."""
    flags = ("flags", "pos", "mnt_id")

    def look() -> dict[int, dict[str, Any]]:
        proc = os.open("/proc/self", os.O_PATH)
        own_fds = os.open("fd", os.O_PATH, dir_fd=proc)
        infos = os.open("fdinfo", os.O_PATH, dir_fd=proc)
        join(namespace.fd)
        found = {}
        for number, fd in fds.items():
            status = os.fstat(fd)
            with open(os.open(str(fd), os.O_RDONLY, dir_fd=infos)) as file:
                rows = dict(line.split(":\t") for line in file.read().splitlines())
            found[number] = {
                "owner": (status.st_uid, status.st_gid),
                "mode": status.st_mode,
                "links": status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0,
                "name": os.readlink(str(fd), dir_fd=own_fds),
                **{name: rows[name].strip() for name in flags},
            }
        return found

    return in_child(look)


def owners_inside(namespace: Namespace, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Owners of files as the container's root sees them."""

    def look() -> dict[str, tuple[int, int]]:
        join(namespace.fd)
        return {path: (os.lstat(path).st_uid, os.lstat(path).st_gid) for path in paths}

    return in_child(look)

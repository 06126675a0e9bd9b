"""Mounts that others hide, where the operator wants them restored into all the same.

A process in the namespace may be in a directory of such a mount, or hold one open: that leads to
the mount itself. Where there is none, a worker uncovers it in a private copy of the namespace, and
files are opened on the copy's mount.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

import anyio.to_thread

from ghostpool import _linux
from ghostpool._errors import Overmounted, PlanError
from ghostpool._model import MountHandle
from ghostpool._mountinfo import LiveMount
from ghostpool._mounttable import MountTable
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._protocol import Failure, MountFacts
from ghostpool._uncovering import Facts, facts_of
from ghostpool._workerclient import WorkerFailure

_MOST = 20_000
"""So many descriptors of others are looked at."""
_DEEPEST = 4096
"""Directories between one of them and the root of its mount."""


class Held(NamedTuple):
    """A descriptor of the root of a mount, and whose directory has led there."""

    fd: int
    holder: str
    """For people."""


async def uncover(
    pool: WorkerPool, planned: PlannedMount, identities: dict[MountHandle, int]
) -> str:
    """Open a mount that is hidden; how it was found, for people. PlanError: it can not be."""
    namespace, mount = planned.namespace, planned.mount
    found = await anyio.to_thread.run_sync(
        lambda: find_held(namespace.target.identity, mount.mnt_id), abandon_on_cancel=False
    )
    # Through a clone of its own, and never made writable itself: put back, it would have to be
    # found again.
    planned.private = planned.clone = True
    if found is not None:
        await _adopt(pool, planned, identities, found.fd)
        return f"it is hidden, and reached by {found.holder}"
    await _uncover_copy(pool, planned, identities)
    return (
        "it is hidden, so files are opened on a private copy of it: their mount id is the copy's, "
        "and their path in /proc/PID/fd begins at its root"
    )


async def _adopt(
    pool: WorkerPool, planned: PlannedMount, identities: dict[MountHandle, int], fd: int
) -> None:
    target = planned.namespace.target.index
    slot = target % pool.jobs
    try:
        fields, _ = await pool.call(slot, "adopt", planned.handle, target=target, fds=[fd])
    except WorkerFailure as error:
        os.close(fd)
        raise _error(error.failure) from error
    except BaseException:
        os.close(fd)
        raise
    facts = MountFacts(*fields)
    _keep(pool, slot, planned, {planned.handle: fd})
    identities[planned.handle] = facts.unique_id or facts.mnt_id
    planned.fsid = facts.fsid


async def _uncover_copy(
    pool: WorkerPool, planned: PlannedMount, identities: dict[MountHandle, int]
) -> None:
    target = planned.namespace.target.index
    slot = target % pool.jobs
    handles = planned.handle, planned.service
    chain = chain_of(planned.mount, planned.namespace.table)
    try:
        fields, fds = await pool.call(slot, "uncover", *handles, chain, target=target)
    except WorkerFailure as error:
        raise _error(error.failure) from error
    _keep(pool, slot, planned, dict(zip(handles, fds, strict=True)))
    # In the journal it is the hidden mount, by the number that the table has: the copy is gone by
    # the time that anybody reads that.
    identities[planned.handle] = planned.mount.mnt_id
    planned.fsid = MountFacts(*fields).fsid


def _keep(pool: WorkerPool, slot: int, planned: PlannedMount, fds: dict[MountHandle, int]) -> None:
    for handle, fd in fds.items():
        if handle in pool.mounts:  # what is mounted over it
            os.close(pool.mounts[handle])
        pool.mounts[handle] = fd
        pool.labels[handle] = planned.label
    pool.learned(slot, fds)


def chain_of(mount: LiveMount, table: MountTable) -> list[Facts]:
    """What the request to uncover a mount takes: itself, its parent, and so on up to the root."""
    chain: list[Facts] = []
    seen: set[int] = set()
    above: LiveMount | None = mount
    while above is not None and above.mnt_id not in seen:
        seen.add(above.mnt_id)
        chain.append(facts_of(above))
        above = table.with_id(above.parent)
    return chain


def _error(failure: Failure) -> PlanError:
    if failure.errno == errno.EINVAL and failure.step == "umount2":
        return Overmounted(
            "what hides it is locked: it came into this mount namespace from one of another user "
            "namespace, and can not be taken off in a copy either (mount_namespaces(7))"
        )
    if failure.errno == errno.ENOTUNIQ:
        return Overmounted("it is hidden, and can not be told from another mount that is like it")
    if failure.errno == errno.ENOSPC:
        return PlanError("no more mount namespaces are allowed: raise user.max_mnt_namespaces")
    return Overmounted(
        f"it is hidden, and can not be reached: {failure.step}: {os.strerror(failure.errno)}"
    )


def find_held(namespace: tuple[int, int], mnt_id: int) -> Held | None:
    """A mount by what the processes of a namespace (device and inode) hold: their cwd, root, and
    the directories that they have open."""
    looked = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = os.stat(f"/proc/{pid}/ns/mnt")
            if (status.st_dev, status.st_ino) != namespace:
                continue
            names = ["cwd", "root", *(f"fd/{name}" for name in os.listdir(f"/proc/{pid}/fd"))]
        except OSError:
            continue  # it has ended, or is not ours to look at
        for name in names:
            looked += 1
            if looked > _MOST:
                return None
            fd = _root_above(f"/proc/{pid}/{name}", mnt_id)
            if fd >= 0:
                return Held(fd, f"{name} of process {pid}")
    return None


def _root_above(path: str, mnt_id: int) -> int:
    """The root of the mount, from a directory on it; -1 if it is none.

    Where the root itself is covered, ".." of what is in it leads to the cover: then only the root
    will do.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        for _ in range(_DEEPEST):
            identity = _linux.mount_identity(fd)
            if identity.mnt_id != mnt_id:
                break
            if identity.mount_root:
                return os.dup(fd)
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = above
    except OSError:
        pass
    finally:
        os.close(fd)
    return -1

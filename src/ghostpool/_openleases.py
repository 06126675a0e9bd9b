"""Leases without a restore: make these mounts writable while I hold them, whatever dies.

What a restore has around its leases is around these too: mounts are opened and identified by the
kernel before anything is changed, a worker in their namespace changes their read-only bit, a
guardian and a journal know of every change before it is made, and what dead runs owe is undone
first. Mounts are called by their mount points; all that may ever be held are named at the start,
so that one that can not be made writable is refused before anybody relies on it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from ghostpool import _needs
from ghostpool._errors import (
    HostNamespace,
    MountNotFound,
    Overmounted,
    ReadOnlySuperblock,
    leaves,
)
from ghostpool._guard import Guard
from ghostpool._launch import launch
from ghostpool._lease import MountLeases, one_of, raise_besides
from ghostpool._leftovers import undo_leftovers
from ghostpool._linux import close_all
from ghostpool._match import Namespace
from ghostpool._model import MountHandle, NsId
from ghostpool._mountkernel import PoolMounts
from ghostpool._paths import text
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._process import ForkServer
from ghostpool._rlimit import all_descriptors
from ghostpool._rundir import open_run_directory
from ghostpool._stall import STALL_S
from ghostpool._survey import open_mounts, read_tables
from ghostpool._targets import Target, pin
from ghostpool._unbroken import unbroken

REVERT_S = 60.0
"""Deadline of one change of mounts, in seconds: longer than the pool insists on its own."""
_ONLY = NsId(0)
_BATCH = 200


@asynccontextmanager
async def open_leases(
    namespace: int | str,
    mounts: Iterable[str],
    *,
    run_dir: str | os.PathLike[str] | None = None,
    stall_s: float = STALL_S,
    mount_setattr: bool = True,
) -> AsyncIterator[MountLeases[str]]:
    """Leases on mounts of a live mount namespace, for the time of the block.

    Inside, `hold` makes mounts writable, once for all who hold them at one time, and the last of
    those puts them back; a mount that somebody else has made writable is left alone. If this
    process is killed, a guardian process puts them back, and if that is killed too, the next run of
    ghostpool or `ghostpool recover` does.

    `namespace` is the pid of a process in it, or the path of a namespace file. `mounts` are the
    mount points of all mounts that may be held, as its mountinfo has them: absolute, from the root
    of the namespace, the topmost mount where several lie on one mount point. `run_dir` is the
    directory of the journal, root's own, in place of the usual one. `stall_s` is in seconds: a
    process that is waited for and shows no sign of life for so long is killed, and the change
    fails. `mount_setattr=False`: change mounts as on Linux before 5.12, with mount(2).

    Raises PlanError before anything is changed: NamespaceNotFound; MountNotFound for what is no
    mount point there; Overmounted for one that another mount hides; ReadOnlySuperblock;
    HostNamespace, since no mount of the host's namespace, or of this process's own, is ever
    remounted; UnsupportedError for a namespace whose owner is a user namespace that is not below
    this process's own. KernelError: the journal can not be written. These errors come alone, not
    in a group.

    `hold` raises MountNotFound for what is not among `mounts`, before it changes anything,
    KernelError for a mount that can not be made writable, WorkerDied if the guardian has died, and
    RevertError, with the command that mends it, for one that can not be made read-only again
    because somebody keeps it busy. Such a mount is tried once more at the end of the block, which
    raises RevertError if it still is; its journal stays then.

    The end of the block puts everything back, even what somebody outside of it still holds, and is
    shielded from cancellation; so is every change, for 60 s at most. Cancelled while it waits, the
    block leaves no process, no descriptor and no change behind. Linux 5.6; CAP_SYS_ADMIN in the
    user namespace that owns the target. RLIMIT_NOFILE is raised to the hard limit meanwhile.
    """
    points = tuple(dict.fromkeys(mounts))
    directory_name = None if run_dir is None else os.fspath(run_dir)
    async with AsyncExitStack() as stack:
        _, hard = stack.enter_context(all_descriptors())
        _needs.check(_needs.mounts_alone(len(points)), 1, None, hard)
        (target,) = pin([str(namespace)]).values()
        stack.callback(close_all, target.fds)
        if target.is_host:
            raise HostNamespace(f"{target.label} is the host's, whose mounts are never remounted")
        server = await stack.enter_async_context(ForkServer.running(launch(), stall_s))
        await undo_leftovers(server, directory_name)
        pool = await stack.enter_async_context(
            WorkerPool.running(server, 1, [target], mount_setattr=mount_setattr)
        )
        handles, planned = await _find(pool, target, points)
        identities = await _open(pool, planned)
        directory = open_run_directory(directory_name)
        stack.callback(os.close, directory)
        guard = await stack.enter_async_context(
            Guard.running(server, pool, directory, secrets.token_hex(6), planned, identities)
        )
        kernel = PoolMounts(pool, planned, guard)
        kernel.identities.update(identities)
        named = _NamedMounts(kernel, handles)
        try:
            yield _NamedLeases(named, handles, target.label)
        except BaseException as error:
            told = {str(leaf) for leaf in leaves(error)}
            failures = [one for one in await named.close() if str(one) not in told]
            if not failures:
                raise
            raise_besides(error, failures)
        else:
            failures = await named.close()
            if failures:
                raise one_of(failures)


class _NamedLeases(MountLeases[str]):
    """Leases on the mounts of a few mount points, and on no other."""

    def __init__(self, kernel: _NamedMounts, known: Collection[str], where: str) -> None:
        super().__init__(kernel, revert_s=REVERT_S)
        self._mounts = kernel
        self._known = known
        self._where = where

    @asynccontextmanager
    async def hold(self, mounts: Iterable[str]) -> AsyncIterator[None]:
        """Keep all of `mounts` writable inside the block; see `MountLeases.hold`.

        MountNotFound: leases on one of them were not asked for. RuntimeError: the block of
        open_leases is over.
        """
        wanted = tuple(mounts)
        self._mounts.require_open()
        for mount in wanted:
            if mount not in self._known:
                known = ", ".join(self._known) or "none"
                raise MountNotFound(
                    f"{mount} is none of the mounts of {self._where} that these leases are for: "
                    + known
                )
        async with super().hold(wanted):
            yield


class _NamedMounts:
    """The kernel side of such leases: a MountKernel over mount points."""

    def __init__(self, kernel: PoolMounts, handles: Mapping[str, MountHandle]) -> None:
        self._kernel = kernel
        self._handles = handles
        self._closed = False

    def require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the block of open_leases is over")

    async def make_writable(self, mounts: Sequence[str]) -> Sequence[bool | Exception]:
        self.require_open()
        return await self._kernel.make_writable([self._handles[mount] for mount in mounts])

    async def make_read_only(self, mounts: Sequence[str]) -> Sequence[Exception | None]:
        return await self._kernel.make_read_only([self._handles[mount] for mount in mounts])

    async def close(self) -> list[Exception]:
        """Put back what is writable, whoever holds it, and change nothing any more."""
        self._closed = True
        return await unbroken(self._kernel.close)


async def _find(
    pool: WorkerPool, target: Target, points: Iterable[str]
) -> tuple[dict[str, MountHandle], dict[MountHandle, PlannedMount]]:
    """The mounts on these mount points now. PlanError: one of them can not be made writable."""
    table = (await read_tables(pool, [target]))[target.index]
    namespace = Namespace(_ONLY, target, table)
    handles: dict[str, MountHandle] = {}
    planned: dict[MountHandle, PlannedMount] = {}
    for point in points:
        path = os.fsencode(point)
        stack = table.stack(path)
        if not stack:
            holder = table.containing(path)
            hint = f": that is on the mount on {text(holder.mountpoint)}" if holder else ""
            raise MountNotFound(f"nothing is mounted on {point} in {target.label}{hint}")
        handle = MountHandle(2 * len(handles))
        one = PlannedMount(handle, namespace, stack[-1], clone=False)
        if one.mount.superblock_read_only:
            raise ReadOnlySuperblock(
                f"the superblock of {one.label} ({one.mount.fstype}) is read-only: no mount of it "
                "can be made writable"
            )
        handles[point], planned[handle] = handle, one
    return handles, planned


async def _open(
    pool: WorkerPool, planned: Mapping[MountHandle, PlannedMount]
) -> dict[MountHandle, int]:
    """Have the kernel find them; their identities. PlanError: one of them is hidden or gone."""
    identities: dict[MountHandle, int] = {}
    mounts = list(planned.values())
    for start in range(0, len(mounts), _BATCH):
        batch = mounts[start : start + _BATCH]
        for one, error in await open_mounts(pool, batch, identities):
            raise Overmounted(f"{one.label}: {error}") from error
    return identities


__all__ = ["open_leases"]

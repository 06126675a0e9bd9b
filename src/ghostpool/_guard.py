"""The coordinator's side of the guardian: what is owed is told before it is changed.

One message for each batch of changes, as for the workers; the guardian has it in the journal when
it answers. A guardian that died fails the restore, which is then undone by the coordinator itself;
telling it that something is settled is best effort, since undoing twice is harmless.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal, NamedTuple

import anyio

from ghostpool import _journal, _linux
from ghostpool._errors import KernelError, WorkerDied
from ghostpool._identity import boot_id, pid_namespace, start_time
from ghostpool._journal import (
    Anchor,
    Journal,
    JournalError,
    JournalFile,
    JournalMount,
    JournalNamespace,
    JournalRun,
)
from ghostpool._model import MountHandle
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._process import STOP_S, Child, ForkServer
from ghostpool._protocol import RemoveOp
from ghostpool._unbroken import unbroken
from ghostpool._workerclient import WorkerClient, WorkerFailure

log = logging.getLogger("ghostpool")
UNDO_S = 10.0
"""Seconds that a guardian may take to undo what this process can not."""
Key = tuple[str, int]


class Owed(NamedTuple):
    """How to undo one change: a mount to make read-only, or names to remove."""

    key: Key
    target: int
    mount: MountHandle
    removals: Sequence[RemoveOp] = ()
    anchor: Anchor | None = None
    """Where the names are."""
    directory: bytes = b""
    files: Sequence[tuple[bytes, int, int]] = ()
    """Name, device and inode: plain removals from `directory`, in short."""

    @property
    def record(self) -> tuple[object, ...]:
        """For the journal: key, kind, target, what, anchor."""
        what: object
        kind, what = "mount", self.mount
        if self.files:
            kind, what = "files", (self.mount, self.directory, self.files)
        elif self.removals:
            kind, what = "names", [tuple(removal) for removal in self.removals]
        return self.key, kind, self.target, what, self.anchor and tuple(self.anchor)


class Guard:
    """A running guardian and the journal that it keeps."""

    def __init__(self, worker: WorkerClient, pool: WorkerPool, directory: int, name: str) -> None:
        self._worker = worker
        self._pool = pool
        self._directory = directory
        self._name = name
        self._owed: set[Key] = set()
        """For the case that the guardian is not there to be asked."""
        self._settled: list[Key] = []
        """What is not told yet."""
        self._lock_fd = -1

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        server: ForkServer,
        pool: WorkerPool,
        directory: int,
        token: str,
        mounts: Mapping[MountHandle, PlannedMount],
        identities: Mapping[MountHandle, int],
    ) -> AsyncIterator[Guard]:
        """A guardian for the time of the block.

        `directory` is the run directory, for the journal, which `token` names. `mounts` are all
        that may come to be owed, `identities` their unique ids. At the end the journal is gone,
        unless something could not be undone: then it stays for `ghostpool recover`.
        KernelError: the journal can not be written, so nothing may be changed.
        """
        worker = await WorkerClient.forked(server, "guardian", mount_setattr=pool.mount_setattr)
        guard = cls(worker, pool, directory, token + _journal.SUFFIX)
        try:
            await guard._open_journal(token, _facts(token, mounts, identities))
            await guard._watch(server.pid, os.dup(server.pidfd))
            await pool.watch_with(guard.watch)
            yield guard
        finally:
            pool.watch_nobody()
            await unbroken(partial(guard._end, server.dead))
            if guard._lock_fd >= 0:
                os.close(guard._lock_fd)
            else:
                # A guardian that died while it made the journal: nothing was owed yet.
                _journal.discard(directory, guard._name)

    async def _end(self, nobody_forks: bool) -> None:
        """End the guardian, with the journal gone where nothing is owed."""
        if self._owed and nobody_forks:
            # Nobody here can undo it any more, but the guardian can.
            await self._leave_it_to_the_guardian()
        else:
            await self._close()
            await self._worker.stop()
        self._worker.kill()
        with anyio.move_on_after(STOP_S):
            await self._worker.child.wait()

    async def _open_journal(self, token: str, records: Sequence[Hashable]) -> None:
        try:
            _, (self._lock_fd,) = await self._worker.call(
                "journal", token, records, fds=[self._directory]
            )
        except WorkerFailure as error:
            raise self._not_written(error) from error

    def _not_written(self, error: WorkerFailure) -> KernelError:
        failure = error.failure
        return KernelError(
            failure.errno,
            "write",
            self._name,
            advice="the journal in the run directory can not be written",
        )

    async def watch(self, child: Child) -> None:
        """A worker whose end the guardian must see before it undoes anything."""
        if child.pidfd < 0:
            return  # it has ended already
        await self._watch(child.pid, os.dup(child.pidfd))

    async def _watch(self, pid: int, pidfd: int) -> None:
        try:
            await self._worker.call("watch", pid, fds=[pidfd])
        finally:
            os.close(pidfd)

    async def owe(self, records: Sequence[Owed]) -> None:
        """Returns when it is in the journal. WorkerDied, KernelError: nothing may be changed."""
        if not records:
            return
        settled, self._settled = self._settled, []
        request = [record.record for record in records]
        targets = {record.target: self._pool.target_fd(record.target) for record in records}
        mounts = {record.mount: self._pool.mounts[record.mount] for record in records}
        self._owed.update(record.key for record in records)
        try:
            await self._worker.call("owe", request, settled, namespaces=targets, mounts=mounts)
        except WorkerFailure as error:
            raise self._not_written(error) from error

    def settle_later(self, keys: Iterable[Key]) -> None:
        """These are undone; it is told with what is owed next, or by `tell_settled`.

        Undoing twice is harmless as long as no other file has the name and the inode.
        """
        self._owed.difference_update(keys)
        self._settled += keys

    async def tell_settled(self) -> None:
        """Tell now what `settle_later` was told."""
        if self._settled:
            keys, self._settled = self._settled, []
            await self.settle(keys)

    async def settle(self, keys: Collection[Key] | Literal["names"], *, must: bool = False) -> None:
        """These are undone, or were never done; or all names are.

        With `must` they are to stay: WorkerDied, KernelError if the journal can not be told so.
        """
        self._owed.difference_update(
            [key for key in self._owed if key[0] != "mount"] if keys == "names" else keys
        )
        try:
            await self._worker.call("settle", keys if keys == "names" else list(keys), must)
        except WorkerFailure as error:
            if must:
                raise self._not_written(error) from error
        except WorkerDied:
            if must:
                raise

    async def _leave_it_to_the_guardian(self) -> None:
        """As when this process dies: its socket is closed, and it undoes what is owed."""
        pidfd = os.dup(self._worker.child.pidfd) if self._worker.child.pidfd >= 0 else -1
        self._worker.let_go()
        if pidfd < 0:
            return
        try:
            with anyio.move_on_after(UNDO_S):
                await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def _close(self) -> None:
        """Take the journal away if nothing is owed."""
        try:
            await self._worker.call("close")
        except (WorkerDied, WorkerFailure):
            if self._lock_fd >= 0:
                self._close_without_guardian()

    def _close_without_guardian(self) -> None:
        """It has died, and what was settled since is not in the journal."""
        if not self._owed:
            _journal.remove(self._directory, self._name)
            return
        try:
            journal = Journal.read(self._lock_fd)
            os.ftruncate(self._lock_fd, journal.end)
            file = JournalFile(self._directory, self._lock_fd, self._name, journal.end)
            file.append("settle", [key for key in journal.debts if key not in self._owed])
        except (OSError, JournalError) as error:
            log.warning("the journal of this run says too much is owed: %s", error)


def _facts(
    token: str, planned: Mapping[MountHandle, PlannedMount], identities: Mapping[MountHandle, int]
) -> list[Hashable]:
    """The records that say who and what is meant by the numbers of this run."""
    pid = os.getpid()
    run = JournalRun(token, pid, start_time(pid), pid_namespace(), boot_id(), int(time.time()))
    targets = {p.namespace.target.index: p.namespace.target for p in planned.values()}
    # Of a mount whose flag is locked, names can be removed only where its lender is.
    targets |= {p.lent_in.index: p.lent_in for p in planned.values() if p.lent_in is not None}
    namespaces = [
        JournalNamespace(
            target.index,
            target.identity[1],
            _linux.mount_namespace_id(target.fd),
            target.label,
            target.enter,
        )
        for target in targets.values()
    ]
    mounts = []
    for handle, one in planned.items():
        mount, identity = one.mount, identities.get(handle, 0)
        mounts.append(
            JournalMount(
                handle,
                one.namespace.target.index,
                identity if identity != mount.mnt_id else 0,
                mount.mnt_id,
                mount.mountpoint,
                mount.root,
                mount.device,
                int(mount.attributes),  # no flag: marshal takes nothing but plain values
                one.fsid,
            )
        )
    return [
        ("run", *run),
        *(("namespace", *fields) for fields in namespaces),
        *(("mount", *fields) for fields in mounts),
    ]

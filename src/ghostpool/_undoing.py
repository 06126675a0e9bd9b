"""Undoing what one dead run owes, from its journal.

Every mount is identified before it is touched, every name by its directory and its inode. What is
gone needs no undoing; what somebody has changed meanwhile is left alone and said, and so is what
can only not be found from here: it stays in the journal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio

from ghostpool import _linux
from ghostpool._covered import chain_of
from ghostpool._errors import GhostpoolError
from ghostpool._journal import Anchor, Debt, Journal, JournalFile, JournalMount
from ghostpool._mend import describe_holders, remount_command
from ghostpool._model import MountHandle, live_of, service_of
from ghostpool._mountinfo import LiveMount, option_names
from ghostpool._mountkernel import revert
from ghostpool._mounttable import MountTable
from ghostpool._mountwork import GONE
from ghostpool._namespaces import find_namespaces
from ghostpool._paths import is_below, join, relative_to, text
from ghostpool._pool import INSIST_S, WorkerPool
from ghostpool._process import ForkServer
from ghostpool._protocol import OTHER, REMOVED, Look, MountFacts, Removed, RemoveOp
from ghostpool._survey import read_tables
from ghostpool._targets import Target
from ghostpool._workerclient import WorkerFailure

_JOBS = 8
_NAME_S = 0.5
"""Seconds that each name may take: a slow file system is not a hung one."""
_RDONLY = int(_linux.Attr.RDONLY)
_T = TypeVar("_T")


@dataclass(slots=True)
class RecoveredRun:
    """What became of one journal."""

    token: str
    pid: int = 0
    begun: int = 0
    """Seconds since 1970."""
    state: str = "recovered"
    """`recovered`: nothing is owed any more; `unfinished`: something is, see `refused`; `alive`:
    the run goes on; `unreadable`: see `refused`. With `dry_run`, what it would become."""
    done: list[str] = field(default_factory=list)
    """What was undone, or found to need no undoing, as text."""
    refused: list[str] = field(default_factory=list)
    """What was not, and why."""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.token,
            "pid": self.pid,
            "begun": self.begun,
            "state": self.state,
            "done": self.done,
            "refused": self.refused,
        }


class _Left(Exception):
    """This debt stays, for the reason in the argument."""


class _Locked(Exception):
    """The read-only flag of this mount can not be cleared, of no clone of it either."""


class _Hidden(_Left):
    """It is where it was, below another mount."""


class _Gone(Exception):
    """There is nothing to undo any more, for the reason in the argument."""


@dataclass(slots=True)
class _Place:
    """A live mount that names are removed through."""

    target: int
    mount: LiveMount
    handle: MountHandle
    below: bytes
    """What the journal's mount has as its root, relative to this one's."""


class Undoing:
    """The debts of one dead run; `file` is None to only look."""

    def __init__(
        self, server: ForkServer, journal: Journal, run: RecoveredRun, file: JournalFile | None
    ) -> None:
        self._server = server
        self._journal = journal
        self._run = run
        self._file = file
        self._pool: WorkerPool
        self._tables: dict[int, MountTable] = {}
        self._found: dict[Hashable, Any] = {}
        """What was looked for once, or why it can not be had; see `_once`."""
        self._saw_all = False
        """A namespace that was not found does not exist any more."""
        self._by_device: dict[int, list[tuple[int, LiveMount]]] | None = None
        self._handles = 2 * len(journal.mounts) + 2

    async def undo(self) -> None:
        """Undo all debts that can be undone; the journal keeps the others."""
        namespaces = self._journal.namespaces
        fds, self._saw_all = find_namespaces(namespaces.values())
        # Names may be on a file system that we can see ourselves, when their namespace is gone.
        own = max(namespaces, default=0) + 1
        fds[own] = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            targets = [self._target(number, fd) for number, fd in fds.items()]
            jobs = min(_JOBS, len(targets))
            async with WorkerPool.running(self._server, jobs, targets) as pool:
                self._pool = pool
                self._tables = await read_tables(pool, targets)
                for key in self._journal.debts.undoing():
                    await self._settle(key, self._journal.debts[key])
        finally:
            _linux.close_all(fds.values())

    def _target(self, number: int, fd: int) -> Target:
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        known = self._journal.namespaces.get(number)
        label = known.label if known else "this namespace"
        return Target(number, fd, identity, label, is_host=known is None, enter=None)

    async def _settle(self, key: Any, debt: Debt) -> None:
        undo = self._undo_mount if debt.kind == "mount" else self._undo_names
        try:
            said = await undo(debt)
        except _Gone as reason:
            said = [str(reason)]
        except (_Left, GhostpoolError, WorkerFailure) as reason:
            self._run.refused.append(str(reason))
            return
        self._run.done += said
        self._journal.debts.settle([key])
        if self._file is not None:
            try:
                self._file.append("settle", [key])
            except OSError:
                pass  # undoing twice is harmless

    # -- mounts ---------------------------------------------------------------------------------

    def _label(self, mount: JournalMount) -> str:
        namespace = self._journal.namespaces[mount.namespace]
        return f"{text(mount.mountpoint)} in {namespace.label}"

    async def _once(self, key: Hashable, find: Callable[[], Awaitable[_T]]) -> _T:
        """What `find` gave when it was first asked for `key`, or raised. _Gone, _Left."""
        if key not in self._found:
            try:
                self._found[key] = await find()
            except (_Gone, _Left) as reason:
                self._found[key] = reason
        found: _T | Exception = self._found[key]
        if isinstance(found, Exception):
            raise found
        return found

    async def _live(self, handle: int) -> LiveMount:
        """The mount as it is now, identified and open. _Gone, _Left."""
        mount = self._journal.mounts[handle]
        return await self._once(("mount", handle), lambda: self._identify(mount))

    async def _identify(self, mount: JournalMount) -> LiveMount:
        label = self._label(mount)
        table = self._tables.get(mount.namespace)
        if table is None:
            if self._saw_all:
                raise _Gone(f"{label}: its namespace is gone")
            raise _Left(
                f"{label}: its namespace can not be found from here: recover in the initial pid "
                "and user namespaces (Linux 6.12 lists all), or give the run up with --forget"
            )
        live = table.with_id(mount.mnt_id)
        if live is None:
            raise _Gone(f"{label}: it was taken off")
        facts = await self._open(mount.namespace, MountHandle(mount.handle), live, label)
        if mount.unique_id and facts.unique_id:
            # Never used twice, so it alone decides: a renamed root or a moved mount is the same.
            if facts.unique_id != mount.unique_id:
                raise _Gone(f"{label}: it was taken off, another mount has its number")
        elif live.device != mount.device:
            raise _Gone(f"{label}: it was taken off, another mount has its number")
        elif (live.root, live.mountpoint) != (mount.root, mount.mountpoint):
            raise _Left(f"{label}: it, or another mount with its number, was moved or renamed")
        return live

    async def _open(
        self, target: int, handle: MountHandle, live: LiveMount, label: str
    ) -> MountFacts:
        try:
            (fields,), fds = await self._pool.insist(
                self._slot(target), "open_mounts", [(handle, live.mountpoint)], target=target
            )
        except WorkerFailure as error:
            why = os.strerror(error.failure.errno)
            raise _Left(f"{label}: no path leads to it any more: {why}") from error
        (self._pool.mounts[handle],) = fds
        self._pool.learned(self._slot(target), [handle])
        facts = MountFacts(*fields)
        if facts.mnt_id != live.mnt_id:
            raise _Hidden(f"{label}: mount {facts.mnt_id} hides it: take that off first")
        return facts

    def _slot(self, target: int) -> int:
        return target % self._pool.jobs

    async def _undo_mount(self, debt: Debt) -> list[str]:
        mount = self._journal.mounts[debt.what]
        live = await self._live(debt.what)
        label = self._label(mount)
        if live.read_only:
            return [f"{label}: is read-only"]
        if live.attributes | _RDONLY != mount.attributes | _RDONLY:
            now, then = (",".join(option_names(a)) for a in (live.attributes, mount.attributes))
            raise _Left(
                f"{label}: somebody has changed its options since ({now}, were {then}); to put it "
                f"back: {self._mend_command(mount, live)}"
            )
        if self._file is None:
            return [f"{label}: to be made read-only again, unless somebody keeps it busy"]
        return [await self._make_read_only(mount, label)]

    async def _make_read_only(self, mount: JournalMount, label: str) -> str:
        """What was done, or that nothing is left to put back. _Left: it stays writable."""
        handle = MountHandle(mount.handle)
        answer = (await revert(self._pool, mount.namespace, [handle]))[handle]
        if answer is None:
            return f"{label}: read-only again"
        if answer[0] in GONE:
            return f"{label}: it was taken off"
        problem = f"{label} stays writable: {answer[1]}: {os.strerror(answer[0])}"
        if answer[0] == errno.EBUSY:
            problem += "; held for writing by " + await describe_holders(mount.mnt_id)
        live = await self._live(mount.handle)
        raise _Left(f"{problem}; to put it back: {self._mend_command(mount, live)}")

    def _mend_command(self, mount: JournalMount, live: LiveMount) -> str:
        enter = self._journal.namespaces[mount.namespace].enter
        return remount_command(enter, live.mountpoint, mount.attributes)

    # -- names ----------------------------------------------------------------------------------

    async def _undo_names(self, debt: Debt) -> list[str]:
        operations = [RemoveOp(*fields) for fields in debt.removals]
        assert debt.anchor is not None
        anchor = Anchor(*debt.anchor)
        mount = self._journal.mounts[live_of(operations[0].mount)]
        label = self._label(mount)
        async for place in self._places(mount, anchor):
            try:
                return await self._undo_names_at(place, anchor, mount, operations)
            except _Locked:
                continue
        raise _Left(
            f"{label}: its read-only flag is locked, and no other mount leads there from here"
        )

    async def _undo_names_at(
        self, place: _Place, anchor: Anchor, mount: JournalMount, operations: list[RemoveOp]
    ) -> list[str]:
        """_Locked: not through this mount."""
        label = self._label(mount)
        await self._check_anchor(place, anchor, label)
        where = [f"{text(join(o.directory, o.name))} on mount {label}" for o in operations]
        if self._file is None:
            return [f"{one}: to be removed, if it is there" for one in where]
        async with self._service(mount, place, label) as service:
            moved = [
                operation._replace(mount=service, directory=join(place.below, operation.directory))
                for operation in operations
            ]
            answers, _ = await self._pool.insist(
                self._slot(place.target),
                "remove",
                [tuple(operation) for operation in moved],
                target=place.target,
                mounts=[service],
                deadline_s=INSIST_S + _NAME_S * len(operations),
            )
        return self._said(where, label, [Removed(*fields) for fields in answers])

    def _said(self, where: list[str], label: str, answers: Iterable[Removed]) -> list[str]:
        said = []
        resisted: list[str] = []
        for name, answer in zip(where, answers, strict=True):
            if answer.errno:
                resisted.append(f"{name}: {answer.step}: {os.strerror(answer.errno)}")
            elif answer.found == REMOVED:
                said.append(f"{name}: removed")
            elif answer.found == OTHER:
                said.append(f"{name}: another file has the name now, left alone")
            said += [
                f"{text(path)} on mount {label}: not removed, something else is in it now"
                for path in answer.left
            ]
        if resisted:
            self._run.done += said
            raise _Left("; ".join(resisted))
        return said

    async def _places(self, mount: JournalMount, anchor: Anchor) -> AsyncIterator[_Place]:
        """Through what the names can be reached: the mount itself, then others of its kind.

        _Gone, _Left: there is none, or none of them can be used.
        """
        gone: _Gone | None = None
        live = None
        try:
            live = await self._live(mount.handle)
        except _Hidden as reason:
            find = partial(self._uncovered, mount, reason)
            yield await self._once(("uncovered", mount.handle), find)
            return
        except _Gone as reason:
            gone = reason
        if live is not None:
            yield _Place(mount.namespace, live, MountHandle(mount.handle), b"")
        path = join(mount.root.strip(b"/"), anchor.path)
        unusable: _Left | None = None
        for target, live in self._mounts_of(mount.device):
            root = live.root.strip(b"/")
            if not is_below(path, root) or not is_below(mount.root.strip(b"/"), root):
                continue
            try:
                key = ("other", target, live.mnt_id)
                handle, facts = await self._once(key, partial(self._open_other, target, live))
            except _Left as reason:
                unusable = reason
                continue
            if facts.fsid != mount.fsid or not (facts.fsid or os.major(live.device)):
                continue  # another file system has the device number by now, or may have
            if live.superblock_read_only:
                unusable = _Left(f"{text(live.mountpoint)}: its superblock is read-only now")
                continue
            yield _Place(target, live, handle, relative_to(mount.root.strip(b"/"), root))
        why = unusable or gone
        if why is not None:
            raise why

    async def _uncovered(self, mount: JournalMount, reason: _Hidden) -> _Place:
        """The mount as a private copy of its namespace has it, which will do for names."""
        table = self._tables[mount.namespace]
        live = table.with_id(mount.mnt_id)
        here = (live.device, live.root, live.mountpoint) if live is not None else None
        if live is None or here != (mount.device, mount.root, mount.mountpoint):
            raise reason
        handles = MountHandle(self._handles), service_of(MountHandle(self._handles))
        self._handles += 2
        slot = self._slot(mount.namespace)
        chain = chain_of(live, table)
        try:
            _, fds = await self._pool.insist(
                slot, "uncover", *handles, chain, target=mount.namespace
            )
        except WorkerFailure:
            raise reason from None
        self._pool.mounts.update(zip(handles, fds, strict=True))
        self._pool.learned(slot, handles)
        return _Place(mount.namespace, live, handles[0], b"")

    def _mounts_of(self, device: int) -> list[tuple[int, LiveMount]]:
        """Mounts of a file system in all namespaces that were found, with their targets."""
        if self._by_device is None:
            self._by_device = {}
            for target, table in self._tables.items():
                for live in table:
                    self._by_device.setdefault(live.device, []).append((target, live))
        return self._by_device.get(device, [])

    async def _open_other(self, target: int, live: LiveMount) -> tuple[MountHandle, MountFacts]:
        """Open a mount that the journal does not know."""
        handle = MountHandle(self._handles)
        self._handles += 2
        return handle, await self._open(target, handle, live, text(live.mountpoint))

    async def _check_anchor(self, place: _Place, anchor: Anchor, label: str) -> None:
        directory = join(place.below, anchor.path)
        answers, _ = await self._pool.insist(
            self._slot(place.target),
            "look",
            [(place.handle, directory, ())],
            target=place.target,
            mounts=[place.handle],
        )
        look = Look(*answers[0])
        where = f"{text(anchor.path) or '.'} on mount {label}"
        if look.errno:
            raise _Left(f"{where}: {os.strerror(look.errno)}")
        if look.existing < len(directory.split(b"/") if directory else []):
            raise _Gone(f"{where}: the directory is gone")
        if (look.device, look.inode) != (anchor.device, anchor.inode):
            raise _Left(f"{where}: another directory has the name now")

    @asynccontextmanager
    async def _service(
        self, mount: JournalMount, place: _Place, label: str
    ) -> AsyncIterator[MountHandle]:
        """The side to remove names through: a writable clone where one can be made.

        Where none can, the mount itself, which is made writable for it if it is not, as the run
        had done, and is owed until it is put back.
        """
        service = service_of(place.handle)
        if service not in self._pool.mounts:
            (failure,), fds = await self._pool.insist(
                self._slot(place.target),
                "clone",
                [(place.handle, service)],
                target=place.target,
                mounts=[place.handle],
            )
            if failure == (errno.EPERM, "mount_setattr"):
                raise _Locked
            if failure is not None:
                async with self._writable(mount, place, label):
                    yield place.handle
                return
            (self._pool.mounts[service],) = fds
            self._pool.learned(self._slot(place.target), [service])
        yield service

    @asynccontextmanager
    async def _writable(
        self, mount: JournalMount, place: _Place, label: str
    ) -> AsyncIterator[None]:
        assert self._file is not None
        if place.handle != mount.handle:
            raise _Left(f"{label}: only a mount of which no clone can be made leads there now")
        key = ("mount", mount.handle)
        if key not in self._journal.debts:
            owed = (key, "mount", mount.namespace, mount.handle, None)
            self._file.append("owe", [owed], sync=True)
        request = [(mount.handle, mount.unique_id or mount.mnt_id)]
        (answer,), _ = await self._pool.insist(
            self._slot(mount.namespace),
            "make_writable",
            request,
            target=mount.namespace,
            mounts=[place.handle],
        )
        changed = answer[0]
        if changed is None:
            raise _Left(f"{label}: {answer[2]}: {os.strerror(answer[1])}")
        try:
            yield
        finally:
            if changed:
                with anyio.CancelScope(shield=True):
                    await self._make_read_only(mount, label)
            if key not in self._journal.debts:
                self._file.append("settle", [key])

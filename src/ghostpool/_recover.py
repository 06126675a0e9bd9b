"""The other story: what dead runs still owe, undone from their journals.

A run is dead when nobody holds the lock of its journal. What it owes is undone in reverse order,
in those of its namespaces that still exist. Every mount is identified before it is touched, every
name by its directory and its inode: what somebody changed meanwhile is left alone, said, and stays
in the journal. What is gone (a mount, a namespace, with a reboot all of them) needs no undoing; but
names may lie on a file system that outlives the namespace they were made in, so they are looked for
through any other mount of it that is left.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from ghostpool import _journal, _linux
from ghostpool._errors import GhostpoolError, PlanError
from ghostpool._identity import boot_id, pid_namespace, start_time
from ghostpool._journal import (
    Anchor,
    Debt,
    Journal,
    JournalError,
    JournalFile,
    JournalMount,
    JournalProcess,
)
from ghostpool._mend import describe_holders
from ghostpool._model import MountHandle, live_of, service_of
from ghostpool._mountinfo import LiveMount, MountTable, option_names
from ghostpool._namespaces import find_namespaces
from ghostpool._paths import is_below, join, relative_to, text
from ghostpool._pool import WorkerPool
from ghostpool._process import ForkServer, WorkerFailure
from ghostpool._protocol import OTHER, REMOVED, Look, MountFacts, Removed, RemoveOp
from ghostpool._survey import read_tables
from ghostpool._targets import Target

log = logging.getLogger("ghostpool")
BUSY_S = 2.0
"""Seconds that a busy mount is tried again."""
DEATH_S = 5.0
"""Seconds that killed workers of the dead run have to be gone."""
_JOBS = 8
_RDONLY = int(_linux.Attr.RDONLY)


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


@contextmanager
def _locked(directory: int, name: str) -> Iterator[int | None]:
    """Descriptor of a dead run's journal, which is ours alone then; None: its run is alive.

    FileNotFoundError: it has just been taken away.
    """
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, name)
        yield fd
    finally:
        os.close(fd)


def forget(directory: int, token: str) -> None:
    """Take a dead run's journal away without undoing anything. PlanError: it can not be."""
    try:
        with _locked(directory, token + _journal.SUFFIX) as fd:
            if fd is None:
                raise PlanError(f"run {token} is alive")
            _journal.remove(directory, token + _journal.SUFFIX)
    except OSError as error:
        raise PlanError(f"run {token}: {error.strerror}: ghostpool recover lists them") from error


async def recover_pending(server: ForkServer, directory: int) -> None:
    """What every command that changes things does first; says in the log what it did."""
    for run in await recover(server, directory):
        for line in run.done:
            log.info("left by run %s: %s", run.token, line)
        if run.done:
            log.warning("left by run %s: undone or gone: %d", run.token, len(run.done))
        for line in run.refused:
            log.warning("left by run %s, and not undone: %s", run.token, line)


async def recover(
    server: ForkServer, directory: int, *, dry_run: bool = False
) -> list[RecoveredRun]:
    """Undo what all dead runs owe; one result for each journal in the run directory.

    `dry_run` looks and says what would be done, and changes nothing.
    """
    runs = []
    for name in _journal.pending(directory):
        try:
            runs.append(await _recover_one(server, directory, name, dry_run))
        except FileNotFoundError:
            continue
        except (GhostpoolError, OSError) as error:
            # One that makes trouble does not keep the others from being undone.
            token = name.removesuffix(_journal.SUFFIX)
            runs.append(RecoveredRun(token, state="unfinished", refused=[str(error)]))
    if not dry_run:
        _sweep(directory)
    return runs


async def _recover_one(
    server: ForkServer, directory: int, name: str, dry_run: bool
) -> RecoveredRun:
    with _locked(directory, name) as fd:
        if fd is not None:
            return await _undo(server, directory, name, fd, dry_run)
    run = RecoveredRun(name.removesuffix(_journal.SUFFIX), state="alive")
    if not dry_run and await anyio.to_thread.run_sync(_wake_guardian, directory, name, run):
        with _locked(directory, name) as fd:
            if fd is not None:
                return await _undo(server, directory, name, fd, dry_run)
    return run


async def _undo(
    server: ForkServer, directory: int, name: str, fd: int, dry_run: bool
) -> RecoveredRun:
    run = RecoveredRun(name.removesuffix(_journal.SUFFIX))
    try:
        journal = Journal(os.pread(fd, os.fstat(fd).st_size, 0))
    except JournalError as error:
        run.state = "unreadable"
        run.refused.append(f"its journal: {error}")
        return run
    run.pid, run.begun = journal.run.pid, journal.run.begun
    file = JournalFile(directory, fd, name, journal.end)
    if journal.run.boot_id != boot_id():
        run.done += _after_reboot(journal)
        journal.debts.clear()
    elif not await anyio.to_thread.run_sync(_end_processes, journal, dry_run):
        run.refused.append("a worker of it can not be killed (uninterruptible): try again later")
    elif journal.debts:
        await _Undoing(server, journal, run, None if dry_run else file).undo()
    if journal.is_cut:
        run.done.append("its journal ends in half a record, which had not been acted on yet")
    if journal.debts:
        run.state = "unfinished"
    elif not dry_run:
        file.remove()
    return run


def _after_reboot(journal: Journal) -> Iterator[str]:
    """The mounts are gone; of names only the operator can know what holds them now."""
    yield "the machine was started anew since: no mount of then is left"
    for debt in journal.debts.values():
        if debt.kind != "names":
            continue
        for operation in (RemoveOp(*fields) for fields in debt.what):
            mount = journal.mounts[live_of(operation.mount)]
            path = text(join(operation.directory, operation.name))
            yield f"{path} may be left, if what was on {text(mount.mountpoint)} is on a disk"


# -- The dead run's children --------------------------------------------------------------------


def _wake_guardian(directory: int, name: str, run: RecoveredRun) -> bool:
    """Whether a guardian that holds the lock alone has ended, having undone what it could.

    One that was stopped is continued: nobody else can, since its lock keeps us off.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        journal = Journal(os.pread(fd, os.fstat(fd).st_size, 0))
    except JournalError:
        return False  # it is being written
    finally:
        os.close(fd)
    run.pid, run.begun = journal.run.pid, journal.run.begun
    if journal.guardian is None or journal.run.pid_namespace != pid_namespace():
        return False
    owner = _pidfd(JournalProcess(run.pid, journal.run.start_time))
    if owner >= 0:
        os.close(owner)
        return False
    guardian = _pidfd(journal.guardian)
    if guardian < 0:
        return False
    try:
        signal.pidfd_send_signal(guardian, signal.SIGCONT)
        if _has_ended(guardian, time.monotonic() + DEATH_S):
            return True
    except ProcessLookupError:
        return True
    finally:
        os.close(guardian)
    run.done.append(f"its guardian, process {journal.guardian.pid}, is undoing it")
    return False


def _end_processes(journal: Journal, dry_run: bool) -> bool:
    """Whether all workers of the run are gone; kills those that are not."""
    if journal.run.pid_namespace != pid_namespace():
        return True  # their pids mean nothing here; they die with their fork server
    pidfds = [fd for one in journal.processes if (fd := _pidfd(one)) >= 0]
    try:
        give_up = time.monotonic() + DEATH_S
        for pidfd in pidfds:
            if not dry_run:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return all(_has_ended(pidfd, give_up) for pidfd in pidfds)
    finally:
        _linux.close_all(pidfds)


def _pidfd(process: JournalProcess) -> int:
    """A descriptor of the very process, or -1: a pid alone may be another one's by now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return -1
    try:
        if start_time(process.pid) == process.start_time:
            return pidfd
    except ProcessLookupError:
        pass
    os.close(pidfd)
    return -1


def _has_ended(pidfd: int, give_up: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, give_up - time.monotonic()) * 1000))


def _sweep(directory: int) -> None:
    """Take away what dead runs leave besides: sockets, and journals that never got their name."""
    for name in os.listdir(directory):
        if name.startswith(".") and name.endswith(_journal.SUFFIX):
            try:
                with _locked(directory, name) as fd:
                    if fd is not None:
                        os.unlink(name, dir_fd=directory)
            except OSError:
                pass
        elif name.endswith(".sock"):
            _remove_dead_socket(directory, name)


def _remove_dead_socket(directory: int, name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            os.unlink(name, dir_fd=directory)
        except OSError:
            pass  # it is listened to (and busy), or no socket


# -- Undoing ------------------------------------------------------------------------------------


class _Left(Exception):
    """This debt stays, for the reason in the argument."""


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


class _Undoing:
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
        self._found: dict[int, LiveMount | Exception] = {}
        self._handles = 2 * len(journal.mounts) + 2

    async def undo(self) -> None:
        """Undo all debts that can be undone; the journal keeps the others."""
        namespaces = self._journal.namespaces
        fds = find_namespaces(namespaces.values())
        # Names may be on a file system that we can see ourselves, when their namespace is gone.
        own = max(namespaces, default=0) + 1
        fds[own] = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            targets = [self._target(number, fd) for number, fd in fds.items()]
            jobs = min(_JOBS, len(targets))
            async with WorkerPool.running(self._server, jobs, targets) as pool:
                self._pool = pool
                self._tables = await read_tables(pool, targets)
                for key, debt in reversed(list(self._journal.debts.items())):
                    await self._settle(key, debt)
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

    async def _live(self, handle: int) -> LiveMount:
        """The mount as it is now, identified and open. _Gone, _Left."""
        if handle not in self._found:
            try:
                self._found[handle] = await self._identify(self._journal.mounts[handle])
            except (_Gone, _Left) as reason:
                self._found[handle] = reason
        found = self._found[handle]
        if isinstance(found, Exception):
            raise found
        return found

    async def _identify(self, mount: JournalMount) -> LiveMount:
        label = self._label(mount)
        table = self._tables.get(mount.namespace)
        if table is None:
            raise _Gone(f"{label}: its namespace is gone")
        live = next((m for m in table if m.mnt_id == mount.mnt_id), None)
        if live is None:
            raise _Gone(f"{label}: it was taken off")
        if (live.root, live.device) != (mount.root, mount.device) or (
            not mount.unique_id and live.mountpoint != mount.mountpoint
        ):
            raise _Gone(f"{label}: it was taken off, another mount has its number")
        facts = await self._open(mount.namespace, MountHandle(mount.handle), live, label)
        if mount.unique_id and facts.unique_id and facts.unique_id != mount.unique_id:
            raise _Gone(f"{label}: it was taken off, another mount has its number")
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
            raise _Left(f"{label}: mount {facts.mnt_id} hides it: take that off first")
        return facts

    def _slot(self, target: int) -> int:
        return target % self._pool.jobs

    async def _undo_mount(self, debt: Debt) -> list[str]:
        mount = self._journal.mounts[debt.what]
        live = await self._live(debt.what)
        label = self._label(mount)
        if live.read_only:
            return [f"{label}: is read-only"]
        if live.attributes | _RDONLY != mount.attributes:
            now, then = (",".join(option_names(a)) for a in (live.attributes, mount.attributes))
            raise _Left(f"{label}: somebody has changed its options since ({now}, were {then})")
        if self._file is not None:
            await self._make_read_only(mount, label)
        return [f"{label}: read-only again"]

    async def _make_read_only(self, mount: JournalMount, label: str) -> None:
        handle = MountHandle(mount.handle)
        give_up = anyio.current_time() + BUSY_S
        pause = 0.001
        while True:
            (answer,), _ = await self._pool.insist(
                self._slot(mount.namespace),
                "make_read_only",
                [handle],
                target=mount.namespace,
                mounts=[handle],
            )
            if answer is None:
                return
            if answer[0] != errno.EBUSY or anyio.current_time() > give_up:
                break
            await anyio.sleep(pause)
            pause = min(2 * pause, 0.1)
        problem = f"{label} stays writable: {answer[1]}: {os.strerror(answer[0])}"
        if answer[0] == errno.EBUSY:
            problem += "; held for writing by " + await describe_holders(mount.mnt_id)
        raise _Left(problem)

    # -- names ----------------------------------------------------------------------------------

    async def _undo_names(self, debt: Debt) -> list[str]:
        operations = [RemoveOp(*fields) for fields in debt.what]
        assert debt.anchor is not None
        anchor = Anchor(*debt.anchor)
        mount = self._journal.mounts[live_of(operations[0].mount)]
        place = await self._place(mount, anchor)
        label = self._label(mount)
        await self._check_anchor(place, anchor, label)
        where = [f"{text(join(o.directory, o.name))} on mount {label}" for o in operations]
        if self._file is None:
            return [f"{one}: removed if it is there" for one in where]
        service = await self._service(place)
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
        )
        return self._said(where, label, [Removed(*fields) for fields in answers])

    @staticmethod
    def _said(where: list[str], label: str, answers: Iterable[Removed]) -> list[str]:
        said = []
        for name, answer in zip(where, answers, strict=True):
            if answer.errno:
                raise _Left(f"{name}: {answer.step}: {os.strerror(answer.errno)}")
            if answer.found == REMOVED:
                said.append(f"{name}: removed")
            elif answer.found == OTHER:
                said.append(f"{name}: another file has the name now, left alone")
            said += [
                f"{text(path)} on mount {label}: not removed, something else is in it now"
                for path in answer.left
            ]
        return said

    async def _place(self, mount: JournalMount, anchor: Anchor) -> _Place:
        """Through what the names can be reached: the mount itself, or another of its kind."""
        try:
            live = await self._live(mount.handle)
            return _Place(mount.namespace, live, MountHandle(mount.handle), b"")
        except _Gone as reason:
            gone = reason
        path = join(mount.root.strip(b"/"), anchor.path)
        for target, table in self._tables.items():
            for live in table:
                root = live.root.strip(b"/")
                if (
                    live.device != mount.device
                    or live.superblock_read_only
                    or not is_below(path, root)
                    or not is_below(mount.root.strip(b"/"), root)
                    or table.stack(live.mountpoint)[-1] != live
                ):
                    continue
                handle = MountHandle(self._handles)
                self._handles += 2
                try:
                    facts = await self._open(target, handle, live, text(live.mountpoint))
                except _Left:
                    continue
                if facts.fsid != mount.fsid or not (facts.fsid or os.major(live.device)):
                    continue  # another file system has the device number by now, or may have
                below = relative_to(mount.root.strip(b"/"), root)
                return _Place(target, live, handle, below)
        raise gone

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

    async def _service(self, place: _Place) -> MountHandle:
        """The side to remove names through: a writable clone where one can be made.

        Where none can, the mount itself is writable until its own debt, an older one, is undone.
        """
        service = service_of(place.handle)
        if service in self._pool.mounts:
            return service
        (failure,), fds = await self._pool.insist(
            self._slot(place.target),
            "clone",
            [(place.handle, service)],
            target=place.target,
            mounts=[place.handle],
        )
        if failure is not None:
            return place.handle
        (self._pool.mounts[service],) = fds
        self._pool.learned(self._slot(place.target), [service])
        return service

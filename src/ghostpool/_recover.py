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
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from ghostpool import _journal, _linux
from ghostpool._errors import GhostpoolError, PlanError
from ghostpool._identity import all_ended, boot_id, has_ended, pid_namespace, start_time
from ghostpool._journal import Journal, JournalError, JournalFile, JournalProcess
from ghostpool._model import live_of
from ghostpool._paths import join, text
from ghostpool._process import ForkServer
from ghostpool._protocol import RemoveOp
from ghostpool._undoing import RecoveredRun, Undoing

log = logging.getLogger("ghostpool")
DEATH_S = 5.0
"""Seconds that killed workers of the dead run have to be gone."""
YOUNG_S = 60.0
"""Seconds in which a socket that nobody listens on may be in the making."""


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


def forget(directory: int, token: str) -> str:
    """Take a dead run's journal away without undoing anything; what it owed, for people.

    PlanError: there is no such journal, or its run is alive.
    """
    name = token + _journal.SUFFIX
    # Of the names that are there: what the user says is never a path.
    if name not in _journal.pending(directory):
        raise PlanError(f"no run {token} has a journal here: ghostpool recover lists those that do")
    try:
        with _locked(directory, name) as fd:
            if fd is None:
                raise PlanError(f"run {token} is alive")
            try:
                debts = Journal.read(fd).debts
                mounts = sum(debt.kind == "mount" for debt in debts.values())
                owed = f"{mounts} mounts and {len(debts) - mounts} sets of names were still owed"
            except JournalError as error:
                owed = f"its journal could not be read: {error}"
            _journal.remove(directory, name)
    except OSError as error:
        raise PlanError(f"run {token}: {error.strerror}") from error
    return f"run {token}: forgotten; {owed}"


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
        journal = Journal.read(fd)
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
        await Undoing(server, journal, run, None if dry_run else file).undo()
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
        for operation in (RemoveOp(*fields) for fields in debt.removals):
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
        journal = Journal.read(fd)
    except JournalError:
        return False  # it is being written
    finally:
        os.close(fd)
    run.pid, run.begun = journal.run.pid, journal.run.begun
    if journal.guardian is None or journal.run.pid_namespace != pid_namespace():
        return False
    owner = _pidfd(JournalProcess(run.pid, journal.run.start_time))
    if owner >= 0:
        try:
            if not has_ended(owner):
                return False
        finally:
            os.close(owner)
    guardian = _pidfd(journal.guardian)
    if guardian < 0:
        return False
    try:
        signal.pidfd_send_signal(guardian, signal.SIGCONT)
        if has_ended(guardian, DEATH_S):
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
        for pidfd in pidfds:
            if not dry_run:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return all_ended(pidfds, DEATH_S)
    finally:
        _linux.close_all(pidfds)


def _pidfd(process: JournalProcess) -> int:
    """A descriptor of the very process, or -1: a pid alone may be another one's by now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return -1
    try:
        if start_time(process.pid) == process.start_time:
            return pidfd
    except ProcessLookupError:
        pass
    os.close(pidfd)
    return -1


def _sweep(directory: int) -> None:
    """Take away what dead servers leave besides: their sockets."""
    for name in os.listdir(directory):
        if name.endswith(".sock") and not _is_young(directory, name):
            _remove_dead_socket(directory, name)


def _is_young(directory: int, name: str) -> bool:
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return time.time() - status.st_mtime < YOUNG_S


def _remove_dead_socket(directory: int, name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            os.unlink(name, dir_fd=directory)
        except OSError:
            pass  # it is listened to (and busy), or no socket

"""The guardian: puts back what a run owes when the run itself is gone.

A process beside the workers that shares no fate with the others: its own session, no death signal
of a parent, hard to choose for the OOM killer. Before a change is made it is told how to undo it,
writes that to the journal, and holds the descriptors for it; when the coordinator's end of its
socket closes while anything is still owed (SIGKILL, a crash), it makes sure that the workers are
dead and undoes it, last things first. It does so with the workers' own code, so there is one way
of undoing. If it is killed too, the journal is what is left.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

from ghostpool import _linux
from ghostpool._capabilities import GUARDIAN, Cap, Capabilities
from ghostpool._identity import all_ended, start_time
from ghostpool._journal import Debts, JournalFile
from ghostpool._mountwork import GONE
from ghostpool._protocol import BlockingChannel, EndOfStream
from ghostpool._worker import Worker

WORKERS_S = 5.0
"""Seconds for killed workers to be gone; in uninterruptible sleep they may be longer."""
BUSY_S = 30.0
"""Seconds that a busy mount is tried again: nobody else will."""
_BATCH = 256
_OOM_SCORE = b"-900"


class Guardian(Worker):
    """A worker that remembers what is owed."""

    def __init__(
        self, channel: BlockingChannel, mount_setattr: bool, capabilities: Capabilities
    ) -> None:
        super().__init__(channel, mount_setattr, capabilities)
        self._debts = Debts()
        self._journal: JournalFile | None = None
        self._workers: list[int] = []
        self._requests["journal"] = self._open_journal
        self._requests["owe"] = self._owe
        self._requests["settle"] = self._settle
        self._requests["watch"] = self._watch
        self._requests["close"] = self._close

    def _open_journal(self, out: list[int], token: str, records: list[tuple[Any, ...]]) -> None:
        (directory,), self.given = self.given, []
        own = os.getpid()
        who = ("guardian", own, start_time(own))
        self._journal = JournalFile.create(directory, token, [*records, who])
        # The lock belongs to the open file description: it is held until both have closed it.
        self._step = "dup"
        out.append(os.dup(self._journal.fileno()))

    def _owe(self, _: list[int], records: list[tuple[Any, ...]], settled: list[Any]) -> None:
        assert self._journal is not None
        if settled:
            self._debts.settle(settled)
            self._note("settle", settled)
        self._journal.append("owe", records, sync=True)
        self._debts.owe(records)

    def _settle(self, _: list[int], keys: list[Any] | str, must: bool = False) -> None:
        if must:
            # Names that are to stay: a journal that owed them would have them removed.
            assert self._journal is not None
            self._journal.append("settle", keys, sync=True)
        self._debts.settle(keys)
        if not must:
            self._note("settle", keys)

    def _watch(self, _: list[int], pid: int) -> None:
        self._workers += self.given
        self.given = []
        try:
            self._note("process", pid, start_time(pid))
        except ProcessLookupError:
            pass  # it has ended

    def _note(self, *record: Any) -> None:
        """Write down what saves work later, but is not needed to be right."""
        try:
            if self._journal is not None:
                self._journal.append(*record)
        except OSError:
            pass

    def _close(self, _: list[int]) -> None:
        """The run is over. What could not be undone stays in the journal, and the user knows."""
        if self._journal is not None and not self._debts:
            self._journal.remove()
        self._debts.clear()
        self._journal = None

    def undo(self) -> None:
        """Undo everything that is owed; what resists does not stop the rest."""
        if self._journal is None:
            return
        owed = sum(debt.changes for debt in self._debts.values())
        workers_ended = self._await_workers() if owed else True
        said: list[str] = []
        undone = 0
        busy: list[Any] = []
        for keys in self._together():
            try:
                done = self._undo(keys)
            except Exception as error:  # noqa: BLE001  nobody is left to raise it to
                said.append(f"{keys[0]}: {error!r}")
                continue
            undone += sum(self._debts[key].changes for key in done)
            if workers_ended:
                self._settle([], done)
            busy += [key for key in keys if key[0] == "mount" and key not in done]
        give_up = time.monotonic() + BUSY_S
        while busy and time.monotonic() < give_up:
            time.sleep(0.05)
            done = [key for key in busy if self._again(key)]
            undone += len(done)
            if workers_ended:
                self._settle([], done)
            busy = [key for key in busy if key not in done]
        if not self._debts:
            self._journal.remove()
        if not workers_ended:
            said.append("a worker hangs, and may still do what it was asked for")
        # The lock is let go of first: nobody may listen, and recover is to be able to work.
        os.close(self._journal.fileno())
        if owed:
            advice = ": run ghostpool recover" if self._debts else ""
            counts = f"undone: {undone}, not yet: {owed - undone}"
            said.append(f"the run ended abruptly; {counts}{advice}")
        for line in said:
            _say(line)

    def _together(self) -> Iterator[list[Any]]:
        """Keys in the order of undoing; names of one target side by side, since a request waits
        for an exchanged directory once."""
        batch: list[Any] = []
        changes = 0
        for key in self._debts.undoing():
            debt = self._debts[key]
            last = self._debts[batch[-1]] if batch else debt
            alone = debt.kind == "mount" or last.kind == "mount" or last.target != debt.target
            if batch and (alone or changes >= _BATCH):
                yield batch
                batch, changes = [], 0
            batch.append(key)
            changes += debt.changes
        if batch:
            yield batch

    def _undo(self, keys: list[Any]) -> list[Any]:
        """Undo one mount, or names of one target; those keys that are done."""
        first = self._debts[keys[0]]
        self._enter(first.target)
        if first.kind == "mount":
            return keys if self._revert(first.what) else []
        debts = [self._debts[key] for key in keys]
        operations = [operation for debt in debts for operation in debt.removals]
        answers = iter(self._requests["remove"]([], operations))
        failed = [sum(next(answers)[0] for _ in range(debt.changes)) for debt in debts]
        return [key for key, errnos in zip(keys, failed, strict=True) if not errnos]

    def _await_workers(self) -> bool:
        """Whether all have ended; they die with the fork server, and one may be in a call."""
        for pidfd in self._workers:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except OSError:
                pass  # it has ended
        return all_ended(self._workers, WORKERS_S)

    def _again(self, key: Any) -> bool:
        try:
            return bool(self._undo([key]))
        except Exception:  # noqa: BLE001  tried again, or left to the journal
            return False

    def _revert(self, handle: int) -> bool:
        """Whether the mount is read-only again, or gone."""
        (answer,) = self._requests["make_read_only"]([], [handle])
        return answer is None or answer[0] in GONE


def _say(text: str) -> None:
    """To the user's stderr, if somebody reads it: a pipe that is full must not keep us here."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(0) not in ([], [(2, select.POLLERR)], [(2, select.POLLNVAL)]):
        try:
            os.write(2, f"ghostpool: guardian: {text}\n".encode(errors="backslashreplace"))
        except OSError:
            pass


def main(fd: int, mount_setattr: bool) -> None:
    """Body of the guardian; returns when nothing is owed any more."""
    os.setsid()
    os.umask(0)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    capabilities = Capabilities(GUARDIAN | Cap.SYS_RESOURCE)
    capabilities.need(int(Cap.SYS_RESOURCE))
    try:
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(_OOM_SCORE)
    except OSError:
        pass  # needs CAP_SYS_RESOURCE
    capabilities.give_up(int(Cap.SYS_RESOURCE))
    guardian = Guardian(BlockingChannel(fd), mount_setattr, capabilities)
    try:
        guardian.serve()
    except (EndOfStream, ConnectionError, BrokenPipeError):
        guardian.undo()

"""The guardian: puts back what a run owes when the run itself is gone.

A process beside the workers that shares no fate with the others: its own session, no death signal
of a parent, hard to choose for the OOM killer. Before a change is made it is told how to undo it,
and holds the descriptors for that; when the coordinator's end of its socket closes while anything
is still owed (SIGKILL, a crash), it makes sure that the workers are dead and undoes it, last
things first. It does so with the workers' own code, so there is one way of undoing.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from typing import Any

from ghostpool import _linux
from ghostpool._capabilities import GUARDIAN, Cap, Capabilities
from ghostpool._protocol import BlockingChannel, EndOfStream
from ghostpool._worker import Worker

WORKERS_S = 5.0
"""Seconds for killed workers to be gone; in uninterruptible sleep they may be longer."""
BUSY_S = 30.0
"""Seconds that a busy mount is tried again: nobody else will."""
_OOM_SCORE = b"-900"


class Guardian(Worker):
    """A worker that remembers what is owed."""

    def __init__(
        self, channel: BlockingChannel, mount_setattr: bool, capabilities: Capabilities
    ) -> None:
        super().__init__(channel, mount_setattr, capabilities)
        self._owed: dict[Any, tuple[str, int, Any]] = {}
        """Key to kind ("mount" or "names"), target, and mount handle or removals."""
        self._workers: list[int] = []
        self._requests["owe"] = self._owe
        self._requests["settle"] = self._settle
        self._requests["watch"] = self._watch

    def _owe(self, _: list[int], records: list[tuple[Any, str, int, Any]]) -> None:
        for key, kind, target, what in records:
            # The latest word is about the latest change: it is undone first.
            self._owed.pop(key, None)
            self._owed[key] = (kind, target, what)

    def _settle(self, _: list[int], keys: list[Any] | None) -> None:
        if keys is None:
            self._owed.clear()
            return
        for key in keys:
            self._owed.pop(key, None)

    def _watch(self, _: list[int]) -> None:
        self._workers += self.given
        self.given = []

    def undo(self) -> None:
        """Undo everything that is owed; what resists does not stop the rest."""
        if not self._owed:
            return
        self._await_workers()
        busy: list[tuple[int, int]] = []
        for kind, target, what in reversed(self._owed.values()):
            try:
                self._enter(target)
                if kind == "names":
                    self._requests["remove"]([], what)
                elif not self._revert(what):
                    busy.append((target, what))
            except Exception as error:  # noqa: BLE001  nobody is left to raise it to
                _say(f"{kind}: {error!r}")
        give_up = time.monotonic() + BUSY_S
        while busy and time.monotonic() < give_up:
            time.sleep(0.05)
            busy = [(target, handle) for target, handle in busy if not self._again(target, handle)]
        _say(f"the run ended abruptly; undone: {len(self._owed)}, still busy: {len(busy)}")

    def _await_workers(self) -> None:
        """They die with the fork server, which ends with the coordinator; one may be in a call."""
        for pidfd in self._workers:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except OSError:
                pass  # it has ended
        give_up = time.monotonic() + WORKERS_S
        for pidfd in self._workers:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0.0, give_up - time.monotonic()) * 1000)

    def _again(self, target: int, handle: int) -> bool:
        try:
            self._enter(target)
            return self._revert(handle)
        except Exception:  # noqa: BLE001  tried again, or told as busy
            return False

    def _revert(self, handle: int) -> bool:
        """Whether the mount is read-only again, or gone."""
        (answer,) = self._requests["make_read_only"]([], [handle])
        return answer is None or answer[0] in (errno.EINVAL, errno.ENOENT)


def _say(text: str) -> None:
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

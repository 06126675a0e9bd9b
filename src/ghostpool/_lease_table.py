"""The lease table: decides which change of a mount is due, and carries none of them out.

Pure bookkeeping, no await and no system call, so that a model can drive it directly; what it
decides is done by `_lease`. The first lease on a mount is to make it writable, further ones
only count, the last release is to put it back.
Invariant: a mount that we made writable, or may have, is `owed` until its revert is confirmed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ghostpool._errors import BarrierBroken

M = TypeVar("M", bound=Hashable)
"""What names a mount; anything hashable, leases never look inside."""


class LeaseState(enum.Enum):
    """Where one mount stands."""

    READ_ONLY = "read-only"
    """As we found it."""
    OPENING = "opening"
    """A lease is being taken: it is being made writable."""
    WRITABLE = "writable"
    """Somebody holds a lease on it."""
    CLOSING = "closing"
    """The last lease has ended: it is being put back."""
    FAILED = "failed"
    """The last change failed, or its outcome is unknown."""


class MountUsage(NamedTuple):
    """What one mount went through."""

    leases: int
    """Most leases at one time."""
    made_writable: int
    """Changes to writable; one of unknown outcome counts as made."""
    reverted: bool
    """The mount is as we found it: nothing is owed."""
    window_s: float
    """Seconds it was writable by our doing, from asking for the change to the confirmed revert."""


class LeaseStatistics(NamedTuple):
    """Numbers over all mounts that leases were asked for."""

    mounts: int
    """How many there are."""
    leases: int
    """Held, or waited for, now."""
    states: dict[LeaseState, int]
    """How many mounts are in each state; states without any are left out."""
    owed: int
    """Mounts that are, or may be, writable by our doing."""
    made_writable: int
    """Changes to writable so far."""
    made_read_only: int
    """Changes back so far."""


class Acquired(NamedTuple, Generic[M]):
    """What `LeaseTable.acquire` decided; the four parts make up the mounts asked for."""

    ready: tuple[M, ...]
    """Counted; writable already."""
    open: tuple[M, ...]
    """Counted; the caller makes them writable and says so with `opened`."""
    join: tuple[M, ...]
    """Counted; somebody else is making them writable."""
    blocked: tuple[M, ...]
    """Not counted: being put back at the moment; ask again when that is over."""


@dataclass(eq=False, repr=False, slots=True)
class _Entry:
    state: LeaseState = LeaseState.READ_ONLY
    count: int = 0
    peak: int = 0
    owed: bool = False
    was_closing: bool = False
    made_writable: int = 0
    made_read_only: int = 0
    opening_since: float = 0.0
    window_start: float | None = None
    window_s: float = 0.0
    error: Exception | None = None
    revert_error: Exception | None = None


class LeaseTable(Generic[M]):
    """Counts leases per mount and says which change is due; carries none of them out.

    ========== ================================= ==================================
    state      event                             becomes
    ========== ================================= ==================================
    READ_ONLY  acquire                           OPENING, by the caller
    OPENING    acquire                           OPENING, the caller waits
    OPENING    opened                            WRITABLE, or FAILED with an error
    WRITABLE   acquire                           WRITABLE
    WRITABLE   last release                      CLOSING if owed, else READ_ONLY
    CLOSING    acquire                           CLOSING, the caller asks again later
    CLOSING    closed                            READ_ONLY, or FAILED (still owed)
    FAILED     acquire, others still counted     FAILED, the caller gets their error
    FAILED     acquire, nobody counted           OPENING, by the caller
    FAILED     last release                      CLOSING if owed, else FAILED
    ========== ================================= ==================================

    `clock` gives seconds and never goes back. With `reopen` false, a mount that was put back
    once is not opened a second time: acquiring it is BarrierBroken, because in a restore that
    can only happen after another task failed and let go of the mount.
    """

    def __init__(self, clock: Callable[[], float], *, reopen: bool = True) -> None:
        self._clock = clock
        self._reopen = reopen
        self._entries: dict[M, _Entry] = {}

    def acquire(self, mounts: Iterable[M]) -> Acquired[M]:
        """Count one lease on each of `mounts` (a mount named twice counts once), or on none.

        Raises the error of a mount whose opening just failed, or BarrierBroken.
        """
        wanted = tuple(dict.fromkeys(mounts))
        for mount in wanted:
            entry = self._entries.get(mount)
            if entry is None:
                continue
            if entry.state is LeaseState.FAILED and entry.count and entry.error is not None:
                raise entry.error
            if entry.was_closing and not self._reopen:
                raise BarrierBroken(f"mount {mount} was put back before this task came to it")
        result: dict[LeaseState, list[M]] = {state: [] for state in LeaseState}
        for mount in wanted:
            entry = self._entries.setdefault(mount, _Entry())
            if entry.state in (LeaseState.READ_ONLY, LeaseState.FAILED):
                result[LeaseState.READ_ONLY].append(mount)
                entry.state, entry.error = LeaseState.OPENING, None
                entry.opening_since = self._clock()
            else:
                result[entry.state].append(mount)
            if entry.state is not LeaseState.CLOSING:
                entry.count += 1
                entry.peak = max(entry.peak, entry.count)
        return Acquired(
            tuple(result[LeaseState.WRITABLE]),
            tuple(result[LeaseState.READ_ONLY]),
            tuple(result[LeaseState.OPENING]),
            tuple(result[LeaseState.CLOSING]),
        )

    def opened(self, mount: M, outcome: bool | Exception, *, unknown: bool = False) -> None:
        """Note what `make_writable` answered; `unknown` says that it raised `outcome` instead."""
        entry = self._in_state(mount, LeaseState.OPENING)
        if isinstance(outcome, Exception):
            entry.state, entry.error = LeaseState.FAILED, outcome
            changed = unknown and not entry.owed
        else:
            entry.state = LeaseState.WRITABLE
            changed = outcome
        if not changed:
            return
        if entry.owed:  # found read-only: the revert that seemed to have failed had worked
            entry.made_read_only += 1
            self._end_window(entry, entry.opening_since)
        entry.owed = True
        entry.made_writable += 1
        entry.window_start = entry.opening_since

    def release(self, mounts: Iterable[M]) -> tuple[M, ...]:
        """Give back one lease on each of `mounts`; the mounts that the caller is to put back now.

        RuntimeError if one of them is not leased.
        """
        wanted = tuple(dict.fromkeys(mounts))
        for mount in wanted:
            entry = self._entries.get(mount)
            if entry is None or not entry.count:
                raise RuntimeError(f"mount {mount} is not leased")
            if entry.state is LeaseState.OPENING and entry.count == 1:
                raise RuntimeError(f"mount {mount} is released while it is being opened")
        closing = []
        for mount in wanted:
            entry = self._entries[mount]
            entry.count -= 1
            if entry.count:
                continue
            if entry.owed:
                entry.state, entry.was_closing = LeaseState.CLOSING, True
                closing.append(mount)
            elif entry.state is not LeaseState.FAILED:
                entry.state = LeaseState.READ_ONLY
        return tuple(closing)

    def closed(self, mount: M, error: Exception | None) -> None:
        """Note what `make_read_only` answered, or raised."""
        entry = self._in_state(mount, LeaseState.CLOSING)
        entry.error = entry.revert_error = error
        if error is not None:
            entry.state = LeaseState.FAILED
            return
        entry.state = LeaseState.READ_ONLY
        entry.owed = False
        entry.made_read_only += 1
        self._end_window(entry, self._clock())

    def state(self, mount: M) -> LeaseState:
        """State of `mount`; one never heard of is READ_ONLY: as we found it."""
        entry = self._entries.get(mount)
        return LeaseState.READ_ONLY if entry is None else entry.state

    def count(self, mount: M) -> int:
        """Leases on `mount` now, of those who wait for its opening too."""
        entry = self._entries.get(mount)
        return 0 if entry is None else entry.count

    @property
    def revert_errors(self) -> dict[M, Exception]:
        """Mounts that are still writable because their last revert failed, and why."""
        return {
            mount: entry.revert_error
            for mount, entry in self._entries.items()
            if entry.revert_error is not None and entry.owed
        }

    def usage(self) -> dict[M, MountUsage]:
        """What each mount went through; a window that is still open ends now."""
        now = self._clock()
        result = {}
        for mount, entry in self._entries.items():
            still_open = 0.0 if entry.window_start is None else now - entry.window_start
            result[mount] = MountUsage(
                entry.peak, entry.made_writable, not entry.owed, entry.window_s + still_open
            )
        return result

    def statistics(self) -> LeaseStatistics:
        entries = self._entries.values()
        states = [entry.state for entry in entries]
        return LeaseStatistics(
            mounts=len(entries),
            leases=sum(entry.count for entry in entries),
            states={state: states.count(state) for state in LeaseState if state in states},
            owed=sum(entry.owed for entry in entries),
            made_writable=sum(entry.made_writable for entry in entries),
            made_read_only=sum(entry.made_read_only for entry in entries),
        )

    def describe(self) -> str:
        """The table in a few words: `3 mounts (2 writable, 1 closing), 5 leases`."""
        numbers = self.statistics()
        states = ", ".join(f"{number} {state.value}" for state, number in numbers.states.items())
        return f"{numbers.mounts} mounts ({states or 'none used'}), {numbers.leases} leases"

    def __repr__(self) -> str:
        return f"<LeaseTable {self.describe()}>"

    def _in_state(self, mount: M, state: LeaseState) -> _Entry:
        entry = self._entries.get(mount)
        if entry is None or entry.state is not state:
            raise RuntimeError(f"mount {mount} is {self.state(mount).value}, not {state.value}")
        return entry

    @staticmethod
    def _end_window(entry: _Entry, end: float) -> None:
        if entry.window_start is not None:
            entry.window_s += end - entry.window_start
            entry.window_start = None


__all__ = ["Acquired", "LeaseState", "LeaseStatistics", "LeaseTable", "M", "MountUsage"]

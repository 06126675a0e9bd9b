"""Leases and the journal together, driven by hypothesis, with crashes between any two steps.

What a restore does to mounts is taken apart into the steps that a power cut can fall between:
a record is written, the kernel changes a mount, a record says that it is undone. Tasks acquire and
release through the real lease table, the journal has the real format, the kernel is the package's
own fake. Whoever crashes loses all memory and may cut the record that is being written anywhere;
`recover` has nothing but the journal's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ghostpool._errors import KernelError
from ghostpool._journal import MAGIC, Journal, JournalRun, _frame
from ghostpool._lease import LeaseTable
from ghostpool._linux import Attr
from ghostpool.testing import FakeKernel

RDONLY = int(Attr.RDONLY)
NAMES = "abc"
MOUNTS = st.sampled_from(NAMES)


class Disk:
    """The journal's bytes; each record is on disk when `write` returns."""

    def __init__(self) -> None:
        run = JournalRun("0123456789ab", 1, 2, 3, "boot", 4)
        self._data = MAGIC + _frame(("run", *run))

    def write(self, kind: str, mount: str) -> None:
        self._data += _frame(_record_of(kind, mount))

    def cut(self, kind: str, mount: str, part: float) -> None:
        """As much of a record as was on disk when the power went; never all of it."""
        frame = _frame(_record_of(kind, mount))
        self._data += frame[: int(part * len(frame))]

    def reopen(self) -> None:
        """Go on behind the last whole record, as `recover` does."""
        self._data = self._data[: Journal(self._data).end]

    def owed(self) -> list[str]:
        """What a replay finds, in the order in which it came to be owed."""
        return [debt.what for debt in Journal(self._data).debts.values()]


def _record_of(kind: str, mount: str) -> tuple[Any, ...]:
    key = ("mount", mount)
    return (kind, [(key, "mount", 0, mount, None)] if kind == "owe" else [key])


Steps = Iterator[None]
"""Something under way: each step of it is one that a crash can come before or after."""


class Machine(RuleBasedStateMachine):
    """Tasks, the table, the journal and the kernel."""

    holders: Bundle[tuple[int, tuple[str, ...]]] = Bundle("holders")

    @initialize(found=st.dictionaries(MOUNTS, st.booleans(), min_size=3))
    def setup(self, found: dict[str, bool]) -> None:
        writable = {mount: found.get(mount, False) for mount in NAMES}
        self.found = {mount: 8 | RDONLY * (not writable[mount]) for mount in NAMES}
        self.kernel: FakeKernel[str] = FakeKernel(self.found)
        self.journal = Disk()
        self.life = 0
        self.gone: set[str] = set()
        self.refuse: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        """A fresh run, which knows nothing of the one before."""
        self.life += 1
        self.table: LeaseTable[str] = LeaseTable(lambda: 0.0)
        self.under_way: list[Steps] = []
        self.settled: set[str] = set()

    # -- what a run does, in its order -----------------------------------------------------------

    def opening(self, mounts: Sequence[str]) -> Steps:
        """As PoolMounts.make_writable: owe, change, and settle what was not changed."""
        for mount in mounts:
            self.journal.write("owe", mount)
            yield
        for mount in mounts:
            outcome = self.change(mount, writable=True)
            yield
            self.table.opened(mount, outcome)
            if outcome is not True and not self.owed_by_table(mount):
                self.journal.write("settle", mount)
                yield

    def closing(self, mounts: Sequence[str]) -> Steps:
        """As PoolMounts.make_read_only: put back, and only then settle."""
        for mount in mounts:
            outcome = self.change(mount, writable=False)
            yield
            error = outcome if isinstance(outcome, Exception) else None
            if error is None:
                self.journal.write("settle", mount)
                yield
            self.table.closed(mount, error)

    def change(self, mount: str, *, writable: bool) -> bool | Exception:
        if mount in self.refuse:
            self.refuse.discard(mount)
            return KernelError(16, "mount_setattr", mount)
        if mount in self.gone:
            # Taken off: opening it fails, and there is nothing left to put back.
            return KernelError(22, "mount_setattr", mount) if writable else False
        changed = self.kernel.is_writable(mount) is not writable
        if writable or self.found[mount] & RDONLY:
            self.kernel.flags[mount] &= ~RDONLY
            self.kernel.flags[mount] |= RDONLY * (not writable)
        return changed

    def owed_by_table(self, mount: str) -> bool:
        use = self.table.usage().get(mount)
        return use is not None and not use.reverted

    def start(self, steps: Steps) -> None:
        self.under_way.append(steps)

    # -- rules -----------------------------------------------------------------------------------

    @rule(target=holders, mounts=st.sets(MOUNTS, min_size=1))
    def acquire(self, mounts: set[str]) -> Any:
        try:
            step = self.table.acquire(sorted(mounts))
        except KernelError:
            return multiple()  # somebody else's opening of it has just failed
        if step.open:
            self.start(self.opening(step.open))
        held = step.ready + step.open + step.join
        return (self.life, held) if held else multiple()

    @rule(holder=consumes(holders))
    def release(self, holder: tuple[int, tuple[str, ...]]) -> None:
        life, mounts = holder
        if life != self.life:
            return  # its run has crashed
        self.finish()  # a lease is given back by who waited for its opening
        closing = self.table.release(mounts)
        if closing:
            self.start(self.closing(closing))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One step of something that is under way, whichever."""
        steps = data.draw(st.sampled_from(range(len(self.under_way))))
        if next(self.under_way[steps], self) is self:
            del self.under_way[steps]

    @rule()
    def finish(self) -> None:
        while self.under_way:
            for _ in self.under_way.pop(0):
                self.owed_is_in_the_journal_before_it_is_changed()

    @rule(mount=MOUNTS)
    def next_change_fails(self, mount: str) -> None:
        self.refuse.add(mount)

    @rule(mount=MOUNTS)
    def unmounted(self, mount: str) -> None:
        """By somebody else, at any moment."""
        self.gone.add(mount)
        self.kernel.flags[mount] = self.found[mount]

    @rule(data=st.data())
    def crash_and_recover(self, data: st.DataObject) -> None:
        """All memory is lost; recovering may be cut short too, and is then done again."""
        kind = data.draw(st.sampled_from(["owe", "settle"]))
        known = self.journal.owed()
        part = data.draw(st.floats(0, 1, exclude_max=True))
        self.journal.cut(kind, data.draw(MOUNTS), part)
        assert self.journal.owed() == known
        self.journal.reopen()
        self._begin()
        self.refuse.clear()
        while owed := self.journal.owed():
            for mount in reversed(owed):
                if data.draw(st.integers(0, 4)) == 0:
                    break  # killed
                self.change(mount, writable=False)
                if data.draw(st.integers(0, 4)) == 0:
                    break  # killed before it could say so
                self.journal.write("settle", mount)
        assert self.kernel.changed == set()

    # -- what always holds -----------------------------------------------------------------------

    @invariant()
    def owed_is_in_the_journal_before_it_is_changed(self) -> None:
        assert self.kernel.changed <= set(self.journal.owed())

    @invariant()
    def writable_exactly_while_leased_or_owed(self) -> None:
        for mount in self.kernel.changed:
            assert self.table.count(mount) or self.owed_by_table(mount) or self.under_way
        for mount in NAMES:
            if self.table.state(mount).value == "writable" and mount not in self.gone:
                assert self.kernel.is_writable(mount)

    @invariant()
    def nothing_is_made_read_only_that_was_found_writable(self) -> None:
        for mount, flags in self.found.items():
            if not flags & RDONLY:
                assert self.kernel.is_writable(mount)

    @invariant()
    def at_rest_the_journal_knows_what_the_table_owes_and_no_more(self) -> None:
        if not self.under_way:
            owed = {mount for mount in NAMES if self.owed_by_table(mount)}
            assert set(self.journal.owed()) == owed


TestLeaseAndJournal = Machine.TestCase


class Forgetful(Machine):
    """Changes first and writes afterwards."""

    def opening(self, mounts: Sequence[str]) -> Steps:
        for mount in mounts:
            outcome = self.change(mount, writable=True)
            yield
            self.journal.write("owe", mount)
            yield
            self.table.opened(mount, outcome)


class Hasty(Machine):
    """Settles first and puts back afterwards."""

    def closing(self, mounts: Sequence[str]) -> Steps:
        for mount in mounts:
            self.journal.write("settle", mount)
            yield
            outcome = self.change(mount, writable=False)
            self.table.closed(mount, outcome if isinstance(outcome, Exception) else None)
            yield


@pytest.mark.parametrize("mistaken", [Forgetful, Hasty])
def test_the_model_sees_a_wrong_order(mistaken: type[Machine]) -> None:
    quiet = settings(database=None, print_blob=False, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(mistaken, settings=quiet)

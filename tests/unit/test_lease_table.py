"""The lease table alone: examples, and a model that hypothesis drives."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ghostpool._errors import BarrierBroken
from ghostpool._lease import Acquired, LeaseState, LeaseTable, MountUsage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_first_lease_opens_further_ones_count_the_last_one_closes() -> None:
    clock = Clock()
    table: LeaseTable[str] = LeaseTable(clock)
    assert table.acquire("ab") == Acquired(ready=(), open=("a", "b"), join=(), blocked=())
    assert table.acquire("a") == Acquired(ready=(), open=(), join=("a",), blocked=())
    clock.now = 1
    table.opened("a", True)
    table.opened("b", False)
    assert table.acquire("aa") == Acquired(ready=("a",), open=(), join=(), blocked=())
    assert table.count("a") == 3
    assert table.release("ab") == ()
    assert table.state("b") is LeaseState.READ_ONLY
    assert table.release("a") == ()
    assert table.release("a") == ("a",)
    assert table.acquire("a") == Acquired(ready=(), open=(), join=(), blocked=("a",))
    assert table.count("a") == 0
    clock.now = 5
    table.closed("a", None)
    assert table.usage() == {"a": MountUsage(3, 1, True, 5.0), "b": MountUsage(1, 0, True, 0.0)}


def test_repr_and_statistics() -> None:
    table: LeaseTable[str] = LeaseTable(Clock())
    table.acquire("abc")
    table.opened("a", True)
    table.opened("b", OSError())
    assert repr(table) == "<LeaseTable 3 mounts (1 opening, 1 writable, 1 failed), 3 leases>"
    numbers = table.statistics()
    assert (numbers.made_writable, numbers.made_read_only, numbers.owed) == (1, 0, 1)


def test_misuse_is_refused_before_anything_is_counted() -> None:
    table: LeaseTable[str] = LeaseTable(Clock())
    with pytest.raises(RuntimeError, match="mount a is not leased"):
        table.release("a")
    table.acquire("a")
    table.acquire("a")
    with pytest.raises(RuntimeError, match="mount b is not leased"):
        table.release("ab")
    table.release("a")
    with pytest.raises(RuntimeError, match="while it is being opened"):
        table.release("a")
    assert table.count("a") == 1
    with pytest.raises(RuntimeError, match="mount a is opening, not closing"):
        table.closed("a", None)
    with pytest.raises(RuntimeError, match="mount b is read-only, not opening"):
        table.opened("b", True)


def test_latecomer_gets_the_error_until_all_who_waited_have_left() -> None:
    table: LeaseTable[str] = LeaseTable(Clock())
    table.acquire("a")
    error = OSError("refused")
    table.opened("a", error)
    with pytest.raises(OSError, match="refused") as caught:
        table.acquire("ba")
    assert caught.value is error
    assert table.count("b") == 0
    assert table.release("a") == ()
    assert table.acquire("a").open == ("a",)


def test_without_reopening_a_mount_that_was_put_back_stays_so() -> None:
    table: LeaseTable[str] = LeaseTable(Clock(), reopen=False)
    table.acquire("a")
    table.opened("a", True)
    table.release("a")
    for _ in range(2):
        with pytest.raises(BarrierBroken, match="mount a was put back"):
            table.acquire("ba")
        assert table.count("b") == 0
        if table.state("a") is LeaseState.CLOSING:
            table.closed("a", None)


def test_without_reopening_a_mount_that_was_never_changed_can_be_leased_again() -> None:
    table: LeaseTable[str] = LeaseTable(Clock(), reopen=False)
    for _ in range(2):
        assert table.acquire("a").open == ("a",)
        table.opened("a", False)
        assert table.release("a") == ()


def test_revert_that_only_seemed_to_fail_is_counted_when_it_shows() -> None:
    table: LeaseTable[str] = LeaseTable(Clock())
    for _ in range(2):
        table.acquire("a")
        table.opened("a", True)
        table.release("a")
        table.closed("a", TimeoutError())
    numbers = table.statistics()
    assert (numbers.made_writable, numbers.made_read_only, numbers.owed) == (2, 1, 1)


MOUNTS = st.sampled_from("abc")


class LeaseModel(RuleBasedStateMachine):
    """The table against the mounts themselves, and a plain list of who holds what."""

    @initialize(writable=st.sets(MOUNTS))
    def setup(self, writable: set[str]) -> None:
        self.clock = Clock()
        self.table: LeaseTable[str] = LeaseTable(self.clock)
        self.found = {mount: mount in writable for mount in "abc"}
        self.real = dict(self.found)
        self.holders: list[str] = []
        self.opening: set[str] = set()
        self.closing: set[str] = set()
        self.failed: set[str] = set()
        self.window = dict.fromkeys("abc", 0.0)
        self.since: dict[str, float] = {}

    @rule(seconds=st.integers(1, 9))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(mount=MOUNTS)
    def acquire(self, mount: str) -> None:
        if mount in self.failed and mount in self.holders:
            with pytest.raises(OSError, match="refused"):
                self.table.acquire(mount)
            return
        step = self.table.acquire(mount)
        if mount in self.closing:
            assert step == ((), (), (), (mount,))
            return
        if mount in self.opening:
            assert step == ((), (), (mount,), ())
        elif mount in self.holders:
            assert step == ((mount,), (), (), ())
        else:
            assert step == ((), (mount,), (), ())
            self.opening.add(mount)
            self.failed.discard(mount)
            self.since.setdefault(mount, self.clock.now)
        self.holders.append(mount)

    def may_release(self) -> list[str]:
        return [m for m in self.holders if m not in self.opening or self.holders.count(m) > 1]

    @precondition(lambda self: self.may_release())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        mount = data.draw(st.sampled_from(self.may_release()))
        self.holders.remove(mount)
        last = mount not in self.holders
        owed = self.owed(mount)
        assert self.table.release(mount) == ((mount,) if last and owed else ())
        if last and owed:
            self.closing.add(mount)
            self.failed.discard(mount)

    def owed(self, mount: str) -> bool:
        return mount in self.since and mount not in self.opening

    @precondition(lambda self: self.opening)
    @rule(data=st.data(), how=st.sampled_from(["works", "refused", "died before", "died after"]))
    def opening_ends(self, data: st.DataObject, how: str) -> None:
        mount = data.draw(st.sampled_from(sorted(self.opening)))
        self.opening.discard(mount)
        before = self.real[mount]
        if how in ("works", "died after"):
            self.real[mount] = True
        if how == "works":
            self.table.opened(mount, not before)
        else:
            self.failed.add(mount)
            self.table.opened(mount, OSError("refused"), unknown=how != "refused")
        ours_already = self.table_owed_before.get(mount, False)
        if not ours_already and (how == "refused" or (how == "works" and before)):
            del self.since[mount]

    @precondition(lambda self: self.closing)
    @rule(data=st.data(), works=st.booleans())
    def closing_ends(self, data: st.DataObject, works: bool) -> None:
        mount = data.draw(st.sampled_from(sorted(self.closing)))
        self.closing.discard(mount)
        self.table.closed(mount, None if works else OSError("busy"))
        if works:
            self.real[mount] = self.found[mount]
            self.window[mount] += self.clock.now - self.since.pop(mount)

    table_owed_before: dict[str, bool]

    @invariant()
    def counts_and_owed_agree(self) -> None:
        numbers = self.table.statistics()
        self.table_owed_before = {
            mount: not use.reverted for mount, use in self.table.usage().items()
        }
        assert numbers.leases == len(self.holders)
        assert numbers.made_writable - numbers.made_read_only == numbers.owed
        for mount in "abc":
            assert self.table.count(mount) == self.holders.count(mount)
            if mount not in self.opening:
                assert self.table_owed_before.get(mount, False) == (mount in self.since)

    @invariant()
    def writable_exactly_while_leased(self) -> None:
        """A mount that is not as it was found is leased, being put back, or known as failed."""
        for mount in "abc":
            state = self.table.state(mount)
            if state is LeaseState.WRITABLE:
                assert self.real[mount]
                assert mount in self.holders
            if self.real[mount] != self.found[mount]:
                assert self.table_owed_before[mount]
                assert mount in self.holders or state in (LeaseState.CLOSING, LeaseState.FAILED)

    @invariant()
    def windows_end_with_the_revert(self) -> None:
        for mount, use in self.table.usage().items():
            if mount in self.opening:
                continue
            still_open = self.clock.now - self.since[mount] if mount in self.since else 0.0
            assert use.window_s == self.window[mount] + still_open


TestLeaseModel = LeaseModel.TestCase

"""The memory in which faults are asked for and told of: several processes, several runs, an end."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from ghostpool.testing import injected_faults
from ghostpool.testing._area import ALWAYS, FAULTS, REGION, REGIONS, Area


@pytest.fixture
def area() -> Iterator[Area]:
    area = Area.create()
    yield area
    area.close()


def test_a_fault_happens_to_the_arrivals_that_were_asked_for(area: Area) -> None:
    """Of all processes together: each has the area mapped for itself."""
    number = area.arm("open linkat", ("stop",), after=2, times=3)
    arrivals = [Area.at(area.path) for _ in range(8)]
    assert [one.take(number) for one in arrivals] == [False] * 2 + [True] * 3 + [False] * 3
    assert area.left(number) == 0
    arrivals[0].give_back(number)
    assert area.left(number) == 1
    assert arrivals[7].take(number)


def test_a_fault_is_seen_by_who_has_mapped_the_area_before(area: Area) -> None:
    other = Area.at(area.path)
    assert other.faults() == []
    area.arm("open linkat", ("errno", errno.EIO))
    area.arm("start setns", ("kill", "worker"), times=ALWAYS)
    assert other.faults() == [
        ("open linkat", ("errno", errno.EIO)),
        ("start setns", ("kill", "worker")),
    ]


def test_nobody_is_killed_who_belongs_to_another_run(area: Area) -> None:
    """Its number may be another process's by now."""
    servers = [Area.at(area.path) for _ in range(2)]
    runs = [server.enter("forkserver") for server in servers]
    assert len(set(runs)) == 2
    worker = Area.at(area.path)
    worker.enter("worker", runs[1])
    assert [one.run for one in area.processes()] == [runs[0], runs[1], runs[1]]
    assert len(area.pids("forkserver")) == 2
    assert len(worker.pids("forkserver")) == 1
    assert len(worker.pids("worker")) == 1
    assert servers[0].pids("worker") == []


def test_what_happened_is_told_after_the_end() -> None:
    area = Area.create()
    number = area.arm("open linkat", ("stop",), times=2)
    one = Area.at(area.path)
    one.enter("worker", 0)
    one.note("open _opening._link: linkat")
    assert one.take(number)
    area.close()
    assert area.left(number) == 1
    assert [process.lines for process in area.processes()] == [("open _opening._link: linkat",)]


def test_there_is_an_end_to_what_is_noted(area: Area) -> None:
    """What does not fit is lost; nobody writes into the region of another, and no run fails."""
    for number in range(REGIONS + 1):
        one = Area.at(area.path)
        one.enter("worker", 0)
        for _ in range(3):
            one.note(f"{number} ".ljust(REGION // 2))
    assert len(area.processes()) == REGIONS
    for number, process in enumerate(area.processes()):
        assert (process.kind, [line.split()[0] for line in process.lines]) == (
            "worker",
            [str(number)],
        )


def test_what_can_not_be_asked_for() -> None:
    with injected_faults() as faults:
        with pytest.raises(ValueError, match="0 is no errno"):
            faults.fail("open", "linkat", 0)
        with pytest.raises(ValueError, match="0 times"):
            faults.fail("open", "linkat", errno.EIO, times=0)
        with pytest.raises(ValueError, match="after -1"):
            faults.stop("open", "linkat", after=-1)
        for _ in range(FAULTS):
            faults.stop("open", "linkat")
        with pytest.raises(RuntimeError, match=f"more than {FAULTS} faults"):
            faults.stop("open", "linkat")

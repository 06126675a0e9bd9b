"""Whoever follows a run gets what there is room for, and can not disturb it."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool._events import Cleaned, Event, FileOpened, Lost, TaskArrived
from ghostpool._followers import Events

KINDS = {one.kind: one for one in Event.__subclasses__() if one.__module__.endswith("._events")}


def arrivals(*tasks: int) -> list[TaskArrived]:
    return [TaskArrived(task=task) for task in tasks]


def received(stream: Any) -> list[Event]:
    found = []
    try:
        while True:
            found.append(stream.receive_nowait())
    except (anyio.WouldBlock, anyio.EndOfStream):
        return found


class Follower:
    """Takes everything, and fails with what it is told to."""

    def __init__(self) -> None:
        self.got: list[Event] = []
        self.closed = 0
        self.failure: Exception | None = None

    def send_nowait(self, event: Event) -> None:
        if self.failure is not None:
            raise self.failure
        self.got.append(event)

    def close(self) -> None:
        self.closed += 1
        if self.failure is not None:
            raise self.failure


def test_a_slow_reader_is_told_how_much_it_lost() -> None:
    sender, receiver = anyio.create_memory_object_stream[Event](2)
    one, two, three, four, five, six = arrivals(1, 2, 3, 4, 5, 6)
    quick = Follower()
    events = Events([sender, quick])
    with receiver:
        for event in (one, two, three, four):
            events.send(event)
        assert received(receiver) == [one, two]
        events.send(five)
        lost, got = received(receiver)
        assert isinstance(lost, Lost)
        assert (lost.events, got) == (2, five)
        events.send(six)
        assert received(receiver) == [six], "it is told once"
        events.close()
    assert quick.got == [one, two, three, four, five, six]
    assert quick.closed == 1


def test_what_is_lost_before_the_loss_can_be_told_counts_too() -> None:
    """Room for one: that is taken by the word of the loss, and the event is lost."""
    sender, receiver = anyio.create_memory_object_stream[Event](1)
    events = Events([sender])
    with receiver:
        for event in arrivals(1, 2):
            events.send(event)
        assert len(received(receiver)) == 1
        events.send(TaskArrived(task=3))
        assert [lost.events for lost in received(receiver) if isinstance(lost, Lost)] == [1]
        events.close()
        (last,) = received(receiver)
        assert isinstance(last, Lost)
        assert last.events == 1


def test_no_room_at_the_end() -> None:
    """Then the loss is not told, and the reader comes to the end all the same."""
    sender, receiver = anyio.create_memory_object_stream[Event](1)
    events = Events([sender])
    one, two = arrivals(1, 2)
    events.send(one)
    events.send(two)
    events.close()
    with receiver:
        assert receiver.receive_nowait() == one
        with pytest.raises(anyio.EndOfStream):
            receiver.receive_nowait()


@pytest.mark.parametrize("failure", [anyio.BrokenResourceError(), ValueError("a bug")])
def test_a_reader_that_fails_gets_no_more(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Follower(), Follower()
    events = Events([bad, good])
    one, two, three = arrivals(1, 2, 3)
    events.send(one)
    bad.failure = failure
    events.send(two)
    bad.failure = None
    events.send(three)
    events.close()
    assert (bad.got, good.got) == ([one], [one, two, three])
    assert (bad.closed, good.closed) == (0, 1)
    bugs = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(bugs) == isinstance(failure, ValueError)


def test_a_reader_that_fails_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Follower(), Follower()
    events = Events([bad, good])
    bad.failure = ValueError("a bug")
    events.close()
    assert (bad.closed, good.closed) == (1, 1)
    assert "a bug" in caplog.text


def test_whether_anybody_follows() -> None:
    """What decides whether events are made at all: not for a reader that is gone."""
    assert not Events()
    gone = Follower()
    gone.failure = anyio.BrokenResourceError()
    events = Events([gone])
    assert events
    events.send(Cleaned(names=1))
    assert not events


def test_documents() -> None:
    """Through JSON and back: nothing is lost, and the kind says which type it was."""
    assert all(getattr(ghostpool, one.__name__) is one for one in KINDS.values())
    assert len(KINDS) == 10
    for event in (
        FileOpened(task=1, file=2, path="/data/\udc80\n", at=1.5),
        Cleaned(names=3),
        *arrivals(4),
    ):
        document = json.loads(json.dumps(event.document()))
        kind = KINDS[document.pop("event")]
        assert kind(**document) == event
        assert math.isfinite(event.at)

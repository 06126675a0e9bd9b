"""Who follows a run: its events go to everybody who does.

Sending never waits. A reader that is slower than the run has as much time as its buffer gives
it; what does not fit is dropped and counted, and the reader is told how much it lost as soon as
there is room again. A reader that fails is dropped, the run is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from ghostpool._events import Event

log = logging.getLogger("ghostpool")


class EventSink(Protocol):
    """Where events go: a MemoryObjectSendStream, or anything else with its `send_nowait`.

    It must return at once, and may raise anyio.WouldBlock (the event is dropped and counted) or
    anyio.BrokenResourceError (nobody reads any more). If it has a `close`, that is called when
    the run is over, so that whoever reads the other end comes to the end of it.
    """

    def send_nowait(self, item: Event, /) -> None:
        """Take an event."""
        ...


class Events:
    """Sends a run's events to everybody who follows it."""

    def __init__(self, sinks: Iterable[EventSink] = ()) -> None:
        self._readers = [_Reader(sink) for sink in sinks]

    def __bool__(self) -> bool:
        """Whether anybody follows: making events that nobody reads costs time."""
        return bool(self._readers)

    def send(self, event: Event) -> None:
        """Hand it to everybody."""
        gone = [reader for reader in self._readers if not reader.take(event)]
        for reader in gone:
            self._readers.remove(reader)

    def close(self) -> None:
        """The run is over: who has room hears of what was lost, and all that nothing comes."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()


class _Reader:
    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._lost = 0

    def take(self, event: Event) -> bool:
        """Whether it wants further ones."""
        try:
            if self._lost:
                self._sink.send_nowait(_lost(self._lost))
                self._lost = 0
            self._sink.send_nowait(event)
        except anyio.WouldBlock:
            self._lost += 1
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return False
        except Exception:  # a follower's bug is no reason to fail a restore, nor its undoing
            log.exception("a reader of events failed and gets no more of them")
            return False
        return True

    def close(self) -> None:
        close: Callable[[], object] | None = getattr(self._sink, "close", None)
        try:
            if self._lost:
                with suppress(anyio.WouldBlock, anyio.BrokenResourceError):
                    self._sink.send_nowait(_lost(self._lost))
            if close is not None:
                close()
        except Exception:  # as above
            log.exception("a reader of events failed at the end")


def _lost(events: int) -> Event:
    from ghostpool._events import Lost

    return Lost(events=events)


NOBODY = Events()
"""Nobody follows."""

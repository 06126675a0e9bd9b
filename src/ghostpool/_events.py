"""What happens in a run, as typed values for whoever follows it: a progress bar, a file, a trace.

Sending never waits. A reader that is slower than the run has as much time as its buffer gives
it; what does not fit is dropped and counted, and the reader is told how much it lost as soon as
there is room again. A reader that fails is dropped, the run is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import anyio

log = logging.getLogger("ghostpool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened in a run."""

    kind: ClassVar[str] = "event"
    """Name of the type, in documents."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970, by this machine's clock."""

    def document(self) -> dict[str, Any]:
        """As plain values: `event` is its kind, the others are its fields."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"event": self.kind, **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """There is a plan, and nothing has been changed yet."""

    kind = "planned"
    ghosts: int
    """How many files are to be made."""
    files: int
    """Opens of ghosts: what the tasks held."""
    tasks: int
    """All of the images, those without any ghost too."""
    mounts: int
    """Live mounts that ghosts are on."""
    to_make_writable: int
    """Mounts that tasks will be leased."""
    refusals: int
    """If there are any, the run ends here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered(Event):
    """A worker process has entered a target's mount namespace, for the first time."""

    kind = "entered"
    worker: int
    """Its pid here."""
    target: str
    """The mount namespace, as messages name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountWritable(Event):
    """A mount was read-only and is writable now, in its namespace's own view."""

    kind = "mount_writable"
    target: str
    """The mount namespace, as messages name it."""
    mountpoint: str
    """In that namespace."""
    mount_id: int
    """Its number in /proc/PID/mountinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostCreated(Event):
    """A ghost's file is there, with its content, under a temporary name."""

    kind = "ghost_created"
    ghost: int
    """Its id in the images."""
    mountpoint: str
    size: int
    """Bytes, holes included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOpened(Event):
    """A ghost was opened under its old name, which is gone again unless it is kept."""

    kind = "file_opened"
    task: int
    """Pid in the images of the one that opened it: several may have it."""
    file: int
    """Id of the open file description in the images."""
    path: str
    """The old name, in the task's mount namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArrived(Event):
    """A task has all its files open and is at the barrier."""

    kind = "task_arrived"
    task: int
    """Its pid in the images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reverted(Event):
    """A mount that was made writable is read-only again."""

    kind = "reverted"
    target: str
    """The mount namespace, as messages name it."""
    mountpoint: str
    """In that namespace."""
    mount_id: int
    """Its number in /proc/PID/mountinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned(Event):
    """The temporary names are gone, after a success or in undoing a failure."""

    kind = "cleaned"
    names: int
    """How many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The run has failed, or was cancelled; what it had done is undone by now. Also sent when
    everything was restored, but what the caller does with it failed."""

    kind = "failed"
    error: str
    """Name of the exception's type."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Event):
    """This reader's buffer was full: so many events are missing before the next one."""

    kind = "lost"
    events: int
    """How many."""


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
                self._sink.send_nowait(Lost(events=self._lost))
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
                    self._sink.send_nowait(Lost(events=self._lost))
            if close is not None:
                close()
        except Exception:  # as above
            log.exception("a reader of events failed at the end")


NOBODY = Events()
"""Nobody follows."""

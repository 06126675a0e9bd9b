"""Spans of a restore for OpenTelemetry, made of its events; nothing where nobody traces.

The API is looked for among the modules that are loaded. Spans go somewhere only if the program,
or what started it (opentelemetry-instrument), has set a tracer provider, for which it has loaded
the API before. So nothing is ever imported here for the first time: no event loop waits for that,
the command starts as fast as without, and who does not trace pays for one look into a dictionary.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ghostpool import __version__
from ghostpool._events import (
    Cleaned,
    Event,
    Failed,
    FileOpened,
    GhostCreated,
    MountWritable,
    Planned,
    Reverted,
    TaskArrived,
)
from ghostpool._followers import EventSink

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_API = "opentelemetry.trace"
FLUSH_MS = 2000
"""Milliseconds that the command waits at its end for what exports its spans."""


def spans() -> tuple[EventSink, ...]:
    """What makes spans of a run that begins now, below the caller's current span; or nothing."""
    if _API not in sys.modules:
        return ()
    from opentelemetry import trace

    tracer = trace.get_tracer("ghostpool", __version__)
    root = tracer.start_span("ghostpool.restore")
    # No provider was set, or it takes no sample of this one.
    return (Spans(tracer, root),) if root.is_recording() else ()


def flush() -> None:
    """Have spans exported that wait for it, before this process ends without further ado."""
    if _API not in sys.modules:
        return
    from opentelemetry import trace

    force = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force is not None:
        force(FLUSH_MS)


class Spans:
    """One run's spans: its own, one below it for each phase, and for each task."""

    def __init__(self, tracer: Tracer, root: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._root = root
        self._inside = set_span_in_context(root)
        self._tasks: dict[int, tuple[Span, int]] = {}
        """Those that have not arrived, with the number of their files."""
        self._planned = False
        self._ghosts = self._arrivals = 0
        """Those that are still to come."""
        self._writable = 0
        self._undoing = self._clean = self._failed = False
        self._name: str | None = None
        self._phase: Span | None = None
        self._go_on(time.time_ns())

    def send_nowait(self, event: Event) -> None:
        """Begin and end spans."""
        at = round(event.at * 1e9)
        match event:
            case Planned():
                self._planned = True
                self._ghosts, self._arrivals = event.ghosts, event.tasks
                self._clean = event.refusals > 0
                names = ("ghosts", "files", "tasks", "mounts", "refusals")
                self._root.set_attributes({f"ghostpool.{n}": getattr(event, n) for n in names})
            case GhostCreated():
                self._ghosts -= 1
            case MountWritable():
                self._writable += 1
                self._note("mount writable", event, at)
            case FileOpened():
                span, files = self._task(event.task, at)
                self._tasks[event.task] = (span, files + 1)
            case TaskArrived():
                span, files = self._task(event.task, at)
                del self._tasks[event.task]
                span.set_attribute("ghostpool.files", files)
                span.end(at)
                self._arrivals -= 1
            case Reverted():
                self._begin_undoing(at)
                self._note("mount reverted", event, at)
                self._writable -= 1
            case Cleaned():
                self._begin_undoing(at)
                self._clean = True
            case Failed():
                self._fail(event, at)
            case _:
                pass
        self._go_on(at)

    def close(self) -> None:
        """The run is over."""
        at = time.time_ns()
        for span, files in self._tasks.values():
            span.set_attribute("ghostpool.files", files)
            _mark(span)
            span.end(at)
        if self._phase is not None:
            self._phase.end(at)
        self._root.end(at)

    def _now(self) -> str | None:
        """The phase that the run is in, by what is still to come."""
        if self._failed:
            return None
        if not self._planned:
            return "plan"
        if self._undoing:
            return None if self._clean and not self._writable else "undo"
        if self._clean and not self._writable:
            return None
        if self._ghosts:
            return "create"
        if self._arrivals:
            return "open"
        return "revert" if self._writable else "clean"

    def _go_on(self, at: int) -> None:
        name = self._now()
        if name == self._name:
            return
        if self._phase is not None:
            self._phase.end(at)
        self._name, self._phase = name, None
        if name is not None:
            self._phase = self._start(f"ghostpool.{name}", at)

    def _start(self, name: str, at: int) -> Span:
        return self._tracer.start_span(name, context=self._inside, start_time=at)

    def _task(self, pid: int, at: int) -> tuple[Span, int]:
        if pid not in self._tasks:
            span = self._start("ghostpool.task", at)
            span.set_attribute("ghostpool.task", pid)
            self._tasks[pid] = (span, 0)
        return self._tasks[pid]

    def _note(self, what: str, event: MountWritable | Reverted, at: int) -> None:
        # On the phase, not on the root: by default a span keeps its last 128 events only.
        attributes: dict[str, str | int] = {
            "ghostpool.target": event.target,
            "ghostpool.mountpoint": event.mountpoint,
            "ghostpool.mount_id": event.mount_id,
        }
        (self._phase or self._root).add_event(what, attributes, at)

    def _begin_undoing(self, at: int) -> None:
        """Before all tasks have arrived nothing is put back, unless the phase has failed."""
        if (self._ghosts or self._arrivals) and not self._undoing:
            self._undoing = True
            if self._phase is not None:
                _mark(self._phase)
            self._go_on(at)

    def _fail(self, event: Failed, at: int) -> None:
        said = {"exception.type": event.error, "exception.message": event.message}
        self._root.add_event("exception", said, at)
        if self._failed:
            return
        _mark(self._root, event.message)
        if self._phase is not None:
            _mark(self._phase)
        self._failed = True


def _mark(span: Span, why: str | None = None) -> None:
    """What it stands for has failed."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))

"""What happens in a run as lines of JSON, written as it happens: the file of --events.

A thread of its own writes, from a queue without a bound, so that neither a slow disk nor a fifo
that nobody reads slows the restore. At the end it has a moment to finish; what was not written
by then is counted and told, and changes nothing else. docs/events.md has the lines.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import select
import stat
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Self

from ghostpool import __version__
from ghostpool._errors import PlanError
from ghostpool._events import Event

log = logging.getLogger("ghostpool")
SCHEMA = 1
FLUSH_S = 2.0
"""Seconds after the run in which a reader may still take what is waiting for it."""
_LOOK_S = 0.1
"""Seconds between two looks for a reader, or for the end."""
_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun(Event):
    """The first line: how the others are to be read, and whose they are."""

    kind = "run"
    schema: int = SCHEMA
    version: str = __version__
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """The last line: nothing comes any more."""

    kind = "end"


class EventFile:
    """A file that gets the events of a run; a context manager, whose end waits for the writer."""

    def __init__(self, path: str) -> None:
        """PlanError if the file can not be written; a fifo need not have a reader yet."""
        self._path = path
        self._fd: int | None
        try:
            self._fd = os.dup(1) if path == "-" else _open(path, os.O_CREAT | os.O_TRUNC)
        except OSError as error:
            raise PlanError(f"--events {path}: {error.strerror}") from error
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._sent = 0
        self._written = 0
        self._problem = f"nothing was taken for {FLUSH_S:g} s"
        self._closed = False
        self._ending = threading.Event()
        self._until = math.inf
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self.send_nowait(Begun(pid=os.getpid()))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()

    def send_nowait(self, event: Event) -> None:
        """Have it written."""
        self._sent += 1
        self._queue.put(event)

    def close(self) -> None:
        """The run is over: have the last line written."""
        if not self._closed:
            self._closed = True
            self.send_nowait(Ended())
            self._queue.put(None)

    def finish(self) -> None:
        """Wait a moment for the writer, and say how many events it could not write."""
        self.close()
        self._until = time.monotonic() + FLUSH_S
        self._ending.set()
        # It is a daemon: where a write itself hangs, as on a dead disk, it ends with the process.
        self._thread.join(FLUSH_S + 2 * _LOOK_S)
        missing = self._sent - self._written
        if missing:
            problem = self._problem
            log.warning("--events %s: %d events were not written: %s", self._path, missing, problem)

    # -- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            fd = self._wait_for_reader()
            if fd is None:
                self._problem = "nobody reads it"
                return
            try:
                self._write_all(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._problem = error.strerror or repr(error)
            # What is still to come is only counted.
            while self._queue.get() is not None:
                pass

    def _wait_for_reader(self) -> int | None:
        fd, last = self._fd, False
        while fd is None and not last:
            last = self._ending.wait(_LOOK_S)
            fd = _open(self._path)
        return fd

    def _write_all(self, fd: int) -> None:
        room = select.poll()
        room.register(fd, select.POLLOUT)
        while data := self._lines():
            while data:
                while not room.poll(1000 * _LOOK_S):
                    if time.monotonic() > self._until:
                        return
                try:
                    # A pipe that has room takes so much at once, also where stdout may block.
                    written = os.write(fd, data[: select.PIPE_BUF])
                except BlockingIOError:  # a terminal, say, to which others write too
                    time.sleep(_LOOK_S)
                    continue
                self._written += data.count(b"\n", 0, written)
                data = data[written:]

    def _lines(self) -> bytes:
        """What is to be written next, as soon as there is anything; b"" at the end."""
        found: list[bytes] = []
        size = 0
        event = self._queue.get()
        while event is not None:
            found.append(json.dumps(event.document(), separators=(",", ":")).encode() + b"\n")
            size += len(found[-1])
            if size >= select.PIPE_BUF:
                break
            try:
                event = self._queue.get_nowait()
            except Empty:
                break
        else:
            self._queue.put(None)  # for the next call
        return b"".join(found)


def _open(path: str, flags: int = 0) -> int | None:
    """The file, open for writing; None: it is a fifo that nobody reads at present."""
    try:
        return os.open(path, _FLAGS | flags, 0o666)
    except OSError as error:
        # ENXIO: nobody reads the fifo, and waiting would block; or it is a socket: open(2).
        if error.errno == errno.ENXIO and stat.S_ISFIFO(os.stat(path).st_mode):
            return None
        raise

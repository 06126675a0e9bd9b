"""The coordinator's side of the reader: what it is given, and what is believed of its answer.

Every frame is bounded, every descriptor it asks for is that of a regular file in the directory of
the images, an archive is unpacked in one of few ways, and every value is checked by `Rebuild`.
However it ends, it is gone afterwards.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import anyio.lowlevel

from ghostpool import _linux
from ghostpool._channel import receive_some
from ghostpool._confine import CPU_S, MEMORY, unpacking_s
from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._imagerows import ASK
from ghostpool._imagesource import OPEN_FLAGS
from ghostpool._limits import Limits, size_text
from ghostpool._model import Images, Step
from ghostpool._protocol import rights
from ghostpool._rebuild import Rebuild
from ghostpool._said import LENGTH, MAX_FRAME
from ghostpool._startreader import Reading

log = logging.getLogger("ghostpool")

SILENCE_S: Final = 30.0
"""How long the reader may say nothing; it says every second that it goes on."""
STOP_S: Final = 5.0
"""How long it may take to be gone after it was killed."""
_MAX_TOTAL: Final = 512 << 20
_MAX_NAME: Final = 255
_MAX_STEPS: Final = 2
"""An archive in an archive, both packed."""
_CHUNK: Final = 1 << 18
_LONGEST: Final = 10_000
"""Characters of a message that are shown."""
_STILL_COSTS: Final = 1 << 16
"""What saying that it goes on counts of the total: two hours of it are too much."""


async def read_apart(reading: Reading) -> Images:
    """What the reader finds in the images.

    ImageError: missing, malformed, contradictory or beyond the limits, or the reader came to grief
    over them. UnsupportedError: images that ghostpool does not read.
    """
    with _ended(reading) as pidfd:
        try:
            return await _Conversation(reading).images()
        except anyio.EndOfStream:
            with anyio.move_on_after(STOP_S):
                await anyio.wait_readable(pidfd)
            why = why_it_ended(pidfd, cpu_s=processor_s(reading.directory))
            raise ImageError(reading.path, None, why) from None
        finally:
            _kill(pidfd)
            with anyio.move_on_after(STOP_S, shield=True):
                await anyio.wait_readable(pidfd)


def discard(reading: Reading) -> None:
    """End the reader of images that nobody wants any more."""
    with _ended(reading):
        pass


@contextmanager
def _ended(reading: Reading) -> Iterator[int]:
    """The reader's pidfd for the time of the block; then it is reaped, if it can be.

    A process in an uninterruptible sleep (a dead network file system) can not: it was killed, and
    goes when the kernel lets it.
    """
    try:
        yield reading.pidfd
    finally:
        _kill(reading.pidfd)
        os.close(reading.pidfd)
        os.close(reading.socket)
        try:
            os.waitpid(reading.pid, os.WNOHANG)
        except ChildProcessError:
            pass  # it was asked for its status, or the program reaps whatever child there is


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass


def processor_s(images: int) -> int:
    """Seconds of processor time that reading a directory or an archive may take."""
    status = os.fstat(images)
    return unpacking_s(status.st_size) if stat.S_ISREG(status.st_mode) else CPU_S


def why_it_ended(
    pidfd: int, text: str = "the process that reads the images", cpu_s: int = CPU_S
) -> str:
    """How a process that was to answer, and that `text` names, came to an end."""
    try:
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        status = None
    if status is None or status.si_code == os.CLD_EXITED:
        return f"{text} ended without an answer"
    if status.si_status == signal.SIGXCPU:
        return f"{text} needed more than {cpu_s} s of processor time"
    name = signal.Signals(status.si_status).name
    memory = " (is the machine out of memory?)" if status.si_status == signal.SIGKILL else ""
    return f"{text} was ended by {name}{memory}"


class _Conversation:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._socket = socket.socket(fileno=os.dup(reading.socket))
        self._socket.setblocking(False)
        self._buffer = bytearray()
        self._total = 0
        self._unpacking: tuple[Step, ...] | None = None
        self._rebuild = Rebuild(
            reading.path, Limits(size=reading.size), all_mounts=reading.all_mounts
        )

    async def images(self) -> Images:
        """Listen until the last frame."""
        try:
            return await self._listen()
        except TimeoutError:
            raise ImageError(
                self._reading.path,
                None,
                f"reading the images has hung for {SILENCE_S:g} s: does their storage answer?",
            ) from None

    async def _listen(self) -> Images:
        with self._socket:
            while not self._rebuild.complete:
                kind, value = await self._frame()
                if kind == "open":
                    await self._open(value)
                elif kind == "error":
                    raise self._error(value)
                elif kind == "confined":
                    self._confined(value)
                elif kind == "archive" and self._unpacking is None:
                    self._unpacking = self._steps(value)
                elif kind == "still":
                    self._total += _STILL_COSTS
                else:
                    self._rebuild.add([kind, value])
            images = self._rebuild.images()
            if self._unpacking is None:
                return images
            return images._replace(unpacking=self._unpacking)

    def _confined(self, layers: list[Any]) -> None:
        match layers:
            case [bool() as root, bool() as filtered]:
                log.debug("the reader is confined: root %s, filter %s", root, filtered)
            case _:
                raise self._nonsense()

    def _steps(self, steps: list[Any]) -> tuple[Step, ...]:
        """How the archive is unpacked, which nobody has to be told of a directory."""
        found = []
        for step in steps:
            match step:
                case ["gzip" | "zstd" as kind, int() as at] if 0 <= at < 1 << 63:
                    found.append(Step(kind, at))
                case _:
                    raise self._nonsense()
        if len(found) > _MAX_STEPS or not stat.S_ISREG(os.fstat(self._reading.directory).st_mode):
            raise self._nonsense()
        return tuple(found)

    def _nonsense(self) -> ImageError:
        return ImageError(
            self._reading.path, None, "the process that reads the images makes no sense"
        )

    async def _frame(self) -> tuple[str, Any]:
        # Frames that are there already would leave no room for a cancellation, or anybody else.
        await anyio.lowlevel.checkpoint()
        (length,) = LENGTH.unpack(await self._take(LENGTH.size))
        self._total += length
        if length > MAX_FRAME or self._total > _MAX_TOTAL:
            raise self._nonsense()
        try:
            kind, value = json.loads(await self._take(length))
        except (ValueError, TypeError, RecursionError):
            raise self._nonsense() from None
        if type(kind) is not str or type(value) is not list:
            raise self._nonsense()
        return kind, value

    async def _take(self, length: int) -> bytes:
        while len(self._buffer) < length:
            self._buffer += await self._some()
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    async def _some(self) -> bytes:
        with anyio.fail_after(SILENCE_S):
            # It has no descriptors to send: there is no space for any.
            data, _, _ = await receive_some(self._socket, _CHUNK)
        return data

    def _error(self, problem: list[Any]) -> ImageError | UnsupportedError:
        match problem:
            case ["image", str() as file, (None | int()) as record, str() as text]:
                return ImageError(file[:_LONGEST], record, text[:_LONGEST])
            case ["unsupported", str() as text]:
                return UnsupportedError(text[:_LONGEST])
            case ["memory"]:
                text = f"reading the images needs more than {size_text(MEMORY)} of memory"
            case ["broken", str() as error]:
                text = f"the process that reads the images failed: {error[:_LONGEST]}"
            case _:
                return self._nonsense()
        return ImageError(self._reading.path, None, text)

    async def _open(self, names: list[Any]) -> None:
        """Open images that the reader may not open by itself."""
        if len(names) > ASK:
            raise self._nonsense()
        fds: list[int] = []
        try:
            codes = []
            for name in names:
                if not _is_component(name):
                    raise self._nonsense()
                try:
                    fds.append(os.open(name, OPEN_FLAGS, dir_fd=self._reading.directory))
                    codes.append(0)
                except OSError as error:
                    codes.append(error.errno or errno.EIO)
            await self._answer(json.dumps(codes).encode(), fds)
        finally:
            _linux.close_all(fds)

    async def _answer(self, body: bytes, fds: list[int]) -> None:
        # Small, and the reader waits for it: it fits the buffer of the socket.
        data = LENGTH.pack(len(body)) + body
        try:
            with anyio.fail_after(SILENCE_S):
                while True:
                    try:
                        sent = self._socket.sendmsg([data], rights(fds), socket.MSG_NOSIGNAL)
                        break
                    except BlockingIOError:
                        await anyio.wait_writable(self._socket)
        except ConnectionError:
            raise anyio.EndOfStream from None
        if sent != len(data):
            raise self._nonsense()


def _is_component(name: Any) -> bool:
    if type(name) is not str or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME
    except UnicodeEncodeError:
        return False


__all__ = ["SILENCE_S", "STOP_S", "processor_s", "read_apart", "why_it_ended"]

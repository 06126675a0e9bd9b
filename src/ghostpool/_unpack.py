"""Streams of bytes that can only be gone through forwards: a file, and what unpacks out of one.

An archive may be packed, with an archive inside that is packed once more: each layer is a stream
over another one, and nothing is held but a piece of each. A position is counted from the beginning
of what the innermost layer gives; an archive that is not packed keeps the positions of its file.
What unpacks is loaded by `load`, before the process that uses it can import nothing any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from ghostpool._model import Step

PIECE: Final = 1 << 18
"""Most bytes that are unpacked at once."""
WINDOW_LOG: Final = 25
"""How far back zstd may refer, as a power of two: it is the memory that unpacking takes."""
_MAGICS: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((bytes((low, 0x2A, 0x4D, 0x18)), "zstd") for low in range(0x50, 0x60)),  # may be skipped
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
)
UNPACKED: Final = ("gzip", "zstd")


class Unreadable(Exception):
    """What is in the stream can not be unpacked; the text says why."""


class Stream(Protocol):
    """Bytes, from a position on."""

    @property
    def at(self) -> int:
        """Position of what is read next."""

    def read(self, most: int) -> bytes:
        """Up to `most` bytes; none only at the end."""

    def peek(self, most: int) -> bytes:
        """What `read` would give, up to `most` bytes; fewer only at the end."""

    def skip(self, length: int) -> bool:
        """Go so many bytes forwards; False: there are not as many."""


class FileStream:
    """A part of a file; its descriptor is only borrowed."""

    def __init__(self, fd: int, at: int, end: int) -> None:
        self.at = at
        self._fd = fd
        self._end = end

    def read(self, most: int) -> bytes:
        data = self.peek(most)
        self.at += len(data)
        return data

    def peek(self, most: int) -> bytes:
        return os.pread(self._fd, max(0, min(most, self._end - self.at)), self.at)

    def skip(self, length: int) -> bool:
        there = length <= self._end - self.at
        self.at = self.at + length if there else self._end
        return there


class PartStream:
    """The next `length` bytes of another stream, at the same positions."""

    def __init__(self, whole: Stream, length: int) -> None:
        self._whole = whole
        self._end = whole.at + length

    @property
    def at(self) -> int:
        return self._whole.at

    def read(self, most: int) -> bytes:
        return self._whole.read(min(most, self._end - self.at))

    def peek(self, most: int) -> bytes:
        return self._whole.peek(min(most, self._end - self.at))

    def skip(self, length: int) -> bool:
        there = length <= self._end - self.at
        return self._whole.skip(min(length, self._end - self.at)) and there


class UnpackedStream:
    """What comes out of a packed stream; `going_on` is called for each piece of it."""

    def __init__(self, packed: Stream, kind: str, going_on: Callable[[], object]) -> None:
        self.at = 0
        self._packed = packed
        self._kind = kind
        self._going_on = going_on
        self._decoder: Any = None
        self._ahead = b""
        self._left = b""
        """Of a piece that was read, what the frame before did not need."""

    def read(self, most: int) -> bytes:
        if most <= 0:
            return b""  # to zlib, none at most means as many as there are
        data = self._ahead[:most] or self._unpack(min(most, PIECE))
        self._ahead = self._ahead[most:]
        self.at += len(data)
        return data

    def peek(self, most: int) -> bytes:
        while len(self._ahead) < most and (data := self._unpack(most - len(self._ahead))):
            self._ahead += data
        return self._ahead[:most]

    def skip(self, length: int) -> bool:
        end = self.at + length
        while self.at < end:
            if not self.read(min(PIECE, end - self.at)):
                return False
        return True

    def _unpack(self, most: int) -> bytes:
        """Up to `most` bytes, none only at the end. Frames follow one another as one stream."""
        self._going_on()
        while True:
            if self._decoder is None or self._decoder.needs_input:
                data = self._left or self._packed.read(PIECE)
                self._left = b""
                if not data:
                    if self._decoder is None:
                        return b""
                    raise Unreadable(f"its {self._kind} data is cut")
            else:
                data = b""
            if self._decoder is None:
                self._decoder = _decoder(self._kind)
            try:
                unpacked: bytes = self._decoder.decompress(data, most)
            except Exception as error:
                raise Unreadable(f"its {self._kind} data can not be unpacked: {error}") from error
            if self._decoder.eof:
                self._left = self._decoder.unused_data
                self._decoder = None
            if unpacked:
                return unpacked


class _Gzip:
    """zlib's decompressor with the methods of all others."""

    def __init__(self) -> None:
        self._decoder = _loaded["gzip"].decompressobj(31)  # 16 for gzip's frame, 15: any window
        self._left = b""
        self.needs_input = True

    def decompress(self, data: bytes, most: int) -> bytes:
        unpacked: bytes = self._decoder.decompress(self._left + data, most)
        self._left = self._decoder.unconsumed_tail
        # All input may be taken, and more than `most` bytes have come of it.
        self.needs_input = not self._left and len(unpacked) < most
        return unpacked

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decoder.unused_data)


_loaded: dict[str, Any] = {}


def load() -> None:
    """Import what unpacks."""
    import zlib

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    _loaded.update(gzip=zlib, zstd=zstd)


def _decoder(kind: str) -> Any:
    if kind == "gzip":
        return _Gzip()
    zstd = _loaded["zstd"]
    most = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    return zstd.ZstdDecompressor(options=most)


def packed_as(head: bytes) -> str | None:
    """What packed the stream that begins so; None: nothing that is known."""
    return next((kind for magic, kind in _MAGICS if head.startswith(magic)), None)


def unpack(stream: Stream, steps: Iterable[Step], going_on: Callable[[], object]) -> Stream:
    """What comes out of a stream, step by step."""
    for kind, at in steps:
        if not stream.skip(at - stream.at):
            raise Unreadable("it is cut")
        stream = UnpackedStream(stream, kind, going_on)
    return stream


__all__ = [
    "PIECE",
    "UNPACKED",
    "FileStream",
    "PartStream",
    "Stream",
    "UnpackedStream",
    "Unreadable",
    "load",
    "packed_as",
    "unpack",
]

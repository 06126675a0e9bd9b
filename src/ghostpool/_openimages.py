"""Images without a restore: what a dump holds, read as a restore reads it."""

from __future__ import annotations

import os

from ghostpool._limits import Limits
from ghostpool._model import Images
from ghostpool._reading import read_apart
from ghostpool._startreader import start_reading


async def read_images(path: str | os.PathLike[str], *, max_size: int = Limits().size) -> Images:
    """What ghostpool needs of the images in the directory or archive `path`, joined and checked.

    The images are untrusted input: a process of its own parses them, without capabilities, with the
    directory as its root and a filter on its system calls, and each value it gives is checked
    again here. Ghosts stay in their images: a `Ghost` says where its content lies.
    An archive is read as it is, packed by zstd or gzip or not: `Images.unpacking`.

    `max_size` is the largest apparent size of a ghost, in bytes, holes included. Raises PlanError
    if there is no such directory or file; ImageError for what can not be read as an archive, for an
    image that is missing, malformed, contradicts another one or asks for more than the limits
    allow, and if reading makes no progress for 30 s; UnsupportedError for images that are not read
    (of a CRIU that is too old, of MIPS). Cancelled, it ends the process and leaves nothing behind.
    Needs no privilege besides reading the files.
    """
    reading = start_reading(os.fspath(path), max_size)
    try:
        return await read_apart(reading)
    finally:
        os.close(reading.directory)


__all__ = ["read_images"]

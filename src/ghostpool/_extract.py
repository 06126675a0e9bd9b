"""The contents of ghosts as plain files in a directory, with a manifest of all that a plain file
does not keep.

Nothing is made but in that directory: by its descriptor, under names of one component that are made
of the ghost's number and of harmless characters, and each only if nothing has it. The manifest is
written last, so that a directory with one is whole; whatever fails before is undone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import anyio.lowlevel

from ghostpool._errors import ImageError, KernelError, PlanError
from ghostpool._imagesource import OPEN_FLAGS
from ghostpool._inspection import SCHEMA, inspection
from ghostpool._linux import write_all
from ghostpool._model import Extent, Ghost, GhostId, Images
from ghostpool._paths import text
from ghostpool._reading import read_apart
from ghostpool._startreader import start_reading
from ghostpool._unpacking import Unpacking

MANIFEST: Final = "manifest.json"
_MAKE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 8 << 20
"""Bytes between two looks at whether this is to end."""
_BASE_NAME: Final = 80
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9._-]")
_NOT_THIS_WAY: Final = (
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
)
"""What copying inside the kernel fails with where it can not be done between these two files."""


_Way = Callable[[int, int, int, int, int], int]


class Extracted(NamedTuple):
    """What came of it."""

    files: int
    others: int
    """Ghosts without content, which are in the manifest only."""
    content: int
    """Bytes that were copied."""


async def extract(path: str, output: str, only: Sequence[str], *, max_size: int) -> Extracted:
    """Extract ghosts of the images at `path` into the directory `output`, new or empty.

    `only`: the numbers of ghosts, and patterns of their old paths; empty: all. PlanError: nothing
    was done; KernelError: it failed, and was undone.
    """
    reading = start_reading(path, max_size)
    try:
        images = await read_apart(reading)
        chosen = choose(images, only)
        manifest = inspection(images)
        async with AsyncExitStack() as stack:
            contents = await stack.enter_async_context(Unpacking.running(images, reading.directory))
            target = stack.enter_context(_output(output))
            by_id = {ghost["id"]: ghost for ghost in manifest["ghosts"]}
            listed = [by_id[ghost.id] for ghost in chosen]
            content = 0
            if images.unpacking:
                # A packed archive is gone through forwards.
                chosen.sort(key=lambda ghost: ghost.extents[0].position if ghost.extents else 0)
            for ghost in chosen:
                entry = by_id[ghost.id]
                await anyio.lowlevel.checkpoint()
                entry["extracted"] = None
                if stat.S_ISREG(ghost.mode):
                    name = _name(images, ghost, entry["names"][0]["file"])
                    await _extract_one(images, ghost, reading.directory, target, name, contents)
                    entry["extracted"] = name
                    content += entry["content"]
            _write_manifest(
                target, {"schema": SCHEMA, "images": manifest["images"], "ghosts": listed}
            )
        files = sum(entry["extracted"] is not None for entry in listed)
        return Extracted(files, len(listed) - files, content)
    finally:
        os.close(reading.directory)


def choose(images: Images, only: Sequence[str]) -> list[Ghost]:
    """The ghosts that are meant, by number. PlanError: something means none."""
    if not only:
        return [images.ghosts[ghost] for ghost in sorted(images.ghosts)]
    paths: dict[GhostId, list[bytes]] = {}
    for remap in images.remaps:
        if remap.kind == "ghost":
            paths.setdefault(GhostId(remap.target), []).append(images.files[remap.origin].name)
    chosen: set[GhostId] = set()
    for wanted in only:
        if wanted.isascii() and wanted.isdigit():
            number = wanted.lstrip("0") or "0"  # not int(): it may have any number of digits
            found = {ghost for ghost in images.ghosts if str(ghost) == number}
        else:
            pattern = os.fsencode(wanted)
            found = {
                ghost
                for ghost, names in paths.items()
                if any(fnmatchcase(name, pattern) for name in names)
            }
        if not found:
            raise PlanError(
                f"--only {text(os.fsencode(wanted))}: no ghost of {images.directory} has this "
                "number or path: see ghostpool inspect"
            )
        chosen |= found
    return [images.ghosts[ghost] for ghost in sorted(chosen)]


def _name(images: Images, ghost: Ghost, file: Any) -> str:
    base = images.files[file].name.rpartition(b"/")[2][:_BASE_NAME]
    return f"{ghost.id}-{_UNSAFE.sub(b'_', base).decode('ascii')}"


class _Output:
    """The directory, and what was made in it."""

    def __init__(self, fd: int, label: str) -> None:
        self._fd = fd
        self._label = label
        self._made: list[tuple[str, int]] = []

    @contextmanager
    def file(self, name: str) -> Iterator[int]:
        """A new file, open for writing. KernelError: that, or what is done with it, fails."""
        step = "open"
        try:
            fd = os.open(name, _MAKE, 0o600, dir_fd=self._fd)
            try:
                self._made.append((name, os.fstat(fd).st_ino))
                step = "write"
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            raise KernelError(error.errno or errno.EIO, step, f"{self._label}/{name}") from error

    def undo(self) -> None:
        """Remove what was made, as far as it is still what has the name."""
        for name, inode in reversed(self._made):
            try:
                if os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_ino == inode:
                    os.unlink(name, dir_fd=self._fd)
            except OSError:
                pass  # somebody else has removed it; the error that is raised says why we stop


@contextmanager
def _output(path: str) -> Iterator[_Output]:
    """The directory `path`, made if it is not there; undone if the block fails."""
    label = text(os.fsencode(path))
    made = True
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            made = False
        # Whoever could have put another one in its place gets files that only we can read.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if made else 0)
        fd = os.open(path, flags)
    except OSError as error:
        raise PlanError(f"{label}: {error.strerror}") from error
    try:
        with os.scandir(fd) as entries:
            if next(entries, None) is not None:
                raise PlanError(f"{label}: is not empty: name a new directory")
        target = _Output(fd, label)
        try:
            yield target
        except BaseException:
            target.undo()
            if made:
                try:
                    os.rmdir(path)
                except OSError:
                    pass  # somebody has put something there
            raise
    finally:
        os.close(fd)


async def _extract_one(
    images: Images,
    ghost: Ghost,
    directory: int,
    target: _Output,
    name: str,
    contents: Unpacking,
) -> None:
    with target.file(name) as fd:
        # What no extent covers stays a hole.
        os.ftruncate(fd, ghost.size)
        if ghost.extents and images.unpacking:
            await _unpack(ghost, contents, fd)
        elif ghost.extents:
            if images.unpacking is None:
                image = _open_image(directory, ghost.file)
            else:
                image = os.dup(directory)  # of the archive, which has the content at its position
            ways: list[_Way] = [_inside, _sent, _read_and_written]
            try:
                for extent in ghost.extents:
                    await _copy(ghost.file, image, fd, extent, ways)
            finally:
                os.close(image)
        if ghost.atime is not None and ghost.mtime is not None:
            os.utime(fd, ns=(ghost.atime * 1000, ghost.mtime * 1000))


async def _unpack(ghost: Ghost, contents: Unpacking, fd: int) -> None:
    """Have the content unpacked, and write it as it comes."""
    stream = await contents.stream(ghost.extents)
    try:
        for extent in ghost.extents:
            offset, end = extent.offset, extent.offset + extent.length
            while offset < end:
                await anyio.wait_readable(stream)
                data = os.read(stream, min(end - offset, _PIECE))
                if not data:
                    cut = ImageError(ghost.file, None, "was cut while it was extracted")
                    raise await contents.problem() or cut
                write_all(fd, data, offset)
                offset += len(data)
    finally:
        os.close(stream)


def _open_image(directory: int, name: str) -> int:
    try:
        image = os.open(name, OPEN_FLAGS, dir_fd=directory)
    except OSError as error:
        raise ImageError(name, None, f"can not be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(image).st_mode):
        os.close(image)
        raise ImageError(name, None, "is not a regular file")
    return image


async def _copy(name: str, image: int, fd: int, extent: Extent, ways: list[_Way]) -> None:
    """Copy one extent by the first of the ways that works between these two files."""
    offset, length, position = extent
    while length:
        await anyio.lowlevel.checkpoint()
        try:
            done = ways[0](image, position, fd, offset, min(length, _PIECE))
        except OSError as error:
            if error.errno not in _NOT_THIS_WAY or len(ways) == 1:
                raise
            del ways[0]
            continue
        if not done:
            raise ImageError(name, None, "was cut while it was extracted")
        position += done
        offset += done
        length -= done


def _inside(image: int, position: int, fd: int, offset: int, length: int) -> int:
    """By the file system, which may share the blocks: copy_file_range(2), Linux 4.5."""
    return os.copy_file_range(image, fd, length, position, offset)


def _sent(image: int, position: int, fd: int, offset: int, length: int) -> int:
    """By the kernel: sendfile(2)."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.sendfile(fd, image, position, length)


def _read_and_written(image: int, position: int, fd: int, offset: int, length: int) -> int:
    data = os.pread(image, length, position)
    write_all(fd, data, offset)
    return len(data)


def _write_manifest(target: _Output, document: dict[str, Any]) -> None:
    with target.file(MANIFEST) as fd:
        write_all(fd, (json.dumps(document, indent=2) + "\n").encode(), 0)


__all__ = ["MANIFEST", "Extracted", "choose", "extract"]

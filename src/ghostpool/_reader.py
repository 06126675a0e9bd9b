"""The reader: a process that may do nothing but read images, and tell what is in them.

It is started first of all, as the fork server is, and has the parser loaded when the first request
comes: a directory or an archive, by descriptor, how large a ghost may be, and whether all mounts
matter. It gives up everything else (see _confine), reads, and answers in frames of JSON. Whoever
takes the parser over by a malformed image has a process that can say untrue things to a coordinator
that believes none of them.

It may not be able to open an image that belongs to somebody else, since what lets root do that is
a capability; then it asks, and gets the descriptor of that one image.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ghostpool import _confine
from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._imagerows import ASK, Rows, Telling
from ghostpool._images import read_source
from ghostpool._imagesource import DirectorySource, ImageSource, OpenFile, OpenImage
from ghostpool._limits import Limits, Tally
from ghostpool._said import Said

if TYPE_CHECKING:
    from ghostpool._archive import ArchiveSource


class AskingSource(DirectorySource):
    """A directory whose images the coordinator opens where this process may not."""

    def __init__(self, fd: int, said: Said) -> None:
        super().__init__(fd)
        self._said = said
        self._expected: list[str] = []
        self._next: dict[str, int] = {}
        self._got: dict[str, int] = {}
        """Name to descriptor, or to minus the errno."""

    def expect(self, names: list[str]) -> None:
        self._expected = names
        self._next = {}

    def open(self, name: str) -> OpenImage | None:
        self._said.go_on()
        if name not in self._got:
            return super().open(name)
        return self._take(name)

    def first(self, name: str, length: int) -> tuple[bytes, int] | None:
        self._said.go_on()
        return None if name in self._got else super().first(name, length)

    def failed(self, name: str, code: int) -> OpenImage | None:
        if code not in (errno.EACCES, errno.EPERM) or name in self._got:
            return super().failed(name, code)
        self._ask(name)
        return self._take(name)

    def _take(self, name: str) -> OpenImage | None:
        fd = self._got.pop(name)
        return OpenFile(name, fd) if fd >= 0 else super().failed(name, -fd)

    def _ask(self, name: str) -> None:
        """Ask for `name` and for what will be opened after it."""
        if not self._next:
            self._next = {expected: at for at, expected in enumerate(self._expected)}
        at = self._next.get(name)
        names = [name] if at is None else self._expected[at : at + ASK]
        names = [name for name in names if name not in self._got]
        self._said.say("open", names)
        codes, fds = self._said.hear()
        arrived = iter(fds)
        for asked, code in zip(names, codes, strict=True):
            self._got[asked] = -code if code else next(arrived)


def read(said: Said) -> None:
    """Serve one request."""
    (path, size, all_mounts, devshm), fds = said.hear()
    limits = Limits(size=size)
    source: ImageSource
    tar: OpenImage | None = None
    at = 0
    is_directory = stat.S_ISDIR(os.fstat(fds[0]).st_mode)
    if devshm is not None or not is_directory:  # what is not loaded now never will be
        from ghostpool import _devshm
    if is_directory:
        said.say("confined", list(_confine.confine(fds[0])))
        source = AskingSource(fds[0], said)
    else:
        source = archive = _archive(path, fds[0], limits, said)
        tar, at = archive.devshm()
    telling = Telling(said.say)
    images = read_source(path, source, limits, telling, all_mounts=all_mounts)
    if devshm is not None:
        tar, at = OpenFile(devshm, fds[1]), 0
    elif all(remap.kind != "linked" for remap in images.remaps):
        tar = None  # nobody asked for it, and nothing needs it
    if tar is not None:
        files = _devshm.read_devshm(devshm or path, tar, Tally(limits))
        found = {file.name: file._replace(position=file.position + at) for file in files}
        images = images._replace(devshm=found)
    telling.finish(images)


def _archive(path: str, fd: int, limits: Limits, said: Said) -> ArchiveSource:
    """The images in an archive; only who has one pays for what reads and unpacks it."""
    from ghostpool._archive import open_archive
    from ghostpool._unpack import load

    load()
    cpu_s = _confine.unpacking_s(os.fstat(fd).st_size)
    said.say("confined", list(_confine.confine(None, cpu_s)))
    source = open_archive(path, fd, limits, said.go_on)
    said.say("archive", [list(step) for step in source.steps])
    return source


def answer(said: Said, work: Callable[[Said], None]) -> None:
    """Do the work, and say so if it fails: errors travel as fields."""
    problem: Rows
    try:
        work(said)
        return
    except ImageError as error:
        problem = ["image", error.file, error.record, error.problem]
    except UnsupportedError as error:
        problem = ["unsupported", str(error)]
    except MemoryError:
        problem = ["memory"]
    except (EOFError, ConnectionError):
        return  # nobody listens any more
    except Exception as error:  # noqa: BLE001  a mistake of ours, told as what it is
        problem = ["broken", repr(error)]
    try:
        said.say("error", problem)
    except OSError:
        pass


def main(fd: int) -> NoReturn:
    """Serve the socket `fd`, and end."""
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    # It ends with its socket, not by a Ctrl-C that goes to the whole group.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    gc.disable()  # nothing here has cycles, and it ends soon
    answer(Said(fd), read)
    os._exit(0)


__all__ = ["main"]

"""The worker: does batches of file and mount work, pinned in one mount namespace at a time.

A child of the lean fork server: one thread, no event loop, nothing of trio. Everything it needs
is imported before it enters a namespace, since after that "/" is the container's; it acts only
on descriptors (mount roots and directories below them, found by openat2 inside the mount) and on
single names in them. What fails goes back as errno, system call, path and mount.
It holds no state that its coordinator can not rebuild: killed, it is replaced.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

from ghostpool import _linux
from ghostpool._creating import CreateWork
from ghostpool._directories import Directories
from ghostpool._failed import Failed, Work
from ghostpool._mountwork import MountWork
from ghostpool._opening import OpenWork
from ghostpool._protocol import MAX_FDS, BlockingChannel, EndOfStream, Report
from ghostpool._removing import RemoveWork


class Worker(Work):
    """State of one worker: descriptors that its coordinator sent or asked it to open."""

    def __init__(self, channel: BlockingChannel, mount_setattr: bool) -> None:
        self._channel = channel
        self.given: list[int] = []
        """Descriptors that came with a request besides namespaces and mounts."""
        self._namespaces: dict[int, int] = {}
        self._current: int | None = None
        self._mounts: dict[int, int] = {}
        # Opened while "/proc" still is the host's: the way to name a descriptor as a path.
        self._step = "openat"
        own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        directories = Directories(self._mounts)
        mounts = MountWork(self._mounts, own_fds, mount_setattr)
        self._creating = CreateWork(directories, own_fds)
        # Every request gets a list for the descriptors that go back with its result.
        self._requests: dict[str, Callable[..., Any]] = {
            "ping": lambda _: os.getpid(),
            "mountinfo": mounts.do_mountinfo,
            "open_mounts": mounts.do_open_mounts,
            "clone": mounts.do_clone,
            "make_writable": mounts.do_make_writable,
            "make_read_only": mounts.do_make_read_only,
            "look": directories.do_look,
            "forget_directories": directories.do_forget_directories,
            "create": self._creating.do_create,
            "place": self._creating.do_place,
            "open": OpenWork(directories, own_fds).do_open,
            "remove": RemoveWork(directories).do_remove,
            "finish": _last_words,
        }

    def serve(self) -> None:
        """Answer requests until the coordinator closes the socket."""
        while True:
            (namespace, new_namespaces, new_mounts, request, *arguments), fds = (
                self._channel.receive()
            )
            taken = iter(fds)
            for key in new_namespaces:
                self._namespaces[key] = next(taken)
            for handle in new_mounts:
                self._mounts[handle] = next(taken)
            out: list[int] = []
            try:
                if namespace >= 0 and namespace != self._current:
                    self._enter(namespace)
                self.given = list(taken)
                if request == "images":
                    (self._creating.images,) = self.given
                    result: Any = ()
                else:
                    result = self._requests[request](out, *arguments)
                self._answer(True, result, out)
            except Failed as error:
                _linux.close_all(out)
                self._channel.send((False, tuple(error.failure)))
            except OSError as error:
                _linux.close_all(out)
                step = getattr(error, "syscall", request)
                self._channel.send((False, (-1, error.errno or errno.EIO, step, b"", -1, ())))

    def _answer(self, ok: bool, result: Any, fds: list[int]) -> None:
        # More descriptors than one frame carries travel ahead, in frames of their own.
        sent = 0
        while len(fds) - sent > MAX_FDS:
            self._channel.send(None, fds[sent : sent + MAX_FDS])
            sent += MAX_FDS
        self._channel.send((ok, result), fds[sent:])
        _linux.close_all(fds)

    def _enter(self, namespace: int) -> None:
        try:
            self._step = "setns"
            _linux.setns(self._namespaces[namespace], _linux.CLONE_NEWNS)
        except OSError as error:
            raise Failed(-1, error.errno or errno.EIO, self._step, b"", -1) from error
        self._current = namespace


def _last_words(_: list[int]) -> tuple[int, ...]:
    return tuple(Report(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main(fd: int, mount_setattr: bool) -> None:
    """Body of a forked worker; returns when the coordinator is gone or done."""
    os.umask(0)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    # The container must not reach our memory or executable through /proc (CVE-2019-5736).
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
    _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        Worker(BlockingChannel(fd), mount_setattr).serve()
    except (EndOfStream, ConnectionError, BrokenPipeError):
        pass

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
from ghostpool._binding import BindWork
from ghostpool._capabilities import ACT, ENTER, NEEDED, WORKER, Cap, Capabilities
from ghostpool._creating import CreateWork
from ghostpool._directories import Directories
from ghostpool._failed import Failed, Work
from ghostpool._filling import FillWork
from ghostpool._finding import FindWork
from ghostpool._mountwork import MountWork
from ghostpool._opening import OpenWork
from ghostpool._protocol import MAX_FDS, BlockingChannel, EndOfStream, Failure, Report
from ghostpool._removing import RemoveWork
from ghostpool._sweeping import SweepWork
from ghostpool._uncovering import UncoverWork


class Worker(Work):
    """State of one worker: descriptors that its coordinator sent or asked it to open."""

    def __init__(
        self, channel: BlockingChannel, mount_setattr: bool, capabilities: Capabilities
    ) -> None:
        self._channel = channel
        self._capabilities = capabilities
        self.given: list[int] = []
        """Descriptors that came with a request besides namespaces and mounts: gone with it, but
        for those that the request takes out of here."""
        self._namespaces: dict[int, int] = {}
        self._current: int | None = None
        self._acting: tuple[int, int] | None = None
        self._mounts: dict[int, int] = {}
        # Opened while "/proc" still is the host's: the way to name a descriptor as a path.
        self._step = "openat"
        own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        directories = Directories(self._mounts)
        mounts = MountWork(self._mounts, own_fds, mount_setattr)
        creating = self._creating = CreateWork(directories, own_fds)
        self._uncovering = UncoverWork(self._mounts, own_fds)
        filling = FillWork(directories, own_fds)
        opening = OpenWork(directories, own_fds)
        # Every request gets a list for the descriptors that go back with its result.
        requests: dict[str, Callable[..., Any]] = {
            "ping": lambda _: os.getpid(),
            "mountinfo": mounts.do_mountinfo,
            "open_mounts": mounts.do_open_mounts,
            "clone": mounts.do_clone,
            "open_part": lambda out, *what: mounts.do_open_part(out, *what, *self.given),
            "clone_part": lambda out: mounts.do_clone_part(out, *self.given),
            "room": mounts.do_room,
            "uncover": self._uncover,
            "adopt": lambda out, handle: self._uncovering.do_adopt(handle, *self.given),
            "make_writable": mounts.do_make_writable,
            "make_read_only": mounts.do_make_read_only,
            "look": directories.do_look,
            "find": FindWork(directories).do_find,
            "forget_directories": directories.do_forget_directories,
            "create": lambda out, operations: creating.do_create(out, operations, *self.given),
            "place": creating.do_place,
            "fill": lambda out, operations: filling.do_fill(out, operations, *self.given),
            "bind": BindWork().do_bind,
            "open": opening.do_open,
            "open_discarded": opening.do_open_discarded,
            "sweep": SweepWork(self._mounts).do_sweep,
            "remove": RemoveWork(directories).do_remove,
            "finish": _last_words,
        }
        self._requests = {name: self._limited(name, do) for name, do in requests.items()}

    def _limited(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """`do` with the capabilities in effect that this request needs, and no other."""
        need, needed = self._capabilities.need, NEEDED.get(name, 0)

        def limited(out: list[int], *arguments: Any) -> Any:
            need(needed)
            return do(out, *arguments)

        return limited

    def serve(self) -> None:
        """Answer requests until the coordinator closes the socket."""
        while True:
            (namespace, acting, new_namespaces, new_mounts, request, *arguments), fds = (
                self._channel.receive()
            )
            taken = iter(fds)
            for key in new_namespaces:
                self._namespaces[key] = next(taken)
            for handle in new_mounts:
                self._mounts[handle] = next(taken)
            self.given = list(taken)
            out: list[int] = []
            try:
                try:
                    if namespace >= 0 and namespace != self._current:
                        self._enter(namespace)
                    if acting != self._acting:
                        self._act_as(acting)
                    result = self._requests[request](out, *arguments)
                finally:
                    _linux.close_all(self.given)
                    self.given = []
                self._answer(True, result, out)
            except Failed as error:
                self._fail(error.failure, out)
            except OSError as error:
                step = getattr(error, "syscall", request)
                self._fail(Failure(-1, error.errno or errno.EIO, step, b"", -1), out)
            except Exception as error:  # noqa: BLE001  there is no stderr to let it come out at
                self._fail(Failure(-1, 0, f"{request}: {error!r}", b"", -1), out)

    def _answer(self, ok: bool, result: Any, fds: list[int]) -> None:
        # More descriptors than one frame carries travel ahead, in frames of their own.
        sent = 0
        while len(fds) - sent > MAX_FDS:
            self._channel.send(None, fds[sent : sent + MAX_FDS])
            sent += MAX_FDS
        self._channel.send((ok, result), fds[sent:])
        _linux.close_all(fds)

    def _fail(self, failure: Failure, fds: list[int]) -> None:
        _linux.close_all(fds)
        self._channel.send((False, tuple(failure)))

    def _uncover(self, out: list[int], *arguments: Any) -> tuple[int, ...]:
        try:
            return self._uncovering.do_uncover(out, *arguments)
        finally:
            self._current = None  # a copy that is nobody's

    def _enter(self, namespace: int) -> None:
        self._capabilities.need(ENTER)
        try:
            self._step = "setns"
            _linux.setns(self._namespaces[namespace], _linux.CLONE_NEWNS)
        except OSError as error:
            raise Failed(-1, error.errno or errno.EIO, self._step, b"", -1) from error
        self._current = namespace

    def _act_as(self, owner: tuple[int, int] | None) -> None:
        """Own new files as somebody whom the namespace has, or as ghostpool does."""
        uid, gid = owner or (os.geteuid(), os.getegid())
        self._capabilities.act_as(uid, gid)
        self._creating.owner = uid
        self._acting = owner


def _last_words(_: list[int]) -> tuple[int, ...]:
    return tuple(Report(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main(
    fd: int, mount_setattr: bool, devices: bool = False, acting: bool = False, *, parent: int
) -> None:
    """Body of a forked worker; returns when the coordinator is gone or done.

    `parent` is the fork server. `devices`: the operator allows device ghosts. `acting`: there are
    targets whose files can not be owned by ghostpool's user.
    """
    os.umask(0)
    # What goes wrong is told through the socket; the user's terminal has no place in a container.
    os.dup2(0, 2)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the kernel was told that this one is to die with it
    ever = WORKER | (Cap.MKNOD if devices else 0) | (ACT if acting else 0)
    capabilities = Capabilities(int(ever))
    try:
        Worker(BlockingChannel(fd), mount_setattr, capabilities).serve()
    except (EndOfStream, ConnectionError, BrokenPipeError):
        pass

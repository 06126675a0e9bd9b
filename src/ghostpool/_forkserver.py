"""The fork server: a lean process whose children are workers, namespace builders and commands.

Started once per run by exec (so nothing of the coordinator's memory is in its children), it has
imported all that a worker needs and no more; a fork of it costs a tenth of a fresh interpreter.
It has one thread, because setns(2) into a mount namespace demands that. It ends when the
coordinator closes its socket, and its workers die with it.
It uses no capability itself, but hands on what it has: a command may be meant to have any.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
from typing import Any

from ghostpool import (
    _build,
    _buildspec,
    _capabilities,
    _command,
    _guardian,
    _linux,
    _usermaps,
    _worker,
)
from ghostpool._failed import Work
from ghostpool._protocol import BlockingChannel, EndOfStream
from ghostpool._seal import seal_imports

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class ForkServer(Work):
    """Forks on request and tells of the ends of its children."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._pid = os.getpid()
        self._children: dict[int, int] = {}
        """pidfd -> pid"""
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._waiting: list[int] = []
        """Descriptors that came ahead of a spawn request."""

    def serve(self) -> None:
        """Until the coordinator is gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._channel.fileno():
                    request, fds = self._channel.receive()
                    self._handle(request, fds)
                else:
                    self._reap(fd)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._channel.send(("exit", pid, os.waitstatus_to_exitcode(status)))

    def _handle(self, request: Any, fds: list[int]) -> None:
        kind, *arguments = request
        if kind == "fds":
            self._waiting += fds
            return
        fds, self._waiting = self._waiting + fds, []
        try:
            self._step = "fork"
            pid = os.fork()
        except OSError as error:
            # EAGAIN or ENOMEM: the workers that are there go on, and are needed to undo things.
            _linux.close_all(fds)
            self._channel.send(("failed", error.errno))
            return
        if pid == 0:
            self._become(kind, arguments, fds)
        _linux.close_all(fds)
        try:
            self._step = "pidfd_open"
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._channel.send(("failed", error.errno))
            return
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._channel.send(("forked", pid), [pidfd])

    def _become(self, kind: str, arguments: list[Any], fds: list[int]) -> None:
        """The child's whole life; never returns."""
        status = 1
        try:
            os.close(self._channel.fileno())
            _linux.close_all(self._children)
            if kind == "worker":
                _worker.main(fds[0], *arguments, parent=self._pid)
                status = 0
            elif kind == "guardian":
                _guardian.main(fds[0], *arguments)
                status = 0
            elif kind == "build":
                _build_namespaces(BlockingChannel(fds[0]), arguments[0])
                status = 0
            elif kind == "user_maps":
                _usermaps.main(fds)
                status = 0
            elif kind == "spawn":
                _command.main(fds, *arguments)
        except BaseException as error:  # noqa: BLE001  a child must not get back into the loop
            os.write(2, f"ghostpool: {kind}: {error!r}\n".encode(errors="replace"))
        finally:
            os._exit(status)


def _build_namespaces(channel: BlockingChannel, specs: Any) -> None:
    os.dup2(0, 2)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    namespaces_wanted = _buildspec.unmarshal(specs)
    fills = any(mount.nodes for wanted in namespaces_wanted for mount in wanted.mounts)
    needed = _capabilities.FILLER if fills else _capabilities.BUILDER
    capabilities = _capabilities.Capabilities(needed)
    capabilities.need(needed)
    try:
        namespaces = _build.build(namespaces_wanted)
    except _buildspec.BuildError as error:
        channel.send((False, (error.errno, error.syscall, error.path, error.mount_id)))
        return
    batch = 200
    while len(namespaces) > batch:
        channel.send(None, namespaces[:batch])
        namespaces = namespaces[batch:]
    channel.send((True, ()), namespaces)


def main(fd: int) -> None:
    """Serve on the socket `fd` until its other end is closed."""
    # A container must not reach our memory, descriptors or executable through /proc, nor those of
    # our children (CVE-2019-5736): they inherit this, and an exec of a command takes it off.
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
    _capabilities.hold_back()
    # What the caller left inheritable would reach every worker, and so a container.
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A core would be written where a container says, or handed to a program of the host.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    for number in _IGNORED:
        # A Ctrl-C reaches the whole process group; who undoes things needs its workers then.
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    seal_imports()
    gc.collect()
    gc.freeze()
    try:
        ForkServer(BlockingChannel(fd)).serve()
    except (EndOfStream, ConnectionError):
        pass

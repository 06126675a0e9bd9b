"""Namespaces for tests: built in a forked child, looked at from forked children.

The test's own process never changes a namespace. What a child finds comes back through a pipe as
a marshalled value; an OSError of it is raised again in the test.
"""

from __future__ import annotations

import marshal
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ghostpool import _linux
from ghostpool._build import BuildError, build
from ghostpool._buildspec import NamespaceSpec
from ghostpool._mountinfo import LiveMount, parse_line

_BATCH = 200


def _fork() -> int:
    with warnings.catch_warnings():
        # Idle threads of an earlier test's event loop; the child uses nothing that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], Any]) -> Any:
    """`function`'s result (a marshallable value), from a child that is gone afterwards."""
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        _report(writer, function)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"child ended with {status}"
    kind, value = marshal.loads(answer)
    if kind == "build":
        raise BuildError(*value)
    if kind == "os":
        raise OSError(*value)
    assert kind == "value", value
    return value


def _report(writer: int, function: Callable[[], Any]) -> None:
    try:
        try:
            answer: tuple[str, Any] = ("value", function())
        except BuildError as error:
            fields = (error.errno, error.syscall, error.path, error.mount_id)
            answer = ("build", fields)
        except OSError as error:
            answer = ("os", (error.errno, traceback.format_exc()))
        except Exception:  # noqa: BLE001  it is told to the test
            answer = ("died", traceback.format_exc())
        with open(writer, "wb") as pipe:
            pipe.write(marshal.dumps(answer))
    finally:
        os._exit(0)


def become_ordinary_user(uid: int = 65534) -> None:
    """Give up root for good and become the root of a new user namespace (in a child only)."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _linux.prctl(_linux.PR_SET_DUMPABLE, 1)  # else the maps belong to the real root
    _linux.unshare(_linux.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


@contextmanager
def built(
    namespaces: Sequence[NamespaceSpec], *, before: Callable[[], object] | None = None
) -> Iterator[list[int]]:
    """Descriptors of the namespaces, built in a child that is gone by then; closed at the end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []

    def child() -> int:
        if before is not None:
            before()
        made = build(namespaces)
        for start in range(0, len(made), _BATCH):
            socket.send_fds(there, [b"."], made[start : start + _BATCH])
        return len(made)

    with here, there:
        try:
            # The messages wait in the socket: a few hundred descriptors fit its buffer.
            count = in_child(child)
            while len(fds) < count:
                fds += socket.recv_fds(here, 1, _BATCH)[1]
            yield fds
        finally:
            _linux.close_all(fds)


def enter(namespace: int) -> None:
    """Move the calling process (a child) into the mount namespace."""
    _linux.setns(namespace, _linux.CLONE_NEWNS)


def inside(namespace: int, function: Callable[[], Any]) -> Any:
    """`function`'s result from a child in the mount namespace."""

    def child() -> Any:
        enter(namespace)
        return function()

    return in_child(child)


def mountinfo(namespace: int) -> list[LiveMount]:
    """The mount table of a namespace; it needs no /proc inside."""

    def child() -> bytes:
        proc = os.open("/proc", os.O_PATH)
        enter(namespace)
        with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as file:
            return file.read()

    return [parse_line(line) for line in in_child(child).splitlines()]

"""Children of the test process: one that gives a function's result, and one that stays.

The test's own process never changes a namespace: what has to be done in one, a child does. What
it finds comes back through a pipe as a marshalled value, so it is made of plain values; an OSError
of it is raised again in the test, with its errno and the child's traceback, and anything else as
an AssertionError that holds the traceback.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from ghostpool import _linux

T = TypeVar("T")


def fork() -> int:
    """os.fork(2), without Python's warning about threads."""
    with warnings.catch_warnings():
        # Idle threads of an earlier test's event loop; the child uses nothing that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], T]) -> T:
    """`function`'s result (made of plain values), from a child that is gone afterwards."""
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        _tell(writer, function)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    result: T = _result(answer, status)
    return result


def _tell(writer: int, function: Callable[[], object]) -> NoReturn:
    try:
        answer = _outcome(function)
        with open(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def _outcome(function: Callable[[], Any]) -> bytes:
    """What is told: ("value", value), ("os", (errno, traceback)) or ("died", traceback)."""
    try:
        return marshal.dumps(("value", function()))
    except OSError as error:
        return marshal.dumps(("os", (error.errno, traceback.format_exc())))
    except BaseException:  # noqa: BLE001  it is told to the test
        return marshal.dumps(("died", traceback.format_exc()))


def _result(answer: bytes, status: int) -> Any:
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise AssertionError(f"the child ended with {code} and without an answer")
    kind, value = marshal.loads(answer)  # noqa: S302  from a fork of this process
    if kind == "os":
        raise OSError(*value)
    if kind == "died":
        raise AssertionError(f"in the child: {value}")
    return value


@contextmanager
def staying(prepare: Callable[[], object]) -> Iterator[int]:
    """Pid of a child that has called `prepare` and then does nothing, until the end of the block.

    What `prepare` raises comes as from `in_child`. The child holds no descriptor of this process,
    but those that `prepare` opened, and ends with this process, whatever ends that.
    """
    # No signal for the death of the parent: the kernel sends it when a thread of it ends.
    parent = os.pidfd_open(os.getpid())
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe:
        try:
            pid = fork()
            if pid == 0:
                _stay(prepare, parent, writer)
        finally:
            os.close(parent)
            os.close(writer)
        pidfd = os.pidfd_open(pid)
        try:
            _result(pipe.read(), 0)
            yield pid
        finally:
            # By pidfd: a program under test may have waited for all of its children.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _stay(prepare: Callable[[], object], parent: int, writer: int) -> NoReturn:
    try:
        inherited = _descriptors() - {0, 1, 2, parent, writer}
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        answer = _outcome(lambda: _without_result(prepare))
        for number in (0, 1, 2):
            os.dup2(null, number)
        # Somebody may wait for the last of them to be closed.
        _linux.close_all(inherited)
        with open(writer, "wb") as pipe:
            pipe.write(answer)
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        poll.poll()
    finally:
        os._exit(0)


def _without_result(function: Callable[[], object]) -> None:
    function()


def _descriptors() -> set[int]:
    """Those of this process, which has one thread."""
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)}


def _is_open(number: int) -> bool:
    """Not so of the descriptor that the list itself was read from."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

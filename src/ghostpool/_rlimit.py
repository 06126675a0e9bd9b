"""RLIMIT_NOFILE as far up as it goes, for as long as anybody in this process needs it.

The limit is the whole process's, and several runs may go on in one program, each with a beginning
and an end of its own, in threads of their own. So they are counted: the first raises it, the last
one out puts it back, unless the program has set another limit meanwhile, which is left alone.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Raised:
    """Who needs the raised limit, and what it was before the first of them came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = (0, 0)

    def acquire(self) -> tuple[int, int]:
        with self._lock:
            if not self._users:
                soft, hard = self._before = resource.getrlimit(resource.RLIMIT_NOFILE)
                if soft != hard:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self._users += 1
            return self._before

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            _, hard = self._before
            if resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard):
                resource.setrlimit(resource.RLIMIT_NOFILE, self._before)


_raised = _Raised()


@contextmanager
def all_descriptors() -> Iterator[tuple[int, int]]:
    """The soft limit at the hard one for the time of the block; gives what both were before.

    getrlimit(2). Descriptors that are open above the old limit at the end stay open; nothing new
    is opened there. A child that is forked meanwhile inherits the raised limit.
    """
    before = _raised.acquire()
    try:
        yield before
    finally:
        _raised.release()


__all__ = ["all_descriptors"]

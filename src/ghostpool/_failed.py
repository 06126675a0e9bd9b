"""How work in a worker is followed, and how it fails: an errno with its system call and path, or
a check by its name."""

from __future__ import annotations

from typing import Any

from ghostpool._protocol import Failure


class Work:
    """Does system calls, and notes each one before it makes it: the steps of a restore.

    Tests make their list of steps out of the assignments to these two attributes, and inject every
    fault at every one of them.
    """

    _step = ""
    """The system call in progress, for the failure."""
    _undo_step = ""
    """One that takes back what a failed operation did; the failure is not about it."""


class Failed(Exception):
    """Carries a Failure up to the worker's message loop."""

    def __init__(
        self, at: int, code: int, step: str, path: bytes, mount: int, done: Any = ()
    ) -> None:
        super().__init__()
        self.failure = Failure(at, code, step, path, mount, tuple(done))


class Mismatch(Exception):
    """A check failed; its argument names it."""

"""How work in a worker fails: an errno with its system call and path, or a check by its name."""

from __future__ import annotations

from typing import Any

from ghostpool._protocol import Failure


class Failed(Exception):
    """Carries a Failure up to the worker's message loop."""

    def __init__(
        self, at: int, code: int, step: str, path: bytes, mount: int, done: Any = ()
    ) -> None:
        super().__init__()
        self.failure = Failure(at, code, step, path, mount, tuple(done))


class Mismatch(Exception):
    """A check failed; its argument names it."""

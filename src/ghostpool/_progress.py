"""The progress bar, made of a run's events.

The bar is drawn by a thread of rich's, a few times a second, and when it starts and stops: an
event only changes numbers, so that a terminal that takes nothing (Ctrl-S) stops no restore.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, Self

from rich.console import Console
from rich.progress import Progress

from ghostpool._events import Event, FileOpened, GhostCreated, Planned

_P = ParamSpec("_P")


class Bar:
    """A context manager. On a terminal it moves; elsewhere it is one line, when it stops."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(console=self._console)
        self._task = self._progress.add_task("restoring", total=None)
        self._shown = False
        """There is something to be seen: what is refused has no progress."""
        self._over = False

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave it as it is; what others print comes below it."""
        if self._over:
            return
        self._over = True
        if not self._shown:
            self._progress.update(self._task, visible=False)
        if self._console.is_terminal:
            self._progress.stop()
        elif self._shown:
            self._console.print(self._progress.get_renderable())

    @contextmanager
    def away(self) -> Iterator[None]:
        """Not on the terminal in the block, for who prints there: it comes again below that."""
        if self._console.is_terminal and not self._over:
            self._progress.stop()
            try:
                yield
            finally:
                self._progress.start()
        else:
            yield

    def before(self, deliver: Callable[_P, Awaitable[None]]) -> Callable[_P, Awaitable[None]]:
        """`deliver`, but the bar has stopped by then: the terminal is its own."""

        async def stopped(*args: _P.args, **kwargs: _P.kwargs) -> None:
            self.stop()
            await deliver(*args, **kwargs)

        return stopped

    def send_nowait(self, event: Event) -> None:
        """Advance: each ghost is a step when it is created, and one for each open of it."""
        match event:
            case Planned(refusals=0):
                self._shown = True
                self._progress.update(self._task, total=event.ghosts + event.files)
            case GhostCreated() | FileOpened():
                self._progress.advance(self._task)
            case _:
                pass

"""Ending a run by a signal or by its time limit, with everything undone.

The signals are received until the very end: a second Ctrl-C, which would find Python's own
handler otherwise, can not skip the undoing that the first one began. Nor may one meet the event
loop's own code while that starts or ends: KeyboardInterrupt there is an internal error of trio.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _not_ignored() -> list[signal.Signals]:
    """nohup(1) and shells ignore a signal for their children: then it is not ours to act on."""
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


_received: list[signal.Signals] = []
"""What this process got so far."""


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number))


def note_only() -> None:
    """From now on signals are noted, not raised; `signals_kept` acts on them when a run begins.

    An exception in the midst of an import, or of a callback of the garbage collector, would be
    turned into another error there, or be printed and dropped.
    """
    for number in _not_ignored():
        signal.signal(number, _note)


def raise_again() -> None:
    """For what blocks outside of an event loop: Ctrl-C is a KeyboardInterrupt, the others kill."""
    for number in _not_ignored():
        first = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if first else signal.SIG_DFL)


@contextmanager
def signals_kept() -> Iterator[list[signal.Signals]]:
    """Note the signals instead of raising for them; put around the whole run of the event loop.

    The list holds those that came before too.
    """
    previous = {number: signal.signal(number, _note) for number in _not_ignored()}
    try:
        yield _received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class TimedOut(Exception):
    """The time limit of the run ended it; no TimeoutError, which errors of the run may be."""


class Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        super().__init__(number.name)


async def until_interrupted(
    story: Callable[[], Awaitable[None]], limit_s: float | None, kept: list[signal.Signals]
) -> None:
    """Await `story`; Interrupted after a signal, TimedOut after `limit_s` seconds.

    `kept` comes from `signals_kept`, and gets the signals of this time too. Errors of the story
    come out as they are, also when a signal came while it was failing.
    """
    import anyio

    deadline = anyio.current_time() + (math.inf if limit_s is None else limit_s)
    with anyio.CancelScope(shield=True):
        with anyio.open_signal_receiver(*_not_ignored()) as signals:
            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope(deadline=deadline)

                async def watch() -> None:
                    async for number in signals:
                        kept.append(number)
                        scope.cancel()

                group.start_soon(watch)
                if kept:
                    scope.cancel()
                error: Exception | None = None
                try:
                    with scope:
                        await story()
                except Exception as caught:  # noqa: BLE001  raised again below, out of the group
                    error = caught
                group.cancel_scope.cancel()
    if error is not None:
        raise error
    if kept and scope.cancelled_caught:
        raise Interrupted(kept[0])
    if scope.cancelled_caught:
        raise TimedOut

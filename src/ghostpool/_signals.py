"""Ending a run by a signal or by its time limit, with everything undone.

The signals are received until the very end: a second Ctrl-C, which would find Python's own
handler otherwise, can not skip the undoing that the first one began. Nor may one meet the event
loop's own code while that starts or ends: KeyboardInterrupt there is an internal error of trio.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import anyio

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _not_ignored() -> list[signal.Signals]:
    """nohup(1) and shells ignore a signal for their children: then it is not ours to act on."""
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def signals_kept() -> Iterator[list[signal.Signals]]:
    """Note the signals instead of raising for them; put around the whole run of the event loop."""
    kept: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        kept.append(signal.Signals(number))

    previous = {number: signal.signal(number, note) for number in _not_ignored()}
    try:
        yield kept
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
    story: Callable[[], Awaitable[None]],
    limit_s: float | None,
    kept: Sequence[signal.Signals] = (),
) -> None:
    """Await `story`; Interrupted after a signal, TimedOut after `limit_s` seconds.

    `kept` are signals that came before this was called; see `signals_kept`. Errors of the story come out as they are, also when a signal came while it was failing.
    """
    received: list[signal.Signals] = []
    deadline = anyio.current_time() + (math.inf if limit_s is None else limit_s)
    with anyio.CancelScope(shield=True):
        with anyio.open_signal_receiver(*_not_ignored()) as signals:
            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope(deadline=deadline)

                async def watch() -> None:
                    async for number in signals:
                        received.append(number)
                        scope.cancel()

                group.start_soon(watch)
                if kept:
                    received.extend(kept)
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
    if received and scope.cancelled_caught:
        raise Interrupted(received[0])
    if scope.cancelled_caught:
        raise TimedOut

"""What must be done to its end is done to its end, under either event loop.

A shielded cancel scope holds off cancellation by scopes, and under trio there is no other. But
asyncio's own (Task.cancel, asyncio.TaskGroup, asyncio.timeout) knows nothing of scopes. Under it
the work has a task of its own, and whoever is cancelled meanwhile goes on waiting for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


async def unbroken(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of `work`, which nothing but itself ends; raises what it raises.

    A cancellation that came meanwhile takes effect at the caller's next checkpoint.
    """
    with anyio.CancelScope(shield=True):
        me = _asyncio_task()
        return await (work() if me is None else _in_a_task_of_its_own(work, me))
    raise AssertionError("nobody cancels this scope")


async def _in_a_task_of_its_own(
    work: Callable[[], Coroutine[Any, Any, T]], me: asyncio.Task[Any]
) -> T:
    import asyncio

    doing = asyncio.get_running_loop().create_task(work())
    held_off = 0
    while not doing.done():
        try:
            await asyncio.wait([doing])
        except asyncio.CancelledError:
            held_off += 1
    for _ in range(held_off):
        me.uncancel()
        me.cancel()
    return doing.result()


def _asyncio_task() -> asyncio.Task[Any] | None:
    """This task, if asyncio runs it; never imported for the question: nobody runs it then."""
    loaded: Any = sys.modules.get("asyncio")
    if loaded is None:
        return None
    task: asyncio.Task[Any] | None
    try:
        task = loaded.current_task()
    except RuntimeError:
        return None
    return task  # None in the callbacks of a loop that trio is a guest of

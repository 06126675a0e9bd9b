"""Work that would keep the event loop of an embedding program too long goes to a thread.

Threads of Python take turns of 5 ms (sys.getswitchinterval), so the loop goes on meanwhile. Only
for work that touches nothing that anybody else uses at the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")
INLINE = 1000
"""So many pieces are done at once: some milliseconds, and less than a thread costs."""


async def apart(work: Callable[[], T], pieces: int) -> T:
    """The result of `work`, which comes to so many pieces of some microseconds each.

    Cancelled, it waits for the end of the work. Raises what the work raises.
    """
    if pieces <= INLINE:
        return work()
    # Not the program's own, whose threads may all be waiting for what is done here.
    return await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))

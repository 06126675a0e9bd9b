"""The synchronous way in, for programs without an event loop: one runs in a thread meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Unpack

from anyio.from_thread import start_blocking_portal

from ghostpool._openrestore import RestoredRun, restore
from ghostpool._request import Options


@contextmanager
def run_restore(
    images: str | os.PathLike[str],
    *,
    keep: bool = False,
    backend: Literal["asyncio", "trio"] = "trio",
    **options: Unpack[Options],
) -> Iterator[RestoredRun]:
    """As `restore`, for programs without an event loop.

        with ghostpool.run_restore("img/", namespaces={11: 4242}) as restored:
            for task in restored.tasks.values():
                fds = task.take_fds_nowait()

    The event loop of `backend` runs in a thread of its own until the end of the block. The thread
    that entered the block blocks there until everything is restored; Ctrl-C, which is its own,
    ends the waiting and has everything undone, as any exception does. Not for use inside an event
    loop. Raises what `restore` raises, in an ExceptionGroup.
    """
    with (
        start_blocking_portal(backend) as portal,
        portal.wrap_async_context_manager(restore(images, keep=keep, **options)) as restored,
    ):
        yield restored


__all__ = ["run_restore"]

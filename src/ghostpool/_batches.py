"""What creating and opening share: work spread over slots and cut into batches, and its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import anyio

from ghostpool._errors import RestoreError, VerificationError
from ghostpool._mend import kernel_error
from ghostpool._paths import text
from ghostpool._planned import Plan
from ghostpool._protocol import Failure

_T = TypeVar("_T")
_M = TypeVar("_M")


class _Grouped(Protocol):
    @property
    def group(self) -> tuple[int, int]: ...


_G = TypeVar("_G", bound=_Grouped)


async def in_slots(
    slots: Mapping[tuple[int, int], int],
    pieces: Iterable[_G],
    work: Callable[[int, list[_G]], Coroutine[Any, Any, None]],
) -> None:
    """Have each slot do its own of `pieces`, in their order, all slots at the same time."""
    by_slot: dict[int, list[_G]] = {}
    for piece in pieces:
        by_slot.setdefault(slots[piece.group], []).append(piece)
    async with anyio.create_task_group() as group:
        for slot, own in by_slot.items():
            group.start_soon(work, slot, own)


def new_room() -> anyio.Semaphore:
    """Room of a slot: two pieces that are under way, and the next one, which is prepared."""
    return anyio.Semaphore(3)


async def one_ahead(
    room: anyio.Semaphore,
    pieces: Iterable[_T],
    prepare: Callable[[_T], Awaitable[_M]],
    carry_out: Callable[[_T, _M, Callable[[], object]], Awaitable[None]],
) -> None:
    """Prepare each piece and have it carried out, in order, two of them under way at a time.

    A worker that has done one has the next already, and what is to come goes into the journal
    while it is busy. `carry_out` calls its last argument when the request is sent: nothing is
    prepared before. `room` is that of all who have work for the slot, so that what a
    hundred tasks prepare does not add up. The first failure ends everything.
    """

    async def do(piece: _T, made: _M, under_way: anyio.Event) -> None:
        try:
            await carry_out(piece, made, under_way.set)
        finally:
            under_way.set()
            room.release()

    async with anyio.create_task_group() as group:
        for piece in pieces:
            await room.acquire()
            try:
                made = await prepare(piece)
            except BaseException:
                room.release()
                raise
            under_way = anyio.Event()
            group.start_soon(do, piece, made, under_way)
            await under_way.wait()


def failed(failure: Failure, plan: Plan, subject: str) -> RestoreError:
    """What a worker could not do for `subject`, or what it found to be different, as an error."""
    if failure.at < 0:
        return kernel_error(failure, plan.mounts)
    if failure.errno:
        return kernel_error(failure, plan.mounts, f"while restoring {subject}")
    return VerificationError(
        f"{subject}: restored file differs in its {failure.step} "
        f"({text(failure.path)} on its mount)"
    )


def batches(
    items: Sequence[_T],
    most: int,
    weigh: Callable[[_T], int] = lambda item: 0,
    limit: int = 1,
) -> Iterator[list[_T]]:
    """Split into runs of at most `most` items that weigh `limit` together, or of one item."""
    batch: list[_T] = []
    weight = 0
    for item in items:
        own = weigh(item)
        if batch and (len(batch) >= most or weight + own > limit):
            yield batch
            batch, weight = [], 0
        batch.append(item)
        weight += own
    if batch:
        yield batch

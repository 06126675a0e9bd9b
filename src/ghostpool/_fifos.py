"""What waits in ghost fifos: which of it fits a pipe here, and putting it back.

A pipe's buffer is gone when its last end is closed, so each fifo that held something is kept open
by an end of ours, which can both read and write: from before the first task opens it until the last
of its opens is done. No end ever waits for another one, and it does not matter which of them there
are: with a writer alone, the bytes wait as before.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ghostpool import _linux
from ghostpool._batches import batches, failed, in_slots
from ghostpool._ledger import Ledger
from ghostpool._model import Extent, FifoData, GhostId
from ghostpool._planned import Plan, PlannedGhost, PlannedOpen
from ghostpool._pool import WorkerPool
from ghostpool._protocol import STREAMED, FillOp
from ghostpool._workerclient import WorkerFailure

_BATCH = 64
_IMAGE = b"fifo-data.img"


class FifoFiller:
    """Fills the fifos of one plan, and keeps them open while they need it."""

    def __init__(
        self, plan: Plan, pool: WorkerPool, ledger: Ledger, slots: Mapping[tuple[int, int], int]
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._ledger = ledger
        self._slots = slots
        self._ends: dict[GhostId, int] = {}
        self._to_open: Counter[GhostId] = Counter()

    async def fill(self) -> None:
        """Put back what waited in the plan's fifos, which are there and have no task yet."""
        if not self._plan.fifos:
            return
        self._to_open.update(
            one.opening.ghost.id
            for one in self._plan.opens
            if one.opening.ghost.id in self._plan.fifos
        )
        fifos = [self._plan.ghosts[ghost] for ghost in self._plan.fifos]
        await in_slots(self._slots, fifos, self._fill_in_slot)

    async def _fill_in_slot(self, slot: int, fifos: list[PlannedGhost]) -> None:
        fifos.sort(key=lambda planned: planned.mount.namespace.target.index)
        for images, own in self._pool.by_images(fifos):
            for batch in batches(own, _BATCH):
                await self._fill_batch(slot, images, batch)

    async def _fill_batch(self, slot: int, images: int, fifos: Sequence[PlannedGhost]) -> None:
        contents = self._pool.contents
        stream = -1
        try:
            if contents is not None:
                waited = [self._plan.fifos[planned.ghost.id] for planned in fifos]
                runs = [Extent(0, one.length, one.position) for one in waited if one.length]
                stream = await contents.stream(runs) if runs else -1
            try:
                _, ends = await self._pool.call(
                    slot,
                    "fill",
                    [tuple(self._fill_op(planned)) for planned in fifos],
                    target=fifos[0].mount.namespace.target.index,
                    mounts={planned.mount.service for planned in fifos},
                    fds=[images if stream < 0 else stream],
                )
            finally:
                if stream >= 0:
                    os.close(stream)
        except WorkerFailure as error:
            file = fifos[max(0, error.failure.at)].ghost.file
            raise failed(error.failure, self._plan, file) from error
        self._ends.update(zip((planned.ghost.id for planned in fifos), ends, strict=True))

    def _fill_op(self, planned: PlannedGhost) -> FillOp:
        data: FifoData = self._plan.fifos[planned.ghost.id]
        created = self._ledger.result(planned.ghost.id)
        return FillOp(
            planned.mount.service,
            planned.directory,
            planned.name,
            created.device,
            created.inode,
            _IMAGE if self._plan.images.unpacking is None else b"",
            data.position if self._pool.contents is None else STREAMED,
            data.length,
            data.pipe_size or 0,
            planned.times_ns,
        )

    def opened(self, opens: Iterable[PlannedOpen]) -> None:
        """These are open: a fifo all of whose opens are done keeps its bytes by itself."""
        for planned in opens if self._ends else ():
            ghost = planned.opening.ghost.id
            if ghost in self._ends:
                self._to_open[ghost] -= 1
                if not self._to_open[ghost]:
                    _linux.close_all([self._ends.pop(ghost)])

    def close(self) -> None:
        """Let go of all that is still kept."""
        _linux.close_all(self._ends.values())
        self._ends.clear()

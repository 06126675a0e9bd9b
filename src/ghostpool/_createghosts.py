"""Creating ghosts: by the service side of their mounts, under temporary names, in batches.

All work in one directory is one worker slot's (docs/design.md, D-008), and every name is in the
ledger before it is made (D-003).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ghostpool._batches import batches, failed, in_slots, new_room, one_ahead
from ghostpool._errors import RestoreError
from ghostpool._followers import Events
from ghostpool._ledger import Ledger
from ghostpool._paths import text
from ghostpool._planned import Plan, PlannedGhost
from ghostpool._pool import WorkerPool
from ghostpool._protocol import STREAMED, Created, CreateOp, Placed, PlaceOp
from ghostpool._unpacking import GAP, Unpacking
from ghostpool._workerclient import WorkerFailure

log = logging.getLogger("ghostpool")
_BATCH = 256
_BYTES = 8 << 20


class Creator:
    """Creates the ghosts of one plan."""

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        ledger: Ledger,
        slots: Mapping[tuple[int, int], int],
        events: Events,
        *,
        own_owner: bool,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._ledger = ledger
        self._slots = slots
        self._events = events
        self._owners = plan.owners
        self._streamed = pool.contents is not None
        self._archive = plan.images.unpacking is not None
        self._owner = (os.geteuid(), os.getegid()) if own_owner else None

    async def create(self) -> None:
        """Make every ghost of the plan, and move the directories to their old names."""
        ghosts: Iterable[PlannedGhost] = self._plan.ghosts.values()
        if self._pool.contents is not None:
            await self._create_streamed(self._pool.contents)
            ghosts = [planned for planned in ghosts if not self._is_streamed(planned)]
        await in_slots(self._slots, ghosts, self._create_in_slot)

    def _is_streamed(self, planned: PlannedGhost) -> bool:
        return bool(planned.ghost.extents) and planned.ghost.id not in self._plan.devshm

    async def _create_streamed(self, contents: Unpacking) -> None:
        """Make all ghosts that have content in the order in which they are in the archive.

        It is unpacked forwards, so their workers take turns: no faster than unpacking, but never
        more of a ghost in memory than a piece.
        """
        ghosts = [planned for planned in self._plan.ghosts.values() if self._is_streamed(planned)]
        ghosts.sort(key=lambda planned: planned.ghost.extents[0].position)
        for slot in sorted({self._slots[planned.group] for planned in ghosts}):
            await self._pool.call(slot, "forget_directories")
        for batch in batches(ghosts, _BATCH, content_of, _BYTES):
            for slot, run in self._runs(batch):
                operations = await self._prepare(slot, run)
                extents = [extent for planned in run for extent in planned.ghost.extents]
                stream = await contents.stream(extents)
                try:
                    await self._create_batch(slot, stream, run, operations, lambda: None)
                except RestoreError as error:
                    # Whatever the worker says: if the archive is what failed, that is the reason.
                    raise await contents.problem() or error from error
                finally:
                    os.close(stream)

    def _runs(self, ghosts: Iterable[PlannedGhost]) -> Iterator[tuple[int, list[PlannedGhost]]]:
        """What one worker makes in one namespace, without a long way between two in the archive."""
        run: list[PlannedGhost] = []
        last: tuple[int, int] | None = None
        end = 0
        for planned in ghosts:
            place = self._slots[planned.group], planned.mount.namespace.target.index
            first, final = planned.ghost.extents[0], planned.ghost.extents[-1]
            if last is not None and (place != last or first.position - end > GAP):
                yield last[0], run
                run = []
            run.append(planned)
            last, end = place, final.position + final.length
        if last is not None:
            yield last[0], run

    async def _create_in_slot(self, slot: int, ghosts: list[PlannedGhost]) -> None:
        # What the plan saw may have been replaced since: look directories up anew.
        await self._pool.call(slot, "forget_directories")
        ghosts.sort(key=lambda planned: planned.mount.namespace.target.index)
        shm = self._plan.devshm
        archived = [planned for planned in ghosts if planned.ghost.id in shm] if shm else []
        if archived:
            ghosts = [planned for planned in ghosts if planned.ghost.id not in shm]
        for source, some in (*self._pool.by_images(ghosts), (self._pool.devshm, archived)):
            await one_ahead(
                new_room(),
                batches(some, _BATCH, content_of, _BYTES),
                partial(self._prepare, slot),
                partial(self._create_batch, slot, source),
            )
        # An outer directory has its name before an inner one is moved into it.
        directories = sorted((g for g in ghosts if g.final), key=lambda g: g.depth)
        for planned in directories:
            await self._place(slot, planned)

    async def _prepare(self, slot: int, ghosts: Sequence[PlannedGhost]) -> list[tuple[Any, ...]]:
        await self._ledger.creating(ghosts, slot)
        if self._plan.devshm and ghosts[0].ghost.id in self._plan.devshm:
            return [tuple(self._create_op(planned)._replace(image=b"")) for planned in ghosts]
        return [tuple(self._create_op(planned)) for planned in ghosts]

    async def _create_batch(
        self,
        slot: int,
        source: int,
        ghosts: Sequence[PlannedGhost],
        operations: list[tuple[Any, ...]],
        sent: Callable[[], object],
    ) -> None:
        try:
            answers, _ = await self._pool.call(
                slot,
                "create",
                operations,
                target=ghosts[0].mount.namespace.target.index,
                mounts={planned.mount.service for planned in ghosts},
                fds=[source],
                sent=sent,
            )
        except WorkerFailure as error:
            for planned, fields in zip(ghosts, error.failure.done, strict=False):
                self._ledger.created(planned, Created(*fields))
            at = error.failure.at
            if at >= 0:
                taken = error.failure.errno == errno.EEXIST
                self._ledger.not_created(ghosts[at if taken else at + 1 :])
            file = ghosts[max(0, at)].ghost.file
            raise failed(error.failure, self._plan, file) from error
        for planned, fields in zip(ghosts, answers, strict=True):
            self._ledger.created(planned, Created(*fields))
        log.debug("created %d ghosts", len(ghosts))
        if self._events:
            from ghostpool._events import GhostCreated

            for planned in ghosts:
                self._events.send(
                    GhostCreated(
                        ghost=planned.ghost.id,
                        mountpoint=text(planned.mount.mount.mountpoint),
                        size=planned.ghost.size,
                    )
                )

    def _create_op(self, planned: PlannedGhost) -> CreateOp:
        ghost = planned.ghost
        return CreateOp(
            planned.mount.service,
            planned.directory,
            planned.name,
            ghost.mode,
            *(self._owner or self._owners.get(ghost.id) or (ghost.uid, ghost.gid)),
            planned.times_ns,
            ghost.rdev or 0,
            ghost.target or b"",
            b"" if self._archive else ghost.file.encode(),
            ghost.size,
            tuple(
                [(offset, length, STREAMED) for offset, length, _ in ghost.extents]
                if self._streamed and self._is_streamed(planned)
                else [(offset, length, position) for offset, length, position in ghost.extents]
            ),
        )

    async def _place(self, slot: int, planned: PlannedGhost) -> None:
        await self._ledger.placing(planned)
        created = self._ledger.result(planned.ghost.id)
        operation = PlaceOp(
            planned.mount.service,
            planned.directory,
            planned.name,
            planned.parents,
            planned.final,
            created.device,
            created.inode,
        )
        try:
            (fields,), _ = await self._pool.call(
                slot,
                "place",
                [tuple(operation)],
                target=planned.mount.namespace.target.index,
                mounts=[planned.mount.service],
            )
        except WorkerFailure as error:
            raise failed(error.failure, self._plan, planned.ghost.file) from error
        self._ledger.placed(planned, Placed(*fields))


def content_of(planned: PlannedGhost) -> int:
    """Bytes that are written for a ghost."""
    return sum(extent.length for extent in planned.ghost.extents)

"""Opening ghosts under their old names, for one task after the other or for many at once.

Tasks may share an open file description; it is opened once, by the first task that asks for it,
and the others wait for that.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import anyio

from ghostpool._batches import batches, failed, in_slots, new_room, one_ahead
from ghostpool._errors import BarrierBroken
from ghostpool._fifos import FifoFiller
from ghostpool._followers import Events
from ghostpool._guard import Key
from ghostpool._ledger import Ledger
from ghostpool._mend import left_behind
from ghostpool._model import GhostId, MountHandle, RegId, id_in_images
from ghostpool._paths import join, relative_to, text
from ghostpool._planned import (
    Files,
    Plan,
    PlannedGhost,
    PlannedLink,
    PlannedOpen,
    is_moved,
)
from ghostpool._pool import WorkerPool
from ghostpool._protocol import OpenOp
from ghostpool._restored import Restored
from ghostpool._workerclient import WorkerFailure

_BATCH = 256
_BATCH_HELD = 128
"""The worker holds as many descriptors until it answers."""


class _Opening:
    """Opens that somebody has begun."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.error: BaseException | None = None


def _opened_often(plan: Plan) -> set[GhostId]:
    """Ghosts that are opened more than once, and what has other names: nobody may move these."""
    opens = plan.opens
    if len(opens) == len(plan.ghosts):  # each is opened: nothing need be counted
        return set()
    opened = Counter(planned.opening.ghost.id for planned in opens)
    return {*plan.links, *(ghost for ghost, count in opened.items() if count > 1)}


def _keys_of(plan: Plan) -> dict[RegId, list[str]]:
    """What each open is held as besides descriptors."""
    found: dict[RegId, list[str]] = {}
    for task in plan.tasks:
        for key in task.keys:
            found.setdefault(key.reg_id, []).append(key.key)
    return found


class Opener:
    """Opens the files of one plan."""

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        ledger: Ledger,
        slots: Mapping[tuple[int, int], int],
        restored: Restored,
        fifos: FifoFiller,
        events: Events,
        *,
        keep: bool,
        files: Files,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._ledger = ledger
        self._slots = slots
        self._restored = restored
        self._fifos = fifos
        self._events = events
        self._keep = keep
        self._files = files
        self._placed = plan.placed
        self._shared = _opened_often(plan)
        self._are_sent = files == "held" or (files == "discarded" and bool(self._shared))
        """Descriptors come with the answers."""
        self._places: dict[tuple[object, ...], tuple[bytes, bytes]] = {}
        self._rooms = {slot: new_room() for slot in set(slots.values())}
        self._begun: dict[RegId, _Opening] = {}
        self._keys = _keys_of(plan) if events else {}

    def not_begun(self, opens: Iterable[PlannedOpen]) -> list[PlannedOpen]:
        """Those of `opens` that nobody has asked for yet."""
        return [planned for planned in opens if planned.opening.file.id not in self._begun]

    async def open(self, task: int, opens: Sequence[PlannedOpen]) -> None:
        """Have all of `opens` open, for the task with this pid.

        Mounts that they need must be leased. BarrierBroken if another task that has begun to open
        one of them failed.
        """
        mine = self.not_begun(opens)
        others = dict.fromkeys(
            self._begun[p.opening.file.id] for p in opens if p.opening.file.id in self._begun
        )
        if mine:
            await self._open_mine(task, mine)
        for opening in others:
            await opening.done.wait()
            if opening.error is not None:
                raise BarrierBroken(
                    f"another task could not open a file that task {task} shares: {opening.error!r}"
                ) from opening.error

    async def _open_mine(self, task: int, opens: Sequence[PlannedOpen]) -> None:
        opening = _Opening()
        self._begun.update((planned.opening.file.id, opening) for planned in opens)
        try:
            await in_slots(self._slots, opens, partial(self._open_in_slot, task))
            await self._ledger.tell_settled()
        except BaseException as error:
            opening.error = error
            raise
        finally:
            opening.done.set()

    async def _open_in_slot(self, task: int, slot: int, opens: list[PlannedOpen]) -> None:
        opens.sort(key=lambda planned: planned.opening.mount.namespace.target.index)
        await one_ahead(
            self._rooms[slot],
            batches(opens, _BATCH_HELD if self._are_sent else _BATCH),
            partial(self._prepare, slot),
            partial(self._open_batch, task, slot),
        )

    async def _prepare(
        self, slot: int, opens: Sequence[PlannedOpen]
    ) -> tuple[list[OpenOp], list[Key]]:
        debts = self._ledger.linking(opens, slot)
        operations = [self._open_op(planned) for planned in opens]
        await self._ledger.owe(debts)
        return operations, [debt.key for debt in debts]

    async def _open_batch(
        self,
        task: int,
        slot: int,
        opens: Sequence[PlannedOpen],
        prepared: tuple[list[OpenOp], list[Key]],
        sent: Callable[[], object],
    ) -> None:
        operations, keys = prepared
        handles = {MountHandle(op.link) for op in operations}
        handles |= {MountHandle(op.live) for op in operations}
        try:
            answers, fds = await self._pool.call(
                slot,
                "open" if self._files == "held" else "open_discarded",
                [tuple(operation) for operation in operations],
                target=opens[0].opening.mount.namespace.target.index,
                mounts=handles,
                sent=sent,
            )
        except WorkerFailure as error:
            name = text(opens[max(0, error.failure.at)].opening.file.name)
            raise failed(error.failure, self._plan, name) from error
        if self._files != "kept":
            held = (
                planned.opening.file.id
                for planned, operation in zip(opens, operations, strict=True)
                if self._files == "held" or not operation.move
            )
            self._restored.fds.update(zip(held, fds, strict=True))
        self._fifos.opened(opens)
        self._restored.opened += len(opens)
        for planned, (_, left) in zip(opens, answers, strict=True):
            mount = planned.opening.mount
            self._restored.left.extend(left_behind(mount, path) for path in left)
        moved = [operation.move for operation in operations]
        self._ledger.opened(opens, moved, keys, keep=self._keep)
        if self._events:
            from ghostpool._events import FileOpened

            for planned in opens:
                self._events.send(
                    FileOpened(
                        task=task,
                        file=id_in_images(planned.opening.file.id),
                        path=text(planned.opening.file.name),
                        keys=",".join(self._keys.get(planned.opening.file.id, ())),
                    )
                )

    def _open_op(self, planned: PlannedOpen) -> OpenOp:
        opening = planned.opening
        ghost = opening.ghost
        placed = self._placed[ghost.id]
        live_directory, names = opening.directory, planned.names
        temp_directory, temp_name, link_directory = b"", b"", b""
        if placed.final:
            assert isinstance(placed, PlannedGhost)
            # Directories have their name already, and it is found inside the file system.
            place = join(placed.mount.root, placed.final_directory)
            live_directory = relative_to(place, opening.mount.root)
            names = (self._ledger.final_name(ghost.id),)
        else:
            temp_name = placed.name
            temp_directory, link_directory = self._seen_from_link(planned, placed)
        device, inode = self._ledger.result(ghost.id)
        position = opening.file.position
        return OpenOp(
            planned.link,
            temp_directory,
            temp_name,
            link_directory,
            opening.mount.handle,
            live_directory,
            names,
            opening.flags,
            -1 if position is None else position,
            device,
            inode,
            ghost.mode,
            self._size_to_check(opening.file.size, ghost.mode),
            self._keep,
            is_moved(ghost, shared=ghost.id in self._shared),
        )

    def _seen_from_link(
        self, planned: PlannedOpen, placed: PlannedGhost | PlannedLink
    ) -> tuple[bytes, bytes]:
        """Directories of the temporary and of the old name, as the mount of the link has them."""
        opening = planned.opening
        key = (
            placed.mount.handle,
            placed.directory,
            planned.link,
            opening.mount.handle,
            opening.directory,
        )
        if key not in self._places:
            self._places[key] = (
                relative_to(placed.place, planned.link_root),
                relative_to(join(opening.mount.root, opening.directory), planned.link_root),
            )
        return self._places[key]

    @staticmethod
    def _size_to_check(size: int | None, mode: int) -> int:
        # A directory's size is the file system's own affair.
        return -1 if size is None or not stat.S_ISREG(mode) else size

"""The ledger: every name that a restore has made, or may have made, until it is taken away.

A name is entered before the request that makes it is sent, so that a worker which dies leaves
nothing that nobody knows of. Taking the temporaries away after a success and undoing a failure
are the same walk, backwards, through the service side of the mounts, which needs no lease.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import anyio

from ghostpool._apart import apart
from ghostpool._errors import GhostpoolError, RevertError, WorkerHung
from ghostpool._guard import Guard, Key, Owed
from ghostpool._journal import Anchor
from ghostpool._mend import left_behind, recover_command
from ghostpool._model import GhostId, MountHandle, live_of
from ghostpool._paths import join, text
from ghostpool._planned import PlannedGhost, PlannedLink, PlannedMount, PlannedOpen
from ghostpool._pool import WorkerPool
from ghostpool._process import Child
from ghostpool._protocol import Created, Placed, Removed, RemoveOp
from ghostpool._workerclient import WorkerFailure

_BATCH = 256
BATCH_S = 60.0
"""Seconds that one batch may take to be undone by a worker that is slow, but alive."""


@dataclass(eq=False, repr=False, slots=True)
class _Temporary:
    planned: PlannedGhost
    slot: int
    device: int | None = None
    """Number of its file system, and `inode` that of the file, since it has been created."""
    inode: int = 0
    placed: Placed | None = None
    placing: bool = False
    moved: bool = False
    """It has become the old name of its only open, which is kept."""


class Ledger:
    """Names that are owed to the file systems."""

    def __init__(
        self,
        pool: WorkerPool,
        mounts: Mapping[MountHandle, PlannedMount],
        guard: Guard,
        links: Mapping[GhostId, PlannedLink] = MappingProxyType({}),
    ) -> None:
        self._pool = pool
        self._guard = guard
        self._mounts = mounts
        self._hidden = links
        """Files of link remaps, whose names nobody has made here."""
        self._temporaries: dict[int, _Temporary] = {}
        self._links: dict[int, tuple[PlannedOpen, int]] = {}
        self._serial = 0
        self._devices: dict[int, int] = {}
        """One object for each number: every answer brings a new one."""
        self._hung: set[int] = set()
        """Superblocks that a worker was lost on: nobody else is sent there, and what was made
        there stays owed."""

    def __len__(self) -> int:
        waiting = sum(1 for one in self._temporaries.values() if not one.moved)
        return waiting + len(self._links)

    async def creating(self, ghosts: Sequence[PlannedGhost], slot: int) -> None:
        """A request to create these ghosts is about to be sent to a slot."""
        places: dict[tuple[MountHandle, bytes], list[PlannedGhost]] = {}
        for planned in ghosts:
            self._temporaries[planned.ghost.id] = _Temporary(planned, slot)
            places.setdefault((planned.mount.service, planned.directory), []).append(planned)
        await self._guard.owe([self._owed_together(some) for some in places.values()])

    def _owed_together(self, ghosts: Sequence[PlannedGhost]) -> Owed:
        """One debt for all temporaries of a directory that are made at a time."""
        first = ghosts[0]
        mount, directory = first.mount.service, first.directory
        return Owed(
            self._new_key(),
            first.mount.namespace.target.index,
            mount,
            anchor=Anchor(directory, *first.group),
            directory=directory,
            files=[(ghost.name, 0, 0) for ghost in ghosts],
        )

    def _new_key(self) -> Key:
        self._serial += 1
        return "names", self._serial

    def created(self, planned: PlannedGhost, result: Created) -> None:
        """The ghost is there, with this identity."""
        temporary = self._temporaries[planned.ghost.id]
        temporary.device = self._devices.setdefault(result.device, result.device)
        temporary.inode = result.inode

    def not_created(self, ghosts: Sequence[PlannedGhost]) -> None:
        """What has these temporary names is somebody else's: the worker did not come to make them.

        Or it found one of them taken, though nobody can have known it.
        """
        for planned in ghosts:
            del self._temporaries[planned.ghost.id]

    async def placing(self, planned: PlannedGhost) -> None:
        """A request to move this directory to its old name is about to be sent."""
        temporary = self._temporaries[planned.ghost.id]
        temporary.placing = True
        await self._guard.owe([_owed(temporary)])

    def placed(self, planned: PlannedGhost, result: Placed) -> None:
        """The directory has one of its final names."""
        self._temporaries[planned.ghost.id].placed = result

    def final_name(self, ghost_id: int) -> bytes:
        """The name that a directory ghost got."""
        temporary = self._temporaries[ghost_id]
        if temporary.placed is None:
            raise RuntimeError(f"ghost {ghost_id:x} has not been moved to its name")
        return temporary.planned.final[temporary.placed.final]

    def result(self, ghost_id: GhostId) -> Created:
        """What creating it gave; of the file of a link remap, what was found."""
        temporary = self._temporaries.get(ghost_id)
        if temporary is None:
            found = self._hidden[ghost_id].found
            return Created(found.device, found.inode)
        if temporary.device is None:
            raise RuntimeError(f"ghost {ghost_id:x} has not been created")
        return Created(temporary.device, temporary.inode)

    def linking(self, opens: Sequence[PlannedOpen], slot: int) -> list[Owed]:
        """A request that gives ghosts their old names for a moment is to be sent, after `owe`.

        Returns what that owes; `opened` takes the keys.
        """
        # Those that share a directory are owed together, but each that has parents to be removed
        # after it alone.
        groups: dict[Hashable, list[PlannedOpen]] = {}
        for planned in opens:
            opening = planned.opening
            self._links[opening.file.id] = planned, slot
            alone = opening.file.id if planned.missing else None
            place = (opening.mount.handle, opening.directory, alone)
            groups.setdefault(place, []).append(planned)
        return [self._owed_links(some) for some in groups.values()]

    async def owe(self, debts: Sequence[Owed]) -> None:
        """Returns when it is in the journal. See `Guard.owe`."""
        await self._guard.owe(debts)

    def _owed_links(self, opens: Sequence[PlannedOpen]) -> Owed:
        first = opens[0]
        mount = first.opening.mount
        key, target = self._new_key(), mount.namespace.target.index
        if first.missing:
            removals = [removal for planned in opens for removal in self._link_ops(planned)]
            return Owed(key, target, mount.service, removals, _anchor_of(first))
        return Owed(
            key,
            target,
            mount.service,
            anchor=_anchor_of(first),
            directory=first.opening.directory,
            files=[
                (name, *self.result(planned.opening.ghost.id))
                for planned in opens
                for name in planned.names
            ],
        )

    def opened(
        self,
        opens: Sequence[PlannedOpen],
        moved: Sequence[bool],
        keys: Sequence[Key],
        *,
        keep: bool,
    ) -> None:
        """The worker answered: the names and their parents are gone, unless they are to be kept.

        `moved`: for each, whether its temporary became the old name.
        """
        for planned, was_moved in zip(opens, moved, strict=True):
            if not keep:
                self._links.pop(planned.opening.file.id, None)
                if was_moved:
                    self._temporaries.pop(planned.opening.ghost.id, None)
            elif was_moved:
                self._temporaries[planned.opening.ghost.id].moved = True
        if not keep:
            self._guard.settle_later(keys)

    async def tell_settled(self) -> None:
        """Tell the guardian what is undone: nothing may be owed for long that is not."""
        await self._guard.tell_settled()

    async def settle(self, *, kept: bool = False) -> None:
        """Everything is undone, or has succeeded: what is still there is to stay.

        `kept`: something is. WorkerDied, KernelError: then the journal must know, and does not.
        """
        await self._guard.settle("names", must=kept)
        self._links.clear()
        self._temporaries.clear()

    async def clear(self, keep: bool = False) -> list[str]:
        """Take all names away, last made first; what was left and why, for people.

        `keep` leaves the old names alone, which stay owed until `settle`. RevertError for a name
        that resists; all others are gone then. Every slot works on its own directories at once.
        """
        by_slot = await apart(lambda: self._to_remove(keep), len(self))
        left: list[str] = []
        errors: list[Exception] = []
        async with anyio.create_task_group() as group:
            for slot, operations in by_slot.items():
                group.start_soon(self._clear_slot, slot, operations, left, errors)
        if errors:
            # What was tried twice was told twice.
            errors = list({str(error): error for error in errors}.values())
            raise errors[0] if len(errors) == 1 else ExceptionGroup("names are left", errors)
        if not keep and not self._hung:
            await self.settle()
        return left

    def _to_remove(self, keep: bool) -> dict[int, list[tuple[int, RemoveOp]]]:
        """What `clear` removes, by slot: target and operation, in order."""
        by_slot: dict[int, list[tuple[int, RemoveOp]]] = {}
        for planned, slot in () if keep else reversed(self._links.values()):
            target = planned.opening.mount.namespace.target.index
            by_slot.setdefault(slot, []).extend((target, op) for op in self._link_ops(planned))
        waiting = [
            temporary
            for temporary in reversed(self._temporaries.values())
            if not temporary.moved and not (keep and temporary.planned.final)
        ]
        waiting.sort(key=_when_removed)
        for temporary in waiting:
            target = temporary.planned.mount.namespace.target.index
            operations = by_slot.setdefault(temporary.slot, [])
            operations += [(target, operation) for operation in _temporary_ops(temporary)]
        return by_slot

    async def _clear_slot(
        self,
        slot: int,
        operations: list[tuple[int, RemoveOp]],
        left: list[str],
        errors: list[Exception],
    ) -> None:
        again = await self._remove(slot, operations, None, errors)
        undead = self._pool.undead(slot)
        if undead:
            # They may have done meanwhile what they were in the middle of.
            again = operations
        # A directory may have been kept by a name that was removed after it had been tried.
        await self._remove(slot, again, left, errors)
        errors += [
            error
            for child in undead
            if child.status is None
            for error in self._may_come(child, operations)
        ]

    async def _remove(
        self,
        slot: int,
        operations: list[tuple[int, RemoveOp]],
        left: list[str] | None,
        errors: list[Exception],
    ) -> list[tuple[int, RemoveOp]]:
        """Remove names; those whose directories could not go, which are told if `left` is given."""
        again: list[tuple[int, RemoveOp]] = []
        for start in range(0, len(operations), _BATCH):
            batch = operations[start : start + _BATCH]
            again += await self._remove_batch(slot, batch, left, errors)
        return again

    async def _remove_batch(
        self,
        slot: int,
        batch: list[tuple[int, RemoveOp]],
        left: list[str] | None,
        errors: list[Exception],
    ) -> list[tuple[int, RemoveOp]]:
        if self._hung:
            batch = [one for one in batch if self._superblock(one[1]) not in self._hung]
        if not batch:
            return []
        # One namespace a message: the service side works from any, so the first one's does.
        target = batch[0][0]
        handles = {MountHandle(operation.mount) for _, operation in batch}
        request = [tuple(operation) for _, operation in batch]
        try:
            answers, _ = await self._pool.insist(
                slot, "remove", request, target=target, mounts=handles, deadline_s=BATCH_S
            )
        except WorkerHung as error:
            return await self._remove_apart(slot, batch, left, errors, error)
        except (GhostpoolError, WorkerFailure) as error:
            errors += [self._not_removed(operation, error) for _, operation in batch[:1]]
            return []
        again: list[tuple[int, RemoveOp]] = []
        for one, fields in zip(batch, answers, strict=True):
            answer = Removed(*fields)
            if answer.left:
                again.append(one)
            self._note(one[1], answer, left, errors)
        return again

    async def _remove_apart(
        self,
        slot: int,
        batch: list[tuple[int, RemoveOp]],
        left: list[str] | None,
        errors: list[Exception],
        error: WorkerHung,
    ) -> list[tuple[int, RemoveOp]]:
        """A file system hangs: what lies on the others goes nevertheless."""
        by_superblock: dict[int, list[tuple[int, RemoveOp]]] = {}
        for one in batch:
            by_superblock.setdefault(self._superblock(one[1]), []).append(one)
        if len(by_superblock) == 1:
            (superblock,) = by_superblock
            if superblock not in self._hung:
                self._hung.add(superblock)
                errors += self._may_be_left([operation for _, operation in batch], str(error))
            return []
        again: list[tuple[int, RemoveOp]] = []
        for some in by_superblock.values():
            again += await self._remove_batch(slot, some, left, errors)
        return again

    def _superblock(self, operation: RemoveOp) -> int:
        return self._mounts[live_of(operation.mount)].mount.device

    def _may_come(
        self, child: Child, operations: Iterable[tuple[int, RemoveOp]]
    ) -> list[RevertError]:
        """A worker that can not be ended may still make one of its names when it wakes."""
        some = [op for _, op in operations if self._superblock(op) not in self._hung]
        why = f"process {child.pid} was killed, but hangs in a call that may still make a name"
        return self._may_be_left(some, why)

    def _may_be_left(self, operations: Iterable[RemoveOp], why: str) -> list[RevertError]:
        """One error for each mount."""
        handles = dict.fromkeys(live_of(operation.mount) for operation in operations)
        return [
            RevertError(
                f"names of this run may be left on mount {self._mounts[handle].label}: {why}",
                recover_command(),
            )
            for handle in handles
        ]

    def _not_removed(self, operation: RemoveOp, error: Exception) -> RevertError:
        planned = self._mounts[live_of(operation.mount)]
        where = join(operation.directory, operation.name)
        return RevertError(
            f"{text(where)} on mount {planned.label}, and more of this run's names, may be left: "
            f"{error}",
            recover_command(),
        )

    def _note(
        self,
        operation: RemoveOp,
        answer: Removed,
        left: list[str] | None,
        errors: list[Exception],
    ) -> None:
        planned = self._mounts[live_of(operation.mount)]
        where = join(operation.directory, operation.name)
        if answer.errno:
            errors.append(
                RevertError(
                    f"{text(where)} on mount {planned.label} can not be removed: "
                    f"{answer.step}: {os.strerror(answer.errno)}",
                    recover_command(),
                )
            )
        told = left if left is not None else []
        for path in answer.left:
            line = left_behind(planned, path)
            if line not in told:
                told.append(line)

    def _link_ops(self, planned: PlannedOpen) -> list[RemoveOp]:
        """The old name may be there, and parents that were missing; through the service side."""
        mount = planned.opening.mount
        device, inode = self.result(planned.opening.ghost.id)
        directory = planned.opening.directory
        parents = tuple(directory.split(b"/")[-planned.missing :]) if planned.missing else ()
        *others, last = planned.names
        service = mount.service
        removals = [RemoveOp(service, directory, name, device, inode, (), None) for name in others]
        return [*removals, RemoveOp(service, directory, last, device, inode, parents, None)]


def _when_removed(temporary: _Temporary) -> tuple[bool, int, bool]:
    """Directories last, the innermost first: files lie in them, and they in one another.

    Of several with one old name, first the one that has it, so that the others can have it too.
    """
    planned, placed = temporary.planned, temporary.placed
    if not planned.final:
        return False, 0, False
    has_it = placed is not None and planned.final[placed.final] == planned.wanted[0]
    return True, -planned.depth, not has_it


def _owed(temporary: _Temporary) -> Owed:
    planned = temporary.planned
    return Owed(
        key=("ghost", planned.ghost.id),
        target=planned.mount.namespace.target.index,
        mount=planned.mount.service,
        removals=list(_temporary_ops(temporary)),
        anchor=Anchor(planned.directory, *planned.group),
    )


def _anchor_of(planned: PlannedOpen) -> Anchor:
    components = planned.opening.directory.split(b"/")
    existing = components[: len(components) - planned.missing]
    return Anchor(b"/".join(existing), *planned.group)


def _temporary_ops(temporary: _Temporary) -> Iterable[RemoveOp]:
    planned, device, inode = temporary.planned, temporary.device or 0, temporary.inode
    if temporary.placed is None:
        yield RemoveOp(
            mount=planned.mount.service,
            directory=planned.directory,
            name=planned.name,
            device=device,
            inode=inode,
            parents=(),
            times=None,
        )
    if not temporary.placing:
        return
    # Without an answer it may have any of its names, and any of its parents may be new; the
    # identity decides about the names, and only empty directories are ever removed.
    names, parents = planned.final, planned.parents
    wanted: tuple[bytes, ...] = ()
    if temporary.placed is not None:
        name = planned.final[temporary.placed.final]
        parents = parents[len(parents) - temporary.placed.made :]
        # What it is called in /proc/PID/fd is the name that it had last.
        better = planned.wanted
        wanted = better[: better.index(name)] if name in better else better
        names = (name, *wanted)
    for number, name in enumerate(names):
        yield RemoveOp(
            mount=planned.mount.service,
            directory=planned.final_directory,
            name=name,
            device=device,
            inode=inode,
            parents=parents if number == len(names) - 1 else (),
            times=planned.times_ns,
            wanted=() if number else wanted,
        )

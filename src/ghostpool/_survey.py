"""The survey: what a plan needs to know of live namespaces, gathered by workers.

Everything up to the first change: mount tables are read, the mounts that matter are opened and
identified by the kernel, read-only ones get their private writable clone, and the old names are
looked at. Nothing that anybody else could see is different afterwards.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ghostpool import _linux, _room
from ghostpool._apart import apart
from ghostpool._errors import MountNotFound, Overmounted, PlanError, UnsupportedError, leaves
from ghostpool._lending import lend
from ghostpool._linkremaps import Place
from ghostpool._match import Namespace
from ghostpool._model import Images, MountHandle, NsId
from ghostpool._mounttable import MountTable
from ghostpool._paths import text
from ghostpool._plan import Planner
from ghostpool._planned import Plan, PlannedMount, Policy, Refusal
from ghostpool._pool import WorkerPool
from ghostpool._protocol import Failure, Found, Look, MountFacts, Room
from ghostpool._skipping import without
from ghostpool._targets import Target
from ghostpool._userns import IdMap, IdMaps
from ghostpool._workerclient import WorkerFailure

_BATCH = 200
_PAGES = 32
"""So many pages of a mount table, a thousand mounts, are read at once; a thread reads the rest."""
_MORE_THAN_A_PAGE = 1 << 16
_Place = tuple[MountHandle, bytes, tuple[bytes, ...]]
_T = TypeVar("_T")
_P = TypeVar("_P", bound=tuple[MountHandle, *tuple[Any, ...]])


class Survey:
    """Makes the plan of one restore."""

    def __init__(
        self,
        pool: WorkerPool,
        images: Images,
        policy: Policy,
        admit: Callable[[Planner], None] = lambda planner: None,
    ) -> None:
        """`admit` may raise for what is to be opened, before it is."""
        self._pool = pool
        self._images = images
        self._policy = policy
        self._admit = admit
        self.identities: dict[MountHandle, int] = {}
        """Unique id (or mnt_id, before Linux 6.8) of each planned mount."""
        self._locked: list[PlannedMount] = []

    async def plan(
        self, targets: Mapping[NsId, Target], tables: Mapping[int, MountTable], token: bytes
    ) -> Plan:
        """The plan, with its refusals. PlanError: the live namespaces can not be looked at.

        `tables` are those of the targets, by number; `token` is the random part of temporary names.
        """
        namespaces = {
            number: Namespace(number, target, tables[target.index])
            for number, target in targets.items()
        }
        skipped: list[Refusal] = []
        while True:
            try:
                plan = await self._plan(namespaces, token)
            except WorkerFailure as error:
                failure = error.failure
                raise PlanError(
                    "the mounts of the target can not be looked at: "
                    f"{failure.step}: {os.strerror(failure.errno)}"
                ) from error
            if self._policy.on_error == "refuse" or not plan.refusals:
                break
            files = {number for refusal in plan.refusals for number in refusal.files}
            less = without(self._images, files)
            fewer = len(less.remaps) < len(self._images.remaps) or len(less.sockets) < len(
                self._images.sockets
            )
            if not fewer or not all(refusal.files for refusal in plan.refusals):
                break  # it is about more than files, so without some nothing would be better
            skipped += plan.refusals
            self._images = less
            # A plan numbers its mounts anew.
            await self._pool.forget_mounts()
            self.identities.clear()
        plan.skipped += skipped
        return plan

    async def _plan(self, namespaces: Mapping[NsId, Namespace], token: bytes) -> Plan:
        def begin() -> Planner:
            planner = Planner(self._images, namespaces, self._policy, token)
            planner.add_bases()
            return planner

        pieces = len(self._images.files)
        planner = await apart(begin, pieces)
        self._locked.clear()
        self._admit(planner)
        await self._open_mounts(planner)
        for planned in planner.mounts:
            if planned.mount.idmapped:
                self._read_idmap(planner, planned)
        if self._locked:
            await lend(self._pool, namespaces.values(), self._locked, planner.refuse_mount)
        looks = await self._look(planner)
        found = await self._find(planner)
        plan = await apart(lambda: planner.finish(looks, found), pieces)
        await self._check_room(planner, plan)
        return plan

    def _read_idmap(self, planner: Planner, planned: PlannedMount) -> None:
        namespace = _linux.mount_namespace_id(planned.namespace.target.fd)
        try:
            maps = _linux.idmap_of(self.identities[planned.handle], namespace)
        except OSError:
            maps = None
        if maps is None:
            problem = "an idmapped mount, whose ids only Linux 6.15 and later tell"
            planner.refuse_mount(planned, UnsupportedError(problem))
        else:
            planned.idmap = IdMaps(IdMap.parse(maps[0]), IdMap.parse(maps[1]))

    def _slot(self, target: Target) -> int:
        return target.index % self._pool.jobs

    async def _open_mounts(self, planner: Planner) -> None:
        by_target: dict[int, list[PlannedMount]] = {}
        for planned in planner.mounts:
            by_target.setdefault(planned.namespace.target.index, []).append(planned)

        async def open_all(mounts: list[PlannedMount]) -> None:
            for start in range(0, len(mounts), _BATCH):
                await self._open_batch(planner, mounts[start : start + _BATCH])

        await _each(open_all, list(by_target.values()))

    async def _open_batch(self, planner: Planner, mounts: list[PlannedMount]) -> None:
        if self._policy.overmounted == "private":
            for planned in mounts:
                await self._open_hidden(planner, planned)
        else:
            for planned, error in await open_mounts(self._pool, mounts, self.identities):
                planner.refuse_mount(planned, error)
        needed = [p for p in mounts if p.service not in self._pool.mounts]
        await self._clone(planner, [p for p in needed if p.read_only or p.private])

    async def _open_hidden(self, planner: Planner, planned: PlannedMount) -> None:
        """Open a mount, hidden or not."""
        try:
            hidden = await open_mounts(self._pool, [planned], self.identities)
        except PlanError as error:
            hidden = [(planned, error)]
        if hidden:
            from ghostpool._covered import uncover

            try:
                planner.warn(planned.label, await uncover(self._pool, planned, self.identities))
            except PlanError as error:
                planner.refuse_mount(planned, error)

    async def _clone(self, planner: Planner, mounts: list[PlannedMount]) -> None:
        """Make the service side of read-only mounts of one namespace."""
        # Those of the host and on read-only superblocks are refused already, and not even cloned.
        mounts = [
            planned
            for planned in mounts
            if (planned.private or not planned.namespace.target.is_host)
            and not planned.mount.superblock_read_only
        ]
        if not mounts:
            return
        target = mounts[0].namespace.target
        slot = self._slot(target)
        answers, fds = await self._pool.call(
            slot,
            "clone",
            [(planned.handle, planned.service) for planned in mounts],
            target=target.index,
            mounts=[planned.handle for planned in mounts],
        )
        taken = iter(fds)
        for planned, failure in zip(mounts, answers, strict=True):
            if failure is None:
                self._pool.mounts[planned.service] = next(taken)
                self._pool.labels[planned.service] = planned.label
                self._pool.learned(slot, [planned.service])
            elif failure == (errno.EPERM, "mount_setattr"):
                self._locked.append(planned)
            elif failure[0] in (errno.EINVAL, errno.ENOSYS) and not planned.private:
                # Unbindable, or Linux before 5.12: the mount's own lease does for both sides.
                planned.clone = False
            else:
                planner.refuse_mount(planned, _clone_error(*failure))

    async def _look(self, planner: Planner) -> dict[tuple[MountHandle, bytes], Look]:
        places: list[_Place] = [
            (handle, directory, names) for (handle, directory), names in planner.looks.items()
        ]
        looks: dict[tuple[MountHandle, bytes], Look] = {}
        for (handle, directory, _), fields in await self._ask(planner, "look", places):
            looks[handle, directory] = Look(*fields)
        return looks

    async def _find(self, planner: Planner) -> dict[Place, Found]:
        answers = await self._ask(planner, "find", planner.names)
        return {place: Found(*fields) for place, fields in answers}

    async def _ask(
        self, planner: Planner, request: str, places: Iterable[_P]
    ) -> list[tuple[_P, tuple[Any, ...]]]:
        """What workers in the mounts' own namespaces answer about each of these places."""
        mounts = {planned.handle: planned for planned in planner.mounts}
        by_target: dict[int, list[_P]] = {}
        for place in places:
            by_target.setdefault(mounts[place[0]].namespace.target.index, []).append(place)
        answered: list[tuple[_P, tuple[Any, ...]]] = []

        async def ask(item: tuple[int, list[_P]]) -> None:
            index, own = item
            for start in range(0, len(own), _BATCH):
                batch = own[start : start + _BATCH]
                answers, _ = await self._pool.call(
                    index % self._pool.jobs,
                    request,
                    batch,
                    target=index,
                    mounts={place[0] for place in batch},
                )
                answered.extend(zip(batch, answers, strict=True))

        await _each(ask, list(by_target.items()))
        return answered

    async def _check_room(self, planner: Planner, plan: Plan) -> None:
        by_target: dict[int, list[_room.Part]] = {}
        for part in _room.parts_of(plan):
            by_target.setdefault(part.mount.namespace.target.index, []).append(part)

        async def check(item: tuple[int, list[_room.Part]]) -> None:
            index, parts = item
            handles = [part.mount.handle for part in parts]
            slot = index % self._pool.jobs
            answers, _ = await self._pool.call(slot, "room", handles, target=index, mounts=handles)
            for part, fields in zip(parts, answers, strict=True):
                if fields is None:
                    continue
                room = Room(*fields)
                reason = _room.refusal(part, room, self._pool.jobs, keep=self._policy.keep)
                if reason is not None:
                    planner.refuse(part.mount.label, _room.no_room(reason))

        await _each(check, list(by_target.items()))


async def read_tables(pool: WorkerPool, targets: Sequence[Target]) -> dict[int, MountTable]:
    """Mount tables as they are now, by target index. PlanError: a namespace can not be entered."""
    tables: dict[int, MountTable] = {}

    async def read(target: Target) -> None:
        try:
            _, (fd,) = await pool.call(target.index % pool.jobs, "mountinfo", target=target.index)
        except WorkerFailure as error:
            failure = error.failure
            raise PlanError(
                f"{target.label}: {failure.step}: {os.strerror(failure.errno)}"
            ) from error
        tables[target.index] = MountTable(await _read_all(fd))

    await _each(read, targets)
    return tables


async def _read_all(fd: int) -> bytes:
    """The content of a file of procfs, which never blocks; a large one takes 2 µs a line."""
    with open(fd, "rb", buffering=0) as file:  # noqa: ASYNC230
        pieces = []
        while piece := file.read(_MORE_THAN_A_PAGE):
            pieces.append(piece)
            if len(pieces) == _PAGES:
                pieces.append(await anyio.to_thread.run_sync(file.readall))
                break
        return b"".join(pieces)


async def open_mounts(
    pool: WorkerPool, mounts: Sequence[PlannedMount], identities: dict[MountHandle, int]
) -> list[tuple[PlannedMount, PlanError]]:
    """Open mounts of one namespace for the pool, and note who they are; those that are hidden.

    PlanError: the kernel could not reach one of them.
    """
    target = mounts[0].namespace.target
    slot = target.index % pool.jobs
    points = [(planned.handle, planned.mount.mountpoint) for planned in mounts]
    try:
        facts, fds = await pool.call(slot, "open_mounts", points, target=target.index)
    except WorkerFailure as error:
        planned = mounts[max(0, error.failure.at)]
        raise _mount_error(planned, error.failure) from error
    hidden: list[tuple[PlannedMount, PlanError]] = []
    for planned, fields, fd in zip(mounts, facts, fds, strict=True):
        pool.mounts[planned.handle] = fd
        pool.labels[planned.handle] = planned.label
        found = MountFacts(*fields)
        identities[planned.handle] = found.unique_id or found.mnt_id
        planned.fsid = found.fsid
        if found.mnt_id != planned.mount.mnt_id:
            problem = (
                f"its mount point leads to mount {found.mnt_id}, not to mount "
                f"{planned.mount.mnt_id} of the table: another mount hides it"
            )
            hidden.append((planned, Overmounted(problem)))
    pool.learned(slot, [planned.handle for planned in mounts])
    return hidden


async def _each(function: Callable[[_T], Coroutine[Any, Any, None]], items: Iterable[_T]) -> None:
    """Run `function` on all items at once; the first error alone comes out."""
    first: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            for item in items:
                group.start_soon(function, item)
    except BaseExceptionGroup as error:
        first = next(iter(leaves(error)))
    if first is not None:
        raise first


def _mount_error(planned: PlannedMount, failure: Failure) -> PlanError:
    if failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        # The kernel could not reach it; the table only tells whether a mount above is why.
        mount, table = planned.mount, planned.namespace.table
        above = table.containing(mount.mountpoint.rpartition(b"/")[0])
        if above is not None and above.mnt_id != mount.parent:
            return Overmounted(
                f"{planned.label} is hidden by mount {above.mnt_id} ({above.fstype}) on "
                f"{text(above.mountpoint)}"
            )
    if failure.errno == errno.ENOENT:
        return MountNotFound(f"{planned.label} is gone since its namespace was read")
    if failure.errno == errno.ELOOP:
        return Overmounted(f"{planned.label} is hidden: its path leads through a symbolic link")
    return PlanError(f"{planned.label}: {failure.step}: {os.strerror(failure.errno)}")


def _clone_error(code: int, step: str) -> PlanError:
    if code == errno.ENOSPC:
        return PlanError("no more mount namespaces are allowed: raise user.max_mnt_namespaces")
    return PlanError(f"no writable clone of it: {step}: {os.strerror(code)}")

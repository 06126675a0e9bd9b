"""One run of a command: from the images to a plan, a restore, and what becomes of it.

Joins the parts: images, targets or a sandbox, fork server, pool, survey, restoration, delivery.
Every part is a context manager, so that whatever ends the run, they end in reverse order.
Parts that only some runs have are imported by those.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import anyio

from ghostpool import _linux, _needs
from ghostpool._errors import (
    GhostpoolError,
    PlanError,
    SandboxError,
    first_cause,
    reportable,
)
from ghostpool._followers import Events, EventSink
from ghostpool._guard import Guard
from ghostpool._launch import Launched
from ghostpool._leftovers import undo_leftovers
from ghostpool._limits import Limits
from ghostpool._model import Images, MountHandle, NsId
from ghostpool._mounttable import MountTable
from ghostpool._needs import Consumers
from ghostpool._plan import Planner
from ghostpool._planned import Files, Plan, Policy
from ghostpool._pod import Container, joined, number_of
from ghostpool._pool import WorkerPool
from ghostpool._process import BuildFailed, ForkServer
from ghostpool._reading import discard, read_apart
from ghostpool._report import Report
from ghostpool._restore import Restoration
from ghostpool._restored import Restored
from ghostpool._rlimit import all_descriptors
from ghostpool._rundir import open_run_directory
from ghostpool._stall import STALL_S
from ghostpool._startreader import Reading, start_reading
from ghostpool._survey import Survey, read_tables
from ghostpool._targets import Target, adopt, distinct, pin, places, resolve_namespaces
from ghostpool._unbroken import unbroken
from ghostpool._unpacking import Unpacking

if TYPE_CHECKING:
    from ghostpool._events import Planned
    from ghostpool._listener import Listener
    from ghostpool._memory import MemoryBound
    from ghostpool._serve import TaskServer
    from ghostpool._undoing import RecoveredRun

log = logging.getLogger("ghostpool")


class Request(NamedTuple):
    """What the operator asked for."""

    images_dir: str
    jobs: int
    tree: int | None = None
    namespaces: Mapping[NsId, str] = MappingProxyType({})
    external: Mapping[str, str] = MappingProxyType({})
    policy: Policy = Policy()
    max_size: int = Limits().size
    """Largest apparent size of a ghost, in bytes."""
    devshm: str | None = None
    """The archive of a container's /dev/shm, whose link remaps are made anew where it is needed."""
    reading: Reading | PlanError | None = None
    """Who reads the images already, if somebody does; or why nobody can."""
    pod: tuple[Container, ...] = ()
    """The containers of a pod, in place of `images_dir`, `tree` and `namespaces`."""
    mount_setattr: bool = True
    """False: do as on Linux before 5.12, with mount(2)."""
    run_dir: str | None = None
    """Directory for the journal, in place of the usual one."""
    consumers: Consumers | None = None
    """Who takes the files over; None: the caller of the library itself."""
    stall_s: float = STALL_S
    """Seconds without a sign of life after which a process that is waited for hangs."""
    events: Sequence[EventSink] = ()
    """Who follows what happens."""
    memory_limit: int | None = None
    """Bytes that the run may take before further work waits; None: as many as it needs."""

    @property
    def containers(self) -> tuple[Container, ...]:
        """What is restored: the containers of the pod, or the one that there is."""
        return self.pod or (Container("", self.images_dir, self.tree, self.namespaces),)

    @property
    def files(self) -> Files:
        """What becomes of an opened file."""
        if self.consumers != "nobody":
            return "held"
        return "kept" if self.policy.keep else "discarded"


@dataclass(eq=False, repr=False, slots=True)
class Prepared:
    """A plan, and everything that carrying it out needs."""

    request: Request
    server: ForkServer
    pool: WorkerPool
    targets: dict[NsId, Target]
    plan: Plan
    identities: Mapping[MountHandle, int]
    report: Report
    soft_limit: int
    """RLIMIT_NOFILE as it was; commands get it back."""
    events: Events

    @asynccontextmanager
    async def restoring(self, *, alone: bool = False) -> AsyncIterator[Session]:
        """The ghosts are there: bring the tasks up inside the block. See `Restoration.running`."""
        servers: list[TaskServer] = []
        async with _told_the_end(servers), AsyncExitStack() as stack:
            directory = open_run_directory(self.request.run_dir)
            stack.callback(os.close, directory)
            guard = await stack.enter_async_context(
                Guard.running(
                    self.server,
                    self.pool,
                    directory,
                    self.plan.token.decode(),
                    self.plan.mounts,
                    self.identities,
                )
            )
            restoration = Restoration(
                self.plan,
                self.pool,
                self.identities,
                guard,
                keep=self.request.policy.keep,
                consume_links=self.request.policy.consume_link_remaps,
                files=self.request.files,
                own_owner=self.request.policy.own_owner,
                events=self.events,
            )
            try:
                async with restoration.running(alone=alone):
                    yield Session(self, restoration, stack, servers)
            finally:
                self.report.usage = restoration.restored.usage
                self.report.left += restoration.restored.left
                self.report.consumed = restoration.restored.consumed

    @asynccontextmanager
    async def restored(self) -> AsyncIterator[Restored]:
        """Carry the plan out and hold the descriptors for the time of the block."""
        async with self.restoring(alone=True) as session:
            await session.restoration.bring_up_all()
            await session.finish()
            yield session.restoration.restored

    async def release_workers(self) -> None:
        """End the workers and their clones: nothing of the restore itself goes on."""
        await self.pool.stop()
        _linux.close_all(self.pool.mounts.values())
        self.pool.mounts.clear()


class Session:
    """A restore whose ghosts are there and whose tasks are to be brought up."""

    def __init__(
        self,
        run: Prepared,
        restoration: Restoration,
        stack: AsyncExitStack,
        servers: list[TaskServer],
    ) -> None:
        self.run = run
        self.restoration = restoration
        self._stack = stack
        self._servers = servers

    async def serve(
        self,
        listener: Listener,
        tasks: Iterable[int] | None = None,
        started: Callable[[TaskServer], object] = lambda server: None,
    ) -> None:
        """Have consumers bring up these tasks, or all of them. See `TaskServer.run`.

        `started` is called when they can connect. What becomes of the restore they are told by
        `finish`, or at the end of the block of `Prepared.restoring`.
        """
        from ghostpool._serve import TaskServer

        server = TaskServer(self.restoration, self.restoration.barrier, listener, tasks)
        self._servers.append(server)
        started(server)
        try:
            await server.run()
        finally:
            self.run.report.missing = server.why_missing()

    async def finish(self) -> None:
        """See `Restoration.finish`; guardian, journal and workers are gone too then."""
        await self.restoration.finish(self._check_consumers)
        # All is done: an interruption that comes only now can not undo it.
        await unbroken(self._let_go)
        report, restored = self.run.report, self.restoration.restored
        report.restored = True
        report.kept = self.run.request.policy.keep
        report.usage = restored.usage
        for server in self._servers:
            server.released()
        log.info("restored: %d open files", restored.opened)

    async def _let_go(self) -> None:
        await self._stack.aclose()
        await self.run.release_workers()

    def _check_consumers(self) -> None:
        for server in self._servers:
            server.check()


@asynccontextmanager
async def _told_the_end(servers: list[TaskServer]) -> AsyncIterator[None]:
    """Consumers that were not released in the block are told why: nothing is left to be undone."""
    try:
        yield
    except BaseException as error:
        reasons = [str(leaf) for leaf in reportable(first_cause(error))]
        for server in servers:
            cancelled = ["cancelled", server.why_missing()]
            server.aborted("; ".join(filter(None, reasons or cancelled)))
        raise
    for server in servers:
        # Without effect on those that were released: who is left saw its program drop an error.
        server.aborted("this restore has failed")


@asynccontextmanager
async def prepared(
    request: Request,
    launched: Launched,
    report: Report,
    check: Callable[[Plan], None] = Plan.check,
    *,
    before: Callable[[ForkServer], Awaitable[None]] | None = None,
) -> AsyncIterator[Prepared]:
    """Everything up to the first change. PlanError: the restore is ruled out.

    `check` may raise for a plan that is not to be carried out; `before` is awaited first.
    """
    begun = time.monotonic()
    report.pod = request.pod

    def admit(planner: Planner) -> None:
        _needs.check(planner.counts(request.files), request.jobs, request.consumers, hard)

    def conclude() -> None:
        report.elapsed_s = time.monotonic() - begun

    events = Events(request.events)
    async with AsyncExitStack() as stack:
        stack.callback(conclude)
        stack.enter_context(_followed(events))
        soft_limit, hard = stack.enter_context(all_descriptors())
        server = await stack.enter_async_context(ForkServer.running(launched, request.stall_s))
        if isinstance(request.reading, PlanError):
            raise request.reading
        if before is not None:
            await before(server)
        named = [place for one in request.containers for place in places(one.tree, one.namespaces)]
        _needs.check_namespaces(len(named), hard)
        pinned = pin(named)
        targets = distinct(pinned.values())
        stack.callback(_close, targets)
        if any(target.user_namespace >= 0 for target in targets):
            from ghostpool._owners import learn_maps

            pinned = await learn_maps(server, pinned)
            targets[:] = distinct(pinned.values())
        readings = _begun(request, stack, all_mounts=not named)
        memory = _memory_bound(request, server)
        pool = await stack.enter_async_context(
            WorkerPool.running(
                server,
                request.jobs,
                targets,
                mount_setattr=request.mount_setattr,
                devices=request.policy.allow_devices,
                memory=memory,
            )
        )
        pool.images = [reading.directory for reading in readings]
        # That which an archive has in it is read from there.
        pool.devshm = readings[0].directory if readings[0].devshm < 0 else readings[0].devshm
        pool.events = events
        try:
            found, tables = await _read(readings, pool, targets)
            by_id = _resolved(request, found, pinned)
            images = joined(found) if request.pod else found[0]
            if images.unpacking:
                pool.contents = await stack.enter_async_context(
                    Unpacking.running(images, readings[0].directory)
                )
            if not by_id:
                by_id = await _rebuilt(request, images, server, hard, readings[0].directory)
                targets += by_id.values()
                pool.add_targets(targets)
                tables = await read_tables(pool, targets)
            policy = request.policy._replace(one_lease=bool(request.pod))
            survey = Survey(pool, images, policy, admit)
            plan = await survey.plan(by_id, tables, os.urandom(6).hex().encode())
            await pool.act_as(plan.acting)
            report.plan = plan
            report.identities = survey.identities
            _log_plan(plan)
            if events:
                events.send(_planned(plan))
            check(plan)
            if memory is not None:
                await memory.check()
            report.ready = not plan.refusals
            yield Prepared(
                request, server, pool, by_id, plan, survey.identities, report, soft_limit, events
            )
        finally:
            await unbroken(pool.stop)
            report.workers = max(report.workers, pool.started)
            report.peak_rss = max(report.peak_rss, pool.peak_rss)
            if memory is not None:
                report.memory = (memory.limit, memory.peak)


@contextmanager
def _followed(events: Events) -> Iterator[None]:
    """Tell of the failure of what is in the block, and that nothing will come any more."""
    try:
        yield
    except BaseException as error:
        if events:
            from ghostpool._events import Failed

            for leaf in reportable(error) or (error,):
                events.send(Failed(error=type(leaf).__name__, message=str(leaf)))
        raise
    finally:
        events.close()


def _planned(plan: Plan) -> Planned:
    from ghostpool._events import Planned

    return Planned(
        ghosts=len(plan.ghosts),
        files=len(plan.opens),
        tasks=len(plan.tasks),
        mounts=len(plan.mounts),
        to_make_writable=len(plan.leased),
        refusals=len(plan.refusals),
    )


def _memory_bound(request: Request, server: ForkServer) -> MemoryBound | None:
    if request.memory_limit is None:
        return None
    from ghostpool._memory import MemoryBound

    return MemoryBound(request.memory_limit, lambda: [os.getpid(), *server.pids()])


def _log_plan(plan: Plan) -> None:
    log.info(
        "planned: %d ghosts, %d opens by %d tasks, %d mounts (%d to be made writable)",
        len(plan.ghosts),
        len(plan.opens),
        len(plan.tasks),
        len(plan.mounts),
        len(plan.leased),
    )
    if not log.isEnabledFor(logging.DEBUG):
        return
    for planned in plan.mounts.values():
        log.debug(
            "mount %d, %s: %s",
            planned.mount.mnt_id,
            planned.label,
            ",".join(planned.mount.options()),
        )


def _begun(request: Request, stack: AsyncExitStack, *, all_mounts: bool) -> list[Reading]:
    """Who reads the images of each container; what they are in is closed with `stack`."""
    assert not isinstance(request.reading, PlanError)
    readings: list[Reading] = []
    try:
        for one in request.containers:
            reading = request.reading or start_reading(
                one.images_dir, request.max_size, all_mounts=all_mounts, devshm=request.devshm
            )
            stack.callback(os.close, reading.directory)
            if reading.devshm >= 0:
                stack.callback(os.close, reading.devshm)
            readings.append(reading)
    except PlanError:
        for reading in readings:
            discard(reading)
        raise
    return readings


async def _read(
    readings: Sequence[Reading], pool: WorkerPool, targets: Sequence[Target]
) -> tuple[list[Images], dict[int, MountTable]]:
    """The images, and the mount tables of these targets, which are read meanwhile."""
    images: list[Images] = []
    left = [*readings]
    tables: dict[int, MountTable] = {}
    problems: list[GhostpoolError] = []

    async def look() -> None:
        try:
            tables.update(await read_tables(pool, targets))
        except GhostpoolError as error:
            problems.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        try:
            while left:
                images.append(await read_apart(left.pop(0)))
        except GhostpoolError as error:
            # Whatever the namespaces are like: first of all there must be something to restore.
            problems.insert(0, error)
            group.cancel_scope.cancel()
        finally:
            for reading in left:
                discard(reading)
    if problems:
        raise problems[0]
    return images, tables


def _resolved(
    request: Request, found: Sequence[Images], pinned: Mapping[str, Target]
) -> dict[NsId, Target]:
    """The targets that the operator named, by the namespaces of the images; none: none is named."""
    targets: dict[NsId, Target] = {}
    for at, (one, images) in enumerate(zip(request.containers, found, strict=True), 1):
        where = resolve_namespaces(images, one.tree, one.namespaces)
        if where and request.external:
            raise PlanError("--external is for rebuilt namespaces: leave it out with -t or --ns")
        for number, place in where.items():
            key = NsId(number_of(at, number)) if request.pod else number
            targets[key] = pinned[place]
    return targets


async def _rebuilt(
    request: Request, images: Images, server: ForkServer, most_fds: int, directory: int
) -> dict[NsId, Target]:
    from ghostpool import _buildspec
    from ghostpool._contents import with_contents
    from ghostpool._sandbox import specs_from_images

    specs = specs_from_images(images, request.external)
    _needs.check_namespaces(len(specs), most_fds)
    specs = await with_contents(specs, images, directory, request.policy)
    try:
        fds = await server.build(_buildspec.marshal(specs))
    except BuildFailed as error:
        raise SandboxError(f"the mount namespaces can not be rebuilt: {error}") from error
    return adopt({NsId(spec.id): fd for spec, fd in zip(specs, fds, strict=True)})


def _close(targets: Iterable[Target]) -> None:
    _linux.close_all(fd for target in targets for fd in target.fds)


async def run_plan(request: Request, launched: Launched, report: Report) -> None:
    """Make the plan into `report`, refusals included, and change nothing."""

    def show_anyway(plan: Plan) -> None:
        pass

    async with prepared(request, launched, report, show_anyway):
        pass


Delivery = Callable[[Prepared, Restored], Awaitable[None]]


def prepared_to_restore(
    request: Request, launched: Launched, report: Report
) -> AbstractAsyncContextManager[Prepared]:
    """As `prepared`; but what runs that died still owe is undone first, and all of it is traced."""

    async def tidy(server: ForkServer) -> None:
        await undo_leftovers(server, request.run_dir)

    if "opentelemetry" in sys.modules:  # else nobody traces, and _tracing need not look
        from ghostpool import _tracing

        request = request._replace(events=(*request.events, *_tracing.spans()))
    return prepared(request, launched, report, before=tidy)


async def run_restore(
    request: Request,
    launched: Launched,
    report: Report,
    deliver: Delivery,
) -> None:
    """Restore, and hand the descriptors to `deliver` after the mounts are back.

    What runs that died still owe is undone first.
    """

    async with (
        prepared_to_restore(request, launched, report) as run,
        run.restored() as restored,
    ):
        await deliver(run, restored)


async def run_served(
    request: Request,
    launched: Launched,
    report: Report,
    listener: Listener,
    announce: Callable[[str], object],
) -> None:
    """Restore with the tasks brought up by consumers on the socket.

    `announce` is called with a line that names the socket, when they can connect.
    """
    async with (
        prepared_to_restore(request, launched, report) as run,
        run.restoring(alone=True) as session,
    ):
        await session.serve(
            listener,
            started=lambda server: announce(f"serving {server.awaited} tasks on {server.path}"),
        )
        await session.finish()


async def run_recover(launched: Launched, directory: int, dry_run: bool) -> list[RecoveredRun]:
    """Undo what dead runs owe; `directory` is the run directory."""
    from ghostpool._recover import recover

    with all_descriptors():
        async with ForkServer.running(launched) as server:
            return await recover(server, directory, dry_run=dry_run)

"""Mounts that lend a clone to one whose read-only flag is locked.

A mount that was copied into the mount namespace of another user namespace keeps its flags there,
whoever asks: no clone of it can be made writable (mount_namespaces(7)). But a mount of the same
superblock that holds the same directory, where it was copied from, or in our own namespace, is not
locked. A private clone of that directory there does what a clone of the mount itself would, and no
mount changes: the file systems are the same, and the root of the clone is compared with that of the
locked mount. docs/design.md, D-030.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from ghostpool._errors import GhostpoolError, PlanError
from ghostpool._linux import close_all
from ghostpool._match import Namespace
from ghostpool._mountinfo import LiveMount
from ghostpool._mounttable import MountTable
from ghostpool._paths import is_below, relative_to, text
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._targets import Target
from ghostpool._workerclient import WorkerFailure

_MOST = 16
"""Mounts that are asked for one locked one."""
_OWN = "/proc/self/ns/mnt"


async def lend(
    pool: WorkerPool,
    namespaces: Iterable[Namespace],
    locked: Iterable[PlannedMount],
    refuse: Callable[[PlannedMount, GhostpoolError], None],
) -> None:
    """Give each of these a service side from another mount, or refuse it with the reason.

    `namespaces`: those of all targets.
    """
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tables = {n.target.index: (n.target, n.table) for n in namespaces}
        identity = (os.fstat(own).st_dev, os.fstat(own).st_ino)
        if all(target.identity != identity for target, _ in tables.values()):
            index = max(tables) + 1
            here = Target(index, own, identity, "this mount namespace", is_host=True, enter=None)
            tables[index] = here, MountTable.of_process(os.getpid())
            pool.add_targets([here])
        for planned in locked:
            if not await _lend(pool, tables.values(), planned, own):
                refuse(planned, _refusal(planned))
    finally:
        os.close(own)


async def _lend(
    pool: WorkerPool,
    tables: Iterable[tuple[Target, MountTable]],
    planned: PlannedMount,
    own: int,
) -> bool:
    for target, lender in islice(_lenders(tables, planned), _MOST):
        below = relative_to(planned.root, lender.root.strip(b"/"))
        slot = target.index % pool.jobs
        part: list[int] = []
        try:
            live = pool.mounts[planned.handle]
            arguments = ("open_part", lender.mountpoint, below)
            _, part = await pool.call(slot, *arguments, target=target.index, fds=[live])
            _, (clone,) = await pool.call(slot, "clone_part", target=target.index, fds=part)
        except WorkerFailure:
            continue  # it is hidden, or something else has the place, or it is locked itself
        finally:
            close_all(part)
        pool.mounts[planned.service] = clone
        pool.labels[planned.service] = planned.label
        planned.lent_in = None if target.fd == own else target
        planned.lender = f"{text(lender.mountpoint)} in {target.label}"
        return True
    return False


def _lenders(
    tables: Iterable[tuple[Target, MountTable]], planned: PlannedMount
) -> Iterator[tuple[Target, LiveMount]]:
    """Mounts that hold the directory which the locked one shows."""
    for target, table in tables:
        for mount in table:
            if (
                mount.device == planned.mount.device
                and (target.index, mount.mnt_id)
                != (planned.namespace.target.index, planned.mount.mnt_id)
                and is_below(planned.root, mount.root.strip(b"/"))
                and not mount.idmapped
                and table.stack(mount.mountpoint)[-1] == mount
            ):
                yield target, mount


def _refusal(planned: PlannedMount) -> PlanError:
    return PlanError(
        "its read-only flag is locked: it came into this mount namespace from one of another "
        "user namespace, and no caller can clear it there (mount_namespaces(7)); and no other "
        f"mount of its superblock that holds {text(b'/' + planned.root)} can be reached, neither "
        "in the targets nor from here"
    )

"""What failed restores have left in a live mount namespace: found by its name, and removed if that
is wanted and nobody owns it.

A worker in the namespace looks through the chosen mounts. Whose what it finds is, is asked after
that: what a restore makes later has another inode, and a name is removed only if it still is the
file that was found. Read-only mounts are worked on through a private writable clone, as in a
restore.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ghostpool import _needs
from ghostpool._claims import Claims
from ghostpool._errors import HostNamespace, MountNotFound, PlanError
from ghostpool._inspection import kind_of, spelled
from ghostpool._launch import Launched
from ghostpool._match import Namespace
from ghostpool._model import MountHandle, NsId
from ghostpool._mountinfo import LiveMount
from ghostpool._mounttable import MountTable
from ghostpool._paths import text
from ghostpool._planned import PlannedMount
from ghostpool._pool import WorkerPool
from ghostpool._process import ForkServer
from ghostpool._protocol import OTHER, REMOVED, Remnant, Removed, RemoveOp
from ghostpool._rlimit import all_descriptors
from ghostpool._survey import open_mounts, read_tables
from ghostpool._targets import Target, pin
from ghostpool._workerclient import WorkerFailure

SCHEMA: Final = 1
KERNEL_FILE_SYSTEMS: Final = frozenset(
    (
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "efivarfs",
        "fusectl",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "smackfs",
        "sysfs",
        "tracefs",
    )
)
"""Where nobody makes files: not looked through unless they are named."""
_BATCH: Final = 500
_WHAT: Final = {
    "ghostpool": "temporary file of ghostpool",
    "criu_ghost": "temporary file of CRIU",
    "cr_link": "file beside a taken name",
    "link_remap": "link remap",
}


@dataclass(eq=False, slots=True)
class Leftover:
    """One name that was found."""

    mount: PlannedMount
    found: Remnant
    state: str = "found"
    """`found`, `removed`, `kept` (for the reason), `gone` (somebody else has removed it) or
    `failed`."""
    reason: str = ""

    @property
    def path(self) -> bytes:
        """In the namespace."""
        parts = (self.mount.mount.mountpoint.rstrip(b"/"), self.found.directory, self.found.name)
        return b"/".join(part for n, part in enumerate(parts) if part or not n)

    def __str__(self) -> str:
        found = self.found
        size = f" of {found.size} bytes" if stat.S_ISREG(found.mode) else ""
        what = f"{_WHAT[found.kind]}, {kind_of(found.mode)}{size}"
        reason = f": {self.reason}" if self.reason else ""
        state = "" if self.state == "found" and not reason else f": {self.state}{reason}"
        return f"{text(self.path)}: {what}{state}"


@dataclass(eq=False, slots=True)
class Cleaning:
    """What came of it."""

    namespace: str = ""
    leftovers: list[Leftover] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Mounts, or parts of them, that were not looked through, and why."""

    @property
    def failed(self) -> bool:
        """Something that should have been removed is still there."""
        return any(leftover.state == "failed" for leftover in self.leftovers)

    def document(self) -> dict[str, Any]:
        """The JSON document; docs/clean.md describes it."""
        return {
            "schema": SCHEMA,
            "namespace": self.namespace,
            "leftovers": [
                {
                    **spelled("path", leftover.path),
                    "kind": leftover.found.kind,
                    "type": kind_of(leftover.found.mode),
                    "mode": f"{stat.S_IMODE(leftover.found.mode):04o}",
                    "owner": [leftover.found.uid, leftover.found.gid],
                    "size": leftover.found.size,
                    "mtime": leftover.found.mtime,
                    **spelled("mountpoint", leftover.mount.mount.mountpoint),
                    "state": leftover.state,
                    "reason": leftover.reason,
                }
                for leftover in self.leftovers
            ],
            "skipped": [{"where": where, "reason": reason} for where, reason in self.skipped],
        }


async def clean(
    launched: Launched,
    directory: int,
    namespace: str,
    mounts: Sequence[str],
    cleaning: Cleaning,
    *,
    remove: bool,
    link_remaps: bool,
) -> None:
    """Find what is left in `mounts` of a namespace (none: all that can hold files), into
    `cleaning`, and `remove` it.

    `directory` is the run directory. PlanError: nothing was removed.
    """
    with all_descriptors() as (_, hard):
        _needs.check(_needs.mounts_alone(1), 1, None, hard)
        async with ForkServer.running(launched) as server:
            (target,) = pin([namespace]).values()
            try:
                cleaning.namespace = target.label
                if target.is_host and not mounts:
                    raise HostNamespace(
                        f"{target.label} is the host's: name the mounts with --mount"
                    )
                async with WorkerPool.running(server, 1, [target]) as pool:
                    table = (await read_tables(pool, [target]))[target.index]
                    chosen = _chosen(target, table, mounts)
                    _needs.check(_needs.mounts_alone(len(chosen)), 1, None, hard)
                    for planned in chosen:
                        await _find(pool, planned, cleaning, must=bool(mounts))
                    _judge(cleaning, Claims.now(directory), link_remaps=link_remaps)
                    if remove:
                        for planned in chosen:
                            await _remove(pool, planned, cleaning)
            finally:
                os.close(target.fd)


def _chosen(target: Target, table: MountTable, points: Sequence[str]) -> list[PlannedMount]:
    """The topmost mounts on these mount points, or all that somebody can have made files on."""
    found: list[LiveMount] = []
    if points:
        for point in dict.fromkeys(map(os.fsencode, points)):
            stack = table.stack(point)
            if not stack:
                raise MountNotFound(f"nothing is mounted on {text(point)} in {target.label}")
            found.append(stack[-1])
    else:
        points_of_files = {
            mount.mountpoint for mount in table if mount.fstype not in KERNEL_FILE_SYSTEMS
        }
        stacks = (table.stack(point) for point in sorted(points_of_files))
        found = [stack[-1] for stack in stacks if stack[-1].fstype not in KERNEL_FILE_SYSTEMS]
    namespace = Namespace(NsId(0), target, table)
    return [
        PlannedMount(MountHandle(2 * number), namespace, mount, clone=False)
        for number, mount in enumerate(found)
    ]


async def _find(pool: WorkerPool, planned: PlannedMount, cleaning: Cleaning, *, must: bool) -> None:
    """Look through one mount. PlanError: it was named, and can not be reached."""
    target = planned.namespace.target.index
    try:
        for _, hidden in await open_mounts(pool, [planned], {}):
            raise hidden
    except PlanError as error:
        if must:
            raise
        cleaning.skipped.append((text(planned.mount.mountpoint), str(error)))
        return
    (rows, unread, example, stopped), _ = await pool.call(
        0, "sweep", planned.handle, target=target, mounts=[planned.handle]
    )
    known = {(one.found.device, one.found.above, one.found.name) for one in cleaning.leftovers}
    for row in rows:
        found = Remnant(*row)
        # Through several mounts of one file system a name is seen several times.
        if (found.device, found.above, found.name) not in known:
            cleaning.leftovers.append(Leftover(planned, found))
    where = text(planned.mount.mountpoint)
    if unread:
        path, code = example[0]
        more = f" (and {unread - 1} more)" if unread > 1 else ""
        below = text(planned.mount.mountpoint.rstrip(b"/") + b"/" + path)
        cleaning.skipped.append((below, f"{os.strerror(code)}{more}"))
    if stopped:
        cleaning.skipped.append((where, "there is more on it than is looked through"))


def _judge(cleaning: Cleaning, claims: Claims, *, link_remaps: bool) -> None:
    """Say why something is no leftover to be removed."""
    for leftover in cleaning.leftovers:
        found = leftover.found
        reason = claims.reason(found)
        if stat.S_ISDIR(found.mode) and found.kind in ("criu_ghost", "link_remap"):
            reason = "no restore gives a directory such a name"
        if reason is None and found.kind == "link_remap" and not link_remaps:
            reason = "an image may need it: --link-remaps removes it too"
        if reason is None and not found.inode:
            reason = "its file system does not tell files apart"
        if reason is not None:
            leftover.state, leftover.reason = "kept", reason


async def _remove(pool: WorkerPool, planned: PlannedMount, cleaning: Cleaning) -> None:
    """Take away what was found on one mount and is nobody's."""
    mine = [one for one in cleaning.leftovers if one.mount is planned and one.state == "found"]
    if not mine:
        return
    refused = await _make_service_side(pool, planned)
    if refused is not None:
        for leftover in mine:
            leftover.state, leftover.reason = "failed", refused
        return
    for start in range(0, len(mine), _BATCH):
        batch = mine[start : start + _BATCH]
        operations = [
            tuple(
                RemoveOp(
                    planned.service,
                    one.found.directory,
                    one.found.name,
                    one.found.device,
                    one.found.inode,
                    (),
                    None,
                )
            )
            for one in batch
        ]
        target = planned.namespace.target.index
        answers, _ = await pool.call(
            0, "remove", operations, target=target, mounts=[planned.service]
        )
        for leftover, fields in zip(batch, answers, strict=True):
            _note(leftover, Removed(*fields))


def _note(leftover: Leftover, removed: Removed) -> None:
    if removed.errno:
        problem = f"{removed.step}: {os.strerror(removed.errno)}"
        leftover.state, leftover.reason = "failed", problem
    elif removed.found == REMOVED:
        leftover.state = "removed"
    elif removed.found == OTHER:
        leftover.state, leftover.reason = "kept", "another file has the name by now"
    else:
        leftover.state = "gone"


async def _make_service_side(pool: WorkerPool, planned: PlannedMount) -> str | None:
    """Have a writable side of the mount; why there is none."""
    mount = planned.mount
    if mount.superblock_read_only:
        return "its superblock is read-only"
    if not mount.read_only:
        return None
    if planned.namespace.target.is_host:
        return "its mount is read-only, and the host's"
    planned.clone = True
    try:
        (failure,), fds = await pool.call(
            0,
            "clone",
            [(planned.handle, planned.service)],
            target=planned.namespace.target.index,
            mounts=[planned.handle],
        )
    except WorkerFailure as error:
        failure, fds = (error.failure.errno, error.failure.step), []
    if failure is not None:
        return f"its mount is read-only, and {failure[1]}: {os.strerror(failure[0])}"
    pool.mounts[planned.service] = fds[0]
    pool.labels[planned.service] = planned.label
    pool.learned(0, [planned.service])
    return None


__all__ = ["Cleaning", "Leftover", "clean"]

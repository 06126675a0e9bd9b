"""Taking away the hidden names of link remaps, when a restore has succeeded and is told to.

What is begun here is finished, whoever is killed: names are owed to the guardian and the journal
from before the first of them goes, and by then there is nothing that could still fail. A name that
can not be taken away stays, and is told (docs/design.md, D-026).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ghostpool._errors import GhostpoolError
from ghostpool._guard import Guard, Owed
from ghostpool._journal import Anchor
from ghostpool._model import MountHandle
from ghostpool._paths import text
from ghostpool._planned import Plan, PlannedLink
from ghostpool._pool import WorkerPool
from ghostpool._protocol import OTHER, REMOVED, Removed, RemoveOp
from ghostpool._workerclient import WorkerFailure

_BATCH = 256


async def consume(plan: Plan, pool: WorkerPool, guard: Guard) -> tuple[int, list[str]]:
    """Take the hidden names away; how many went, and what stayed, for people."""
    by_directory: dict[tuple[MountHandle, bytes], dict[bytes, PlannedLink]] = {}
    for link in plan.links.values():
        key = link.mount.service, link.directory
        by_directory.setdefault(key, {})[link.name] = link
    gone = 0
    left: list[str] = []
    for links in by_directory.values():
        some = list(links.values())
        for start in range(0, len(some), _BATCH):
            batch = some[start : start + _BATCH]
            try:
                gone += await _consume(batch, pool, guard, left)
            except (GhostpoolError, WorkerFailure) as error:
                left += [_left(link, str(error)) for link in batch]
    return gone, left


async def _consume(
    links: list[PlannedLink], pool: WorkerPool, guard: Guard, left: list[str]
) -> int:
    first = links[0]
    mount, directory = first.mount, first.directory
    target = mount.namespace.target.index
    owed = Owed(
        ("consumed", first.linked.id),
        target,
        mount.service,
        anchor=Anchor(directory, first.found.directory_device, first.found.directory_inode),
        directory=directory,
        files=[(link.name, link.found.device, link.found.inode) for link in links],
    )
    await guard.owe([owed])
    request = [tuple(operation) for operation in _operations(links)]
    slot = target % pool.jobs
    answers, _ = await pool.insist(slot, "remove", request, target=target, mounts=[mount.service])
    await guard.settle([owed.key])
    gone = 0
    for link, fields in zip(links, answers, strict=True):
        answer = Removed(*fields)
        if answer.errno:
            left.append(_left(link, f"{answer.step}: {os.strerror(answer.errno)}"))
        elif answer.found == OTHER:
            left.append(_left(link, "another file has the name now"))
        elif answer.found == REMOVED:
            gone += 1  # else it was gone: through another mount of its, or by somebody else
    return gone


def _operations(links: Iterable[PlannedLink]) -> Iterable[RemoveOp]:
    for link in links:
        identity = link.found.device, link.found.inode
        yield RemoveOp(link.mount.service, link.directory, link.name, *identity, (), None)


def _left(link: PlannedLink, why: str) -> str:
    return f"{text(link.linked.hidden)} on mount {link.mount.label} was not taken away: {why}"

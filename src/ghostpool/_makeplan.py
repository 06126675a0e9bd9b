"""A plan without a restore: what would be done, and what would be refused and why."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ghostpool._launch import launch
from ghostpool._limits import Limits
from ghostpool._model import NsId
from ghostpool._planned import Plan, Policy
from ghostpool._report import Report
from ghostpool._run import Request, run_plan
from ghostpool._stall import STALL_S
from ghostpool._userns import maps_owner


async def make_plan(
    images: str | os.PathLike[str],
    *,
    tree: int | None = None,
    namespaces: Mapping[int, int | str] | None = None,
    external: Mapping[str, str] | None = None,
    jobs: int | None = None,
    keep: bool = False,
    allow_devices: bool = False,
    allow_setuid: bool = False,
    max_size: int = Limits().size,
    stall_s: float = STALL_S,
) -> Plan:
    """Plan to restore the ghosts of the image directory `images`, and change nothing.

    `tree` is the pid of a process in the namespace that stands for that of the images' root task;
    `namespaces` maps any mount namespace id of the images to the pid of a process in it, or to the
    path of a namespace file. With neither, namespaces are rebuilt from the images for the time of
    the call, with `external` as the paths of what can not be rebuilt, by external key or mount
    point. `jobs` workers look at most at a time; by default as many as this process may use CPUs.
    `keep`, `allow_devices` and `allow_setuid` as for a restore; `max_size` in bytes, the largest
    apparent size of a ghost; `stall_s` in seconds, after which a process without a sign of life is
    killed.

    What can not be restored is in `Plan.refusals`, which `Plan.check` raises; what rules out even
    to plan is raised: ImageError, NamespaceNotFound, SandboxError and other PlanErrors, WorkerDied
    if a process was killed. Raises them alone, not in a group. Cancelled, it leaves nothing behind.
    The plan tells how things were when it was made: nothing keeps them so. Needs CAP_SYS_ADMIN over
    the namespaces. RLIMIT_NOFILE is raised to the hard limit meanwhile.
    """
    request = Request(
        images_dir=os.fspath(images),
        jobs=jobs or len(os.sched_getaffinity(0)),
        tree=tree,
        namespaces={NsId(number): str(where) for number, where in (namespaces or {}).items()},
        external=dict(external or {}),
        policy=Policy(
            allow_devices=allow_devices, allow_setuid=allow_setuid, keep=keep, mapped=maps_owner()
        ),
        max_size=max_size,
        stall_s=stall_s,
    )
    report = Report()
    await run_plan(request, launch(), report)
    assert report.plan is not None
    return report.plan


__all__ = ["make_plan"]

"""A plan without a restore: what would be done, and what would be refused and why."""

from __future__ import annotations

import os
from typing import Unpack

from ghostpool._launch import launch
from ghostpool._planned import Plan
from ghostpool._report import Report
from ghostpool._request import Options, request_of
from ghostpool._run import run_plan


async def make_plan(
    images: str | os.PathLike[str], *, keep: bool = False, **options: Unpack[Options]
) -> Plan:
    """Plan to restore the ghosts of the image directory `images`, and change nothing.

    The arguments are those of `restore`.

    What can not be restored is in `Plan.refusals`, which `Plan.check` raises; what rules out even
    to plan is raised: ImageError, NamespaceNotFound, SandboxError and other PlanErrors, WorkerDied
    if a process was killed. Raises them alone, not in a group. Cancelled, it leaves nothing behind.
    The plan tells how things were when it was made: nothing keeps them so. Needs CAP_SYS_ADMIN over
    the namespaces. RLIMIT_NOFILE is raised to the hard limit meanwhile.
    """
    request = request_of(images, options, keep=keep)
    report = Report()
    await run_plan(request, launch(), report)
    assert report.plan is not None
    return report.plan


__all__ = ["make_plan"]

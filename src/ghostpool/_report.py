"""The report of a run: one JSON document, versioned, written when it ends or fails."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghostpool._errors import GhostpoolError, leaves
from ghostpool._lease import MountUsage
from ghostpool._model import Ghost, Linked, MountHandle, RegId, id_in_images
from ghostpool._paths import text
from ghostpool._planned import Opening, Plan, PlannedMount, Refusal, Strategy
from ghostpool._pod import Container
from ghostpool._protocol import Found

SCHEMA = 1


@dataclass(eq=False, slots=True)
class Report:
    """What is known of a run; grows while it goes on."""

    strategy: Strategy = "remount"
    plan: Plan | None = None
    """None: it has not come to one."""
    pod: Sequence[Container] = ()
    """The containers, if it is one of a pod."""
    usage: Mapping[MountHandle, MountUsage] = field(default_factory=dict)
    """What each mount went through."""
    identities: Mapping[MountHandle, int] = field(default_factory=dict)
    """Unique ids of the mounts, or their mnt_ids before Linux 6.8."""
    workers: int = 0
    """Processes that were started in mount namespaces."""
    peak_rss: int = 0
    """Most memory of one worker, in bytes."""
    memory: tuple[int, int] | None = None
    """The bound that was set, and the most that was seen, in bytes."""
    elapsed_s: float = 0.0
    """Seconds from the reading of the images to the end."""
    commands: list[tuple[int, int]] = field(default_factory=list)
    """Task and status of each command that ran, 128 + n for one that signal n ended."""
    consumed: int = 0
    """Hidden names of link remaps that were taken away, as was asked for."""
    left: list[str] = field(default_factory=list)
    """What was left alone in cleaning up, and why."""
    error: BaseException | None = None
    """What the run failed with; a library's caller gets it raised."""
    status: int = 0
    """Exit status of the command."""
    ready: bool = False
    """The plan was without refusals, so every clone that it asks for had been made."""
    restored: bool = False
    """Every ghost was restored and every mount put back, whatever a command said later."""
    missing: str = ""
    """Served tasks that have not arrived, and what of each of them was waited for; for people."""
    kept: bool = False
    """The names stay, whatever interrupts the run from now on."""

    def document(self) -> dict[str, Any]:
        """The JSON document; docs/report.md describes it."""
        plan = self.plan
        return {
            "schema": SCHEMA,
            "strategy": self.strategy if plan is None else plan.strategy,
            "status": self.status,
            "restored": self.restored,
            "elapsed_s": round(self.elapsed_s, 6),
            "ghosts": len(plan.ghosts) if plan else 0,
            "link_remaps": len(plan.links) if plan else 0,
            "remaps": len(plan.opens) if plan else 0,
            "tasks": len(plan.images.tasks) if plan else 0,
            "containers": [
                {"number": at, "name": one.name, "images": text(os.fsencode(one.images_dir))}
                for at, one in enumerate(self.pod, 1)
            ],
            "namespaces": len({t.namespace for t in plan.images.tasks}) if plan else 0,
            "mounts": [self._mount(planned) for planned in plan.mounts.values()] if plan else [],
            "workers": {"count": self.workers, "peak_rss_bytes": self.peak_rss},
            "memory": dict(zip(("limit_bytes", "peak_bytes"), self.memory, strict=True))
            if self.memory
            else None,
            "commands": [
                {"task": task, "status": status} for task, status in sorted(self.commands)
            ],
            "keys": _keys(plan) if plan else [],
            "warnings": list(plan.warnings) if plan else [],
            "of_dead_processes": of_dead_processes(plan) if plan else [],
            "refusals": [str(refusal) for refusal in plan.refusals] if plan else [],
            "skipped": [_refusal_document(refusal) for refusal in plan.skipped] if plan else [],
            "consumed_link_remaps": self.consumed,
            "left": self.left,
            "errors": [error_document(leaf) for leaf in leaves(self.error)],
        }

    def _mount(self, planned: PlannedMount) -> dict[str, Any]:
        usage = self.usage.get(planned.handle, MountUsage(0, 0, True, 0.0))
        return {
            "namespace": planned.namespace.id,
            "mountpoint": text(planned.mount.mountpoint),
            "mount_id": planned.mount.mnt_id,
            "unique_id": self.identities.get(planned.handle, 0),
            "options": planned.mount.options(),
            "made_writable": {
                # A clone is made writable once, when it is made; where none can be made, the
                # lease of the mount itself serves for creating too.
                "service": int(planned.clone and self.ready),
                "task": usage.made_writable,
            },
            "reverted": usage.reverted,
            "leases": usage.leases,
            "window_s": round(usage.window_s, 6),
        }


def error_document(error: BaseException) -> dict[str, Any]:
    """One error with its fields."""
    document: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if not isinstance(error, GhostpoolError):
        return document
    for name in ("errno", "syscall", "path", "mount", "namespace", "file", "record", "command"):
        value = getattr(error, name, None)
        if value is not None:
            document[name] = value
    return document


def facts_of(plan: Plan, opening: Opening) -> Ghost | Found:
    """Mode, owner and size of what is opened: of the image, or of the file that is there."""
    ghost = opening.ghost
    return plan.links[ghost.id].found if isinstance(ghost, Linked) else ghost


def of_dead_processes(plan: Plan) -> list[dict[str, Any]]:
    """Files of /proc that only who restores their processes can open again."""
    images = plan.images
    found: dict[RegId, dict[str, Any]] = {
        remap.origin: {
            "pid": remap.target,
            "path": text(images.files[remap.origin].name),
            "file": remap.origin,
            "descriptors": [],
        }
        for remap in images.remaps
        if remap.kind == "procfs"
    }
    for task in images.tasks if found else ():
        for row in task.descriptors:
            if row.reg_id in found:
                found[row.reg_id]["descriptors"].append({"task": task.pid, "fd": row.number})
    return list(found.values())


def _keys(plan: Plan) -> list[dict[str, Any]]:
    """What tasks hold besides descriptors."""
    return [
        {
            "task": task.task.pid,
            "key": key.key,
            "number": key.number,
            "file": (file := id_in_images(key.reg_id)),
            "path": text(plan.images.files[file].name),
        }
        for task in plan.tasks
        for key in task.keys
    ]


def _refusal_document(refusal: Refusal) -> dict[str, Any]:
    document = {"subject": refusal.subject, **error_document(refusal.error)}
    if refusal.files:
        document["files"] = list(refusal.files)
    return document


def recommended(plan: Plan) -> Strategy:
    """What would change fewer mounts: a private clone wherever one can be made."""
    clones = any(planned.clone and planned.mount.read_only for planned in plan.mounts.values())
    return "detached" if clones else "remount"


def plan_document(plan: Plan) -> dict[str, Any]:
    """What `ghostpool plan --json` prints; docs/report.md describes it."""
    opens = []
    for task in plan.tasks:
        for planned in task.opens:
            link = plan.links.get(planned.opening.ghost.id)
            facts = facts_of(plan, planned.opening)
            opens.append(
                {
                    "task": task.task.pid,
                    "file": id_in_images(planned.opening.file.id),
                    "ghost": None if link else planned.opening.ghost.id,
                    "link_remap": text(link.linked.hidden) if link else None,
                    "path": text(planned.opening.file.name),
                    "namespace": planned.opening.mount.namespace.id,
                    "mountpoint": text(planned.opening.mount.mount.mountpoint),
                    "name": text(planned.names[0]),
                    "mode": f"{facts.mode:o}",
                    "owner": [facts.uid, facts.gid],
                    "size": facts.size,
                    "temporary_directory": None
                    if link
                    else text(plan.ghosts[planned.opening.ghost.id].directory) or ".",
                    "missing_directories": planned.missing,
                }
            )
    leased = plan.leased
    return {
        "schema": SCHEMA,
        "strategy": plan.strategy,
        "recommended_strategy": recommended(plan),
        "ghosts": len(plan.ghosts),
        "link_remaps": len(plan.links),
        "tasks": len(plan.images.tasks),
        "opens": opens,
        "keys": _keys(plan),
        "mounts": [
            {
                "namespace": planned.namespace.id,
                "target": planned.namespace.target.label,
                "mountpoint": text(planned.mount.mountpoint),
                "mount_id": planned.mount.mnt_id,
                "options": planned.mount.options(),
                "service_clone": planned.clone,
                "strategy": plan.strategy_of(planned),
                "made_writable": planned.handle in leased,
            }
            for planned in plan.mounts.values()
        ],
        "privileged": [
            {
                "path": privileged.name,
                "file": privileged.file,
                "kinds": list(privileged.kinds),
                "allowed": privileged.allowed,
            }
            for privileged in plan.privileged
        ],
        "warnings": plan.warnings,
        "of_dead_processes": of_dead_processes(plan),
        "refusals": [_refusal_document(refusal) for refusal in plan.refusals],
        "skipped": [_refusal_document(refusal) for refusal in plan.skipped],
    }

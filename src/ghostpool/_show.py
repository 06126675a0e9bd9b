"""Plans for people, as tables."""

from __future__ import annotations

import stat

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ghostpool._inspection import kind_of
from ghostpool._model import id_in_images
from ghostpool._paths import text
from ghostpool._planned import Plan
from ghostpool._report import facts_of, recommended


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: files, mounts, warnings, refusals."""
    console = console or Console(highlight=False)
    files = table("ghost files", "task", "file", "kind", "size", "mode", "owner", "opened as")
    for task in plan.tasks:
        for planned in task.opens:
            ghost = facts_of(plan, planned.opening)
            files.add_row(
                str(task.task.pid),
                escape(text(planned.opening.file.name)),
                kind_of(ghost.mode),
                str(ghost.size) if stat.S_ISREG(ghost.mode) else "",
                f"{stat.S_IMODE(ghost.mode):04o}",
                f"{ghost.uid}:{ghost.gid}",
                escape(text(planned.names[0])),
            )
    if files.rows:
        console.print(files)
    for link in plan.links.values():
        console.print(f"opened by its link remap: {escape(text(link.linked.hidden))}")
    keys = table("held besides descriptors", "task", "as", "file", "number for a command")
    for task in plan.tasks:
        for key in task.keys:
            name = text(plan.images.files[id_in_images(key.reg_id)].name)
            keys.add_row(str(task.task.pid), key.key, escape(name), str(key.number))
    if keys.rows:
        console.print(keys)
    leased = plan.leased
    mounts = table("mounts", "ns", "mount point", "options", "service side", "task side")
    for mount in plan.mounts.values():
        mounts.add_row(
            str(mount.namespace.id),
            escape(text(mount.mount.mountpoint)),
            ", ".join(mount.mount.options()),
            "private clone" if mount.clone else "the mount",
            "made writable" if mount.handle in leased else "untouched",
        )
    if mounts.rows:
        console.print(mounts)
    for privileged in plan.privileged:
        console.print(f"privileged: {escape(str(privileged))}", soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"warning: {escape(warning)}", soft_wrap=True)
    for refusal in plan.skipped:
        console.print(f"skipped: {escape(str(refusal))}", soft_wrap=True)
    for refusal in plan.refusals:
        console.print(f"refused: {escape(str(refusal))}", soft_wrap=True)
    if not plan.refusals:
        if plan.strategy == "remount" and recommended(plan) == "detached":
            console.print("--strategy detached would leave read-only mounts as they are")
        console.print(f"{len(plan.ghosts)} ghosts, {len(plan.opens)} opens: can be restored")


def table(title: str, *headings: str) -> Table:
    """An empty table whose cells fold instead of losing their ends."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        made.add_column(heading, overflow="fold")
    return made

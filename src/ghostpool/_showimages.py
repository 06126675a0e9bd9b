"""What images hold, for people: tables, or the tree of the tasks with what each of them holds.

Made of the document of _inspection, whose texts are fit for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from ghostpool._limits import size_text
from ghostpool._show import table

_DEEPEST: Final = 16
"""Levels of the tree that are indented: images may say that 65,536 tasks are each other's child."""
_SHOWN: Final = 8
_WIDTH: Final = 160
_TARGET: Final = 40
"""Holders of one name that are listed in a table."""


def show_images(document: dict[str, Any], console: Console | None = None) -> None:
    """Print tables of tasks, ghosts and link remaps."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH  # nobody's window: a line is a line
    tasks = table("tasks", "task", "parent", "ns", "held")
    for task in document["tasks"]:
        row = (task["pid"], task["parent"], task["namespace"], task["holds"])
        tasks.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(tasks)
    ghosts = table(
        "ghost files", "id", "kind", "size", "stored", "mode", "owner", "path", "mount", "held by"
    )
    for ghost in document["ghosts"]:
        facts: tuple[str, ...] = (
            str(ghost["id"]),
            ghost["kind"],
            *_sizes(ghost),
            ghost["mode"],
            "{}:{}".format(*ghost["owner"]),
        )
        for name in ghost["names"]:
            path = name["path"] + _target(ghost)
            ghosts.add_row(*facts, escape(path), escape(_mount(name)), _holders(name["held_by"]))
            facts = ("",) * len(facts)
    for column in ghosts.columns[:6]:
        column.no_wrap = True
    if ghosts.rows:
        console.print(ghosts)
    links = table("link remaps", "path", "hidden name", "mount", "held by")
    for link in document["link_remaps"]:
        cells = escape(link["path"]), escape(link["hidden"]), escape(_mount(link))
        links.add_row(*cells, _holders(link["held_by"]))
    if links.rows:
        console.print(links)
    for line in _rest(document):
        console.print(escape(line), soft_wrap=True)


def tree_lines(document: dict[str, Any]) -> Iterator[str]:
    """The tasks below their parents, each with the removed files that it holds."""
    held: dict[int, list[str]] = {}
    for name, what in _names(document):
        for holder in name["held_by"]:
            key = f"fd {holder['descriptor']}" if "descriptor" in holder else holder["as"]
            held.setdefault(holder["task"], []).append(f"{key}: {name['path']} ({what})")
    tasks = {task["pid"]: task for task in document["tasks"]}
    children: dict[int, list[int]] = {}
    for pid, task in tasks.items():
        children.setdefault(task["parent"] if task["parent"] in tasks else 0, []).append(pid)
    # What is below nothing that is here comes first; then whatever only says it is its own parent.
    seen: set[int] = set()
    for root in (*children.get(0, ()), *tasks):
        waiting = [(root, 0)]
        while waiting:
            pid, depth = waiting.pop()
            if pid in seen:
                continue
            seen.add(pid)
            indent = "  " * min(depth, _DEEPEST)
            deep = f" (level {depth})" if depth > _DEEPEST else ""
            namespace = tasks[pid]["namespace"]
            where = "" if namespace is None else f", mount namespace {namespace}"
            yield f"{indent}task {pid}{where}{deep}"
            yield from (f"{indent}    {line}" for line in held.get(pid, ()))
            waiting += ((child, depth + 1) for child in reversed(children.get(pid, [])))
    yield from _rest(document)


def _names(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every name of a removed file, and what kind of file it is."""
    for ghost in document["ghosts"]:
        size, stored = _sizes(ghost)
        facts = ", ".join(filter(None, (size, f"{stored} stored" if stored != size else "")))
        for name in ghost["names"]:
            yield name, f"ghost {ghost['id']}, {ghost['kind']}{', ' if facts else ''}{facts}"
    for link in document["link_remaps"]:
        yield link, f"link remap {link['hidden']}"
    for other in document["procfs"]:
        yield other, f"of the dead process {other['pid']}"


def _rest(document: dict[str, Any]) -> Iterator[str]:
    """What is in no table, and the sums."""
    for other in document["procfs"]:
        yield f"{other['path']}: a file of the dead process {other['pid']} in /proc"
    for name in document["deleted_sockets"]:
        yield f"{name}: a bound UNIX socket whose name is gone"
    if document["own_user_namespace"]:
        yield "dumped in a user namespace of its own: owners are ids inside it"
    ghosts = document["ghosts"]
    size, content = (sum(ghost[key] for ghost in ghosts) for key in ("size", "content"))
    links = len(document["link_remaps"])
    yield (
        f"{_count(len(document['tasks']), 'task')}, {_count(len(ghosts), 'ghost')} "
        f"({size:,} bytes, {content:,} of them stored), {_count(links, 'link remap')}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _sizes(ghost: dict[str, Any]) -> tuple[str, str]:
    """Apparent size, and how much of it is stored; of what can have content."""
    if "device" in ghost:
        return "{}, {}".format(*ghost["device"]), ""
    if ghost["kind"] != "file":
        return "", ""
    return size_text(ghost["size"]), size_text(ghost["content"])


def _target(ghost: dict[str, Any]) -> str:
    target: str = ghost.get("target", "")
    return f" -> {target[:_TARGET]}{'…' * (len(target) > _TARGET)}" if target else ""


def _mount(name: dict[str, Any]) -> str:
    if name["mountpoint"] is None:
        return ""
    return f"{name['mountpoint']} ({'ro' if name['read_only'] else 'rw'})"


def _holders(holders: Iterable[dict[str, Any]]) -> str:
    """By task: "1: fd 3, fd 4; 2: cwd"."""
    by_task: dict[int, list[str]] = {}
    for number, holder in enumerate(holders):
        if number == _SHOWN:
            return "; ".join([*_by_task(by_task), "…"])
        key = f"fd {holder['descriptor']}" if "descriptor" in holder else holder["as"]
        by_task.setdefault(holder["task"], []).append(key)
    return "; ".join(_by_task(by_task))


def _by_task(by_task: dict[int, list[str]]) -> list[str]:
    return [f"{task}: {', '.join(keys)}" for task, keys in by_task.items()]


__all__ = ["show_images", "tree_lines"]

"""What tasks hold besides descriptors: mappings, executable, working and root directory; pure.

Each is a key, and gets an open of the flags that it had. Where a descriptor or another key of the
same file had the same, they share one; else the file is opened once more, under an id of its own.
Why keys have numbers too: docs/design.md, D-027.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from ghostpool._admission import alike
from ghostpool._errors import PlanError
from ghostpool._model import Holder, Images, Pid, RegFile, RegId, Task, further_open
from ghostpool._planned import PlannedKey

_DIRECTORIES = ("cwd", "root")
_MAPPABLE = frozenset((stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK))
_FIRST = 3
"""Numbers below it are a command's own."""


def holders_of(images: Images) -> dict[RegId, list[Holder]]:
    """All that hold a file in another way than by a descriptor, by the file."""
    found: dict[RegId, list[Holder]] = {}
    for task in images.tasks:
        for holder in task.holders:
            found.setdefault(holder.reg_id, []).append(holder)
    return found


class Keys:
    """The keys of all tasks, as far as their opens are known."""

    def __init__(self) -> None:
        self._found: dict[Pid, dict[str, RegId]] = {}

    def add(
        self, file: RegFile, mode: int, holders: Iterable[Holder], *, held: bool
    ) -> Iterator[RegFile]:
        """The opens that the holders of a file of this mode need, besides that of its descriptors
        if it is `held` by any.

        PlanError: such a file can not be what it is said to be.
        """
        opens = {alike(file.flags): file.id} if held else {}
        for holder in holders:
            _check(holder, mode)
            flags = _flags(holder, file)
            reg = opens.get(alike(flags))
            if reg is None:
                reg = opens[alike(flags)] = further_open(file.id, len(opens))
                yield file._replace(id=reg, flags=flags, position=None)
            self._found.setdefault(holder.pid, {})[holder.key] = reg

    def of_task(self, task: Task) -> tuple[PlannedKey, ...]:
        """The keys of a task, each at a number that no descriptor of it has."""
        found = self._found.get(task.pid)
        return tuple(_numbered(task, found)) if found else ()


def _numbered(task: Task, found: Mapping[str, RegId]) -> Iterator[PlannedKey]:
    used = {descriptor.number for descriptor in task.descriptors}
    free = (number for number in count(_FIRST) if number not in used)
    for holder in task.holders:
        if holder.key in found:
            yield PlannedKey(holder.key, next(free), found[holder.key])


def _check(holder: Holder, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if holder.key in _DIRECTORIES:
        possible = kind == stat.S_IFDIR
    elif holder.key == "exe":
        possible = kind == stat.S_IFREG
    else:
        possible = kind in _MAPPABLE
    if not possible:
        raise PlanError(
            f"held by task {holder.pid} as {holder.key}, which a file of mode {mode:o} can not be"
        )


def _flags(holder: Holder, file: RegFile) -> int:
    if holder.flags is not None:
        return holder.flags
    return file.flags | os.O_DIRECTORY if holder.key in _DIRECTORIES else file.flags

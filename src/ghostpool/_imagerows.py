"""Images as rows of plain values: what the reader process tells the coordinator.

    frame := u32 length, <length> bytes of JSON: [kind, rows]
    ["files", [[1, 32769, 0, "/data/a", 501, null, 33188, false], …]]

Rows are lists of numbers, booleans, nulls and strings, so they can be JSON, which can neither name
a class nor run anything. Bytes are strings of the characters U+0000 to U+00FF. What is believed of
rows, and made of them, is in _rebuild.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final

from ghostpool._model import Extent, Ghost, ImageMount, Images, RegFile, Socket, Task

Rows = list[Any]

ASK: Final = 64
"""Images that the reader asks for at once."""
BATCH: Final = 1000
"""Rows of a frame, and extents of a row."""
KINDS: Final = (
    "head",
    "mounts",
    "files",
    "sockets",
    "remaps",
    "descriptors",
    "tasks",
    "holders",
    "ghosts",
    "extents",
    "fifos",
    "devshm",
    "end",
)
"""In the order in which they come; one kind may take many frames. What takes long to read comes
late, so that all before it is rebuilt meanwhile."""


class Telling:
    """Says what is in images while they are still being read, in frames of at most BATCH rows.

    Called with what is known so far: a kind and values of it. `finish` says the rest.
    """

    def __init__(self, say: Callable[[str, Rows], None]) -> None:
        self._say = say
        self._kind = ""
        self._rows: Rows = []

    def __call__(self, kind: str, values: Iterable[Any]) -> None:
        if kind == "tasks":
            self._tell_tasks(tuple(values))
        else:
            row_of = _ROWS.get(kind)
            self._tell(kind, values if row_of is None else map(row_of, values))

    def _tell(self, kind: str, values: Iterable[Any]) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        rows = iter(values)
        while True:
            self._rows += islice(rows, BATCH - len(self._rows))
            if len(self._rows) < BATCH:
                break
            self._flush()

    def _tell_tasks(self, tasks: tuple[Task, ...]) -> None:
        tables: dict[int, int] = {}
        for task in tasks:
            tables.setdefault(id(task.descriptors), len(tables))
        self._tell("descriptors", _descriptors(tasks, tables))
        rows = ([t.pid, t.parent, t.namespace, tables[id(t.descriptors)]] for t in tasks)
        self._tell("tasks", rows)
        self._tell("holders", (list(h) for task in tasks for h in task.holders))

    def _flush(self) -> None:
        if self._rows:
            self._say(self._kind, self._rows)
            self._rows = []

    def finish(self, images: Images) -> None:
        """All that comes after the ghosts, and the end."""
        self._tell("extents", _further_extents(images))
        self._tell("fifos", ([reg, *data] for reg, data in images.fifo_data.items()))
        if images.devshm is not None:
            files = images.devshm.values()
            self._tell("devshm", ([_plain(file.name), *file[1:]] for file in files))
            if not files:  # that there is nothing in it is something else than no archive
                self._flush()
                self._say("devshm", [])
        self._flush()
        self._say("end", [])


def rows_of(images: Images) -> list[tuple[str, Rows]]:
    """All the frames of images that have been read."""
    frames: list[tuple[str, Rows]] = []
    telling = Telling(lambda kind, rows: frames.append((kind, rows)))
    telling("head", (images.root_namespace, images.own_user_namespace))
    telling("mounts", (mount for table in images.mounts.values() for mount in table))
    telling("files", images.files.values())
    telling("sockets", images.sockets.values())
    telling("remaps", images.remaps)
    telling("tasks", images.tasks)
    telling("ghosts", images.ghosts.values())
    telling.finish(images)
    return frames


def _plain(value: bytes | str) -> str:
    if isinstance(value, str):  # of a mount: UTF-8 with what is not in surrogates
        value = value.encode("utf-8", "surrogateescape")
    return value.decode("latin-1")


def _mount(mount: ImageMount) -> Rows:
    return [
        mount.id,
        mount.parent,
        mount.namespace,
        _plain(mount.fstype),
        mount.device,
        _plain(mount.root),
        _plain(mount.mountpoint),
        _plain(mount.source),
        _plain(mount.options),
        mount.flags,
        mount.superblock_flags,
        mount.shared_group,
        mount.master_group,
        mount.unbindable,
        None if mount.external_key is None else _plain(mount.external_key),
        mount.deleted_root,
    ]


def _file(file: RegFile) -> Rows:
    ident, flags, position, name, mnt_id, size, mode, external = file
    return [ident, flags, position, name.decode("latin-1"), mnt_id, size, mode, external]


def _socket(socket: Socket) -> Rows:
    *numbers, name, directory, owner, options = socket
    return [*numbers, _plain(name), _plain(directory), owner, options]


def _ghost(ghost: Ghost) -> Rows:
    ident, mode, uid, gid, atime, mtime, size, extents, rdev, target = ghost
    link = None if target is None else _plain(target)
    flat = _flat(extents[:BATCH])
    return [ident, mode, uid, gid, atime, mtime, size, flat, rdev, link]


def _flat(extents: tuple[Extent, ...]) -> list[int]:
    return list(chain.from_iterable(extents))


def _further_extents(images: Images) -> Iterator[Rows]:
    for ghost in images.ghosts.values():
        for at in range(BATCH, len(ghost.extents), BATCH):
            yield [ghost.id, _flat(ghost.extents[at : at + BATCH])]


def _descriptors(tasks: Iterable[Task], tables: dict[int, int]) -> Iterator[Rows]:
    done: set[int] = set()
    for task in tasks:
        table = tables[id(task.descriptors)]
        if table not in done:
            done.add(table)
            for row in task.descriptors:
                yield [table, *row]


_ROWS: Final[dict[str, Callable[[Any], Rows]]] = {
    "mounts": _mount,
    "files": _file,
    "sockets": _socket,
    "remaps": list,
    "ghosts": _ghost,
}
"""Those kinds whose values are not rows yet."""


__all__ = ["ASK", "BATCH", "KINDS", "Rows", "Telling", "rows_of"]

"""Images as rows of plain values, and back: what the reader process tells the coordinator.

    frame := u32 length, <length> bytes of JSON: [kind, rows]
    ["files", [[1, 32769, 0, "/data/a", 501, null, 33188, false], …]]

Rows are lists of numbers, booleans, nulls and strings, so they can be JSON, which can neither name
a class nor run anything. The reader may be in the hands of whoever wrote the images: every value
that comes back is held against its type, its range and what else was said, and whatever is off is
one ImageError. Bytes are strings of the characters U+0000 to U+00FF.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, Literal

from ghostpool._errors import ImageError
from ghostpool._limits import TEXT_LIMIT, Limits, Tally
from ghostpool._model import (
    GHOST_KINDS,
    HOST_NS,
    TARGET_MAX,
    Descriptor,
    Extent,
    Ghost,
    GhostId,
    Holder,
    ImageMount,
    Images,
    MntId,
    NsId,
    Pid,
    RegFile,
    RegId,
    Remap,
    Task,
)
from ghostpool._paths import ghost_file_name, is_image_path, is_on_mount

Rows = list[Any]

LENGTH: Final = struct.Struct("<I")
MAX_FRAME: Final = 4 << 20
ASK: Final = 64
"""Images that the reader asks for at once."""
BATCH: Final = 1000
"""Rows of a frame, and extents of a row."""
KINDS: Final = (
    "head",
    "mounts",
    "files",
    "ghosts",
    "extents",
    "remaps",
    "descriptors",
    "tasks",
    "holders",
    "fifos",
    "sockets",
    "end",
)
"""In the order in which they come; one kind may take many frames."""

_REMAP_KINDS: Final[dict[str, Literal["ghost", "linked", "procfs"]]] = {
    "ghost": "ghost",
    "linked": "linked",
    "procfs": "procfs",
}
_KEY: Final = re.compile(r"exe|cwd|root|map:[0-9a-f]{1,16}-[0-9a-f]{1,16}", re.ASCII)
_U31: Final = (1 << 31) - 1
_U32: Final = (1 << 32) - 1
_U63: Final = (1 << 63) - 1
_U64: Final = (1 << 64) - 1
_TIME: Final = 1_000_000 << 63


# There.


class Telling:
    """Says what is in images while they are still being read, in frames of at most BATCH rows.

    Called with what is known so far: a kind and values of it. `finish` says the rest.
    """

    def __init__(self, say: Callable[[str, Rows], None]) -> None:
        self._say = say
        self._kind = ""
        self._rows: Rows = []

    def __call__(self, kind: str, values: Iterable[Any]) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        row_of = _ROWS.get(kind)
        rows = iter(values) if row_of is None else map(row_of, values)
        while True:
            self._rows += islice(rows, BATCH - len(self._rows))
            if len(self._rows) < BATCH:
                break
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._say(self._kind, self._rows)
            self._rows = []

    def finish(self, images: Images) -> None:
        """All that comes after the ghosts, and the end."""
        tables: dict[int, int] = {}
        for task in images.tasks:
            tables.setdefault(id(task.descriptors), len(tables))
        self("extents", _further_extents(images))
        self("remaps", map(list, images.remaps))
        self("descriptors", _descriptors(images, tables))
        tasks = ([t.pid, t.parent, t.namespace, tables[id(t.descriptors)]] for t in images.tasks)
        self("tasks", tasks)
        self("holders", ([h.pid, h.key, h.reg_id] for task in images.tasks for h in task.holders))
        self("fifos", map(list, images.pending_fifo_bytes.items()))
        self("sockets", map(_plain, images.deleted_sockets))
        self._flush()
        self._say("end", [])


def rows_of(images: Images) -> list[tuple[str, Rows]]:
    """All the frames of images that have been read."""
    frames: list[tuple[str, Rows]] = []
    telling = Telling(lambda kind, rows: frames.append((kind, rows)))
    telling("head", (images.root_namespace, images.own_user_namespace))
    telling("mounts", (mount for table in images.mounts.values() for mount in table))
    telling("files", images.files.values())
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


def _ghost(ghost: Ghost) -> Rows:
    ident, _, mode, uid, gid, atime, mtime, size, extents, rdev, target = ghost
    link = None if target is None else _plain(target)
    flat = _flat(extents[:BATCH])
    return [ident, mode, uid, gid, atime, mtime, size, flat, rdev, link]


def _flat(extents: tuple[Extent, ...]) -> list[int]:
    return list(chain.from_iterable(extents))


def _further_extents(images: Images) -> Iterator[Rows]:
    for ghost in images.ghosts.values():
        for at in range(BATCH, len(ghost.extents), BATCH):
            yield [ghost.id, _flat(ghost.extents[at : at + BATCH])]


def _descriptors(images: Images, tables: dict[int, int]) -> Iterator[Rows]:
    done: set[int] = set()
    for task in images.tasks:
        table = tables[id(task.descriptors)]
        if table not in done:
            done.add(table)
            for row in task.descriptors:
                yield [table, *row]


_ROWS: Final[dict[str, Callable[[Any], Rows]]] = {
    "mounts": _mount,
    "files": _file,
    "ghosts": _ghost,
}
"""Those kinds whose values are not rows yet."""


# And back.


class Nonsense(ValueError):
    """What was said can not be true of any images."""


def _show(value: Any) -> str:
    return str(value) if type(value) is int else f"a {type(value).__name__}"


def _number(value: Any, most: int = _U32, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Nonsense(f"{_show(value)} is no number from {least} to {most}")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise Nonsense("a value that is neither true nor false")
    return value


def _bytes(value: Any, most: int) -> bytes:
    if type(value) is not str or len(value) > most or "\0" in value:
        raise Nonsense(f"a text that is none, is longer than {most} or holds a NUL")
    return value.encode("latin-1")


def _text(value: Any) -> str:
    return _bytes(value, TEXT_LIMIT).decode("utf-8", "surrogateescape")


def _known(key: Any, known: Any, what: str) -> Any:
    if type(key) is not int or key not in known:
        raise Nonsense(f"a reference to {what} {_show(key)} that is not there")
    return key


class Rebuild:
    """Images out of rows that nobody vouches for.

    `directory` names the images in messages. `add` takes frames in any number; after the last
    one `images` has the result. Both raise ImageError for whatever is not as it has to be.
    """

    def __init__(self, directory: str, limits: Limits) -> None:
        self._directory = directory
        self._tally = Tally(limits)
        self._at = -1
        self._root_namespace = HOST_NS
        self._own_user_namespace = False
        self._mounts: dict[NsId, list[ImageMount]] = {}
        self._points: dict[MntId, bytes] = {}
        self._homes: dict[MntId, NsId] = {}
        self._files: dict[RegId, RegFile] = {}
        self._remaps: dict[RegId, Remap] = {}
        self._ghosts: dict[GhostId, Ghost] = {}
        self._further: dict[GhostId, list[Extent]] = {}
        self._tables: dict[int, dict[int, Descriptor]] = {}
        self._tasks: dict[Pid, tuple[Pid, NsId, int]] = {}
        self._holders: dict[Pid, list[Holder]] = {}
        self._fifos: dict[RegId, int] = {}
        self._sockets: list[bytes] = []

    @property
    def complete(self) -> bool:
        """The last frame is there."""
        return self._at == len(KINDS) - 1

    def add(self, frame: Any) -> None:
        """Take one frame in."""
        try:
            kind, rows = frame
            at = KINDS.index(kind)
            if at < self._at or (at == 0) != (self._at < 0):
                raise Nonsense(f"{kind} comes out of order")
            if type(rows) is not list or len(rows) > BATCH:
                raise Nonsense(f"{kind} are no rows")
            self._at = at
            getattr(self, f"_add_{kind}")(rows)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._nonsense(error) from None

    def images(self) -> Images:
        """The result."""
        try:
            if not self.complete:
                raise Nonsense("the last frame is missing")
            return self._images()
        except ValueError as error:
            raise self._nonsense(error) from None

    def _nonsense(self, error: Exception) -> ImageError:
        what = error if isinstance(error, Nonsense) else "rows of another shape"
        return ImageError(
            self._directory, None, f"the process that reads the images makes no sense: {what}"
        )

    def _images(self) -> Images:
        if not self._tasks:
            raise Nonsense("no task")
        tables = {
            number: tuple(row for _, row in sorted(table.items()))
            for number, table in self._tables.items()
        }
        tasks = tuple(
            Task(pid, parent, namespace, tables.get(table, ()), tuple(self._holders.get(pid, ())))
            for pid, (parent, namespace, table) in self._tasks.items()
        )
        if tasks[0].namespace != self._root_namespace:
            raise Nonsense("the first task is not in the root namespace")
        return Images(
            directory=self._directory,
            tasks=tasks,
            files=self._files,
            remaps=tuple(self._remaps.values()),
            ghosts=self._ghosts,
            mounts={namespace: tuple(table) for namespace, table in self._mounts.items()},
            root_namespace=self._root_namespace,
            own_user_namespace=self._own_user_namespace,
            pending_fifo_bytes=self._fifos,
            deleted_sockets=tuple(self._sockets),
        )

    def _count(self, kind: str, number: int) -> None:
        self._tally.count(self._directory, None, kind, number)

    def _add_head(self, row: Rows) -> None:
        namespace, own_user_namespace = row
        self._root_namespace = NsId(_number(namespace))
        self._own_user_namespace = _bool(own_user_namespace)

    def _add_mounts(self, rows: Rows) -> None:
        self._count("mountpoints", len(rows))
        for row in rows:
            (ident, above, home, fstype, device, root, point, source, options) = row[:9]
            (flags, sb_flags, shared, master, unbindable, key, deleted) = row[9:]
            mount = ImageMount(
                MntId(_number(ident)),
                MntId(_number(above)),
                NsId(_number(home, least=1)),
                _text(fstype),
                _number(device, _U64),
                _bytes(root, TEXT_LIMIT),
                _bytes(point, TEXT_LIMIT),
                _text(source),
                _text(options),
                _number(flags),
                _number(sb_flags),
                _number(shared),
                _number(master),
                _bool(unbindable),
                None if key is None else _text(key),
                _bool(deleted),
            )
            table = self._mounts.setdefault(mount.namespace, [])
            if mount.id in self._points or not is_image_path(mount.mountpoint):
                raise Nonsense(f"mount {mount.id} comes twice or is nowhere")
            if table:
                if self._homes.get(mount.parent) != mount.namespace:
                    raise Nonsense(f"mount {mount.id} comes before its parent")
            elif mount.mountpoint != b"/":
                raise Nonsense(f"the first mount of namespace {mount.namespace} is no root")
            table.append(mount)
            self._points[mount.id] = mount.mountpoint
            self._homes[mount.id] = mount.namespace

    def _add_files(self, rows: Rows) -> None:
        self._count("files", len(rows))
        for ident, flags, position, name, mnt_id, size, mode, external in rows:
            reg = RegId(_number(ident))
            path = _bytes(name, TEXT_LIMIT)
            if reg in self._files:
                raise Nonsense(f"file id {reg} comes twice")
            if not _bool(external) and not is_image_path(path):
                raise Nonsense(f"{path[:80]!r} is no absolute, normal path of a file")
            if mnt_id is not None and not external:
                _known(mnt_id, self._points, "mount")
            self._files[reg] = RegFile(
                reg,
                _number(flags),
                None if position is None else _number(position, _U64),
                path,
                None if mnt_id is None else MntId(_number(mnt_id, _U31, -_U31 - 1)),
                None if size is None else _number(size, _U64),
                None if mode is None else _number(mode),
                external,
            )

    def _add_ghosts(self, rows: Rows) -> None:
        self._count("ghost-file", len(rows))
        for ident, mode, uid, gid, atime, mtime, size, extents, rdev, target in rows:
            ghost = GhostId(_number(ident))
            if ghost in self._ghosts:
                raise Nonsense(f"ghost {ghost} comes twice")
            kind = _number(mode, 0o177777) & 0o170000
            if kind not in GHOST_KINDS or (kind != stat.S_IFREG and (size or extents)):
                raise Nonsense(f"ghost {ghost} has mode {mode:#o}, size {size}")
            if (kind == stat.S_IFLNK) != (target is not None):
                raise Nonsense(f"ghost {ghost} of mode {mode:#o} is a link, or is none")
            if (kind in (stat.S_IFCHR, stat.S_IFBLK)) != (rdev is not None):
                raise Nonsense(f"ghost {ghost} of mode {mode:#o} is a device, or is none")
            file = ghost_file_name(ghost)
            self._tally.size(file, _number(size, _U63))
            self._ghosts[ghost] = Ghost(
                ghost,
                file,
                mode,
                _number(uid),
                _number(gid),
                None if atime is None else _number(atime, _TIME, -_TIME),
                None if mtime is None else _number(mtime, _TIME, -_TIME),
                size,
                tuple(self._extents(file, 0, size, extents)),
                None if rdev is None else _number(rdev),
                None if target is None else _bytes(target, TARGET_MAX),
            )

    def _extents(self, file: str, covered: int, size: int, flat: Any) -> list[Extent]:
        if type(flat) is not list or len(flat) % 3 or len(flat) > 3 * BATCH:
            raise Nonsense(f"{file}: extents of another shape")
        if not flat:
            return []
        self._tally.count(file, None, "chunks", len(flat) // 3)
        extents = []
        for at in range(0, len(flat), 3):
            offset = _number(flat[at], size, covered)
            length = _number(flat[at + 1], size - offset, 1)
            position = _number(flat[at + 2], _U63 - length)
            covered = offset + length
            extents.append(Extent(offset, length, position))
        self._tally.content(file, 0, sum(extent.length for extent in extents))
        return extents

    def _add_extents(self, rows: Rows) -> None:
        for ident, flat in rows:
            ghost = self._ghosts[_known(ident, self._ghosts, "ghost")]
            so_far = self._further.setdefault(ghost.id, list(ghost.extents))
            covered = so_far[-1].offset + so_far[-1].length if so_far else 0
            so_far += self._extents(ghost.file, covered, ghost.size, flat)

    def _add_remaps(self, rows: Rows) -> None:
        self._complete_ghosts()
        self._count("remap-fpath", len(rows))
        for record, origin, kind, target in rows:
            file = self._files[_known(origin, self._files, "file")]
            if file.id in self._remaps or type(kind) is not str or kind not in _REMAP_KINDS:
                raise Nonsense(f"a remap of file id {file.id} that can not be")
            if kind == "ghost":
                _known(target, self._ghosts, "ghost")
            elif kind == "linked":
                _known(target, self._files, "file")
            if kind != "procfs":
                self._check_remapped(file)
            self._remaps[file.id] = Remap(
                _number(record), file.id, _REMAP_KINDS[kind], _number(target)
            )

    def _complete_ghosts(self) -> None:
        for ident, extents in self._further.items():
            self._ghosts[ident] = self._ghosts[ident]._replace(extents=tuple(extents))
        self._further.clear()

    def _check_remapped(self, file: RegFile) -> None:
        if file.external or file.flags > _U31 or (file.position or 0) > _U63:
            raise Nonsense(f"file id {file.id} can not be opened again")
        if file.mnt_id is None:
            if self._points:
                raise Nonsense(f"file id {file.id} was removed from no mount")
            return
        if not is_on_mount(file.name, self._points[file.mnt_id]):
            raise Nonsense(f"file id {file.id} is not below its mount")

    def _add_descriptors(self, rows: Rows) -> None:
        self._count("fdinfo", len(rows))
        for table, number, reg, close_on_exec, fifo in rows:
            found = self._tables.setdefault(_number(table), {})
            if _number(number, _U31) in found:
                raise Nonsense(f"descriptor {number} comes twice")
            _known(reg, self._files, "file")
            found[number] = Descriptor(number, RegId(reg), _bool(close_on_exec), _bool(fifo))

    def _add_tasks(self, rows: Rows) -> None:
        self._count("pstree", len(rows))
        for ident, above, namespace, table in rows:
            pid, parent = Pid(_number(ident, least=1)), Pid(_number(above))
            if pid in self._tasks or bool(parent) != bool(self._tasks):
                raise Nonsense(f"task {pid} comes twice, or is the first one of two")
            if self._mounts:
                _known(namespace, self._mounts, "namespace")
            elif _number(namespace) != HOST_NS:
                raise Nonsense(f"task {pid} is in a namespace without mounts")
            self._tasks[pid] = parent, NsId(namespace), _number(table)

    def _add_holders(self, rows: Rows) -> None:
        self._count("fdinfo", len(rows))
        for ident, key, reg in rows:
            pid = Pid(_known(ident, self._tasks, "task"))
            if type(key) is not str or not _KEY.fullmatch(key):
                raise Nonsense(f"task {pid} holds a file in no known way")
            _known(reg, self._remaps, "remapped file")
            self._holders.setdefault(pid, []).append(Holder(pid, key, RegId(reg)))

    def _add_fifos(self, rows: Rows) -> None:
        for reg, pending in rows:
            self._fifos[RegId(_known(reg, self._files, "file"))] = _number(pending)

    def _add_sockets(self, rows: Rows) -> None:
        self._count("fifo-data", len(rows))
        for name in rows:
            if type(name) is not str:
                raise Nonsense("the name of a socket that is no text")
            self._sockets.append(name.encode("latin-1"))

    def _add_end(self, rows: Rows) -> None:
        if rows:
            raise Nonsense("something after the end")
        self._complete_ghosts()


__all__ = [
    "ASK",
    "BATCH",
    "KINDS",
    "LENGTH",
    "MAX_FRAME",
    "Nonsense",
    "Rebuild",
    "Telling",
    "rows_of",
]

"""Images out of the rows that the reader process tells, none of which is believed.

The reader may be in the hands of whoever wrote the images: every value that comes back is held
against its type, its range and what else was said, and whatever is off is one ImageError. A column
of a frame is checked as a whole, and value by value only where that fails, to say which one is off.
"""

from __future__ import annotations

import re
import stat
from array import array
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from operator import lt
from typing import Any, Final, Literal, TypeVar

from ghostpool._columns import Columns, numbers
from ghostpool._errors import ImageError
from ghostpool._imagerows import BATCH, KINDS, Rows
from ghostpool._limits import NAME_LIMIT, TEXT_LIMIT, YEAR_US, Limits, Tally
from ghostpool._model import (
    GHOST_KINDS,
    HOST_NS,
    TARGET_MAX,
    Descriptor,
    Extent,
    FifoData,
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
    ShmFile,
    Socket,
    Task,
    maker,
)
from ghostpool._paths import ghost_file_name, is_image_path, is_on_mount

_T = TypeVar("_T", bound=tuple[Any, ...])
_REMAP_KINDS: Final[dict[str, Literal["ghost", "linked", "procfs"]]] = {
    "ghost": "ghost",
    "linked": "linked",
    "procfs": "procfs",
}
_make_extent: Final = maker(Extent)
_make_remap: Final = maker(Remap)
_make_descriptor: Final = maker(Descriptor)
_Table = tuple["array[int]", "array[int]", list[bool], list[bool]]
_KEY: Final = re.compile(r"exe|cwd|root|map:[0-9a-f]{1,16}-[0-9a-f]{1,16}", re.ASCII)
_HIDDEN: Final = re.compile(rb"link_remap\.[0-9]{1,10}")
_IFMT: Final = 0o170000
_IFREG: Final = stat.S_IFREG
_U31: Final = (1 << 31) - 1
_U32: Final = (1 << 32) - 1
_U63: Final = (1 << 63) - 1
_U64: Final = (1 << 64) - 1
_TIME: Final = 1_000_000 << 63


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


def _columns(rows: Rows, number: int) -> list[tuple[Any, ...]]:
    """Rows the other way round: checking a column takes a third of the time of its values."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * number
    if len(columns) != number:
        raise Nonsense(f"rows of {len(columns)} values, not of {number}")
    return columns


def _numbers(column: Sequence[Any], most: int = _U32, least: int = 0) -> None:
    if column and ({*map(type, column)} != {int} or min(column) < least or max(column) > most):
        for value in column:
            _number(value, most, least)


def _some(column: tuple[Any, ...]) -> Sequence[Any]:
    """Those that are not null."""
    return [value for value in column if value is not None] if None in column else column


def _bools(column: tuple[Any, ...]) -> None:
    if not {*map(type, column)} <= {bool}:
        for value in column:
            _bool(value)


def _all_known(keys: Iterable[Any], known: Any, what: str) -> None:
    for key in keys:
        if type(key) is not int or key not in known:
            _known(key, known, what)


def _check_kind(ident: int, mode: int, size: int, flat: Any, rdev: Any, target: Any) -> None:
    """What a ghost of this mode has and has not."""
    kind = mode & _IFMT
    if kind not in GHOST_KINDS or (kind != _IFREG and (size or flat)):
        raise Nonsense(f"ghost {ident} has mode {mode:#o}, size {size}")
    if (kind == stat.S_IFLNK) != (target is not None):
        raise Nonsense(f"ghost {ident} of mode {mode:#o} is a link, or is none")
    if (kind in (stat.S_IFCHR, stat.S_IFBLK)) != (rdev is not None):
        raise Nonsense(f"ghost {ident} of mode {mode:#o} is a device, or is none")


def _shared(column: Sequence[Any], seen: dict[int, int]) -> Sequence[Any]:
    """The same with one object for each number: the parser makes a new one every time."""
    return [*map(seen.setdefault, column, column)]


def _by_number(table: _Table) -> Columns[Descriptor]:
    """The descriptors of a table in their order, no two of which have one number."""
    own = table[0]
    if not all(map(lt, own, islice(own, 1, None))):
        order = sorted(range(len(own)), key=own.__getitem__)
        for one, next_one in pairwise(order):
            if own[one] == own[next_one]:
                raise Nonsense(f"descriptor {own[one]} comes twice")
        _, regs, close_on_exec, fifo = table
        table = (
            array("I", [own[at] for at in order]),
            array("I", [regs[at] for at in order]),
            [close_on_exec[at] for at in order],
            [fifo[at] for at in order],
        )
    return Columns(_make_descriptor, table)


def _made(kind: type[_T], *columns: Iterable[Any]) -> Iterator[_T]:
    return map(maker(kind), zip(*columns, strict=True))


class Rebuild:
    """Images out of rows that nobody vouches for.

    `directory` names the images in messages. `add` takes frames in any number; after the last
    one `images` has the result. Both raise ImageError for whatever is not as it has to be.
    Without `all_mounts` a mount needs no parent; whatever refers to one still needs the mount.
    """

    def __init__(self, directory: str, limits: Limits, *, all_mounts: bool = True) -> None:
        self._directory = directory
        self._tally = Tally(limits)
        self._all_mounts = all_mounts
        self._at = -1
        self._root_namespace = HOST_NS
        self._own_user_namespace = False
        self._mounts: dict[NsId, list[ImageMount]] = {}
        self._points: dict[MntId, bytes] = {}
        self._homes: dict[MntId, NsId] = {}
        self._ids: dict[int, int] = {}
        """The one object of each number that names or counts something."""
        self._files: dict[RegId, RegFile] = {}
        self._remapped: set[int] = set()
        self._remap_records = numbers()
        self._remap_origins = numbers()
        self._remap_kinds: list[str] = []
        self._remap_targets = numbers()
        self._awaited: set[int] = set()
        """Ghosts that remaps lead to, and that have not been told of."""
        self._ghosts: dict[GhostId, Ghost] = {}
        self._further: dict[GhostId, list[Extent]] = {}
        self._tables: dict[int, _Table] = {}
        self._tasks: dict[Pid, tuple[Pid, NsId, int]] = {}
        self._holders: dict[Pid, dict[str, Holder]] = {}
        self._fifos: dict[RegId, FifoData] = {}
        self._sockets: dict[RegId, Socket] = {}
        self._devshm: dict[bytes, ShmFile] | None = None

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
        except (ValueError, TypeError, LookupError, RecursionError) as error:
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
        tables = {number: _by_number(table) for number, table in self._tables.items()}
        tasks = tuple(
            Task(
                pid,
                parent,
                namespace,
                tables.get(table, ()),
                tuple(self._holders.get(pid, {}).values()),
            )
            for pid, (parent, namespace, table) in self._tasks.items()
        )
        if tasks[0].namespace != self._root_namespace:
            raise Nonsense("the first task is not in the root namespace")
        return Images(
            directory=self._directory,
            tasks=tasks,
            files=self._files,
            remaps=Columns(
                _make_remap,
                (
                    self._remap_records,
                    self._remap_origins,
                    self._remap_kinds,
                    self._remap_targets,
                ),
            ),
            ghosts=self._ghosts,
            mounts={namespace: tuple(table) for namespace, table in self._mounts.items()},
            root_namespace=self._root_namespace,
            own_user_namespace=self._own_user_namespace,
            fifo_data=self._fifos,
            sockets=self._sockets,
            devshm=self._devshm,
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
                if self._all_mounts and self._homes.get(mount.parent) != mount.namespace:
                    raise Nonsense(f"mount {mount.id} comes before its parent")
            elif mount.mountpoint != b"/":
                raise Nonsense(f"the first mount of namespace {mount.namespace} is no root")
            table.append(mount)
            self._points[mount.id] = mount.mountpoint
            self._homes[mount.id] = mount.namespace

    def _add_files(self, rows: Rows) -> None:
        self._count("files", len(rows))
        ids, flags, positions, names, mnt_ids, sizes, modes, external = _columns(rows, 8)
        self._new(ids, self._files, "file id")
        _numbers(flags)
        _numbers(_some(positions), _U64)
        _numbers(_some(mnt_ids), _U31, -_U31 - 1)
        _numbers(_some(sizes), _U64)
        _numbers(_some(modes))
        _bools(external)
        paths = [_bytes(name, TEXT_LIMIT) for name in names]
        for path, mnt_id, is_external in zip(paths, mnt_ids, external, strict=True):
            if is_external:
                continue
            if not is_image_path(path):
                raise Nonsense(f"{path[:80]!r} is no absolute, normal path of a file")
            if mnt_id is not None and mnt_id not in self._points:
                _known(mnt_id, self._points, "mount")
        own = _shared(ids, self._ids)
        values = [_shared(column, {}) for column in (flags, positions)]
        more = [_shared(column, {}) for column in (mnt_ids, sizes, modes)]
        files = _made(RegFile, own, *values, paths, *more, external)
        self._files.update(zip(own, files, strict=True))

    @staticmethod
    def _new(ids: tuple[Any, ...], known: Mapping[Any, Any], what: str) -> None:
        """Numbers that are different, and none of which is there yet."""
        _numbers(ids)
        if len({*ids}) < len(ids) or not known.keys().isdisjoint(ids):
            seen = set(known)
            for ident in ids:
                if ident in seen:
                    raise Nonsense(f"{what} {ident} comes twice")
                seen.add(ident)

    def _add_remaps(self, rows: Rows) -> None:
        self._count("remap-fpath", len(rows))
        records, origins, kinds, targets = _columns(rows, 4)
        _numbers(records)
        _all_known(origins, self._files, "file")
        _numbers(targets)
        own = [_shared(column, self._ids) for column in (origins, targets)]
        for origin, target, kind in zip(*own, kinds, strict=True):
            if origin in self._remapped or type(kind) is not str or kind not in _REMAP_KINDS:
                raise Nonsense(f"a remap of file id {origin} that can not be")
            if kind == "ghost":
                self._awaited.add(target)
            elif kind == "linked":
                _known(target, self._files, "file")
            if kind != "procfs":
                self._check_remapped(self._files[origin])
            self._remapped.add(origin)
        self._remap_records.extend(records)
        self._remap_origins.extend(origins)
        self._remap_kinds += map(_REMAP_KINDS.__getitem__, kinds)
        self._remap_targets.extend(targets)

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
        tables, own, files, close_on_exec, fifo = _columns(rows, 5)
        _numbers(tables)
        _numbers(own, _U31)
        known: Container[int] = self._files
        if self._sockets:
            known = ChainMap[RegId, Any](self._sockets, self._files)
        _all_known(files, known, "file")
        _bools(close_on_exec)
        _bools(fifo)
        for table, number, file, closing, as_fifo in zip(
            tables, own, files, close_on_exec, fifo, strict=True
        ):
            found = self._tables.get(table)
            if found is None:
                found = self._tables[table] = numbers(), numbers(), [], []
            found[0].append(number)
            found[1].append(file)
            found[2].append(closing)
            found[3].append(as_fifo)

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
        for ident, key, reg, flags in rows:
            pid = Pid(_known(ident, self._tasks, "task"))
            if type(key) is not str or not _KEY.fullmatch(key):
                raise Nonsense(f"task {pid} holds a file in no known way")
            _known(reg, self._remapped, "remapped file")
            if key.startswith("map:") != (flags is not None):
                raise Nonsense(f"task {pid} holds {key} with flags, or without")
            _numbers(() if flags is None else (flags,), _U31)
            held = self._holders.setdefault(pid, {})
            if key in held:
                raise Nonsense(f"task {pid} holds {key} twice")
            held[key] = Holder(pid, key, RegId(reg), flags)

    def _add_ghosts(self, rows: Rows) -> None:
        self._count("ghost-file", len(rows))
        ids, modes, uids, gids, atimes, mtimes, sizes, flats, rdevs, targets = _columns(rows, 10)
        self._new(ids, self._ghosts, "ghost")
        _numbers(modes, 0o177777)
        _numbers(uids)
        _numbers(gids)
        _numbers(_some(atimes), _TIME, -_TIME)
        _numbers(_some(mtimes), _TIME, -_TIME)
        _numbers(sizes, _U63)
        _numbers(_some(rdevs))
        links = [None if target is None else _bytes(target, TARGET_MAX) for target in targets]
        extents = []
        alike: dict[Extent, tuple[Extent, ...]] = {}
        for ident, mode, size, flat, rdev, target in zip(
            ids, modes, sizes, flats, rdevs, targets, strict=True
        ):
            if mode & _IFMT != _IFREG or rdev is not None or target is not None:
                _check_kind(ident, mode, size, flat, rdev, target)
            file = ghost_file_name(ident)
            self._tally.size(file, size)
            found = self._extents(file, 0, size, flat)
            # Most have one, which is all of the file and at the same place of the image.
            extents.append(alike.setdefault(found[0], found) if len(found) == 1 else found)
        own = _shared(ids, self._ids)
        values = [_shared(column, {}) for column in (modes, uids, gids, atimes, mtimes, sizes)]
        ghosts = _made(Ghost, own, *values, extents, rdevs, links)
        self._ghosts.update(zip(own, ghosts, strict=True))
        self._awaited.difference_update(ids)

    def _extents(self, file: str, covered: int, size: int, flat: Any) -> tuple[Extent, ...]:
        if type(flat) is not list or len(flat) % 3 or len(flat) > 3 * BATCH:
            raise Nonsense(f"{file}: extents of another shape")
        if not flat:
            return ()
        self._tally.count(file, None, "chunks", len(flat) // 3)
        extents = []
        content = 0
        for offset, length, position in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            if not (
                type(offset) is type(length) is type(position) is int
                and covered <= offset < offset + length <= size
                and 0 <= position <= _U63 - length
            ):
                _number(offset, size, covered)
                _number(length, size - offset, 1)
                _number(position, _U63 - length)
            covered = offset + length
            content += length
            extents.append(_make_extent((offset, length, position)))
        self._tally.content(file, 0, content)
        return tuple(extents)

    def _add_extents(self, rows: Rows) -> None:
        for ident, flat in rows:
            ghost = self._ghosts[_known(ident, self._ghosts, "ghost")]
            so_far = self._further.setdefault(ghost.id, list(ghost.extents))
            covered = so_far[-1].offset + so_far[-1].length if so_far else 0
            so_far += self._extents(ghost.file, covered, ghost.size, flat)

    def _add_fifos(self, rows: Rows) -> None:
        self._count("fifo-data", len(rows))
        for reg, position, length, size in rows:
            self._fifos[RegId(_known(reg, self._files, "file"))] = FifoData(
                _number(position, _U63 - _U32),
                _number(length, _U32 if size is None else _number(size)),
                size,
            )

    def _add_sockets(self, rows: Rows) -> None:
        self._count("fifo-data", len(rows))
        for row in rows:
            ident, kind, state, flags, uflags, backlog, peer = row[:7]
            shutdown, name, directory, owner, options = row[7:]
            _numbers(row[:7])
            if ident in self._files or ident in self._sockets:
                raise Nonsense(f"socket {ident} comes twice, or is a file")
            if owner is not None:
                _numbers(owner)
                mode, uid, gid = owner
                owner = mode, uid, gid
            *sizes, send_us, receive_us, passcred, passsec = options
            _numbers(sizes)
            send, receive = sizes
            socket = Socket(
                *(RegId(ident), kind, state, flags, uflags, backlog, peer),
                _number(shutdown, 3),
                _bytes(name, NAME_LIMIT),
                _bytes(directory, TEXT_LIMIT),
                owner,
                (
                    *(send, receive, _number(send_us, YEAR_US), _number(receive_us, YEAR_US)),
                    *(_bool(passcred), _bool(passsec)),
                ),
            )
            if not socket.name:
                raise Nonsense(f"socket {ident} has no name")
            self._sockets[socket.id] = socket

    def _add_devshm(self, rows: Rows) -> None:
        self._count("ghost-file", len(rows))
        if self._devshm is None:
            self._devshm = {}
        for name, mode, uid, gid, mtime, size, position in rows:
            path = _bytes(name, TEXT_LIMIT)
            if not _HIDDEN.fullmatch(path) or _number(mode, 0o177777) & _IFMT != _IFREG:
                raise Nonsense("a file of /dev/shm that is no link remap")
            if path in self._devshm:
                raise Nonsense("a file of /dev/shm that comes twice")
            self._tally.size("devshm", _number(size, _U63))
            self._tally.content("devshm", 0, size)
            self._devshm[path] = ShmFile(
                path,
                mode,
                _number(uid),
                _number(gid),
                _number(mtime, _TIME, -_TIME),
                size,
                _number(position, _U63 - size),
            )

    def _add_end(self, rows: Rows) -> None:
        if rows:
            raise Nonsense("something after the end")
        for ident in self._awaited:
            _known(ident, self._ghosts, "ghost")
        for ident, extents in self._further.items():
            self._ghosts[ident] = self._ghosts[ident]._replace(extents=tuple(extents))


__all__ = ["Nonsense", "Rebuild"]

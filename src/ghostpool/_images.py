"""CRIU's images as frozen values, joined and checked against each other.

    pstree -> task -> ids -> fdinfo -> files -> remap-fpath -> ghost-file-X
                        \\-> mountpoints-N <- mnt_id of the file

`read_images` follows these arrows from the inventory on. An arrow that leads nowhere is an
ImageError that names file and record; where an image that was cut between two records would
go unnoticed that way, what was cut off is looked for from the other end (a ghost image that no
record needs, a task's images without the task). Nothing is written, nothing is awaited.
Source of the format: CRIU 4.2, images/*.proto and the code that reads them.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._filetable import FD_TYPE_FIFO, FD_TYPE_REG, FileTable, read_fifo_data, read_files
from ghostpool._imagefile import ImageDirectory, open_directory
from ghostpool._imagemounts import read_mounts
from ghostpool._imagesource import ImageSource
from ghostpool._limits import Limits
from ghostpool._machine import flags_of
from ghostpool._model import (
    HOST_NS,
    Descriptor,
    Ghost,
    GhostId,
    Holder,
    ImageMount,
    Images,
    MntId,
    NsId,
    Pid,
    RegId,
    Remap,
    Task,
    maker,
)
from ghostpool._remaps import check_remapped, read_ghosts, read_remaps

_make_descriptor: Final = maker(Descriptor)
_ALIVE: Final = 1
_STOPPED: Final = 3
_ZOMBIE: Final = frozenset((2, 6))

_VMA_FILE: Final = 0x40 | 0x80
_VMA_MEMFD: Final = 0x4000
_VMA_PLUGIN: Final = 1 << 27
_MAP_SHARED: Final = 1
_PROT_WRITE: Final = 2

_STRAY_TASK: Final = re.compile(r"(?:core|ids)-([1-9][0-9]*)\.img")


def read_images(
    directory: str | os.PathLike[str],
    *,
    directory_fd: int | None = None,
    limits: Limits | None = None,
) -> Images:
    """Read and check the image directory of one `criu dump`, in this process.

    `directory` names it in messages; with `directory_fd` that open directory is read instead
    (it stays open). Ghost content is located, not read.
    Raises ImageError for what is missing, malformed or contradictory, or beyond `limits`;
    UnsupportedError for images of CRIU versions or machines that ghostpool does not read;
    nothing else. The parser runs with all that the caller may do: this is for who trusts the
    images, and the commands read them in a process that may do nothing (docs/reading-images.md).
    """
    path = os.fspath(directory)
    with open_directory(path, directory_fd) as source:
        return read_source(path, source, limits)


def read_source(
    path: str,
    source: ImageSource,
    limits: Limits | None = None,
    told: Callable[[str, Iterable[Any]], None] | None = None,
    *,
    all_mounts: bool = True,
) -> Images:
    """The same for images that need not be in a directory; `path` names them in messages.

    Without `all_mounts` there are no more mounts than it takes to find those that files were opened
    on in a live namespace; the images of all are read and checked.

    `told` is called with what is known while the rest is being read, and takes all of it: "head"
    (the root namespace, and whether there is an own user namespace), then "mounts", "files",
    "remaps", "tasks" and "ghosts", which are read as it takes them.
    """
    directory = ImageDirectory(path, source, limits or Limits())
    return _read(directory, told or _told_nobody, all_mounts)


def _told_nobody(_: str, values: Iterable[Any]) -> None:
    deque(values, maxlen=0)


def _read(
    source: ImageDirectory, told: Callable[[str, Iterable[Any]], None], all_mounts: bool
) -> Images:
    inventory = _inventory(source)
    living = _living_tasks(source)
    root = living[0]
    own_mounts = root.ids.mnt_ns_id != inventory.mnt_ns_id
    for task in living:
        _check_namespace(task, root, own_mounts)
    ours = flags_of(root.machine, f"core-{root.pid}.img")
    files = read_files(source, ours)
    used = None if all_mounts else {reg.mnt_id for reg in files.regs.values()}
    mounts = _mounts(source, living, used) if own_mounts else {}
    _check_mount_ids(files, mounts)
    own_user_namespace = root.ids.user_ns_id != inventory.user_ns_id
    told("head", (root.ids.mnt_ns_id if own_mounts else HOST_NS, own_user_namespace))
    told("mounts", chain.from_iterable(mounts.values()))
    told("files", files.regs.values())
    told("sockets", files.sockets.values())
    remaps = read_remaps(source, files)
    check_remapped(remaps, files, mounts)
    told("remaps", remaps)
    tasks = _tasks(source, living, files, remaps, own_mounts, ours)
    told("tasks", tasks)
    ghosts: dict[GhostId, Ghost] = {}
    told("ghosts", read_ghosts(source, remaps, files, ghosts))
    return Images(
        directory=source.path,
        tasks=tasks,
        files=files.regs,
        remaps=remaps,
        ghosts=ghosts,
        mounts=mounts,
        root_namespace=tasks[0].namespace,
        own_user_namespace=own_user_namespace,
        fifo_data=read_fifo_data(source, files),
        sockets=files.sockets,
    )


def _inventory(source: ImageDirectory) -> Any:
    """Ids of the process that ran criu: what differs from them was dumped."""
    name = "inventory.img"
    inventory = source.inventory
    if not inventory.fdinfo_per_id:
        raise UnsupportedError(f"{name}: images of a CRIU older than 0.4 are not supported")
    if not inventory.ns_per_id:
        raise UnsupportedError(f"{name}: images of a CRIU older than 0.8 are not supported")
    if not inventory.HasField("root_ids"):
        raise ImageError(name, 0, "has no root_ids, so own namespaces can not be told from others")
    return inventory.root_ids


@dataclass(frozen=True, slots=True)
class _Living:
    pid: int
    parent: int
    ids: Any
    machine: int

    @property
    def ids_file(self) -> str:
        return f"ids-{self.pid}.img"


def _living_tasks(source: ImageDirectory) -> list[_Living]:
    """Tasks that are not zombies, parents first; the root is the first."""
    name = "pstree.img"
    parents: dict[int, int] = {}
    threads: set[int] = set()
    for number, entry in enumerate(source.records(name, "pstree")):
        pid, parent = entry.pid, entry.ppid
        if not pid:
            raise ImageError(name, number, "0 is no pid")
        if pid in parents:
            raise ImageError(name, number, f"repeats pid {pid}")
        if not parents:
            if parent:
                raise ImageError(name, number, f"the first task has a parent, {parent}")
        elif parent not in parents:
            raise ImageError(
                name, number, f"task {pid} has parent {parent}, which no record before it lists"
            )
        parents[pid] = parent
        source.tally.count(name, number, "threads", len(entry.threads))
        threads.update(entry.threads)
    if not parents:
        state = "holds no task" if name in source.names else "is missing"
        raise ImageError(name, None, state)
    for image in sorted(name for name in source.names if name.startswith(("core-", "ids-"))):
        stray = _STRAY_TASK.fullmatch(image)
        if stray and int(stray[1]) not in parents and int(stray[1]) not in threads:
            raise ImageError(
                name,
                None,
                f"{image} is there, but no record lists pid {stray[1]}: is {name} cut?",
            )
    source.expect([f"{kind}-{pid}.img" for pid in parents for kind in ("core", "ids")])
    living = [
        _Living(pid, parent, *found)
        for pid, parent in parents.items()
        if (found := _ids(source, pid)) is not None
    ]
    for thread in sorted(threads - parents.keys()):
        core = f"core-{thread}.img"
        if core in source.names:  # nothing in it matters here, but a cut directory should not pass
            source.one(core, "core")
    if not living or living[0].parent:
        raise ImageError(name, 0, "the first task is a zombie: there is nothing to restore")
    return living


def _ids(source: ImageDirectory, pid: int) -> tuple[Any, int] | None:
    """The ids of a living task and its kind of machine.

    None for a zombie: only its core image tells the two apart.
    """
    core = f"core-{pid}.img"
    entry = source.one(core, "core", absent=f"is missing, but pstree.img lists task {pid}")
    if not entry.HasField("tc"):
        raise ImageError(core, 0, f"is not that of a task, but pstree.img lists {pid} as one")
    state = entry.tc.task_state
    if state in _ZOMBIE:
        return None
    if state not in (_ALIVE, _STOPPED):
        raise ImageError(core, 0, f"task state {state} is unknown")
    absent = f"is missing, but {core} says that task {pid} is alive"
    return source.one(f"ids-{pid}.img", "ids", absent=absent), entry.mtype


def _check_namespace(task: _Living, root: _Living, own_mounts: bool) -> None:
    namespace = task.ids.mnt_ns_id
    if own_mounts and not namespace:
        raise ImageError(task.ids_file, 0, "has no mnt_ns_id, but the dump has mount namespaces")
    if not own_mounts and namespace != root.ids.mnt_ns_id:
        raise ImageError(
            task.ids_file,
            0,
            f"names mount namespace {namespace}, but the first task has none of its own",
        )


def _mounts(
    source: ImageDirectory, living: list[_Living], used: Container[MntId | None] | None
) -> dict[NsId, tuple[ImageMount, ...]]:
    mounts: dict[NsId, tuple[ImageMount, ...]] = {}
    homes: dict[MntId, NsId] = {}
    for task in living:
        namespace = NsId(task.ids.mnt_ns_id)
        if namespace not in mounts:
            mounts[namespace] = read_mounts(source, namespace, homes, used, task=task.pid)
    return mounts


def _tasks(
    source: ImageDirectory,
    living: list[_Living],
    files: FileTable,
    remaps: tuple[Remap, ...],
    own_mounts: bool,
    ours: Callable[[int], int] | None,
) -> tuple[Task, ...]:
    remapped = {remap.origin for remap in remaps}
    absent: list[str] = []
    tables: dict[int, tuple[Descriptor, ...]] = {}
    tasks = []
    source.expect([f"{kind}-{task.pid}.img" for task in living for kind in ("fs", "mm")])
    for task in living:
        files_id = task.ids.files_id
        if files_id not in tables:
            tables[files_id] = _descriptors(source, files_id, files, absent)
        held = _holders(source, Pid(task.pid), files, ours)
        holders = tuple(holder for holder in held if holder.reg_id in remapped)
        namespace = NsId(task.ids.mnt_ns_id) if own_mounts else HOST_NS
        tasks.append(Task(Pid(task.pid), Pid(task.parent), namespace, tables[files_id], holders))
    if absent:
        _check_held(remaps, tasks, absent[0])
    return tuple(tasks)


def _check_held(remaps: Iterable[Remap], tasks: Iterable[Task], absent: str) -> None:
    """Something that was read holds every ghost, if the image `absent` does not.

    A ghost may be held by something that is not read here (an inotify mark, a descriptor in
    flight), but beside a missing image it is far more likely that this image held it.
    """
    held = {row.reg_id for task in tasks for row in task.descriptors}
    held.update(holder.reg_id for task in tasks for holder in task.holders)
    unused = {r.origin: r.record for r in remaps if r.kind != "procfs" and r.origin not in held}
    if unused:
        origin = min(unused)
        raise ImageError(
            absent,
            None,
            f"is missing, and nothing else refers to file id {origin} of remap-fpath.img, "
            f"record {unused[origin]}",
        )


def _descriptors(
    source: ImageDirectory, files_id: int, files: FileTable, absent: list[str]
) -> tuple[Descriptor, ...]:
    name = f"fdinfo-{files_id}.img"
    if name not in source.names:
        absent.append(name)
    regs = files.regs
    rows: dict[int, Descriptor | None] = {}
    for number, entry in enumerate(source.records(name, "fdinfo")):
        fd = entry.fd
        if fd in rows:
            raise ImageError(name, number, f"repeats descriptor {fd}")
        if fd >> 31:
            raise ImageError(name, number, f"{fd} is no number of a descriptor")
        kind, ident = entry.type, entry.id
        if kind == FD_TYPE_REG and ident in regs:
            reg = ident
        elif (kind, ident) in files.others:
            reg = files.others[kind, ident]
            if reg is None:
                rows[fd] = None
                continue
        else:
            of = "" if kind == FD_TYPE_REG else f" of type {kind}"
            image = files.image(kind)
            raise ImageError(
                name, number, f"refers to file id {ident}{of}, which {image} does not hold"
            )
        close_on_exec = bool(entry.flags & 1)
        rows[fd] = _make_descriptor((fd, reg, close_on_exec, kind == FD_TYPE_FIFO))
    return tuple(row for fd in sorted(rows) if (row := rows[fd]) is not None)


def _holders(
    source: ImageDirectory, pid: Pid, files: FileTable, ours: Callable[[int], int] | None
) -> Iterable[Holder]:
    fs, mm = f"fs-{pid}.img", f"mm-{pid}.img"
    # A dump writes both for every living task; without one, a ghost that is mapped or a working
    # directory besides being open would lose that silently.
    entry = source.one(fs, "fs")
    directories = ((fs, "cwd", entry.cwd_id, None), (fs, "root", entry.root_id, None))
    entry = source.one(mm, "mm")
    if not entry.vmas and f"vmas-{pid}.img" in source.names:
        raise UnsupportedError(
            f"vmas-{pid}.img: mappings in an image of their own, as of a CRIU older than 1.2, "
            "are not supported"
        )
    # For any other status shmid is not an id of a file.
    mapped = (
        (mm, f"map:{vma.start:x}-{vma.end:x}", vma.shmid, _mapping_flags(vma, ours))
        for vma in entry.vmas
        if vma.status & _VMA_FILE and not vma.status & (_VMA_MEMFD | _VMA_PLUGIN)
    )
    keys: set[str] = set()
    program = ((mm, "exe", entry.exe_file_id, None),)
    for name, key, reg, flags in chain(directories, program, mapped):
        if reg not in files.regs:
            raise ImageError(
                name, 0, f"{key} refers to file id {reg}, which {files.image()} does not hold"
            )
        if key in keys:
            raise ImageError(name, 0, f"repeats {key}")
        if flags is not None and flags >> 31:
            raise ImageError(name, 0, f"{flags:#x} of {key} are no open flags")
        keys.add(key)
        yield Holder(pid, key, RegId(reg), flags)


def _mapping_flags(vma: Any, ours: Callable[[int], int] | None) -> int:
    """Of the open that a mapping is made from; not every CRIU says them."""
    if vma.HasField("fdflags"):
        flags: int = vma.fdflags
        return flags if ours is None else ours(flags)
    writes = vma.flags & _MAP_SHARED and vma.prot & _PROT_WRITE
    return os.O_RDWR if writes else os.O_RDONLY


def _check_mount_ids(files: FileTable, mounts: dict[NsId, tuple[ImageMount, ...]]) -> None:
    known: set[MntId | None] = {mount.id for table in mounts.values() for mount in table}
    known.add(None)
    for reg in files.regs.values():
        if reg.mnt_id not in known and not reg.external:
            raise ImageError(
                files.image(),
                files.records[reg.id],
                f"{reg.name!r} is on mount {reg.mnt_id}, which no mountpoints image holds",
            )


__all__ = ["read_images", "read_source"]

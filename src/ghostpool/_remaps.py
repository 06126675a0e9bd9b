"""remap-fpath.img: which open file is to be opened through which ghost, link or process.

A record joins a reg file to its target, so both ends are checked here. An end that is cut off
from the image is noticed from the other side: a ghost image, or a hidden name that the dump
made (link_remap.N), without a record that leads to it.
Source: CRIU 4.2, images/remap-file-path.proto, criu/files-reg.c (collect_one_remap).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._filetable import FileTable
from ghostpool._ghostfile import read_ghost
from ghostpool._imagefile import ImageDirectory
from ghostpool._model import Ghost, GhostId, ImageMount, NsId, RegId, Remap, maker
from ghostpool._paths import ghost_file_name, is_on_mount

_KINDS: Final[dict[int, Literal["linked", "ghost", "procfs"]]] = {
    0: "linked",
    1: "ghost",
    2: "procfs",
}
_make_remap: Final = maker(Remap)
_OLD_GHOST_BIT: Final = 1 << 31
_STRAY_GHOST: Final = re.compile(r"ghost-file-[0-9a-f]+\.img")


def read_remaps(source: ImageDirectory, files: FileTable) -> tuple[Remap, ...]:
    """The records of remap-fpath.img in file order, each of them leading somewhere."""
    name = "remap-fpath.img"
    remaps: dict[RegId, Remap] = {}
    regs = files.regs
    for number, entry in enumerate(source.records(name, "remap-fpath")):
        origin, target, code = entry.orig_id, entry.remap_id, entry.remap_type
        if not code and not entry.HasField("remap_type"):
            # CRIU wrote no type before 1.4, and none for links before 2.9
            code = 1 if target & _OLD_GHOST_BIT else 0
            target &= ~_OLD_GHOST_BIT
        kind = _KINDS.get(code)
        if kind is None:
            raise UnsupportedError(f"{name}, record {number}: remap type {code} is unknown")
        if origin not in regs:
            raise ImageError(
                name, number, f"refers to file id {origin}, which {files.image()} does not hold"
            )
        if origin in remaps:
            raise ImageError(name, number, f"repeats file id {origin}")
        if regs[origin].external:
            raise ImageError(name, number, f"file id {origin} is external, it can have no remap")
        if kind == "linked" and target not in regs:
            raise ImageError(
                name, number, f"leads to file id {target}, which {files.image()} does not hold"
            )
        remaps[origin] = _make_remap((number, origin, kind, target))
    return tuple(remaps.values())


def _check_complete(
    source: ImageDirectory, remaps: Sequence[Remap], files: FileTable, images: Iterable[str]
) -> None:
    """Every ghost image, and every hidden name that the dump made, has its record."""
    name = "remap-fpath.img"
    for image in sorted(source.names.difference(images)):
        if _STRAY_GHOST.fullmatch(image):
            raise ImageError(
                name, None, f"{image} is there, but no record refers to it: is {name} cut?"
            )
    linked = {remap.target for remap in remaps if remap.kind == "linked"}
    for reg in files.regs.values():
        if (
            reg.mnt_id is None
            and reg.mode is None
            and reg.id not in linked
            and reg.name.endswith(b"/link_remap.%d" % reg.id)
        ):
            raise ImageError(
                name,
                None,
                f"no record refers to {reg.name!r} (file id {reg.id}): is {name} cut?",
            )


def read_ghosts(
    source: ImageDirectory,
    remaps: Sequence[Remap],
    files: FileTable,
    ghosts: dict[GhostId, Ghost],
) -> Iterator[Ghost]:
    """The ghosts that the remaps lead to, held against what files.img says of them.

    Each goes into `ghosts` as well.
    """
    images = {GhostId(r.target): ghost_file_name(r.target) for r in remaps if r.kind == "ghost"}
    _check_complete(source, remaps, files, images.values())
    source.expect(list(images.values()))
    place = source.place
    for remap in remaps:
        if remap.kind != "ghost":
            continue
        ghost_id = GhostId(remap.target)
        ghost = ghosts.get(ghost_id)
        new = ghost is None
        if ghost is None:
            image = images[ghost_id]
            ghost = read_ghost(source, ghost_id, image, referrer=remap.record)
            if place is not None:
                ghost = _moved(ghost, place(image))
            ghosts[ghost_id] = ghost
        reg = files.regs[remap.origin]
        if reg.size is not None and reg.size != ghost.size and stat.S_ISREG(ghost.mode):
            problem = f"has {ghost.size} bytes", f"{reg.size}"
        elif reg.mode is not None and reg.mode != ghost.mode:
            problem = f"has mode {ghost.mode:#o}", f"{reg.mode:#o}"
        else:
            if new:
                yield ghost
            continue
        where = f"{files.image()}, record {files.records[reg.id]}"
        raise ImageError(ghost.file, 0, f"the ghost {problem[0]}, {where} says {problem[1]}")


def _moved(ghost: Ghost, by: int) -> Ghost:
    """The ghost with the positions of its content in an archive."""
    extents = [extent._replace(position=extent.position + by) for extent in ghost.extents]
    return ghost._replace(extents=tuple(extents))


def check_remapped(
    remaps: Sequence[Remap], files: FileTable, mounts: dict[NsId, tuple[ImageMount, ...]]
) -> None:
    """What a file has to have so that it can be opened under its old name again."""
    points = {mount.id: mount.mountpoint for table in mounts.values() for mount in table}
    for remap in remaps:
        if remap.kind == "procfs":
            continue
        reg = files.regs[remap.origin]
        problem = None
        if reg.position is not None and reg.position >> 63:
            problem = f"{reg.position} is no position in a file"
        elif reg.flags >> 31:
            problem = f"{reg.flags:#x} are no open flags"
        elif reg.mnt_id is None:
            if mounts and all(known.mnt_id is None for known in files.regs.values()):
                raise UnsupportedError(
                    f"{files.image()}: files without their mounts, as of a CRIU older than 1.3, "
                    "are not supported"
                )
            if mounts:
                problem = f"{reg.name!r} was removed, but the record does not say from which mount"
        elif not is_on_mount(reg.name, points[reg.mnt_id]):
            problem = f"{reg.name!r} is not below its mount {reg.mnt_id} at {points[reg.mnt_id]!r}"
        if problem is not None:
            raise ImageError(files.image(), files.records[reg.id], problem)


__all__ = ["check_remapped", "read_ghosts", "read_remaps"]

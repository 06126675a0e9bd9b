"""Link remaps: files that have a name still, only not the one that they were opened by; pure.

`criu dump` has linked such a file to a hidden name, link_remap.N, in the directory of the old name
or the deepest one above it that is there. So it is opened like a ghost that was made already, whose
temporary name is the hidden one; but it is nobody's to move, change or take away, and it has to be
there (docs/design.md, D-026).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from typing import Final, NamedTuple

from ghostpool._admission import check_ghost
from ghostpool._errors import PlanError, UnsupportedError
from ghostpool._match import Matcher
from ghostpool._model import (
    Extent,
    GhostId,
    Linked,
    MountHandle,
    RegFile,
    ShmFile,
    ShmGhost,
)
from ghostpool._paths import is_below, text
from ghostpool._planned import Opening, PlannedLink, PlannedMount, Policy
from ghostpool._pod import in_images
from ghostpool._protocol import Found

_IDS: Final = 1 << 32
"""Ids of ghosts are below it."""
_DEV_SHM: Final = b"/dev/shm"
_OPENED: Final = frozenset((stat.S_IFREG, stat.S_IFIFO, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK))
_DEVICES: Final = frozenset((stat.S_IFCHR, stat.S_IFBLK))

Place = tuple[MountHandle, bytes, bytes]
"""A mount, a directory relative to its root, and a name in it."""


class _Wanted(NamedTuple):
    opening: Opening
    directory: bytes
    """Of the hidden name, relative to the root of the mount."""
    name: bytes

    @property
    def place(self) -> Place:
        return self.opening.mount.handle, self.directory, self.name


class LinkRemaps:
    """The link remaps of one plan: which names are to be found, and what is made of them."""

    def __init__(
        self, matcher: Matcher, policy: Policy, devshm: Mapping[bytes, ShmFile] | None
    ) -> None:
        """`devshm`: what is in the archive of a container's /dev/shm, if there is one."""
        self._devshm = devshm
        self._made: dict[tuple[int, int], ShmGhost] = {}
        """By superblock and position in the archive: names of one file lead to one ghost."""
        self._matcher = matcher
        self._policy = policy
        self._wanted: list[_Wanted] = []

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def places(self) -> list[Place]:
        """The hidden names that are to be found."""
        return list(dict.fromkeys(wanted.place for wanted in self._wanted))

    @staticmethod
    def linked(file: RegFile, hidden: RegFile) -> Linked:
        """What `file` is opened as, by the name of `hidden`. PlanError: that is no hidden name."""
        directory, _, name = hidden.name.rpartition(b"/")
        # Whatever else an image names is a file that the dump has not linked; and nobody should
        # get it by an image that says so.
        if name != b"link_remap.%d" % in_images(hidden.id) or not is_below(
            file.name.rpartition(b"/")[0].lstrip(b"/"), directory.lstrip(b"/")
        ):
            raise PlanError(
                f"a link remap to {text(hidden.name)} (file id {hidden.id}), which is no name that "
                "criu dump gives a file"
            )
        # Images before CRIU 2.4 do not say; nearly all are regular, and the others are refused.
        mode = stat.S_IFREG if file.mode is None else file.mode
        return Linked(GhostId(_IDS + file.id), mode, hidden.name)

    def add(self, opening: Opening, linked: Linked) -> None:
        """It is to be opened so. MountNotFound, PlanError: its hidden name is on another mount."""
        if stat.S_IFMT(linked.mode) in _DEVICES and not self._policy.allow_devices:
            raise PlanError("a link remap to a device, refused without --allow-devices")
        site = self._matcher.site(opening.file._replace(name=linked.hidden))
        if site.mount != opening.mount.mount:
            raise PlanError(
                f"its link remap {text(linked.hidden)} is on the mount on "
                f"{text(site.mount.mountpoint)} now, and linking happens inside one mount"
            )
        self._wanted.append(_Wanted(opening, site.directory, site.name))

    def resolve(
        self, found: Mapping[Place, Found]
    ) -> list[tuple[Opening, PlannedLink | ShmGhost | PlanError]]:
        """Each open with what is there by now, or is made, or why it can not be opened so."""
        resolved: list[tuple[Opening, PlannedLink | ShmGhost | PlanError]] = []
        for wanted in self._wanted:
            try:
                resolved.append(self._resolve(wanted, found[wanted.place]))
            except PlanError as error:
                resolved.append((wanted.opening, error))
        return resolved

    def _resolve(self, wanted: _Wanted, found: Found) -> tuple[Opening, PlannedLink | ShmGhost]:
        opening, file = wanted.opening, wanted.opening.file
        linked = opening.ghost
        assert isinstance(linked, Linked)
        if found.errno == errno.ENOENT:
            made = self._anew(wanted)
            if made is not None:
                return opening._replace(ghost=made), made
            raise PlanError(self._missing(opening, linked))
        where = text(linked.hidden)
        if found.errno:
            raise PlanError(f"its link remap {where}: {os.strerror(found.errno)}")
        if stat.S_IFMT(found.mode) not in _OPENED:
            raise PlanError(f"its link remap {where} is no file of a kind that is linked")
        if file.mode is not None and file.mode != found.mode:
            raise PlanError(
                f"its link remap {where} has mode {found.mode:o} now, files.img says {file.mode:o}"
            )
        if file.mode is None and stat.S_IFMT(found.mode) != stat.S_IFREG:
            raise PlanError(
                f"its link remap {where} is no regular file, and images of CRIU before 2.4 do not "
                "say what it was"
            )
        if file.size is not None and stat.S_ISREG(found.mode) and file.size != found.size:
            raise PlanError(
                f"its link remap {where} has {found.size} bytes now, files.img says {file.size}: "
                "the file was changed since the dump"
            )
        linked = linked._replace(mode=found.mode)
        planned = PlannedLink(linked, opening.mount, wanted.directory, found)
        return opening._replace(ghost=linked), planned

    def _anew(self, wanted: _Wanted) -> ShmGhost | None:
        """What the archive of /dev/shm has of it, as a ghost. PlanError."""
        opening, file = wanted.opening, wanted.opening.file
        mount = opening.mount
        if self._devshm is None or mount.mount.mountpoint != _DEV_SHM or wanted.directory:
            return None
        archived = self._devshm.get(wanted.name)
        if archived is None:
            return None
        if mount.namespace.target.ids is not None:
            raise UnsupportedError(
                "its file is in the archive of /dev/shm, whose owners are not translated into a "
                "user namespace yet"
            )
        if file.mode is not None and file.mode != archived.mode:
            raise PlanError(
                f"files.img says mode {file.mode:o}, the archive of /dev/shm {archived.mode:o}"
            )
        if file.size is not None and file.size != archived.size:
            raise PlanError(
                f"files.img says {file.size} bytes, the archive of /dev/shm {archived.size}"
            )
        key = mount.mount.device, archived.position
        made = self._made.get(key)
        if made is None:
            times, size = (archived.mtime, archived.mtime), archived.size
            extents = (Extent(0, size, archived.position),) if size else ()
            ident = GhostId((_IDS << 1) + len(self._made))
            owner = archived.uid, archived.gid
            made = ShmGhost(ident, archived.mode, *owner, *times, size, extents)
            check_ghost(made, self._policy)
            self._made[key] = made
        return made

    def _missing(self, opening: Opening, linked: Linked) -> str:
        what, remedy = self._supply(opening.file, opening.mount)
        return (
            f"its link remap {text(linked.hidden)} is not there on {opening.mount.label}, {what}: "
            f"such a file comes from its own file system, not from the images; {remedy}"
        )

    def _supply(self, file: RegFile, mount: PlannedMount) -> tuple[str, str]:
        """What the mount of a missing file is, and what would bring the file back."""
        dumped = self._matcher.dumped(file)
        key = None if dumped is None else dumped.external_key
        what = "a tmpfs" if mount.mount.fstype == "tmpfs" else f"of type {mount.mount.fstype}"
        if key is not None:
            what += f", external in the images ({key})"
        if mount.mount.mountpoint == _DEV_SHM:
            if self._devshm is not None:
                return what, (
                    "nor in the archive of /dev/shm (devshm-checkpoint.tar): is it of the same "
                    "dump?"
                )
            return what, (
                "--devshm FILE supplies it, where the runtime has saved /dev/shm beside the images "
                "(devshm-checkpoint.tar); or restore where that file system is mounted"
            )
        if mount.namespace.target.enter is not None:
            return what, "restore where that file system is mounted"
        if key is not None or mount.mount.fstype != "tmpfs":
            return what, "--external has to name the file system as it was when it was dumped"
        return what, (
            "of a tmpfs a rebuilt namespace has what the images have, and they do not have this "
            "file: restore with -t or --ns where that file system is mounted"
        )


__all__ = ["LinkRemaps"]

"""Joining the mounts of the images with those that are there now.

By mount point and the order of the mounts on it, with root and file system as the tie-breaker;
never by number, since the ids in images are another kernel's. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ghostpool._errors import GhostpoolError, MountNotFound, Overmounted
from ghostpool._model import ImageMount, Images, MntId, NsId, RegFile, maker
from ghostpool._mountinfo import LiveMount
from ghostpool._mounttable import MountTable
from ghostpool._paths import join, text
from ghostpool._targets import Target


class Namespace(NamedTuple):
    """A target and its mount table, as the plan sees them."""

    id: NsId
    target: Target
    table: MountTable


class Site(NamedTuple):
    """Where an old name lives: a live mount and a path inside it."""

    namespace: Namespace
    mount: LiveMount
    directory: bytes
    """Relative to the root of the mount; b"" is the root itself."""
    name: bytes

    @property
    def path(self) -> bytes:
        """Directory of the name inside the file system, as components joined by "/"."""
        return join(self.mount.root.strip(b"/"), self.directory)


_make_site = maker(Site)


class Matcher:
    """Finds the live site of each reg file of the images."""

    def __init__(
        self, images: Images, namespaces: Mapping[NsId, Namespace], *, hidden: bool = False
    ) -> None:
        """`hidden`: mounts that others hide are found, too."""
        self._hidden = hidden
        self._images = images
        self._namespaces = namespaces
        used = {file.mnt_id for file in images.files.values()}
        self._mounts: dict[MntId, ImageMount] = {}
        """Those that files were opened on: a few, of however many."""
        self._stacks: dict[tuple[NsId, bytes], list[ImageMount]] = {}
        """All that are on the same mount points as those."""
        for number, mounts in images.mounts.items():
            here = {mount.id: mount for mount in mounts if mount.id in used}
            self._mounts |= here
            points = {mount.mountpoint for mount in here.values()}
            for mount in mounts:
                if mount.mountpoint in points:
                    self._stacks.setdefault((number, mount.mountpoint), []).append(mount)
        self._found: dict[MntId, tuple[Namespace, LiveMount, bytes] | GhostpoolError] = {}

    def site(self, file: RegFile) -> Site:
        """Where `file` is to be opened. MountNotFound, Overmounted."""
        if file.mnt_id is None:
            return self._site_by_path(file)
        found = self._found.get(file.mnt_id)
        if found is None:
            mount = self._mounts[file.mnt_id]
            namespace = self._namespaces[mount.namespace]
            try:
                found = namespace, self._match(mount, namespace), mount.mountpoint
            except GhostpoolError as error:
                found = error
            self._found[file.mnt_id] = found
        if isinstance(found, GhostpoolError):
            raise found
        return _site(*found, file.name)

    def dumped(self, file: RegFile) -> ImageMount | None:
        """The mount of the images that `file` was opened on, where they have one."""
        return None if file.mnt_id is None else self._mounts[file.mnt_id]

    def _site_by_path(self, file: RegFile) -> Site:
        namespace = self._namespaces[self._images.root_namespace]
        live = namespace.table.containing(file.name.rpartition(b"/")[0])
        if live is None:
            raise MountNotFound(f"{namespace.target.label}: no mount holds {text(file.name)}")
        return _site(namespace, live, live.mountpoint, file.name)

    def _match(self, mount: ImageMount, namespace: Namespace) -> LiveMount:
        stack = namespace.table.stack(mount.mountpoint)
        where = f"{text(mount.mountpoint)} in {namespace.target.label}"
        if not stack:
            raise MountNotFound(
                f"nothing is mounted on {where}, where the images have mount {mount.id} "
                f"({mount.fstype or mount.source})"
            )
        wanted = self._stacks[mount.namespace, mount.mountpoint]
        if len(wanted) == len(stack):
            live = stack[wanted.index(mount)]
        else:
            live = self._only_candidate(mount, wanted, stack, where)
        if live is not stack[-1] and not self._hidden:
            raise Overmounted(
                f"mount {live.mnt_id} on {where} is hidden by mount {stack[-1].mnt_id} "
                f"({stack[-1].fstype}) on the same mount point "
                "(--overmounted private restores into it)"
            )
        return live

    def _only_candidate(
        self, mount: ImageMount, wanted: list[ImageMount], stack: list[LiveMount], where: str
    ) -> LiveMount:
        alike = [
            live
            for live in stack
            if live.root == mount.root and (not mount.fstype or live.fstype == mount.fstype)
        ]
        if len(alike) == 1:
            return alike[0]
        if len(stack) == 1 and mount is wanted[-1]:
            # What covered the mount, or lay under it, is gone: one remains and it is visible.
            return stack[0]
        raise MountNotFound(
            f"{len(stack)} mounts are stacked on {where} (all but the top one hidden) and "
            f"{len(wanted)} in the images: which one is mount {mount.id} of the images can not "
            "be told"
        )


def _site(namespace: Namespace, live: LiveMount, mountpoint: bytes, name: bytes) -> Site:
    above = mountpoint.rstrip(b"/") + b"/"
    if not name.startswith(above) or name == above:
        raise MountNotFound(
            f"{text(name)} is not below {text(mountpoint)}, the mount point of its mount"
        )
    directory, _, last = name[len(above) :].rpartition(b"/")
    return _make_site((namespace, live, directory, last))

"""Which live mount namespaces a restore acts on, pinned before anything else is looked at.

A target is named by the operator (a pid, or a namespace file), never by the images. It is pinned
once, as a descriptor: a pid that is reused, or a file that is replaced, can not redirect the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ghostpool import _linux
from ghostpool._errors import NamespaceNotFound, UnsupportedError
from ghostpool._identity import has_ended
from ghostpool._linux import close_all
from ghostpool._model import HOST_NS, Images, NsId
from ghostpool._userns import IdMaps


@dataclass(frozen=True, slots=True)
class Target:
    """One live mount namespace."""

    index: int
    """Number under which workers know it."""
    fd: int
    """Of the namespace, as long as the run goes on; not to be closed."""
    identity: tuple[int, int]
    """Device and inode of the namespace file."""
    label: str
    """For messages: the namespace and how the operator named it."""
    is_host: bool
    """The mount namespace of pid 1 or our own: never remounted."""
    enter: str | None
    """Pid or path that names it for mount -N and nsenter; None: it ends with this run."""
    user_namespace: int = -1
    """Descriptor of the user namespace that owns it; -1: our own does."""
    ids: IdMaps | None = None
    """The maps of that, as we see them; None: ids are the same there."""

    @property
    def fds(self) -> tuple[int, ...]:
        """Its descriptors, to be closed when the run is over."""
        return (self.fd, self.user_namespace) if self.user_namespace >= 0 else (self.fd,)


def parse_namespace_option(text: str) -> tuple[NsId, str]:
    """`ID=PID|PATH` of the option --ns. ValueError says what is wrong."""
    number, separator, where = text.partition("=")
    if not separator or not where or not number.isdecimal():
        raise ValueError(f"{text!r} is not of the form ID=PID or ID=PATH")
    return NsId(int(number)), where


def places(tree: int | None, namespaces: Mapping[NsId, str]) -> list[str]:
    """What -t and --ns name, as `pin` takes it."""
    return [*namespaces.values(), *(() if tree is None else (str(tree),))]


def resolve_namespaces(
    images: Images, tree: int | None, namespaces: Mapping[NsId, str]
) -> dict[NsId, str]:
    """Join -t and --ns: where each mount namespace of the images is to be found.

    -t names the root task's namespace. NamespaceNotFound for an id that the images do not have,
    or one that is named by nothing.
    """
    wanted = sorted({task.namespace for task in images.tasks} | set(images.mounts))
    for number in namespaces:
        if number not in wanted:
            known = ", ".join(map(str, wanted))
            raise NamespaceNotFound(
                f"--ns {number}=…: the images have no mount namespace {number}; theirs: {known}"
            )
    where = dict(namespaces)
    if tree is not None:
        where.setdefault(images.root_namespace, str(tree))
    missing = [number for number in wanted if number not in where]
    if missing and where:
        raise NamespaceNotFound(
            "no target for mount namespace "
            + ", ".join(map(str, missing))
            + " of the images: add "
            + " ".join(f"--ns {number}=PID" for number in missing)
        )
    if not where and images.root_namespace == HOST_NS:
        raise NamespaceNotFound(
            f"{images.directory}: dumped without a mount namespace of its own, so there is no "
            "mount tree to rebuild: name a target with -t PID"
        )
    return where


def _open_namespace(where: str) -> tuple[int, str]:
    """Descriptor of the mount namespace of a pid, or at a path; and how mount -N names it."""
    if not where.isdecimal():
        try:
            fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NamespaceNotFound(f"{where}: {error.strerror}") from error
        return fd, os.path.abspath(where)
    pid = int(where)
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise NamespaceNotFound(f"no process has pid {where}") from error
    try:
        try:
            fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NamespaceNotFound(f"mount namespace of pid {pid}: {error.strerror}") from error
        # The descriptor is the pid's own only if the process was still there after the open.
        if has_ended(pidfd):
            os.close(fd)
            raise NamespaceNotFound(f"process {pid} has ended")
        return fd, str(pid)
    finally:
        os.close(pidfd)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def pin(places: Iterable[str]) -> dict[str, Target]:
    """Open every target, by its pid or path; places that lead to one namespace share its Target.

    NamespaceNotFound: a pid that is not alive, a path that is no mount namespace.
    UnsupportedError: a mount namespace that a user namespace above, or beside, our own owns.
    """
    opened: list[tuple[int, str, str]] = []
    owners: list[int] = []
    try:
        for where in dict.fromkeys(places):
            fd, enter = _open_namespace(where)
            opened.append((fd, where, enter))
            owners.append(_owner(fd, where))
        return _share(opened, owners)
    except BaseException:
        close_all(fd for fd, _, _ in opened)
        close_all(owner for owner in owners if owner >= 0)
        raise


def distinct(targets: Iterable[Target]) -> list[Target]:
    """Each of them once, by its number."""
    return sorted({target.index: target for target in targets}.values(), key=lambda one: one.index)


def _owner(fd: int, where: str) -> int:
    """Descriptor of the user namespace that owns this mount namespace; -1: our own does."""
    try:
        kind = _linux.namespace_type(fd)
    except OSError:
        kind = 0
    if kind != _linux.CLONE_NEWNS:
        raise NamespaceNotFound(f"{where} is not a mount namespace")
    try:
        owner = _linux.owning_user_namespace(fd)
    except OSError as error:
        raise UnsupportedError(
            f"the mount namespace of {where} belongs to a user namespace that is not below this "
            "process's own: run the restore in one that is above it"
        ) from error
    if _status_identity(owner) == _identity("/proc/self/ns/user"):
        os.close(owner)
        return -1
    return owner


def _status_identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _share(opened: Iterable[tuple[int, str, str]], owners: Iterable[int]) -> dict[str, Target]:
    # In some sandboxes pid 1's namespace can not be read; then our own is the host's.
    hosts = {_identity("/proc/1/ns/mnt"), _identity("/proc/self/ns/mnt")}
    by_identity: dict[tuple[int, int], Target] = {}
    targets: dict[str, Target] = {}
    for (fd, where, enter), owner in zip(opened, owners, strict=True):
        identity = _status_identity(fd)
        if identity in by_identity:
            close_all((fd,) if owner < 0 else (fd, owner))
        else:
            how = f"pid {where}" if where.isdecimal() else where
            by_identity[identity] = Target(
                index=len(by_identity),
                fd=fd,
                identity=identity,
                label=f"mnt:[{identity[1]}] ({how})",
                is_host=identity in hosts,
                enter=enter,
                user_namespace=owner,
            )
        targets[where] = by_identity[identity]
    return targets


def adopt(namespaces: Mapping[NsId, int]) -> dict[NsId, Target]:
    """Targets of namespaces that were built for this run; takes over their descriptors."""
    targets: dict[NsId, Target] = {}
    for index, (number, fd) in enumerate(namespaces.items()):
        identity = _status_identity(fd)
        label = f"mnt:[{identity[1]}] (rebuilt from mountpoints-{number}.img)"
        targets[number] = Target(index, fd, identity, label, is_host=False, enter=None)
    return targets

"""Which mount namespaces are still there, whoever or whatever keeps them.

The kernel lists them all from Linux 6.12 on, those without a process too; before, and where it
does not let us look, processes and the namespace files that are bound somewhere lead to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from ghostpool import _linux
from ghostpool._identity import is_initial
from ghostpool._journal import JournalNamespace
from ghostpool._linux import close_all
from ghostpool._mounttable import MountTable

_OWN = "/proc/self/ns/mnt"
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def find_namespaces(wanted: Iterable[JournalNamespace]) -> tuple[dict[int, int], bool]:
    """Descriptors, by number, of those of `wanted` that were found; the caller closes them.

    And whether one that was not found does not exist any more: only if the kernel listed them all.
    """
    missing = {namespace.inode: namespace for namespace in wanted}
    found: dict[int, int] = {}
    listing = _Listing()
    try:
        for walk in (listing.walk, _reachable):
            for fd in walk():
                namespace = missing.get(os.fstat(fd).st_ino)
                if namespace is None or not _is(fd, namespace):
                    os.close(fd)
                    continue
                found[namespace.number] = fd
                del missing[namespace.inode]
                if not missing:
                    return found, True
    except BaseException:
        close_all(found.values())
        raise
    return found, listing.whole and is_initial()


def _is(fd: int, namespace: JournalNamespace) -> bool:
    """The inode is used again after the namespace is gone, its unique id is not."""
    unique_id = _linux.mount_namespace_id(fd)
    return not namespace.unique_id or not unique_id or unique_id == namespace.unique_id


class _Listing:
    """The kernel's list of mount namespaces."""

    def __init__(self) -> None:
        self.whole = False
        """It was read to the end, both ways."""

    def walk(self) -> Iterator[int]:
        """Our own namespace, and the others in the order of their unique ids, both ways."""
        for back in (False, True):
            at = os.open(_OWN, _FLAGS)
            try:
                if not back:
                    yield os.dup(at)
                while True:
                    try:
                        following = _linux.next_mount_namespace(at, back=back)
                    except OSError:
                        return  # an older kernel, or not ours to list
                    if following is None:
                        break
                    os.close(at)
                    at = following
                    yield os.dup(at)
            finally:
                os.close(at)
        self.whole = True


def _reachable() -> Iterator[int]:
    """Those of all processes, and those that a file of our own namespace stands for."""
    paths = [b"/proc/%s/ns/mnt" % name for name in os.listdir(b"/proc") if name.isdigit()]
    with open("/proc/self/mountinfo", "rb") as file:
        paths += [m.mountpoint for m in MountTable(file.read()) if m.root.startswith(b"mnt:[")]
    for path in paths:
        try:
            yield os.open(path, _FLAGS)
        except OSError:
            continue  # it has ended, or is not ours to look at

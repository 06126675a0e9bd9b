"""The mount table of a live namespace: mountinfo, read and split in one piece.

proc_pid_mountinfo(5). The table is indexed by mount point and a line is parsed only when it is
asked for: a plan needs a handful of the mounts, and one system call per mount (statmount) costs
more than reading all of them this way (docs/design.md, D-004).
Pure but for `MountTable.of_process`: bytes in, values out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ghostpool._errors import NamespaceNotFound
from ghostpool._mountinfo import LiveMount, parse_line, unescape


class MountTable:
    """The mounts of one namespace, found by mount point; as of the time when it was read.

    `raw` is the content of /proc/PID/mountinfo, proc_pid_mountinfo(5), of a process whose root is
    the root of the namespace: the kernel leaves out what lies outside the root of that process.
    Iterating gives every mount, those of one mount point together, len() their number. Lines are
    parsed when they are asked for: ValueError for one that is no line of mountinfo.
    """

    def __init__(self, raw: bytes) -> None:
        self._lines: dict[bytes, list[bytes]] = {}
        for line in raw.split(b"\n"):
            if line:
                self._lines.setdefault(line.split(b" ", 5)[4], []).append(line)
        # Escapes are rare: rewrite only the keys that hold one.
        for key in [key for key in self._lines if b"\\" in key]:
            self._lines.setdefault(unescape(key), []).extend(self._lines.pop(key))

    @classmethod
    def of_process(cls, pid: int) -> MountTable:
        """The mounts that process `pid` has now, below its root.

        procfs answers at once, so this may be called in an event loop. Needs what ptrace(2) calls
        PTRACE_MODE_READ over the process. NamespaceNotFound: there is no such process, it has
        ended, or its table may not be read.
        """
        try:
            fd = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NamespaceNotFound(f"no process has pid {pid}") from error
        except OSError as error:
            # EINVAL: one that has ended, and that its parent has not waited for, has no mounts.
            raise NamespaceNotFound(f"mount table of pid {pid}: {error.strerror}") from error
        with open(fd, "rb") as file:
            return cls(file.read())

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[LiveMount]:
        for lines in self._lines.values():
            yield from map(parse_line, lines)

    def with_id(self, mnt_id: int) -> LiveMount | None:
        """The mount with this number, or None; no other line is parsed."""
        start = b"%d " % mnt_id
        lines = (line for lines in self._lines.values() for line in lines)
        return next((parse_line(line) for line in lines if line.startswith(start)), None)

    def stack(self, mountpoint: bytes) -> list[LiveMount]:
        """The mounts on `mountpoint`, bottom first; none if it is no mount point.

        The order is that of the parents (each covers the one it is mounted on), not that of
        the lines: moves and MOVE_MOUNT_BENEATH leave the lines in the order of creation.
        """
        mounts = [parse_line(line) for line in self._lines.get(mountpoint, ())]
        if len(mounts) < 2:
            return mounts
        by_parent: dict[int, list[LiveMount]] = {}
        ids = {mount.mnt_id for mount in mounts}
        for mount in mounts:
            by_parent.setdefault(mount.parent, []).append(mount)
        ordered: list[LiveMount] = []
        pending = [m for m in mounts if m.parent not in ids or m.parent == m.mnt_id]
        while pending:
            mount = pending.pop(0)
            ordered.append(mount)
            pending.extend(m for m in by_parent.get(mount.mnt_id, ()) if m is not mount)
        return ordered

    def containing(self, path: bytes) -> LiveMount | None:
        """The topmost mount with the longest mount point that is a prefix of `path`, or None.

        `path` is absolute and is not looked up: links in it, and mounts that hide others, are not
        seen.
        """
        while True:
            stack = self.stack(path or b"/")
            if stack:
                return stack[-1]
            if not path or path == b"/":
                return None
            path = path.rpartition(b"/")[0]


__all__ = ["MountTable"]

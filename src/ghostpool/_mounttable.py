"""The mount table of a live namespace: mountinfo, read in one piece.

proc_pid_mountinfo(5). A plan needs a handful of the mounts, so they are searched for in the bytes,
a millisecond each in a table of 100,000 mounts, and only their lines are parsed. Whoever asks for
many has the table split and indexed by mount point, which takes as long as eighty searches. One
system call per mount (statmount) costs more than reading all of them (docs/design.md, D-004).
Pure but for `MountTable.of_process`: bytes in, values out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ghostpool._errors import NamespaceNotFound
from ghostpool._mountinfo import LiveMount, escape, parse_line, unescape

_SEARCHES = 40
"""So many lines are looked at before the table is indexed."""


class MountTable:
    """The mounts of one namespace, found by mount point; as of the time when it was read.

    `raw` is the content of /proc/PID/mountinfo, proc_pid_mountinfo(5), of a process whose root is
    the root of the namespace: the kernel leaves out what lies outside the root of that process.
    Iterating gives every mount, those of one mount point together, len() their number. Lines are
    parsed when they are asked for: ValueError for one that is no line of mountinfo.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw if not raw or raw.endswith(b"\n") else raw + b"\n"
        self._searches = 0
        self._index: dict[bytes, list[bytes]] | None = None
        """Lines by mount point, once there were too many searches."""

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
        with open(fd, "rb", buffering=0) as file:
            return cls(file.readall())

    def __len__(self) -> int:
        return self._raw.count(b"\n")

    def __iter__(self) -> Iterator[LiveMount]:
        for lines in self._indexed().values():
            yield from map(parse_line, lines)

    def with_id(self, mnt_id: int) -> LiveMount | None:
        """The mount with this number, or None; no other line is parsed."""
        start = b"%d " % mnt_id
        if self._raw.startswith(start):
            return parse_line(self._line(0))
        at = self._raw.find(b"\n" + start)
        return None if at < 0 else parse_line(self._line(at + 1))

    def _line(self, at: int) -> bytes:
        """The line that this is a place in."""
        return self._raw[self._raw.rfind(b"\n", 0, at) + 1 : self._raw.index(b"\n", at)]

    def _lines(self, mountpoint: bytes) -> list[bytes]:
        """Those of the mounts on a mount point."""
        if self._index is None:
            word = b" %b " % escape(mountpoint)
            found: list[bytes] = []
            at = self._raw.find(word)
            while self._searches < _SEARCHES:
                self._searches += 1
                if at < 0:
                    return found
                line = self._line(at)
                # Elsewhere in the line the same word is a root, or a source.
                if _mountpoint(line) == mountpoint:
                    found.append(line)
                at = self._raw.find(word, self._raw.index(b"\n", at))
        return self._indexed().get(mountpoint, [])

    def _indexed(self) -> dict[bytes, list[bytes]]:
        if self._index is None:
            self._index = {}
            for line in self._raw.split(b"\n"):
                if line:
                    self._index.setdefault(_mountpoint(line), []).append(line)
        return self._index

    def stack(self, mountpoint: bytes) -> list[LiveMount]:
        """The mounts on `mountpoint`, bottom first; none if it is no mount point.

        The order is that of the parents (each covers the one it is mounted on), not that of
        the lines: moves and MOVE_MOUNT_BENEATH leave the lines in the order of creation.
        """
        mounts = [parse_line(line) for line in self._lines(mountpoint)]
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


def _mountpoint(line: bytes) -> bytes:
    fields = line.split(b" ", 5)
    if len(fields) < 6:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    return unescape(fields[4])


__all__ = ["MountTable"]

"""One mount namespace that a child of the test process holds, and looks at for the test."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ghostpool import _linux
from ghostpool._linux import Attr
from ghostpool._mountinfo import LiveMount, parse_line
from ghostpool.testing._forked import in_child, staying
from ghostpool.testing._snapshot import Snapshot, walk_all

T = TypeVar("T")
_OPTIONS = re.compile(rb"^(?:\S+ ){4}(\S+) (\S+) ")
"""Not the package's own parser: a test that used it could not see its mistakes."""


@dataclass(frozen=True)
class Namespace:
    """A mount namespace, held by a process until the end of the block that made it.

    `pid` and `path` both name it wherever ghostpool takes a namespace (`namespaces=`, `-t`,
    `--ns`). Nothing that is mounted in it is seen outside.
    """

    pid: int
    """The process that holds it: a child of the test process that does nothing."""
    fd: int
    """A descriptor of the namespace, the test process's own."""

    @property
    def path(self) -> str:
        """The namespace's file, /proc/PID/ns/mnt; setns(2), nsenter(1)."""
        return f"/proc/{self.pid}/ns/mnt"

    def run(self, function: Callable[[], T]) -> T:
        """`function`'s result, from a child of the test process that has entered the namespace.

        The result is made of plain values (numbers, text, bytes, None, lists, dicts, …); what else
        the function changes in its process is gone with it, what it mounts or writes stays in the
        namespace. It starts at the namespace's root. An OSError is raised again, with its errno;
        any other exception becomes an AssertionError with the child's traceback.
        """

        def child() -> T:
            enter(self.fd)
            return function()

        return in_child(child)

    def mount_tmpfs(
        self,
        mountpoint: str | os.PathLike[str],
        files: Mapping[str, bytes] | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """Mount a fresh tmpfs with these files (name below it to content) on `mountpoint`.

        `mountpoint` exists: it is not made, because in a copy of the machine's namespace it would
        be made on the machine's disk. `read_only`: the mount is, its superblock is not. OSError if
        the mount fails.
        """

        def child() -> None:
            point = os.fsencode(mountpoint)
            _linux.mount(b"tmpfs", point, b"tmpfs", 0)
            for name, data in (files or {}).items():
                path = Path(mountpoint, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            if read_only:
                fd = os.open(point, os.O_PATH | os.O_CLOEXEC)
                _linux.mount_setattr(fd, attr_set=int(Attr.RDONLY))

        self.run(child)

    def mountinfo(self) -> bytes:
        """The mount table as the kernel gives it: proc_pid_mountinfo(5)."""
        return Path(f"/proc/{self.pid}/mountinfo").read_bytes()

    def table(self) -> list[LiveMount]:
        """The mount table as ghostpool reads it, in the kernel's order."""
        return [parse_line(line) for line in self.mountinfo().splitlines()]

    def options(self) -> dict[bytes, list[str]]:
        """Per-mount options by mount point, as the kernel spells them; of the topmost mount."""
        return options_of(self.mountinfo())

    def is_writable(self, mountpoint: bytes) -> bool:
        """Whether the topmost mount at `mountpoint` is: KeyError if nothing is mounted there."""
        return "rw" in self.options()[mountpoint]

    def snapshot(self, below: bytes = b"/") -> Snapshot:
        """Everything that a restore could have touched: equal to an earlier one if it did not.

        The whole mount table, and every file of every tmpfs that is mounted at `below` or below
        it, hidden ones too. In a copy of the machine's namespace name the mount point that is the
        test's own: other processes change the rest.
        """
        table = self.mountinfo()
        proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        try:
            files = self.run(lambda: walk_all(proc, below))
        finally:
            os.close(proc)
        return Snapshot.made(table, files)


def enter(namespace: int) -> None:
    """Move the calling process (a child) into the mount namespace of the descriptor."""
    _linux.setns(namespace, _linux.CLONE_NEWNS)


def options_of(mountinfo: bytes) -> dict[bytes, list[str]]:
    """Per-mount options by mount point, out of the text of a mountinfo."""
    found = {}
    for line in mountinfo.splitlines():
        match = _OPTIONS.match(line)
        if match is None:
            raise ValueError(f"not a line of mountinfo: {line!r}")
        found[match[1]] = match[2].decode().split(",")
    return found


def leave_privately() -> None:
    """Move the calling process (a child) into a copy of its mount namespace, cut off from it."""
    _linux.unshare(_linux.CLONE_NEWNS)
    _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)


@contextmanager
def private_namespace(setup: Callable[[], object] | None = None) -> Iterator[Namespace]:
    """A copy of this process's mount namespace, with propagation cut, for the time of the block.

    `setup` is called once in the process that holds it, before the block begins; descriptors that
    it opens stay open there. It raises as in `Namespace.run`.
    Needs CAP_SYS_ADMIN. PermissionError without it.
    """

    def prepare() -> None:
        leave_privately()
        if setup is not None:
            setup()

    with staying(prepare) as pid, opened(pid) as namespace:
        yield namespace


@contextmanager
def held(fd: int) -> Iterator[Namespace]:
    """The namespace of the descriptor, with a process that holds it; for the time of the block."""
    with staying(lambda: enter(fd)) as pid:
        yield Namespace(pid, fd)


@contextmanager
def opened(pid: int) -> Iterator[Namespace]:
    """The namespace that process `pid` is in, with a descriptor for the time of the block."""
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Namespace(pid, fd)
    finally:
        os.close(fd)

"""Live targets for tests: processes in private mount namespaces, and what they looked like.

`live` builds namespaces and keeps one process in each, as a container would. `Snapshot` is all
that a run could have touched there: the mount table byte for byte, and every file of every
mount, hidden ones included. Two of them are equal only if nothing was touched in between.
The test's own namespace is never changed: everything happens in children.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._linux import Attr
from ghostpool._mountinfo import LiveMount, parse_line
from tests.support.namespaces import _fork, built, enter, in_child

REFUSAL_S = 5.0
"""Seconds in which a refusal must come."""
GRACE_S = 5.0
"""Seconds in which a process that has nobody to work for ends."""
RUN_S = 30.0
"""Seconds after which a run of the command hangs."""

ROOT = MountSpec(1, 0, b"/", superblock=1, source="rootfs", options="size=1m,mode=755")
_OPTIONS = re.compile(rb"^(?:\S+ ){4}(\S+) (\S+) ")


def tmpfs(number: int, mountpoint: bytes, **fields: Any) -> MountSpec:
    """A tmpfs of its own on the root, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {
        "parent": 1,
        "superblock": number,
        "source": f"t{number}",
        "options": "mode=755",
    }
    return MountSpec(id=number, mountpoint=mountpoint, **(defaults | fields))


def read_only(number: int, mountpoint: bytes, *names: str, **fields: Any) -> MountSpec:
    """A read-only tmpfs with directories (names that end in "/") and files of some content."""
    base = mountpoint.decode()
    nodes = tuple(
        Node(f"{base}/{name}".rstrip("/").encode(), stat.S_IFDIR | 0o755)
        if name.endswith("/")
        else Node(f"{base}/{name}".encode(), stat.S_IFREG | 0o644, data=b"of " + name.encode())
        for name in names
    )
    return tmpfs(number, mountpoint, **({"attributes": int(Attr.RDONLY), "nodes": nodes} | fields))


def host_programs(first: int) -> tuple[tuple[Node, ...], tuple[MountSpec, ...]]:
    """What makes commands of the machine run on a bare root: nodes for it, and mounts.

    The machine's directories are bound read-only; /proc is the kernel's.
    """
    nodes: list[Node] = []
    mounts = [tmpfs(first, b"/proc", fstype="proc", source="proc", options="")]
    for name in ("/bin", "/lib", "/lib64", "/sbin", "/usr"):
        if os.path.islink(name):
            target = os.readlink(name).encode()
            nodes.append(Node(name.encode(), stat.S_IFLNK | 0o777, target=target))
        elif os.path.isdir(name):
            number = first + len(mounts)
            external = {"external": name.encode(), "attributes": int(Attr.RDONLY)}
            mounts.append(tmpfs(number, name.encode(), **external))
    return tuple(nodes), tuple(mounts)


# -- Targets ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One file of a snapshot."""

    mode: int
    owner: tuple[int, int]
    inode: int
    links: int
    rdev: int
    size: int
    times: tuple[int, int]
    """Modification and change, in nanoseconds: a name made and removed again shows in these."""
    content: str


@dataclass(frozen=True)
class Snapshot:
    """Mount table and files of a namespace."""

    mountinfo: bytes
    files: dict[str, Entry]

    def names(self) -> set[tuple[str, int, str]]:
        """Path, inode and content of every file."""
        return {(path, entry.inode, entry.content) for path, entry in self.files.items()}

    def without_directory_times(self) -> Snapshot:
        """What must be equal after an undone restore: it did work in the directories."""
        return Snapshot(
            self.mountinfo,
            {
                path: entry._replace(times=(0, 0)) if stat.S_ISDIR(entry.mode) else entry
                for path, entry in self.files.items()
            },
        )


@dataclass(frozen=True)
class Live:
    """A process in a mount namespace."""

    pid: int
    fd: int
    """Descriptor of the namespace."""

    def inside(self, function: Callable[[], Any]) -> Any:
        """`function`'s result from a child in the namespace."""

        def child() -> Any:
            enter(self.fd)
            return function()

        return in_child(child)

    def mountinfo(self) -> bytes:
        return Path(f"/proc/{self.pid}/mountinfo").read_bytes()

    def table(self) -> list[LiveMount]:
        """The mount table, read as the package reads it."""
        return [parse_line(line) for line in self.mountinfo().splitlines()]

    def options(self) -> dict[bytes, list[str]]:
        """Per-mount options by mount point, as the kernel spells them."""
        return options_of(self.mountinfo())

    def is_writable(self, mountpoint: bytes) -> bool:
        return self.options()[mountpoint][0] == "rw"

    def snapshot(self) -> Snapshot:
        table = self.mountinfo()
        proc = os.open("/proc", os.O_PATH)
        try:
            files = self.inside(lambda: _walk_all(proc))
        finally:
            os.close(proc)
        return Snapshot(table, {path: Entry(*entry) for path, entry in files.items()})


def options_of(mountinfo: bytes) -> dict[bytes, list[str]]:
    """Per-mount options by mount point, out of the text of a mountinfo."""
    found = {}
    for line in mountinfo.splitlines():
        match = _OPTIONS.match(line)
        assert match is not None, line
        found[match[1]] = match[2].decode().split(",")
    return found


def _walk_all(proc: int) -> dict[str, tuple[Any, ...]]:
    """Every file of every mount, in a child: in a copy of the namespace, taken apart from the top.

    Unmounting from the last line to the first shows what other mounts hide.
    """
    _linux.unshare(_linux.CLONE_NEWNS)
    _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
    table = os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc)
    with open(table, "rb") as file:
        lines = file.read().splitlines()
    found: dict[str, tuple[Any, ...]] = {}
    for number, mount in reversed(list(enumerate(map(parse_line, lines)))):
        if mount.fstype == "tmpfs":
            _walk(found, f"{number}:{os.fsdecode(mount.mountpoint)}", mount.mountpoint)
        if mount.mountpoint != b"/":
            try:
                _linux.umount2(mount.mountpoint, _linux.MNT_DETACH)
            except OSError:
                pass  # locked, in the namespace of another user namespace: nothing is below it
    return found


def _walk(found: dict[str, tuple[Any, ...]], label: str, path: bytes) -> None:
    status = os.lstat(path)
    content = ""
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.fsdecode(os.readlink(path))
    found[label] = (
        status.st_mode,
        (status.st_uid, status.st_gid),
        status.st_ino,
        status.st_nlink,
        status.st_rdev,
        status.st_size,
        (status.st_mtime_ns, status.st_ctime_ns),
        content,
    )
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            below = os.path.join(path, name)
            if os.lstat(below).st_dev == status.st_dev:
                _walk(found, f"{label}/{os.fsdecode(name)}", below)


@contextmanager
def process(body: Callable[[Callable[[], None]], object]) -> Iterator[int]:
    """A child of the test that runs `body`, which calls its argument once it is ready.

    The pid, from then on; the child is killed and reaped at the end.
    """
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        try:
            _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(reader)
            body(lambda: os.close(writer) if os.write(writer, b".") else None)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert pipe.read() == b".", "the process was not ready"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def holder(namespace: int) -> Iterator[int]:
    """Pid of a process that stays in the mount namespace."""

    def body(ready: Callable[[], None]) -> None:
        enter(namespace)
        ready()
        while True:
            signal.pause()

    with process(body) as pid:
        yield pid


@contextmanager
def live(*namespaces: Sequence[MountSpec]) -> Iterator[list[Live]]:
    """One process in a namespace of its own for each list of mounts; the root may be left out."""
    specs = []
    for number, mounts in enumerate(namespaces):
        base = 1000 * number
        own = tuple(
            mount._replace(
                id=base + mount.id,
                parent=base + mount.parent if mount.parent else 0,
                superblock=base + mount.superblock,
            )
            for mount in (mounts if mounts[0].parent == 0 else (ROOT, *mounts))
        )
        specs.append(NamespaceSpec(10 + number, own))
    with built(specs) as fds, ExitStack() as stack:
        yield [Live(stack.enter_context(holder(fd)), fd) for fd in fds]


# -- Runs of the command ------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished run of the command."""

    status: int
    out: str
    err: str
    elapsed_s: float


def command(*arguments: str | Path | int) -> list[str]:
    """The command line of ghostpool as this interpreter has it installed."""
    return [sys.executable, "-m", "ghostpool", *map(str, arguments)]


def run(*arguments: str | Path | int, **options: Any) -> Run:
    """Run ghostpool to its end."""
    return run_argv(command(*arguments), **options)


def run_argv(argv: Sequence[str], **options: Any) -> Run:
    """Run a command line to its end, with its output."""
    begun = time.monotonic()
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
        **options,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)


@contextmanager
def running(*arguments: str | Path | int, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A run of ghostpool that goes on during the block, and is ended with it."""
    process = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in descendants(process.pid):
                    child.kill()
                process.kill()


def read_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """The first lines that a running process prints; what comes later is left to communicate."""
    assert process.stdout is not None
    fd = process.stdout.fileno()
    text = b""
    while text.count(b"\n") < count:
        ready, _, _ = select.select([fd], [], [], RUN_S)
        piece = os.read(fd, 1) if ready else b""
        assert piece, f"it printed no more than {text!r}: {process.communicate()}"
        text += piece
    return text.decode().splitlines()


def descendants(pid: int) -> list[psutil.Process]:
    """Processes below `pid` that are alive."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """They end within a moment, by themselves; pid 1 may take its time to bury an orphan."""
    deadline = time.monotonic() + GRACE_S
    while alive := [process for process in processes if _is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.005)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_refused(
    done: Run, before: Sequence[Snapshot], targets: Sequence[Live], *words: str
) -> None:
    """Exit status 2, one line that holds `words`, in time, and nothing was touched."""
    assert done.status == 2, done
    assert done.out == "", done
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("ghostpool: "), done.err
    for word in words:
        assert word in lines[0], f"{word!r} is missing in: {lines[0]}"
    assert done.elapsed_s < REFUSAL_S, done
    for snapshot, target in zip(before, targets, strict=True):
        assert target.snapshot() == snapshot


# The same run with what is chosen on Linux before 5.12: there is no option for it.
WITHOUT_MOUNT_SETATTR = """
import sys, anyio
from ghostpool import _deliver, _run
from ghostpool._launch import launch
from ghostpool._report import Report

request = _run.Request(
    images_dir=sys.argv[1], jobs=int(sys.argv[2]), tree=int(sys.argv[3]), mount_setattr=False
)

async def main():
    await _run.run_restore(request, launch(), Report(), _deliver.discard)

anyio.run(main, backend="trio")
"""


def argv_of(images: Path, target: Live, *, mount_setattr: bool, jobs: int = 4) -> list[str]:
    """A command line that restores and discards, with mount_setattr(2) or with mount(2)."""
    if mount_setattr:
        return command("restore", "-D", images, "-t", target.pid, "--jobs", jobs, "--discard")
    return [sys.executable, "-c", WITHOUT_MOUNT_SETATTR, str(images), str(jobs), str(target.pid)]

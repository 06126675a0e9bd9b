"""Live targets for tests: processes in private mount namespaces, and what they looked like.

`live` builds namespaces and keeps one process in each, as a container would; what they look like
and looked like is told by the package's own `Namespace` and `Snapshot`. Two snapshots are equal
only if nothing was touched in between.
The test's own namespace is never changed: everything happens in children.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._linux import Attr
from ghostpool.testing import Namespace, Snapshot, built_targets
from ghostpool.testing._forked import fork

REFUSAL_S = 5.0
"""Seconds in which a refusal must come."""
GRACE_S = 5.0
"""Seconds in which a process that has nobody to work for ends."""
RUN_S = 30.0
"""Seconds after which a run of the command hangs."""

ROOT = MountSpec(1, 0, b"/", superblock=1, source="rootfs", options="size=1m,mode=755")


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

Live = Namespace
"""A process in a mount namespace."""


@contextmanager
def process(body: Callable[[Callable[[], None]], object]) -> Iterator[int]:
    """A child of the test that runs `body`, which calls its argument once it is ready.

    The pid, from then on; the child is killed and reaped at the end.
    """
    reader, writer = os.pipe()
    pid = fork()
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
    with built_targets(*specs) as targets:
        yield list(targets.values())


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


def argv_of(
    images: Path,
    target: Live,
    *,
    mount_setattr: bool,
    jobs: int = 4,
    strategy: str = "remount",
) -> list[str]:
    """A command line that restores and discards, with mount_setattr(2) or with mount(2)."""
    if mount_setattr:
        where = ("-D", images, "-t", target.pid, "--strategy", strategy)
        return command("restore", *where, "--jobs", jobs, "--discard")
    return [sys.executable, "-c", WITHOUT_MOUNT_SETATTR, str(images), str(jobs), str(target.pid)]

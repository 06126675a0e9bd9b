"""The real command in a process of its own, its consumers, and what must be the same afterwards.

A `Probe` is a command that holds a task's descriptors and tells of them; a `Served` restore waits
until all tasks were fetched. `look` is everything of a mount namespace that a restore has to leave
as it was. Nothing here is the product's own word: mounts and files are read from the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ghostpool import _linux
from ghostpool._linux import Attr
from ghostpool.testing import Namespace, private_namespace
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import enter

LIMIT_S = 60
"""Seconds after which a command under test is taken for hung."""
COMMAND = (sys.executable, "-m", "ghostpool")
PROBE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("probe.py")))


# -- The command --------------------------------------------------------------------------------


def ghostpool(
    *arguments: object, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `prefix` is what starts it."""
    return subprocess.run(
        [*prefix, *COMMAND, *map(str, arguments)],
        **{"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": LIMIT_S, **options},
        text=True,
        check=False,
    )


def start(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """Start a command with pipes for stdin, stdout and stderr."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*map(str, command)], **{**pipes, **options}, text=True)


def end(process: subprocess.Popen[str]) -> str:
    """Wait for `process`, closing its input; what it said on stderr."""
    try:
        return process.communicate(timeout=LIMIT_S)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


def fetched_at_once(
    socket: object, tasks: Iterable[int], *words: object, prefix: Sequence[str] = ()
) -> dict[int, subprocess.CompletedProcess[str]]:
    """Run `ghostpool fetch` for all the tasks at the same time, as they wait for each other.

    `words`: further options, and "--" with the command; `prefix` is what starts it.
    """
    running = {}
    done = {}
    for task in tasks:
        fetch = ("fetch", "--socket", socket, "--task", task, *words)
        running[task] = start([*prefix, *COMMAND, *fetch], stdin=subprocess.DEVNULL)
    try:
        for task, process in running.items():
            out, err = process.communicate(timeout=LIMIT_S)
            done[task] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.communicate()
    return done


class Served:
    """A restore that serves its descriptors on `socket`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"nothing is served: {end(process)}"
        start_of_line, _, self.socket = line.rstrip("\n").partition(" on ")
        serving, count, tasks = start_of_line.split()
        assert (serving, tasks) == ("serving", "tasks")
        self.tasks = int(count)

    def namespaces(self) -> list[int]:
        """Descriptors of the mount namespaces that the server holds; to be closed by who asks."""
        held = Path(f"/proc/{self.process.pid}/fd")
        links = {os.readlink(path): path for path in held.iterdir()}
        return [
            os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            for link, path in sorted(links.items())
            if link.startswith("mnt:[")
        ]


@contextmanager
def serving(*arguments: object, prefix: Sequence[str] = ()) -> Iterator[Served]:
    """`ghostpool restore` in the foreground of its own; killed if it still runs at the end."""
    command = [*prefix, *COMMAND, "restore", "--timeout", LIMIT_S, *arguments]
    process = start(command, stdin=subprocess.DEVNULL)
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        end(process)


class Probe:
    """A consumer that lives, holding the descriptors of one task, until `close`."""

    def __init__(self, socket: str, task: int) -> None:
        fetch = ("fetch", "--socket", socket, "--task", task)
        self.process = start([*COMMAND, *fetch, "--", *PROBE])
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Waits until it has the descriptors."""
        if self._facts is None:
            self._facts = self._line()
        return self._facts

    @property
    def descriptors(self) -> dict[int, dict[str, Any]]:
        """By number."""
        return {int(fd): known for fd, known in self.facts["descriptors"].items()}

    def ask(self, *words: object) -> Any:
        """One question, see tests/support/probe.py; a table comes back by number."""
        assert self.facts
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        got = self._line()
        return {int(fd): value for fd, value in got.items()} if isinstance(got, dict) else got

    def _line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the probe said nothing: {end(self.process)}"
        return json.loads(line)

    def close(self) -> None:
        """Let it end and its descriptors with it."""
        assert not end(self.process)
        assert self.process.returncode == 0


@contextmanager
def fetched(socket: str, tasks: Iterable[int]) -> Iterator[dict[int, Probe]]:
    """A probe for each task, started at the same time, all alive for the time of the block."""
    probes: dict[int, Probe] = {}
    try:
        for task in tasks:
            probes[task] = Probe(socket, task)
        yield probes
        for probe in probes.values():
            probe.close()
    finally:
        for probe in probes.values():
            if probe.process.poll() is None:
                probe.process.kill()
                probe.process.communicate()


# -- Open file descriptions ---------------------------------------------------------------------

_KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine(), 272)


def same_open_file(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (pid, descriptor) are one open file description: kcmp(2), KCMP_FILE."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (one[0], other[0], 0, one[1], other[1])
    got = libc.syscall(_KCMP, *map(ctypes.c_ulong, arguments))
    if got < 0:
        raise OSError(ctypes.get_errno(), "kcmp")
    return bool(got == 0)


# -- Before and after ---------------------------------------------------------------------------


class Seen(NamedTuple):
    """A mount namespace as it is: its mount table and the files that one can reach in it."""

    mounts: bytes
    files: dict[str, tuple[Any, ...]]


def look(namespace: int, *roots: str) -> Seen:
    """The namespace at the descriptor; `roots`: where to look for files, everywhere if none."""

    def child() -> tuple[bytes, dict[str, tuple[Any, ...]]]:
        proc = os.open("/proc", os.O_PATH)
        enter(namespace)
        with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as file:
            mounts = file.read()
        return mounts, dict(_files(roots or ("/",), _kernels(mounts)))

    return Seen(*in_child(child))


def _kernels(mounts: bytes) -> set[str]:
    """Mount points of file systems whose files are the kernel's."""
    rows = [line.decode().split(" - ") for line in mounts.splitlines()]
    return {row[0].split()[4] for row in rows if row[1].split()[0] in ("proc", "sysfs", "devpts")}


def _files(roots: Iterable[str], leave_out: set[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for root in roots:
        for where, directories, names in os.walk(root, onerror=_raise):
            directories[:] = [d for d in directories if os.path.join(where, d) not in leave_out]
            yield where, _directory(os.lstat(where))
            for name in [*names, *(d for d in directories if _is_link(where, d))]:
                path = os.path.join(where, name)
                yield path, _file(path)


def _raise(error: OSError) -> None:
    raise error


def _is_link(where: str, name: str) -> bool:
    return os.path.islink(os.path.join(where, name))


def _directory(status: os.stat_result) -> tuple[Any, ...]:
    # The times of a directory may change: a name was in it for a moment.
    return (
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_dev,
        status.st_ino,
        status.st_nlink,
    )


def _file(path: str) -> tuple[Any, ...]:
    status = os.lstat(path)
    content = ""
    if stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (*_directory(status), status.st_size, status.st_rdev, *times, content)


# -- A live process to restore into -------------------------------------------------------------


Live = Namespace
"""A process in a private mount namespace."""
live = private_namespace


def mount_tmpfs(path: Path, flags: int = 0) -> None:
    """A fresh tmpfs on `path`, which is made if missing (in a private namespace only)."""
    path.mkdir(parents=True, exist_ok=True)
    _linux.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags)


def make_read_only(path: Path) -> None:
    """Set the read-only bit of the mount on `path`, and of no other mount."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _linux.mount_setattr(fd, attr_set=int(Attr.RDONLY))
    finally:
        os.close(fd)


_ENTER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ghostpool import _linux
fd = os.open(sys.argv[2], os.O_RDONLY | os.O_CLOEXEC)
here = os.getcwd()
_linux.setns(fd, _linux.CLONE_NEWNS)
os.chdir(here)
os.execv(sys.argv[3], sys.argv[3:])
"""


def entering(target: Live) -> list[str]:
    """What to put before a command line to run it in the mount namespace of `target`."""
    above = str(Path(_linux.__file__).parent.parent)
    return [sys.executable, "-I", "-c", _ENTER, above, f"/proc/{target.pid}/ns/mnt"]


def keeps_holes(directory: str) -> bool:
    """Whether the file system of `directory` has holes, and tells where."""
    path = Path(directory) / "holes"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.pwrite(fd, b"x", 1 << 20)
        os.fsync(fd)
        return os.fstat(fd).st_blocks < 1024 and os.lseek(fd, 0, os.SEEK_DATA) > 0
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENXIO):
            raise
        return False
    finally:
        os.close(fd)
        path.unlink()

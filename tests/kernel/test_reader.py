"""The process that reads the images: what it can not do, and what becomes of its answers."""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import trio

import ghostpool as package
from ghostpool import _confine, _linux, _reading
from ghostpool._errors import ImageError, PlanError, UnsupportedError
from ghostpool._images import read_images
from ghostpool._limits import Limits
from ghostpool._model import Images
from ghostpool._options import begin_reading
from ghostpool._reading import read_apart
from ghostpool._startreader import Reading, start_reading
from tests.support.corpus import CASES, CORPUS
from tests.support.imagewriter import ImageSet, head, small
from tests.support.restore import ghostpool

ABOVE = str(Path(package.__file__).parent.parent)
SIZE = Limits().size


def read(directory: Path, size: int = SIZE) -> Images:
    """The images as a command gets them."""
    return finish(start_reading(str(directory), size))


def finish(reading: Reading) -> Images:
    try:
        return trio.run(read_apart, reading)
    finally:
        os.close(reading.directory)


# What it finds.


@pytest.mark.parametrize("case", CASES)
def test_it_finds_what_a_reader_in_this_process_finds(case: str) -> None:
    images = CORPUS / case / "images"
    assert read(images) == read_images(images)


@pytest.mark.parametrize(("tree", "namespaces"), [(None, ()), (1, ()), (None, ((10, "1"),))])
def test_all_mounts_are_told_where_a_namespace_is_to_be_rebuilt(
    tree: int | None, namespaces: tuple[tuple[int, str], ...]
) -> None:
    directory = CORPUS / "06-nested-mntns" / "images"
    options = {"images_dir": str(directory), "max_size": SIZE}
    reading = begin_reading({**options, "tree": tree, "namespaces": namespaces})
    images = finish(reading)
    every = read_images(directory)
    assert images._replace(mounts=every.mounts) == every
    rebuilt = tree is None and not namespaces
    assert (images == every) == rebuilt
    assert reading.all_mounts == rebuilt


def test_errors_arrive_as_they_were(tmp_path: Path) -> None:
    small().write(tmp_path)
    (tmp_path / "pstree.img").write_bytes(head("pstree.img") + b"\x09\0\0\0")
    with pytest.raises(ImageError, match=r"pstree\.img, record 0: ") as caught:
        read(tmp_path)
    assert (caught.value.file, caught.value.record) == ("pstree.img", 0)
    assert caught.value.problem == "the record should have 9 bytes, the file has 0 more"


def test_images_that_are_not_supported(tmp_path: Path) -> None:
    made = small()
    images = made.images()
    images["inventory.img"] = [b"\x02\0\0\0\x08\x09"]
    with pytest.raises(UnsupportedError, match="image format version 9 is unknown"):
        read(made.write(tmp_path, images))


def test_names_that_are_not_text(tmp_path: Path) -> None:
    made = small()
    made.open(1, 9, b'/data/\xff\xfe"\\'.decode("latin-1"), ghost=made.ghost())
    images = read(made.write(tmp_path))
    assert images == read_images(tmp_path)


def test_a_ghost_of_many_chunks_comes_over(tmp_path: Path) -> None:
    made = small()
    chunks = [(2 * number, b"x") for number in range(5000)]
    made.open(1, 9, "/data/holes", ghost=made.ghost(chunks=chunks, size=10_000))
    images = read(made.write(tmp_path))
    assert max(len(ghost.extents) for ghost in images.ghosts.values()) == 5000
    assert images == read_images(tmp_path)


def test_images_of_others_are_asked_for(tmp_path: Path) -> None:
    """Root reads them by a capability, which the reader has not."""
    made = ImageSet()
    made.task()
    for number in range(200):
        made.open(1, 3 + number, f"/gone{number}", ghost=made.ghost(b"%d" % number))
    directory = made.write(tmp_path / "images")
    expected = read_images(directory)
    for path in directory.iterdir():
        path.chmod(0o600)
        os.chown(path, 4321, 4321)
    directory.chmod(0o700)
    os.chown(directory, 5432, 5432)
    assert read(directory) == expected
    done = ghostpool("plan", "-D", directory)
    assert done.returncode == 0, done.stderr


def test_an_image_that_nobody_may_open(tmp_path: Path) -> None:
    """What the coordinator opens for it has to be a regular file, too."""
    directory = small().write(tmp_path / "images")
    secret = tmp_path / "secret"
    (directory / "files.img").rename(secret)
    (directory / "files.img").symlink_to(secret)
    directory.chmod(0o700)
    os.chown(directory, 5432, 5432)
    with pytest.raises(ImageError, match=r"files\.img: is a symbolic link, not an image"):
        read(directory)


@pytest.mark.needs_mount_ns
def test_without_the_right_to_change_the_root(tmp_path: Path) -> None:
    """Then it opens nothing at all by itself."""

    def drop() -> None:
        _linux.prctl(24, 18)  # PR_CAPBSET_DROP, CAP_SYS_CHROOT

    directory = small().write(tmp_path)
    done = ghostpool("plan", "-vv", "-D", directory, preexec_fn=drop)
    assert "the reader is confined: root False, filter True" in done.stderr
    # Its own rebuilding of namespaces, which comes after the reading, needs that right.
    assert "the mount namespaces can not be rebuilt" in done.stderr
    done = ghostpool("plan", "-vv", "-D", CORPUS / "01-ro-basic/images")
    assert "the reader is confined: root True, filter True" in done.stderr


# What it can not do.

_ATTEMPTS = """
import ctypes, errno, json, mmap, os, signal, socket, sys
sys.path.append({above!r})
from ghostpool import _confine
pipe = socket.socket(fileno=3)
directory = os.open({directory!r}, os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
inside = os.open({directory!r}, os.O_PATH)
confined = _confine.confine(directory)
def call(function, *arguments):
    def attempt():
        if function(*arguments) == -1:
            raise OSError(ctypes.get_errno(), "")
    return attempt
attempts = {{
    "socket": lambda: socket.socket(),
    "execve": lambda: os.execve("/bin/true", ["true"], {{}}),
    "fork": os.fork,
    "kill": lambda: os.kill(parent, 0),
    "ptrace": call(libc.ptrace, 16, parent, 0, 0),
    "write a file": lambda: os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=directory),
    "write an image": lambda: os.open("inventory.img", os.O_RDWR, dir_fd=directory),
    "truncate": lambda: os.truncate("inventory.img", 0),
    "unlink": lambda: os.unlink("inventory.img", dir_fd=directory),
    "anonymous file": lambda: os.open(".", os.O_TMPFILE | os.O_RDWR, dir_fd=directory),
    "path descriptor": lambda: os.open("inventory.img", os.O_PATH, dir_fd=directory),
    "chroot": lambda: os.chroot("/"),
    "unshare": call(libc.unshare, 0x10000000),
    "setns": call(libc.setns, directory, 0),
    "mount": call(libc.mount, b"x", b"/", b"tmpfs", 0, None),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "memfd": lambda: os.memfd_create("x"),
    "host file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "above": lambda: os.open("../../../../../../etc/passwd", os.O_RDONLY, dir_fd=directory),
    "proc": lambda: os.open("/proc/self/mem", os.O_RDONLY),
    "memory": lambda: bytearray(600 << 20),
    "allowed": lambda: os.close(os.open("inventory.img", os.O_RDONLY, dir_fd=directory)),
}}
results = {{}}
for name, attempt in attempts.items():
    try:
        attempt()
        results[name] = "done"
    except OSError as error:
        results[name] = errno.errorcode[error.errno]
    except Exception as error:
        results[name] = type(error).__name__
finders = [sys.meta_path, sys.path, sys.path_hooks, list(sys.path_importer_cache)]
pipe.sendall(json.dumps([list(confined), results, finders]).encode() + b"\\n")
pipe.recv(1)
"""


def spawn(code: str) -> tuple[int, socket.socket]:
    """A lean interpreter that runs `code`, and a socket whose other end is its number 3."""
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-I", "-S", "-c", code]
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)]
    with theirs:
        return os.posix_spawn(sys.executable, argv, {}, file_actions=actions), ours


@contextmanager
def confined_process(directory: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A process that has confined itself: its pid, and what came of all that it tried then."""
    pid, ours = spawn(_ATTEMPTS.format(above=ABOVE, directory=str(directory)))
    try:
        with ours, ours.makefile("rb") as lines:
            confined, results, finders = json.loads(lines.readline())
            assert confined == [True, True]
            assert finders == [[], [], [], []]  # of modules
            yield pid, results
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.needs_mount_ns
@pytest.mark.skipif(os.uname().machine not in _confine._MACHINES, reason="no filter here")
def test_what_it_can_not_do(tmp_path: Path) -> None:
    small().write(tmp_path)
    before = (tmp_path / "inventory.img").read_bytes()
    with confined_process(tmp_path) as (pid, results):
        assert results.pop("allowed") == "done"
        assert results.pop("memory") == "MemoryError"
        for absent in ("host file", "above", "proc"):
            assert results.pop(absent) == "ENOENT", absent
        assert results == dict.fromkeys(results, "EPERM")
        assert "socket" in results
        status = dict(
            line.split(":\t")
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Seccomp"].strip() == "2"
        limits = {
            resource.RLIMIT_AS: _confine.MEMORY,
            resource.RLIMIT_CPU: _confine.CPU_S,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: _confine.FILES,
        }
        for what, most in limits.items():
            assert resource.prlimit(pid, what) == (most, most)
        assert Path(f"/proc/{pid}/root").readlink() == tmp_path
        # Not dumpable: its files in /proc belong to root, and are nobody else's to read.
        assert os.stat(f"/proc/{pid}/maps").st_uid == 0
    assert (tmp_path / "inventory.img").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_it_has_its_socket_the_images_and_nothing_else(tmp_path: Path) -> None:
    """Looked at while it waits for somebody to take its answer, which no socket holds at once."""
    made = small()
    for number in range(20_000):
        made.reg(f"/lib/{number}")
    secret = os.open("/etc", os.O_RDONLY)
    os.set_inheritable(secret, True)
    reading = start_reading(str(made.write(tmp_path)), SIZE)
    try:
        process = psutil.Process(reading.pid)
        deadline = time.monotonic() + 30
        links: set[str] = set()
        # Its own root, as it is called from here, is the directory.
        while links != {"/dev/null", "socket", str(tmp_path)} and time.monotonic() < deadline:
            found = Path(f"/proc/{reading.pid}/fd").iterdir()
            try:
                links = {os.readlink(path).partition(":")[0] for path in found}
            except FileNotFoundError:
                continue  # closed meanwhile
        assert links == {"/dev/null", "socket", str(tmp_path)}
        assert process.environ() == {}
    finally:
        os.close(secret)
        finish(reading)


@pytest.mark.parametrize("machine", sorted(_confine._MACHINES))
@pytest.mark.parametrize("may_open", [True, False])
def test_the_filter_is_well_formed(machine: str, may_open: bool) -> None:
    """Every jump stays inside, every path ends in a verdict, and openat depends on `may_open`."""
    program = _confine.filter_program(machine, may_open)
    assert program is not None
    steps = list(struct.iter_unpack("HBBI", program))
    assert steps[-1][0] == 0x06
    for at, (code, if_true, if_false, _) in enumerate(steps):
        if code in {0x15, 0x45}:
            assert at + 1 + max(if_true, if_false) < len(steps)
    assert len(_confine._MACHINES[machine][1]) == 27  # as docs/reading-images.md says
    number = _confine._MACHINES[machine][1]["openat"]
    assert any(code == 0x15 and k == number for code, _, _, k in steps) is may_open


def test_no_filter_for_an_unknown_machine() -> None:
    assert _confine.filter_program("sparc", True) is None


# What becomes of a reader that misbehaves.


@contextmanager
def impostor(code: str, directory: Path) -> Iterator[Reading]:
    """A process in the reader's place that does `code`, with its socket as number 3."""
    prologue = (
        "import json, os, signal, socket, struct, time\n"
        "pipe = socket.socket(fileno=3)\n"
        "def say(*frame):\n"
        "    body = json.dumps(frame).encode()\n"
        "    pipe.sendall(struct.pack('<I', len(body)) + body)\n"
    )
    pid, ours = spawn(prologue + code)
    fd = os.open(directory, os.O_RDONLY)
    try:
        yield Reading(pid, ours.detach(), fd, str(directory), SIZE, os.pidfd_open(pid))
    finally:
        os.close(fd)
    assert not psutil.pid_exists(pid), "the reader was left behind"


MISBEHAVIOUR = {
    "ends at once": ("pass", "ended without an answer"),
    "is killed": ("os.kill(os.getpid(), 9)", r"ended by SIGKILL \(is the machine out of memory\?"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
    "works for ever": ("os.kill(os.getpid(), signal.SIGXCPU)", "120 s of processor time"),
    "is silent": ("time.sleep(60)", "has hung for 0.5 s"),
    "announces a gibibyte": ("pipe.sendall(b'\\0\\0\\0\\x40')", "makes no sense"),
    "no JSON": ("pipe.sendall(b'\\4\\0\\0\\0{\"a\"')", "makes no sense"),
    "nested": ("pipe.sendall(struct.pack('<I', 100000) + b'[' * 100000)", "makes no sense"),
    "a number": ("say(3)", "makes no sense"),
    "an unknown frame": ("say('exec', ['true'])", "makes no sense"),
    "an unknown error": ("say('error', ['x', 1])", "makes no sense"),
    "confined somehow": ("say('confined', ['%s'] * 3)", "makes no sense"),
    "does not listen": (
        "while True: say('open', ['x' * 200] * 60)",
        "has hung for 0.5 s",
    ),
    "out of memory": ("say('error', ['memory'])", "needs more than 512M of memory"),
    "its own mistake": ("say('error', ['broken', 'KeyError(1)'])", r"failed: KeyError\(1\)"),
    "asks for what is elsewhere": ("say('open', ['../x'])", "makes no sense"),
    "asks for a path": ("say('open', ['/etc/passwd'])", "makes no sense"),
    "asks for too much": ("say('open', ['a'] * 300)", "makes no sense"),
    "the end alone": ("say('end', [])", "makes no sense: end comes out of order"),
    "no task": ("say('head', [0, False]); say('end', [])", "makes no sense: no task"),
    "half a frame": ("pipe.sendall(b'\\9\\0')", "ended without an answer"),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_a_reader_that_misbehaves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error that says so, and no process is left."""
    monkeypatch.setattr(_reading, "SILENCE_S", 0.5)
    if kind not in {"is silent", "does not listen"}:
        monkeypatch.setattr(_reading, "SILENCE_S", 20)
    code, expected = MISBEHAVIOUR[kind]
    with impostor(code, tmp_path) as reading, pytest.raises(ImageError, match=expected) as caught:
        trio.run(read_apart, reading)
    assert caught.value.file == str(tmp_path)


def test_what_it_asks_for_is_a_regular_file_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "there").write_text("there")
    os.mkfifo(tmp_path / "fifo")
    code = (
        "say('open', ['link', 'missing', 'there', 'fifo'])\n"
        "data, fds, _, _ = socket.recv_fds(pipe, 4096, 10)\n"
        "codes = json.loads(data[4:])\n"
        "say('error', ['image', str(codes), len(fds), os.read(fds[0], 99).decode()])"
    )
    with impostor(code, tmp_path) as reading, pytest.raises(ImageError, match="there") as caught:
        trio.run(read_apart, reading)
    assert json.loads(caught.value.file)[:3] == [errno.ELOOP, errno.ENOENT, 0]
    assert caught.value.problem == "there"


def test_a_cancelled_coordinator_leaves_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(reading: Reading) -> None:
        with trio.move_on_after(0.2) as scope:
            await read_apart(reading)
        assert scope.cancelled_caught

    with impostor("time.sleep(60)", tmp_path) as reading:
        trio.run(story, reading)
    # Nor does one that has always something to say keep it from being cancelled.
    monkeypatch.setattr(_reading, "_STILL_COSTS", 0)
    flood = "while True: pipe.sendall(10_000 * b'\\x0d\\0\\0\\0[\"still\", []]')"
    with impostor(flood, tmp_path) as reading:
        assert select.select([reading.socket], [], [], 20)[0]
        trio.run(story, reading)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_real_reader_that_is_killed_or_stopped(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reading, "SILENCE_S", 0.5)
    reading = start_reading(str(small().write(tmp_path)), SIZE)
    os.kill(reading.pid, number)
    with pytest.raises(ImageError, match="SIGKILL" if number == signal.SIGKILL else "has hung"):
        finish(reading)
    assert not psutil.pid_exists(reading.pid)


def test_a_reader_without_a_coordinator_ends(tmp_path: Path) -> None:
    reading = start_reading(str(small().write(tmp_path)), SIZE)
    os.close(reading.socket)
    os.close(reading.directory)
    os.close(reading.pidfd)
    _, status = os.waitpid(reading.pid, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 1}


# Limits, through the commands.


def exabyte(directory: Path) -> Path:
    made = ImageSet()
    made.task()
    made.open(1, 3, "/gone", ghost=made.ghost(chunks=[], size=1 << 60))
    return made.write(directory)


def test_an_exabyte_is_refused_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ImageError, match="the limit is 1T") as caught:
        read_images(exabyte(tmp_path))
    assert time.monotonic() - begun < 0.5
    assert caught.value.file == "ghost-file-1.img"
    assert "a ghost of 1,152,921,504,606,846,976 bytes: the limit is 1T" in caught.value.problem
    assert "--max-size 1024P" in caught.value.problem


@pytest.mark.needs_mount_ns
def test_the_limit_is_an_option(tmp_path: Path) -> None:
    images = exabyte(tmp_path)
    done = ghostpool("plan", "-D", images)
    assert done.returncode == 2
    assert "--max-size 1024P" in done.stderr
    assert ghostpool("plan", "-D", images, "--max-size", "1024P").returncode == 0
    done = ghostpool("plan", "-D", CORPUS / "03-sparse/images", "--max-size", "4K")
    assert done.returncode == 2
    assert "the limit is 4K" in done.stderr
    for nonsense in ("0", "-1", "1X", "9999999P", "K"):
        done = ghostpool("plan", "-D", images, f"--max-size={nonsense}")
        assert done.returncode == 2
        assert "is no size" in done.stderr


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="name the directory that was given to criu dump -D"):
        start_reading(str(tmp_path / "missing"), SIZE)

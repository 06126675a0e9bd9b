"""The LISTEN_FDS convention: descriptors handed to commands by it, and a socket taken by it."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import passing
from tests.support.imagewriter import ImageSet
from tests.support.restore import (
    COMMAND,
    LIMIT_S,
    ghostpool,
    live,
    make_read_only,
    mount_tmpfs,
    serving,
    start,
)

pytestmark = pytest.mark.needs_mount_ns
HELD = {1: {700: "nine", 9: "nine", 0: "zero"}, 2: {3: "three", 4: "four"}, 5: {}}
"""Numbers in the tasks, with the names of what they are open at; 9 and 700 are one open file."""

# What a command can know of what it was passed; asked of libsystemd too, if so called.
TELL = """
import ctypes, json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith(("LISTEN", "GHOST"))}
told["pid"] = os.getpid()
held = [int(name) for name in os.listdir("/proc/self/fd")]
told["open"] = sorted(fd for fd in held if os.path.exists(f"/proc/self/fd/{fd}"))
passed = range(3, 3 + int(told.get("LISTEN_FDS", 0)))
told["content"] = [os.pread(fd, 100, 0).decode() for fd in passed]
told["inheritable"] = [os.get_inheritable(fd) for fd in passed]
if sys.argv[1:] == ["libsystemd"]:
    names = ctypes.POINTER(ctypes.c_char_p)()
    library = ctypes.CDLL("libsystemd.so.0")
    count = library.sd_listen_fds_with_names(0, ctypes.byref(names))
    told["libsystemd"] = [names[n].decode() for n in range(count)]
print(json.dumps(told), flush=True)
"""
TELLS = [sys.executable, "-I", "-S", "-c", TELL]
LIBSYSTEMD = pytest.param("libsystemd", marks=pytest.mark.needs_systemd)


@pytest.fixture
def where(tmp_path: Path) -> Iterator[tuple[object, ...]]:
    """Options that name images and their target."""

    def setup() -> None:
        mount_tmpfs(Path("/mnt"))
        make_read_only(Path("/mnt"))

    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/mnt", device=(0, 70), flags=0x200001)
    for task, held in HELD.items():
        images.task(task)
        opened: dict[str, int] = {}
        for number, name in held.items():
            if name in opened:
                images.fd(task, number, opened[name])
                continue
            ghost = images.ghost(name.encode())
            opened[name] = images.open(task, number, f"/mnt/{name}", ghost=ghost, cloexec=True)
    with live(setup) as target:
        yield "-D", images.write(tmp_path / "images"), "-t", target.pid


def passes(*kinds: str) -> list[str]:
    """What to put before a command line to have it passed descriptors."""
    return [sys.executable, passing.__file__, *kinds, "--"]


def fetched(path: object, *words: str, prefix: Sequence[str] = ()) -> dict[int, dict[str, Any]]:
    """What is told to the consumers of all tasks that have any, which fetch at the same time."""
    consumers: dict[int, subprocess.Popen[str]] = {}
    told = {}
    try:
        for task in (1, 2):
            fetch = ("fetch", "--socket", path, "--task", task, *words)
            consumers[task] = start([*prefix, *COMMAND, *fetch], stdin=subprocess.DEVNULL)
        for task, consumer in consumers.items():
            out, err = consumer.communicate(timeout=LIMIT_S)
            assert (consumer.returncode, err) == (0, "")
            told[task] = json.loads(out)
    finally:
        for consumer in consumers.values():
            if consumer.poll() is None:
                consumer.kill()
                consumer.communicate()
    return told


def check_told(told: dict[str, Any], task: int) -> None:
    """It has what it should have, in the places of the convention, and nothing else."""
    names = [HELD[task][number] for number in sorted(HELD[task])]
    assert told["content"] == names
    assert told["inheritable"] == [True] * len(names)
    assert told["open"] == list(range(3 + len(names)))
    if not names:
        assert not [name for name in told if name.startswith("LISTEN")]
        return
    assert told["LISTEN_PID"] == str(told["pid"])
    assert told["LISTEN_FDS"] == str(len(names))
    numbers = list(map(str, sorted(HELD[task])))
    assert told["LISTEN_FDNAMES"] == ":".join(numbers)
    assert told.get("libsystemd", numbers) == numbers


# -- Commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asking", ["", LIBSYSTEMD])
def test_commands_find_them_from_3_on(where: Sequence[object], asking: str) -> None:
    """In the order of their numbers, which are their names; whatever was passed to us before."""
    words = ["--listen-fds", "--", *TELLS, *filter(None, [asking])]
    done = ghostpool("restore", *where, *words, prefix=passes("file:/dev/null", "file:/dev/zero"))
    assert (done.returncode, done.stderr) == (0, "")
    told = {int(row["GHOSTPOOL_TASK"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert set(told) == set(HELD)
    for task, row in told.items():
        check_told(row, task)
    # By the numbers in the task, as the names are.
    assert [told[task]["GHOSTPOOL_CLOEXEC"] for task in HELD] == ["0,700", "3,4", ""]


@pytest.mark.parametrize("asking", ["", LIBSYSTEMD])
def test_who_fetches_finds_them_from_3_on(
    where: Sequence[object], asking: str, tmp_path: Path
) -> None:
    with serving(*where, "--serve", tmp_path / "socket") as served:
        words = ["--listen-fds", "--", *TELLS, *filter(None, [asking])]
        told = fetched(served.socket, *words, prefix=passes(*["file:/dev/null"] * 7))
        for task, row in told.items():
            check_told(row, task)
        assert served.process.wait(timeout=30) == 0


@pytest.mark.parametrize("kind", ["file:/dev/null", "stranger"])
def test_what_was_passed_to_us_is_not_the_commands(
    where: Sequence[object], kind: str, tmp_path: Path
) -> None:
    """It would take a descriptor of the task, or none at all, for what it was promised."""
    done = ghostpool("restore", *where, "--", *TELLS, prefix=passes(kind))
    assert (done.returncode, done.stderr) == (0, "")
    rows = {int(row["GHOSTPOOL_TASK"]): row for row in map(json.loads, done.stdout.splitlines())}
    with serving(*where, "--serve", tmp_path / "socket") as served:
        for task, row in fetched(served.socket, "--", *TELLS, prefix=passes(kind)).items():
            rows[-task] = row
    for task, told in rows.items():
        assert not [name for name in told if name.startswith("LISTEN")]
        assert set(told["open"]) == {0, 1, 2, *HELD[abs(task)]}


@pytest.mark.parametrize("said", ["many", "", "2"])
def test_variables_that_are_not_true(where: Sequence[object], said: str) -> None:
    lie = ["sh", "-c", 'export LISTEN_PID=$$ LISTEN_FDS="$0"; exec "$@"', said]
    for command in (["restore", *where], ["fetch", "--socket", "nowhere", "--task", "1"]):
        done = ghostpool(*command, "--", "true", prefix=lie)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"ghostpool: LISTEN_FDS={said}: .*\n", done.stderr), done.stderr


# -- The socket to serve on ---------------------------------------------------------------------


def test_serving_on_a_socket_that_is_passed(where: Sequence[object], tmp_path: Path) -> None:
    """Its name and mode are of who made it, and stay."""
    path = tmp_path / "socket"
    with serving(*where, prefix=passes(f"listening:{path}")) as served:
        assert (served.socket, served.tasks) == (str(path), 2)
        for task, row in fetched(path, "--listen-fds", "--", *TELLS).items():
            check_told(row, task)
        assert served.process.wait(timeout=30) == 0
    assert stat.S_ISSOCK(path.lstat().st_mode)


def test_a_socket_that_another_process_was_passed(where: Sequence[object], tmp_path: Path) -> None:
    """Then it is none of ours, and one is bound as ever."""
    with serving(*where, "--serve", tmp_path / "own", prefix=passes("stranger")) as served:
        assert served.socket == str(tmp_path / "own")


@pytest.mark.parametrize(
    ("kinds", "saying"),
    [
        (["stream"], "no listening UNIX SOCK_SEQPACKET socket"),
        (["datagram"], "no listening UNIX SOCK_SEQPACKET socket"),
        (["bound"], "no listening UNIX SOCK_SEQPACKET socket"),
        (["file"], "no socket to serve on"),
        (["abstract"], "not at a full path"),
        (["relative"], "not at a full path"),
        (["listening", "stream"], "2 sockets"),
        (["closed"], "LISTEN_FDS=1: .*Bad file descriptor"),
    ],
)
def test_what_can_not_be_served_on(
    where: Sequence[object], kinds: list[str], saying: str, tmp_path: Path
) -> None:
    """One line, status 2; what was passed is left where it is."""
    (tmp_path / "file").write_text("something")
    words = [f"{kind}:{tmp_path}/{kind}" for kind in kinds]
    done = ghostpool("restore", *where, prefix=passes(*words))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"ghostpool: .*{saying}.*\n", done.stderr), done.stderr
    left = {"file", *kinds} - {"abstract", "closed"}
    assert {path.name for path in tmp_path.iterdir()} == left | {"images"}


def test_one_socket_is_enough(where: Sequence[object], tmp_path: Path) -> None:
    passed = passes(f"listening:{tmp_path}/socket")
    done = ghostpool("restore", *where, "--serve", tmp_path / "own", prefix=passed)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--serve and a socket that is passed" in done.stderr
    assert not (tmp_path / "own").exists()


@pytest.mark.needs_systemd
def test_activated_by_systemd(where: Sequence[object], tmp_path: Path) -> None:
    """The first consumer that connects is what starts it, and is served first."""
    path = tmp_path / "socket"
    activate = ["systemd-socket-activate", "--seqpacket", "-l", path, "-E", "GHOSTPOOL_RUN_DIR"]
    process = start([*activate, *COMMAND, "restore", "--timeout", LIMIT_S, *where])
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"Listening on {path} as 3.\n"
        for task, row in fetched(path, "--listen-fds", "--", *TELLS).items():
            check_told(row, task)
        out, _ = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (0, f"serving 2 tasks on {path}\n")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()

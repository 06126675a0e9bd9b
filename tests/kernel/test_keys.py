"""Ghosts that a task held without a descriptor: mappings, executable, working and root directory.

They are delivered by key. Commands, consumers on the socket and the library do with them what the
keys are for: map, change directory, execute.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool._linux import close_all
from ghostpool.testing._targets import built
from tests.support.consumers import NAMES, command_line
from tests.support.corpus import CORPUS, corpus
from tests.support.imagewriter import O_RDWR, ImageSet
from tests.support.restore import (
    Live,
    fetched,
    live,
    look,
    make_read_only,
    mount_tmpfs,
    same_open_file,
    serving,
    start,
)
from tests.support.restore import (
    ghostpool as run,
)
from tests.support.truth import specs_from_truth

pytestmark = pytest.mark.needs_mount_ns

CONTENT = b"mapped before " * 500
DIRECTORY = stat.S_IFDIR | 0o750
O_DIRECTORY = 0o300000  # with O_LARGEFILE, as fdinfo shows it
SHARED = 1
READS, WRITES = 1, 3

# What a command does with them; `true` is the ghost of a program, and the end of it.
TELL = """
import hashlib, json, mmap, os, sys
keys = json.loads(os.environ["GHOSTPOOL_KEYS"])
told = {"task": os.environ["GHOSTPOOL_TASK"], "keys": keys}
told["names"] = os.environ.get("LISTEN_FDNAMES")
held = {int(name) for name in os.listdir("/proc/self/fd")}
told["open"] = sorted(fd for fd in held if os.path.exists(f"/proc/self/fd/{fd}"))
for key, fd in keys.items():
    status = os.fstat(fd)
    with open(f"/proc/self/fdinfo/{fd}") as file:
        flags = int(dict(line.split(":", 1) for line in file)["flags"], 8)
    seen = {"link": os.readlink(f"/proc/self/fd/{fd}"), "nlink": status.st_nlink, "flags": flags}
    seen |= {"mode": status.st_mode, "inode": [status.st_dev, status.st_ino]}
    if key.startswith("map:"):
        writes = flags & os.O_ACCMODE == os.O_RDWR
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        with mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, prot) as memory:
            if writes:
                memory[:5] = b"wrote"
            seen["sha256"] = hashlib.sha256(memory[:]).hexdigest()
    elif key == "cwd":
        os.fchdir(fd)
        seen["now"] = os.readlink("/proc/self/cwd")
    told[key] = seen
line = json.dumps(told) + "\\n"
assert len(line) <= 4096, "it would be mixed with that of another task: pipe(7)"
os.write(1, line.encode())
if "exe" in keys:
    os.execve(keys["exe"], ["true"], {})
"""
TELLS = [sys.executable, "-I", "-S", "-c", TELL]


@contextmanager
def target() -> Iterator[Live]:
    """A namespace with a read-only mount at /mnt/ro and a writable one at /mnt/rw."""

    def setup() -> None:
        mount_tmpfs(Path("/mnt"))
        for name in ("ro", "rw"):
            mount_tmpfs(Path("/mnt") / name)
        make_read_only(Path("/mnt/ro"))

    with live(setup) as there:
        namespace = os.open(f"/proc/{there.pid}/ns/mnt", os.O_RDONLY)
        try:
            before = look(namespace, "/mnt")
            yield there
            assert look(namespace, "/mnt") == before
        finally:
            os.close(namespace)


def bare() -> ImageSet:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/mnt", device=(0, 61))
    images.mount("/mnt/ro", device=(0, 62), flags=0x200001)
    images.mount("/mnt/rw", device=(0, 63))
    return images


def removed(images: ImageSet, name: str, ghost: int, **fields: Any) -> int:
    """A reg file that is known by a mapping or the like only; its id."""
    known = images._ghosts[ghost]
    fields = {"flags": 0, "mode": known.mode, "size": known.size} | fields
    reg = images.reg(name, **fields)
    images.remap(reg, ghost)
    return reg


def full() -> ImageSet:
    """Task 1 holds ghosts in every way; task 2 is in the same directory, and has nothing else."""
    images = bare()
    images.task(1)
    images.task(2)
    text = images.ghost(CONTENT)
    own = images.open(1, 4, "/mnt/ro/text", ghost=text, pos=3)
    images.map(1, 0x1000, 0x2000, own, fdflags=0)  # as descriptor 4: one open file
    other = removed(images, "/mnt/ro/text", text)
    images.map(1, 0x3000, 0x4000, other)
    images.map(1, 0x5000, 0x6000, other, fdflags=0)  # the same flags, whoever says them
    data = removed(images, "/mnt/rw/data", images.ghost(CONTENT))
    images.map(1, 0x7FFF00000000, 0x7FFF00002000, data, status=0x81, prot=WRITES, flags=SHARED)
    images.map(1, 0x8000, 0x9000, data, status=0x81, prot=READS, flags=SHARED)
    here = images.ghost(mode=DIRECTORY)
    for task in (1, 2):
        images.cwd(task, removed(images, "/mnt/ro/gone/here", here))
    images.root(1, removed(images, "/mnt/ro/top", images.ghost(mode=DIRECTORY), flags=O_DIRECTORY))
    program = Path(shutil.which("true") or "/bin/true").read_bytes()
    images.exe(1, removed(images, "/mnt/ro/program", images.ghost(program, mode=0o100755)))
    return images


MAPS = ["map:1000-2000", "map:3000-4000", "map:5000-6000", "map:7fff00000000-7fff00002000"]
MAPS += ["map:8000-9000"]
NUMBERS = dict(zip(["cwd", "root", "exe", *MAPS], [3, 5, 6, 7, 8, 9, 10, 11], strict=True))


def check_told(told: dict[str, Any], names: str | None = None) -> None:
    """What the command of task 1, and that of task 2, say."""
    assert told["names"] == names
    if told["task"] == "2":
        assert list(told["keys"]) == ["cwd"]
        assert told["cwd"]["now"] == "/mnt/ro/gone/here (deleted)"
        return
    links = {
        **dict.fromkeys(MAPS[:3], "/mnt/ro/text"),
        **dict.fromkeys(MAPS[3:], "/mnt/rw/data"),
        "cwd": "/mnt/ro/gone/here",
        "root": "/mnt/ro/top",
        "exe": "/mnt/ro/program",
    }
    seen = {key: told[key] for key in told["keys"]}
    assert {key: row["link"] for key, row in seen.items()} == {
        key: f"{link} (deleted)" for key, link in links.items()
    }
    assert {row["nlink"] for row in seen.values()} == {0}
    assert seen["cwd"]["now"] == "/mnt/ro/gone/here (deleted)"
    assert {key: row["flags"] & ~0o100000 for key, row in seen.items()} == {
        **dict.fromkeys([*MAPS, "exe"], os.O_RDONLY),
        MAPS[3]: os.O_RDWR,
        **dict.fromkeys(["cwd", "root"], os.O_DIRECTORY),
    }
    assert seen["cwd"]["mode"] == seen["root"]["mode"] == DIRECTORY
    before, wrote = (sha256(text).hexdigest() for text in (CONTENT, b"wrote" + CONTENT[5:]))
    assert [seen[key]["sha256"] for key in MAPS] == [*[before] * 3, *[wrote] * 2]
    inodes = [[seen[key]["inode"] for key in keys] for keys in (MAPS[:3], MAPS[3:])]
    assert [inode[0] for inode in inodes] == [inode[-1] for inode in inodes]
    assert inodes[0][0] != inodes[1][0]


def test_commands_find_them_at_free_numbers(tmp_path: Path) -> None:
    """A command maps, changes directory, and becomes the program that was removed."""
    images = full().write(tmp_path)
    with target() as there:
        done = run("restore", "-D", images, "-t", there.pid, "--", *TELLS)
    assert (done.returncode, done.stderr) == (0, "")
    for told in map(json.loads, done.stdout.splitlines()):
        check_told(told)
        numbers = NUMBERS if told["task"] == "1" else {"cwd": 3}
        assert told["keys"] == numbers
        own = {4} if told["task"] == "1" else set()
        assert set(told["open"]) == {0, 1, 2, *own, *numbers.values()}


def test_commands_find_them_by_name(tmp_path: Path) -> None:
    """By the convention of sd_listen_fds(3) each has a name, in which there can be no colon."""
    images = full().write(tmp_path)
    with target() as there:
        done = run("restore", "-D", images, "-t", there.pid, "--listen-fds", "--", *TELLS)
    assert (done.returncode, done.stderr) == (0, "")
    listed = {number: key.replace(":", "-") for key, number in NUMBERS.items()} | {4: "4"}
    names = ":".join(listed[number] for number in sorted(listed))
    for told in map(json.loads, done.stdout.splitlines()):
        check_told(told, names if told["task"] == "1" else "cwd")
        assert set(told["open"]) == set(range(3 + len(told["names"].split(":"))))
        assert told["keys"].get("exe") in (None, 6)
        assert min(told["keys"].values()) == 3


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.needs_cc] * (n == "fetch.c")) for n in NAMES]
)
def test_consumers_find_them(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever program fetches them; numbers are those that a command has."""
    images = full().write(tmp_path / "images")
    compiled = tmp_path_factory.getbasetemp()
    with (
        target() as there,
        serving("-D", images, "-t", there.pid, "--serve", tmp_path / "socket") as served,
    ):
        assert served.tasks == 2
        lines = [command_line(name, compiled, served.socket, task, *TELLS) for task in (1, 2)]
        consumers = [start(line) for line in lines]
        for task, consumer in enumerate(consumers, 1):
            out, err = consumer.communicate(timeout=30)
            assert (consumer.returncode, err) == (0, "")
            told = json.loads(out)
            assert told["task"] == str(task)
            check_told(told)
            assert told["keys"] == (NUMBERS if task == 1 else {"cwd": 3})
        assert served.process.wait(timeout=30) == 0


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_the_library_gives_them(tmp_path: Path, backend: str) -> None:
    """Each key has a descriptor of its own; keys of the same flags are one open file."""
    images = str(full().write(tmp_path))

    async def whole(pid: int) -> None:
        async with ghostpool.restore(images, tree=pid) as restored:
            task = restored.tasks[1]
            keys = await task.take_keys()
            fds = await task.take_fds()
            with pytest.raises(RuntimeError, match="keys of task 1 have been taken"):
                task.take_keys_nowait()
            (here,) = (await restored.tasks[2].take_keys()).items()
        try:
            assert here[0] == "cwd"
            assert os.path.samestat(os.fstat(here[1]), os.fstat(keys["cwd"]))
            assert sorted(keys) == sorted(NUMBERS)
            assert list(fds) == [4]
            assert len({*keys.values(), *fds.values()}) == len(keys) + len(fds)
            assert not any(map(os.get_inheritable, keys.values()))
            check_sharing(keys | {"4": fds[4]})
        finally:
            close_all([*keys.values(), *fds.values(), here[1]])

    async def pooled(pid: int) -> None:
        async with ghostpool.open_pool(images, tree=pid) as pool:
            async with anyio.create_task_group() as group:
                group.start_soon(other, pool)
                async with pool.task(1) as task:
                    keys = await task.open_keys()
                    assert await task.open_keys() == keys
                    check_sharing(keys | {"4": (await task.open_files())[4]})
                    own = await task.take_keys()
                    assert not {*own.values()} & {*keys.values()}
            await pool.finish()
        close_all(own.values())

    async def other(pool: ghostpool.GhostPool) -> None:
        async with pool.task(2):
            pass

    with target() as there:
        anyio.run(whole, there.pid, backend=backend)
        anyio.run(pooled, there.pid, backend=backend)


def check_sharing(fds: dict[str, int]) -> None:
    """Only what had the flags of another is one open file with it."""
    pid = os.getpid()
    groups: list[set[str]] = []
    for key, fd in fds.items():
        for group in groups:
            if same_open_file((pid, fd), (pid, fds[min(group)])):
                group.add(key)
                break
        else:
            groups.append({key})
    assert {frozenset(group) for group in groups if len(group) > 1} == {
        frozenset(("4", MAPS[0])),
        frozenset((MAPS[1], MAPS[2])),
    }


@pytest.mark.long
def test_the_plan_the_report_and_the_events_tell_them(tmp_path: Path) -> None:
    images = full().write(tmp_path / "images")
    report, events = tmp_path / "report", tmp_path / "events"
    with target() as there:
        where = ("-D", images, "-t", there.pid)
        plan = json.loads(run("plan", *where, "--json").stdout)
        shown = run("plan", *where, env={**os.environ, "COLUMNS": "200"}).stdout
        options = ("--discard", "--report", report, "--events", events)
        done = run("restore", *where, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert {row["key"]: row["number"] for row in plan["keys"] if row["task"] == 1} == NUMBERS
    files = {row["file"] for row in plan["keys"]}
    assert files <= {row["file"] for row in plan["opens"]}
    assert {row["path"] for row in plan["keys"]} == {
        *("/mnt/ro/text", "/mnt/rw/data", "/mnt/ro/gone/here", "/mnt/ro/top", "/mnt/ro/program")
    }
    assert json.loads(report.read_text())["keys"] == plan["keys"]
    assert all(key in shown for key in NUMBERS)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    opened = [line for line in lines if line["event"] == "file_opened"]
    told = [key for line in opened for key in line["keys"].split(",") if key]
    assert sorted(told) == sorted([*NUMBERS, "cwd"])
    assert {line["file"] for line in opened} == {row["file"] for row in plan["opens"]}


@pytest.mark.long
def test_keeping_needs_no_key(tmp_path: Path) -> None:
    """What was mapped and executed is there by its name."""
    images = bare()
    images.task(1)
    images.map(1, 0x1000, 0x2000, removed(images, "/mnt/ro/text", images.ghost(CONTENT)))
    made = images.write(tmp_path)

    def setup() -> None:
        for path in ("/mnt", "/mnt/ro"):
            mount_tmpfs(Path(path))

    with live(setup) as there:
        done = run("restore", "-D", made, "-t", there.pid, "--keep")
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(f"/proc/{there.pid}/root/mnt/ro/text").read_bytes() == CONTENT


@pytest.mark.long
def test_directories_keep_their_flag_and_name(tmp_path: Path) -> None:
    """O_DIRECTORY is a part of O_TMPFILE, of which nothing may be left where both were."""
    images = bare()
    images.task(1)
    directory = images.ghost(mode=DIRECTORY)
    for number, flags in ((4, O_DIRECTORY), (5, 0o100000), (6, O_DIRECTORY | os.O_PATH)):
        images.open(1, number, "/mnt/ro/gone/here", ghost=directory, flags=flags)
    unnamed = images.ghost(CONTENT)
    images.open(1, 7, "/mnt/rw/#14", ghost=unnamed, flags=0o20300002)
    made = images.write(tmp_path / "images")
    script = "import json, os\nfor fd in range(4, 8):\n"
    script += " fields = dict(line.split(':', 1) for line in open(f'/proc/self/fdinfo/{fd}'))\n"
    script += " print(json.dumps([os.readlink(f'/proc/self/fd/{fd}'), int(fields['flags'], 8)]))"
    with target() as there:
        words = ("--", sys.executable, "-I", "-S", "-c", script)
        done = run("restore", "-D", made, "-t", there.pid, *words)
    assert (done.returncode, done.stderr) == (0, "")
    here = "/mnt/ro/gone/here (deleted)"
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [here, O_DIRECTORY],
        [here, 0o100000],
        [here, os.O_DIRECTORY | os.O_PATH],
        ["/mnt/rw/#14 (deleted)", O_RDWR],
    ]


# -- What can not be ----------------------------------------------------------------------------


def mapped_for_writing(images: ImageSet) -> None:
    data = removed(images, "/mnt/ro/data", images.ghost(CONTENT))
    images.map(1, 0x1000, 0x2000, data, status=0x81, prot=WRITES, flags=SHARED)


def mapped_by_flags(images: ImageSet) -> None:
    data = removed(images, "/mnt/ro/data", images.ghost(CONTENT))
    images.map(1, 0x1000, 0x2000, data, fdflags=O_RDWR)


def working_file(images: ImageSet) -> None:
    images.cwd(1, removed(images, "/mnt/ro/data", images.ghost(CONTENT)))


def mapped_directory(images: ImageSet) -> None:
    gone = removed(images, "/mnt/ro/data", images.ghost(mode=DIRECTORY))
    images.map(1, 0x1000, 0x2000, gone)


def executed_device(images: ImageSet) -> None:
    mode = stat.S_IFCHR | 0o600
    images.exe(1, removed(images, "/mnt/ro/data", images.ghost(mode=mode, rdev=0x103)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mapped_for_writing, ("open for writing", "/mnt/ro is read-only")),
        (mapped_by_flags, ("open for writing", "/mnt/ro is read-only")),
        (working_file, ("task 1 as cwd", "mode 100644")),
        (mapped_directory, ("task 1 as map:1000-2000", "mode 40750")),
        (executed_device, ("task 1 as exe", "mode 20600")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_can_not_be_is_refused(tmp_path: Path, make: Any, words: tuple[str, ...]) -> None:
    images = bare()
    images.task(1)
    make(images)
    made = images.write(tmp_path)
    with target() as there:
        options = ("--allow-devices", "--discard")
        done = run("restore", "-D", made, "-t", there.pid, *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for word in ("/mnt/ro/data", *words):
        assert word in done.stderr, done.stderr


@pytest.mark.long
def test_more_keys_than_a_command_can_be_told_of(tmp_path: Path) -> None:
    """A string of an environment has its limit: refused before anything is touched, or undone."""
    images = bare()
    images.task(1)
    text = removed(images, "/mnt/ro/text", images.ghost(CONTENT))
    for at in range(0x7FFF_0000_0000, 0x7FFF_0000_0000 + 2001 * 0x2000, 0x2000):
        images.map(1, at, at + 0x1000, text)
    made = images.write(tmp_path / "images")
    with target() as there:
        done = run("restore", "-D", made, "-t", there.pid, "--", "true")
        assert done.returncode == 2
        assert "2001 mappings and the like of one task, more than the 2000" in done.stderr
        where = ("-D", made, "-t", there.pid, "--serve", tmp_path / "socket")
        with serving(*where) as served:
            fetch = run("fetch", "--socket", served.socket, "--task", 1, "--", "true")
            assert fetch.returncode == 1
            assert "2001 mappings" in fetch.stderr
            assert served.process.wait(timeout=30) == 1


@pytest.mark.long
def test_what_can_not_be_is_left_out(tmp_path: Path) -> None:
    """With --on-error=skip a task has the other keys, by the numbers that are free then."""
    images = bare()
    images.task(1)
    mapped_for_writing(images)
    images.cwd(1, removed(images, "/mnt/ro/here", images.ghost(mode=DIRECTORY)))
    images.root(1, removed(images, "/mnt/ro/file", images.ghost(CONTENT)))
    images.map(1, 0x3000, 0x4000, removed(images, "/mnt/ro/text", images.ghost(CONTENT)))
    made = images.write(tmp_path)
    with target() as there:
        words = ("--on-error", "skip", "--", "sh", "-c", "echo $GHOSTPOOL_KEYS; ls /proc/self/fd")
        done = run("restore", "-D", made, "-t", there.pid, *words)
    first, *open_numbers = done.stdout.splitlines()
    assert json.loads(first) == {"cwd": 3, "map:3000-4000": 4}
    assert {"3", "4"} < set(open_numbers)
    assert "/mnt/ro/data" in done.stderr
    assert "/mnt/ro/file" in done.stderr


# -- Real dumps ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_mapped_ghosts_of_a_real_dump(tmp_path: Path, strategy: str) -> None:
    """Each mapping of the truth has its key, and what that leads to is what was mapped."""
    truth = corpus("08-mmap")[1]
    (task,) = truth["tasks"]
    (spec,) = specs_from_truth(truth)
    socket = tmp_path / "socket"
    with built([spec]) as (fd,):
        before = look(fd)
        images = CORPUS / "08-mmap" / "images"
        place = f"{root_namespace()}=/proc/{os.getpid()}/fd/{fd}"
        with (
            serving(
                "-D", images, "--ns", place, "--strategy", strategy, "--serve", socket
            ) as served,
            fetched(served.socket, [1]) as probes,
        ):
            known, keys = probes[1].descriptors, probes[1].facts["keys"]
            content = probes[1].ask("content")
            assert served.process.wait(timeout=30) == 0
        assert look(fd) == before
    assert set(known) == {0, 1, 2, 3, *keys.values()}
    assert [*keys] == [key for key in keys if key.startswith("map:")]
    ghosts = [row for row in task["maps"] if row["remap"] == "ghost"]
    assert len(keys) == len(ghosts)
    seen = sorted(
        (
            _length(key),
            known[number]["link"],
            known[number]["flags"] & os.O_ACCMODE,
            stat.S_IMODE(known[number]["mode"]),
            (known[number]["uid"], known[number]["gid"], known[number]["nlink"]),
            known[number]["mtime_ns"],
            content[number]["sha256"],
        )
        for key, number in keys.items()
    )
    assert seen == sorted(
        (
            row["length"],
            f"{row['path']} (deleted)",
            os.O_RDWR if row["prot"] == "rw-s" else os.O_RDONLY,
            row["mode"],
            (row["uid"], row["gid"], 0),
            row["mtime"][0] * 10**9 + row["mtime"][1] // 1000 * 1000,
            row["sha256"],
        )
        for row in ghosts
    )
    inodes: dict[str, set[tuple[int, int]]] = {}
    for number in (3, *keys.values()):
        inode = known[number]["dev"], known[number]["ino"]
        inodes.setdefault(known[number]["link"], set()).add(inode)
    assert {len(found) for found in inodes.values()} == {1}
    assert len(set.union(*inodes.values())) == len({row["group"] for row in ghosts})


def _length(key: str) -> int:
    start, _, end = key.removeprefix("map:").partition("-")
    return int(end, 16) - int(start, 16)


def root_namespace() -> int:
    return corpus("08-mmap")[0].root_namespace


@pytest.mark.long
def test_mapped_ghosts_in_a_rebuilt_namespace(tmp_path: Path) -> None:
    report = tmp_path / "report"
    images = CORPUS / "08-mmap" / "images"
    done = run("restore", "-D", images, "--discard", "--report", report)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(report.read_text())
    assert (document["ghosts"], len(document["keys"])) == (5, 6)

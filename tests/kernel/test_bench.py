"""The benchmarks measure what they say: real images, the whole work, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from bench import big, criu, filesystems, leased, loop, many, memory, mounts, rivals, writable
from bench.images import Shape, content_of, name_of, write_images
from bench.measure import Setting, alternate
from bench.ratios import known, median_ratio, shown, slopes
from bench.scene import (
    BenchError,
    in_private_namespace,
    live_namespace,
    live_namespaces,
    read_mountinfo,
)
from ghostpool._images import read_images

CHECKOUT = Path(__file__).parents[2]

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

SHAPES = [
    Shape(0),
    Shape(1, mounts=1, size=0),
    Shape(300, namespaces=2, mounts=3, tasks=2, directories=2, base=b"/some/where"),
    Shape(7, namespaces=1, mounts=2, further_mounts=150, size=12287),
    Shape(3, mounts=1, size=12288),
    Shape(2, mounts=1, size=(1 << 20) + 5),
    Shape(2, mounts=1, size=1 << 30, extents=4, extent=8192),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generated_images_are_read(shape: Shape, tmp_path: Path) -> None:
    """The generator's images pass the reader's checks, and hold what the shape says."""
    directory = tmp_path / "images"
    write_images(directory, shape)
    images = read_images(directory)

    assert len(images.ghosts) == len(images.remaps) == shape.ghosts
    assert len(images.tasks) == shape.namespaces * shape.tasks
    assert len(images.mounts) == shape.namespaces
    for tree in images.mounts.values():
        assert len(tree) == 1 + shape.mounts + shape.further_mounts
        assert sum(mount.flags & 1 for mount in tree) == shape.mounts
        assert [mount.mountpoint for mount in tree[1 : 1 + shape.mounts]] == [
            shape.mountpoint(number) for number in range(shape.mounts)
        ]
        # The further mounts are binds of the root's file system, the others file systems each.
        assert len({mount.device for mount in tree}) == 1 + shape.mounts
        assert {mount.device for mount in tree[1 + shape.mounts :]} <= {tree[0].device}
    devices = {mount.device for tree in images.mounts.values() for mount in tree}
    assert len(devices) == shape.namespaces * (1 + shape.mounts)
    assert sum(len(task.descriptors) for task in images.tasks) == shape.ghosts
    for remap in images.remaps:
        ghost = remap.target - 1
        place = shape.place(ghost)
        file = images.files[remap.origin]
        above = shape.mountpoint(place.mount) + shape.directory(place.directory)
        assert file.name == above + b"/" + name_of(ghost)
        assert file.size == shape.size
        task = images.tasks[place.namespace * shape.tasks + place.task]
        assert file.id in {row.reg_id for row in task.descriptors}
        (mount,) = (m for m in images.mounts[task.namespace] if m.id == file.mnt_id)
        assert mount.mountpoint == shape.mountpoint(place.mount)


@pytest.mark.parametrize("size", [0, 4096, 12288, (1 << 20) + 5])
def test_content_of_generated_ghosts(size: int, tmp_path: Path) -> None:
    """The content lies where the reader finds it, raw below 12 KiB and in a chunk from there."""
    shape = Shape(2, mounts=1, size=size)
    directory = tmp_path / "images"
    write_images(directory, shape)
    expected = (content_of(shape)[: 1 << 20] * 2)[:size]
    ghosts = read_images(directory).ghosts.values()
    assert len(ghosts) == 2
    for ghost in ghosts:
        assert ghost.size == size
        assert ghost.mode == stat.S_IFREG | 0o644
        data = bytearray(size)
        image = (directory / ghost.file).read_bytes()
        for extent in ghost.extents:
            part = image[extent.position : extent.position + extent.length]
            data[extent.offset : extent.offset + extent.length] = part
        assert bytes(data) == expected


def test_generated_holes_are_read(tmp_path: Path) -> None:
    """A ghost with holes takes no more room than its data, in the image as in the file."""
    shape = Shape(1, mounts=1, size=1 << 30, extents=4, extent=8192)
    write_images(tmp_path / "images", shape)
    (ghost,) = read_images(tmp_path / "images").ghosts.values()
    assert ghost.size == 1 << 30
    assert [(extent.offset, extent.length) for extent in ghost.extents] == [
        (number << 28, 8192) for number in range(4)
    ]
    image = (tmp_path / "images" / ghost.file).read_bytes()
    for extent in ghost.extents:
        part = image[extent.position : extent.position + extent.length]
        assert part == content_of(shape)[:8192]


@pytest.mark.parametrize(
    "shape", [Shape(1, size=4096, extents=2), Shape(1, size=1 << 20, extents=300)]
)
def test_holes_that_do_not_fit(shape: Shape, tmp_path: Path) -> None:
    """What no dump could have is refused."""
    with pytest.raises(ValueError, match="holes need a ghost in chunks"):
        write_images(tmp_path / "images", shape)


def test_ghosts_are_spread_evenly() -> None:
    """Every namespace, mount, directory and task gets its share."""
    shape = Shape(480, namespaces=2, mounts=3, directories=4, tasks=5)
    places = [shape.place(number) for number in range(shape.ghosts)]
    assert set(Counter(places).values()) == {4}
    assert len(set(places)) == 2 * 3 * 4 * 5


def test_generated_images_are_restored(tmp_path: Path) -> None:
    """All that the images hold can be rebuilt and restored, further mounts and parents too."""
    shape = Shape(60, namespaces=2, mounts=3, tasks=2, directories=2, further_mounts=5)
    write_images(tmp_path / "images", shape)
    command = [sys.executable, "-m", "ghostpool", "restore", "-D", str(tmp_path / "images")]
    done = subprocess.run(
        [*command, "-j", "2", "--discard", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["restored"], report["ghosts"], report["remaps"]) == (True, 60, 60)
    assert (report["namespaces"], report["tasks"], len(report["mounts"])) == (2, 4, 6)
    assert all(mount["made_writable"]["task"] == 1 for mount in report["mounts"])


def bench(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench` from the checkout, with its scratch and its JSON below `tmp_path`."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--json", str(tmp_path / "samples.json"), *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert list(scratch.iterdir()) == []
    return done


def test_start_runs_to_its_end(tmp_path: Path) -> None:
    """The smallest question: facts, a table with ratios first, one sample of each rival."""
    done = bench(tmp_path, "--quick", "--only", "start", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "- kernel: " + os.uname().release.partition("-")[0] in done.stdout
    assert "| 1.00 | python -c 'import trio, anyio' |" in done.stdout
    document = json.loads((tmp_path / "samples.json").read_text())
    assert document["machine"]["usable_cpus"] >= 1
    (answer,) = document["answers"]
    assert answer["name"] == "start"
    assert {"ghostpool, live namespace", "shell, nsenter"} <= answer["seconds"].keys()
    assert all(len(v) == 1 and v[0] > 0 for v in answer["seconds"].values())


@pytest.mark.long
@pytest.mark.needs_cc
def test_slope_restores_with_every_rival(tmp_path: Path) -> None:
    """ghostpool and both shells run in one live namespace, which is looked at afterwards."""
    done = bench(tmp_path, "--quick", "--only", "slope", "--rounds", "1", "--ghosts", "12", "24")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads((tmp_path / "samples.json").read_text())["answers"]
    names = {name.partition(":")[0] for name in answer["seconds"]}
    assert names >= {
        "C, one process",
        "C, one process, remounting",
        "ghostpool, 1 job",
        "ghostpool, 2 jobs, detached",
        "shell, bulk",
        "shell, one by one",
    }


C_SHAPES = [
    Shape(40, namespaces=2, mounts=3, directories=2, size=4096),
    Shape(3, mounts=1, size=0),
    Shape(2, mounts=2, size=12287),
    Shape(2, mounts=2, size=(3 << 20) + 5),
    Shape(2, mounts=1, size=64 << 20, extents=7, extent=(1 << 20) + 3),
]


@pytest.mark.needs_cc
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("strategy", ["clone", "remount"])
@pytest.mark.parametrize("shape", C_SHAPES, ids=str)
def test_the_program_in_c_restores(shape: Shape, strategy: str) -> None:
    """Everything that it is said to do is done: content, owner, mode, times, names; mounts back."""

    def body(scratch: Path) -> None:
        there = replace(shape, base=bytes(scratch / "live"))
        program = rivals.compile_c(scratch)
        write_images(scratch / "images", there)
        with live_namespaces(there) as pids:
            found = [mounts_of(pid) for pid in pids]
            for keep in (False, True):
                command = rivals.c(
                    program, scratch / "images", pids=pids, strategy=strategy, keep=keep
                )
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                assert done.stdout == f"{there.ghosts} ghosts\n"
            assert [mounts_of(pid) for pid in pids] == found
            for number in range(there.ghosts):
                check_and_remove(there, number, pids[there.place(number).namespace])

    assert in_private_namespace(body) == 0


def mounts_of(pid: int) -> list[list[bytes]]:
    """The mount points of a namespace, with their options."""
    return [line.split(b" ")[4:6] for line in read_mountinfo(pid).splitlines()]


def check_and_remove(shape: Shape, number: int, pid: int) -> None:
    """A ghost that was kept is what the images say, and so may go: nothing else is left then."""
    place = shape.place(number)
    point = shape.mountpoint(place.mount)
    path = b"/proc/%d/root%b%b/%b" % (pid, point, shape.directory(place.directory), name_of(number))
    status = os.stat(path)
    assert (status.st_uid, status.st_gid, status.st_mode) == (1000, 1000, stat.S_IFREG | 0o644)
    assert status.st_nlink == 1
    assert status.st_atime_ns == 1_600_000_000_000_001_000
    assert status.st_mtime_ns == 1_500_000_000_000_002_000
    assert status.st_size == shape.size
    assert status.st_blocks * 512 <= sum(length + 8192 for _, length in shape.data)
    content = content_of(shape)[: 1 << 20]
    with open(path, "rb") as file:
        for offset, length in shape.data:
            file.seek(offset)
            assert file.read(length) == (content * (length // len(content) + 1))[:length]
    script = ["mount -o remount,bind,rw $1; rm $1$2; mount -o remount,bind,ro $1", "sh"]
    name = shape.directory(place.directory) + b"/" + name_of(number)
    command = ["nsenter", "-t", str(pid), "-m", "sh", "-ec", *script]
    subprocess.run([*command, os.fsdecode(point), os.fsdecode(name)], check=True)


@pytest.mark.needs_cc
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_program_in_c_fails_with_its_mount_put_back() -> None:
    """An image that is cut ends it; the mount that it had made writable is not left so."""

    def body(scratch: Path) -> None:
        shape = Shape(2, mounts=1, base=bytes(scratch / "live"))
        program = rivals.compile_c(scratch)
        write_images(scratch / "images", shape)
        os.truncate(scratch / "images" / "ghost-file-2.img", 30)
        with live_namespace(shape) as pid:
            command = rivals.c(program, scratch / "images", pid=pid, strategy="remount")
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert "longer than its message" in done.stderr

    assert in_private_namespace(body) == 0


@pytest.mark.needs_cc
@pytest.mark.parametrize("name", ["rival.c", "holder.c"])
def test_programs_in_c_are_clean(name: str, tmp_path: Path) -> None:
    """No warning, however many are asked for."""
    source = CHECKOUT / "bench" / name
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    subprocess.run(["cc", "-O2", *warnings, "-o", tmp_path / "rival", source], check=True)


def leave_a_file(point: bytes, pid: int) -> None:
    script = ["mount -o remount,bind,rw $1; : > $1/left; mount -o remount,bind,ro $1", "sh"]
    subprocess.run(
        ["nsenter", "-t", str(pid), "-m", "sh", "-c", *script, os.fsdecode(point)], check=True
    )


def leave_it_writable(point: bytes, pid: int) -> None:
    command = ["nsenter", "-t", str(pid), "-m", "mount", "-o", "remount,bind,rw"]
    subprocess.run([*command, os.fsdecode(point)], check=True)


# Idle threads of an earlier test's event loop; the child uses nothing that they hold.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("sloppy", "complaint"),
    [(leave_a_file, "was left with [b'left'] in it"), (leave_it_writable, "was left writable")],
)
def test_a_sloppy_rival_is_noticed(
    sloppy: Callable[[bytes, int], None], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Work that is only half done does not count."""

    def body(scratch: Path) -> None:
        shape = Shape(0, mounts=2, base=bytes(scratch / "live"))
        with live_namespace(shape) as pid:
            sloppy(shape.mountpoint(1), pid)

    assert in_private_namespace(body) == 1
    assert complaint in capfd.readouterr().err


def test_a_failing_rival_ends_the_run(tmp_path: Path) -> None:
    """A command that fails is an error and no sample: an nsenter that can not enter."""
    programs, scratch = tmp_path / "bin", tmp_path / "scratch"
    programs.mkdir()
    scratch.mkdir()
    (programs / "nsenter").write_text("#!/bin/sh\necho no way in >&2\nexit 7\n")
    (programs / "nsenter").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--only", "start", "--rounds", "1"],
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(scratch), "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "status 7: no way in" in done.stderr
    assert list(scratch.iterdir()) == []


def test_rivals_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """One unmeasured run each, then rounds that go forth and back."""
    order: list[str] = []
    names = ("a", "b", "c")
    samples = alternate("turns", {name: lambda n=name: order.append(n) for name in names}, 3)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(names, 3)


def test_a_machine_without_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no rival then, and the reason is said."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(criu.Absent, match="no criu on the PATH"), criu.dumped(tmp_path, 1, 1):
        pass


def test_ratios_are_those_of_single_rounds() -> None:
    """A round that was disturbed says nothing, and does not become a number."""
    assert slopes([1.0, 2.0], [3.0, 6.0], 2) == [1.0, 2.0]
    assert median_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    assert median_ratio([1.0, -4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    nothing = median_ratio([1.0], [-1.0])
    assert shown(nothing) == "–"
    assert known({"a": nothing, "b": 2.0}) == {"b": 2.0}


def test_windows_are_read_from_events(tmp_path: Path) -> None:
    """A mount that is writable before one of its ghosts is there is counted."""
    events = [
        {"event": "ghost_created", "mountpoint": "/a", "at": 1.0},
        {"event": "mount_writable", "mountpoint": "/a", "at": 2.0},
        {"event": "mount_writable", "mountpoint": "/b", "at": 2.5},
        {"event": "ghost_created", "mountpoint": "/b", "at": 3.0},
        {"event": "reverted", "mountpoint": "/b", "at": 4.0},
        {"event": "reverted", "mountpoint": "/a", "at": 5.0},
    ]
    file = tmp_path / "events"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert writable.windows_of(file, mounts=2) == ([1.5, 3.0], 1)
    with pytest.raises(BenchError, match="2 of 3 mounts"):
        writable.windows_of(file, mounts=3)


QUESTIONS = [big, filesystems, leased, loop, many, memory, mounts, writable]


@pytest.mark.long
@pytest.mark.needs_cc
@pytest.mark.needs_loop
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_questions_are_answered(question: ModuleType) -> None:
    """Each has an answer of a few rows, one sample of each run at least, and its figures."""

    def body(scratch: Path) -> None:
        answer = question.measure(Setting(scratch, rounds=1, quick=True))
        assert answer.name == question.__name__.rpartition(".")[2]
        assert answer.rows
        assert all(len(row) == len(answer.columns) for row in answer.rows)
        assert all(answer.samples.values())
        assert answer.markdown()
        if question is not leased:  # of one round that is disturbed it has none
            assert answer.figures
        if question is writable:
            assert answer.figures["made writable before its first ghost is ready"] == 0
        assert {path.name for path in scratch.iterdir()} <= {"rival", "run"}

    assert in_private_namespace(body) == 0


@pytest.mark.needs_loop
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_file_systems_behind_loop_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ghosts are on the file system that is said; its device goes with it, also if it is killed."""

    def devices() -> str:
        done = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True)
        return done.stdout

    def body(scratch: Path) -> None:
        with filesystems.file_system("ext4", scratch) as root:
            shape = Shape(0, mounts=2, base=bytes(scratch / "live"))
            with live_namespace(shape, root) as pid:
                lines = read_mountinfo(pid).splitlines()
                (line,) = (one for one in lines if shape.mountpoint(1) in one)
                assert b" ro," in line
                assert b" - ext4 " in line
            assert str(scratch) in devices()
        assert str(scratch) not in devices()
        again = scratch / "again"
        again.mkdir()
        with filesystems.file_system("ext4", again):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_private_namespace(body) == -signal.SIGKILL
    assert "ghostpool-bench-" not in devices()
    monkeypatch.setenv("PATH", "/nowhere")
    absent = pytest.raises(filesystems.Absent, match=r"no mkfs\.xfs")
    with absent, filesystems.file_system("xfs", Path("/nowhere")):
        pass


def test_guard_runs_to_its_end(tmp_path: Path) -> None:
    """A run that is killed on purpose leaves nothing, and the others do the same work."""
    done = bench(tmp_path, "--quick", "--only", "guard", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "| 1.00 | neither, and nothing verified |" in done.stdout
    (answer,) = json.loads((tmp_path / "samples.json").read_text())["answers"]
    samples = answer["seconds"]
    assert len(samples) == 6
    assert answer["figures"]["share of safety"] < 1
    assert all(0 < value < 60 for values in samples.values() for value in values)

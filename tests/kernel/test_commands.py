"""What users get in hand: commands, kept files, a socket, a plan, and exit statuses to rely on.

The target is a live process in a private copy of the machine's mounts, with fresh tmpfs mounts
on directories below `base`: `a` and `b` read-only, `rw` writable, `bin` with a program. The
images are made for exactly these mounts; two tasks hold what `Stage` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool.testing._targets import built
from tests.support.corpus import CORPUS, corpus
from tests.support.imagewriter import O_RDONLY, O_RDWR, ImageSet
from tests.support.restore import (
    COMMAND,
    PROBE,
    Live,
    Probe,
    Seen,
    end,
    entering,
    fetched_at_once,
    ghostpool,
    live,
    look,
    make_read_only,
    mount_tmpfs,
    serving,
    start,
)
from tests.support.truth import specs_from_truth

pytestmark = pytest.mark.needs_mount_ns

HIGH = 700
SHARED = b"held by both tasks"
TIMES_NS = (1_600_000_000_000_001_000, 1_500_000_000_000_002_000)
CONTENT = {
    "zero": b"number zero",
    "one": b"number one",
    "two": b"number two",
    "closing": b"close-on-exec",
    "shared": SHARED,
    "written": b"open for writing",
    "deep/er/down": b"its directory is gone too",
}


@dataclass(frozen=True)
class Stage:
    """A live target and images that fit it.

    Task 1 holds 0, 1, 2 (names of `a`), 5 (close-on-exec), 9 (of `rw`, for writing) and HIGH,
    which it shares with number 4 of task 2; that one has 3, in directories that are gone, too.
    """

    base: Path
    images: Path
    target: Live
    before: Seen

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ghostpool restore` into the target."""
        return ghostpool("restore", *self.where, *arguments, **options)

    @property
    def where(self) -> tuple[object, ...]:
        """Options that name images and target."""
        return ("-D", self.images, "-t", self.target.pid)

    def look(self) -> Seen:
        """The target's mounts, and its files below `base`."""
        return look(self.target.fd, str(self.base))


def make_images(base: Path, directory: Path) -> Path:
    made = ImageSet()
    made.mount("/")
    for name, flags in ("a", 0x200001), ("b", 0x200001), ("rw", 0x200000):
        made.mount(f"{base}/{name}", flags=flags)
    made.task(1)
    made.task(2)
    ghosts = {name: made.ghost(data, mode=0o100640, uid=7, gid=8) for name, data in CONTENT.items()}
    for number, name in enumerate(("zero", "one", "two")):
        made.open(1, number, f"{base}/a/{name}", ghost=ghosts[name], pos=number)
    made.open(1, 5, f"{base}/b/closing", ghost=ghosts["closing"], cloexec=True)
    flags = O_RDWR | os.O_APPEND
    made.open(1, 9, f"{base}/rw/written", ghost=ghosts["written"], flags=flags, pos=4)
    shared = made.open(1, HIGH, f"{base}/a/shared", ghost=ghosts["shared"], pos=11)
    made.open(2, 3, f"{base}/b/deep/er/down", ghost=ghosts["deep/er/down"], cloexec=True)
    made.fd(2, 4, shared)
    return made.write(directory)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    base = tmp_path / "base"
    base.mkdir()
    # Under the target's own mount, so that only the machine's namespace has it.
    program(base / "outside", "exit 0")

    def setup() -> None:
        mount_tmpfs(base)
        for name in ("a", "b", "rw", "bin"):
            mount_tmpfs(base / name, _linux.MS_NOSUID)
        for name in ("a", "b", "rw"):
            (base / name / "living").write_text(name)
        program(base / "bin" / "inside", f'echo "$GHOSTPOOL_TASK $*" >> {tmp_path}/ran')
        for name in ("a", "b"):
            make_read_only(base / name)

    with live(setup) as target:
        before = look(target.fd, str(base))
        yield Stage(base, make_images(base, tmp_path / "images"), target, before)


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def one_line(text: str, pattern: str) -> None:
    """A refusal is one line that says what is wrong."""
    assert re.fullmatch(rf"ghostpool: .*(?:{pattern}).*\n", text), text


# -- Commands -----------------------------------------------------------------------------------


def test_command_holds_its_task_and_nothing_else(stage: Stage, tmp_path: Path) -> None:
    """Numbers, contents, flags, positions; started where the task was, when all is over."""
    report = tmp_path / "report"
    listed = [stage.base / name for name in ("a", "b", "rw")]
    done = stage.run(
        *("--jobs", 16, "--report", report, "--", *PROBE, "--to", tmp_path, *listed),
        prefix=("sh", "-c", 'ulimit -Sn 801; exec "$@"', "sh"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2)}
    assert stage.look() == stage.before

    held = {
        1: {0: "zero", 1: "one", 2: "two", 5: "closing", 9: "written", HIGH: "shared"},
        2: {3: "deep/er/down", 4: "shared"},
    }
    for task, names in held.items():
        facts = told[task]
        assert {int(fd) for fd in facts["descriptors"]} == {0, 1, 2} | set(names)
        for fd, name in names.items():
            check_descriptor(stage, name, facts["descriptors"][str(fd)])
            digest = hashlib.sha256(CONTENT[name]).hexdigest()
            assert facts["content"][str(fd)]["sha256"] == digest
        assert facts["task"] == str(task)
        assert facts["cwd"] == "/"
        assert facts["soft_limit"] == 801
        inode = os.fstat(stage.target.fd).st_ino
        assert facts["mount_namespace"] == f"mnt:[{inode}]"
        # The command saw the mounts as they were before, and no name of ours.
        assert facts["mountinfo"].encode() == stage.before.mounts
        assert list(facts["listed"].values()) == [["living"]] * 3
    assert (told[1]["cloexec"], told[2]["cloexec"]) == ("5", "3")

    document = json.loads(report.read_text())
    assert {row["task"]: row["status"] for row in document["commands"]} == {1: 0, 2: 0}
    assert len(document["commands"]) == 2
    times = {
        Path(mount["mountpoint"]).name: (mount["made_writable"], mount["leases"], mount["reverted"])
        for mount in document["mounts"]
    }
    assert times == {
        "a": ({"service": 1, "task": 1}, 1, True),
        "b": ({"service": 1, "task": 1}, 2, True),
        "rw": ({"service": 0, "task": 0}, 0, True),
    }


def check_descriptor(stage: Stage, name: str, facts: dict[str, Any]) -> None:
    where = {"closing": "b", "deep/er/down": "b", "written": "rw"}.get(name, "a")
    positions = {"one": 1, "two": 2, "shared": 11, "written": 4}
    assert facts["link"] == f"{stage.base}/{where}/{name} (deleted)"
    assert facts["flags"] == (O_RDWR | os.O_APPEND if name == "written" else O_RDONLY)
    assert facts["pos"] == positions.get(name, 0)
    assert (facts["mode"], facts["uid"], facts["gid"]) == (stat.S_IFREG | 0o640, 7, 8)
    assert facts["size"] == len(CONTENT[name])
    assert facts["nlink"] == 0
    assert (facts["atime_ns"], facts["mtime_ns"]) == TIMES_NS


def test_command_without_our_signal_dispositions(stage: Stage, tmp_path: Path) -> None:
    """No signal is ignored or blocked in a command, whatever Python or our processes ignore."""
    text = f"grep ^Sig /proc/self/status > {tmp_path}/signals.$GHOSTPOOL_TASK"
    assert stage.run("--", "sh", "-c", text).returncode == 0
    for task in (1, 2):
        rows = (
            line.split(":\t") for line in (tmp_path / f"signals.{task}").read_text().splitlines()
        )
        masks = {name: mask for name, mask in rows if name in {"SigIgn", "SigBlk"}}
        # Only the standard signals: the test may have been started with others ignored.
        assert {name: int(mask, 16) & 0x7FFFFFFF for name, mask in masks.items()} == {
            "SigIgn": 0,
            "SigBlk": 0,
        }


def test_command_is_found_in_the_namespace_of_the_task(stage: Stage, tmp_path: Path) -> None:
    """PATH is searched where the task lives: there is no such program in ours."""
    path = f"{stage.base}/bin:{os.environ['PATH']}"
    done = stage.run("--", "inside", "an argument", env={**os.environ, "PATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    ran = (tmp_path / "ran").read_text().splitlines()
    assert sorted(ran) == ["1 an argument", "2 an argument"]


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [("exit 0", "exit 7", 7), ("exit 9", "exit 3", 9), ("kill -KILL $$", "exit 2", 128 + 9)],
)
def test_exit_status_is_the_highest_of_the_commands(
    stage: Stage, tmp_path: Path, first: str, second: str, status: int
) -> None:
    """One that a signal ended counts as 128 and its number; the report has them all."""
    report = tmp_path / "report"
    text = f"if [ $GHOSTPOOL_TASK = 1 ]; then {first}; else {second}; fi"
    done = stage.run("--report", report, "--", "sh", "-c", text)
    assert (done.returncode, done.stderr) == (status, "")
    document = json.loads(report.read_text())
    statuses = {row["task"]: row["status"] for row in document["commands"]}
    lesser = {7: 0, 9: 3, 137: 2}[status]
    assert statuses == ({1: status, 2: lesser} if status != 7 else {1: lesser, 2: status})
    assert document["restored"]
    assert document["errors"] == []
    assert stage.look() == stage.before


@pytest.mark.parametrize("where", ["nowhere", "outside"])
def test_command_that_can_not_be_started(stage: Stage, where: str, tmp_path: Path) -> None:
    """It fails the run, by one line, and everything is as before."""
    report = tmp_path / "report"
    command = stage.base / where  # "outside" is there, but not in the target
    done = stage.run("--report", report, "--", command)
    assert (done.returncode, done.stdout) == (1, "")
    one_line(done.stderr, f"{re.escape(str(command))}: No such file or directory")
    (error,) = json.loads(report.read_text())["errors"]
    assert "No such file" in error["message"]
    assert stage.look() == stage.before


def test_interrupted_run_ends_its_commands(stage: Stage, tmp_path: Path) -> None:
    """A signal to the run ends the commands, too, and the status is 130."""
    text = f"touch {tmp_path}/started.$GHOSTPOOL_TASK; exec sleep 60"
    process = start([*COMMAND, "restore", *stage.where, "--", "sh", "-c", text])
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("started.*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGINT)
        said = end(process)
    assert process.returncode == 130
    one_line(said, "interrupted")
    assert stage.look() == stage.before


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        ("--json -- true", "stdout belongs to the command"),
        ("--report - -- true", "stdout belongs to the command"),
        ("--keep --discard", "--keep and --discard exclude each other"),
        ("--keep -- true", "a command and --keep exclude each other"),
        ("--discard --serve socket", "--discard and --serve exclude each other"),
        ("--serve socket -- true", "a command and --serve exclude each other"),
        ("--listen-fds --keep", "--listen-fds is for a command"),
        ("--listen-fds --discard", "--listen-fds is for a command"),
        ("--listen-fds --serve socket", "--listen-fds is for a command"),
        ("--json --report file", "--json and --report FILE exclude each other"),
        ("--jobs 0 --discard", "--jobs.* 0 is not in the range"),
        ("--ns ten=1 --discard", "ID=PID or ID=PATH"),
    ],
)
def test_options_that_exclude_each_other(arguments: str, saying: str, tmp_path: Path) -> None:
    """They are refused before anything is looked at."""
    done = ghostpool("restore", "-D", "nowhere", *arguments.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, saying)
    assert not list(tmp_path.iterdir())


# -- Files --------------------------------------------------------------------------------------


def test_keep_leaves_the_files_at_their_old_names(stage: Stage) -> None:
    """Linked where they were, as they were, directories made anew; nothing else is different."""
    done = stage.run("--keep", "--jobs", 16)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    after = stage.look()
    assert after.mounts == stage.before.mounts
    kept = {
        f"{stage.base}/{where}/{name}": CONTENT[name]
        for where, names in {
            "a": ("zero", "one", "two", "shared"),
            "b": ("closing", "deep/er/down"),
            "rw": ("written",),
        }.items()
        for name in names
    }
    made = {f"{stage.base}/b/deep", f"{stage.base}/b/deep/er"}
    assert set(after.files) == set(stage.before.files) | set(kept) | made
    for path, content in kept.items():
        mode, uid, gid, _, _, nlink, size, _, mtime, _, digest = after.files[path]
        assert (mode, uid, gid, nlink) == (stat.S_IFREG | 0o640, 7, 8, 1)
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
        assert mtime == TIMES_NS[1]
    for path, known in stage.before.files.items():
        if stat.S_ISREG(known[0]):
            assert after.files[path] == known


def test_keep_goes_round_a_name_that_is_taken(stage: Stage, tmp_path: Path) -> None:
    """A living file is not touched; the ghost is kept beside it."""
    made = ImageSet()
    made.mount("/")
    made.mount(f"{stage.base}/a", flags=0x200001)
    made.task(1)
    made.open(1, 3, f"{stage.base}/a/living", ghost=made.ghost(b"the older one"))
    images = made.write(tmp_path / "taken")
    done = ghostpool("restore", "-D", images, "-t", stage.target.pid, "--keep")
    assert done.returncode == 0
    one_line(done.stderr, r"taken by a living file.*living\.cr_link")
    after = stage.look()
    beside = f"{stage.base}/a/living.cr_link"
    assert after.files.pop(beside)[-1] == hashlib.sha256(b"the older one").hexdigest()
    assert after == stage.before


def test_discard_leaves_nothing(stage: Stage) -> None:
    """A rehearsal: everything is done, checked and gone again; --json is all of stdout."""
    done = stage.run("--discard", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["restored"], document["ghosts"]) == (True, len(CONTENT))
    assert stage.look() == stage.before


# -- Serving ------------------------------------------------------------------------------------


def fetch(path: str, task: int, *command: object) -> subprocess.CompletedProcess[str]:
    return ghostpool("fetch", "--socket", path, "--task", task, "--", *(command or ("true",)))


def test_serving_each_task_once(stage: Stage, tmp_path: Path) -> None:
    """Whoever has fetched becomes its command when all tasks are; with the last the server ends."""
    path = tmp_path / "socket"
    with serving(*stage.where, "--serve", path) as served:
        assert (served.tasks, served.socket) == (2, str(path))
        status = path.lstat()
        assert (stat.S_ISSOCK(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o600)

        done = fetch(served.socket, 3)
        assert (done.returncode, done.stdout) == (2, "")
        one_line(done.stderr, "refused: no task 3 here, but 1, 2")

        probe = Probe(served.socket, 2)
        done = fetch(served.socket, 1, *PROBE, "--to", tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        facts = json.loads((tmp_path / "1.json").read_text())
        assert {int(fd) for fd in facts["descriptors"]} == {0, 1, 2, 5, 9, HIGH}
        assert facts["content"]["0"]["sha256"] == hashlib.sha256(CONTENT["zero"]).hexdigest()
        assert facts["cloexec"] == "5"
        assert set(probe.descriptors) == {0, 1, 2, 3, 4}
        assert served.process.wait(timeout=30) == 0
        assert not path.exists()
        assert stage.look() == stage.before
        probe.close()


def hello(path: str, task: int) -> socket.socket:
    """A connection of this process that has got the descriptors of a task, and closed them."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(30)
    connection.connect(path)
    connection.send(json.dumps({"type": "hello", "version": 1, "task": task}).encode())
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 253)
    assert len(fds) == len(json.loads(data)["files"]) > 0
    _linux.close_all(fds)
    return connection


def test_a_lost_consumer_ends_it_for_all(stage: Stage, tmp_path: Path) -> None:
    """All are told which one, and why; nothing is left of it."""
    path = str(tmp_path / "socket")
    with serving(*stage.where, "--serve", path) as served:
        lost = hello(path, 1)
        done = fetch(path, 1)
        assert (done.returncode, done.stdout) == (2, "")
        one_line(done.stderr, "refused: task 1 has another consumer")
        other = start([*COMMAND, "fetch", "--socket", path, "--task", 2, "--", "true"])
        lost.send(b'{"type": "abort", "reason": "no \\"room\\" \\u001b[2J"}')
        reason = rf"consumer of task 1 \(process {os.getpid()}\) aborted \(no \"room\" .x1b\[2J\)"
        one_line(end(served.process), reason)
        assert served.process.returncode == 1
        message = json.loads(lost.recv(1 << 16))
        assert (message["type"], message["refused"]) == ("abort", False)
        lost.close()
        one_line(end(other), f"(?:the restore was undone: .*{reason}|is ghostpool serving there)")
        assert other.returncode in (1, 2)
    assert not os.path.exists(path)
    assert stage.look() == stage.before


def test_time_limit_names_who_has_not_arrived(stage: Stage, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    report = tmp_path / "report"
    limits = ("--timeout", 1, "--report", report)
    process = start([*COMMAND, "restore", *stage.where, "--serve", path, *limits])
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving 2 tasks on {path}\n"
    with hello(path, 1) as connection:
        missing = "nobody has said hello for task 2; the consumer has not said ready for task 1"
        assert end(process) == (
            f"ghostpool: not done within 1 s; {missing}; everything was undone\n"
        )
        message = json.loads(connection.recv(1 << 16))
        assert message == {"type": "abort", "reason": f"cancelled; {missing}", "refused": False}
    assert process.returncode == 1
    assert json.loads(report.read_text())["restored"] is False
    assert stage.look() == stage.before


def test_serving_says_so_to_people_only(stage: Stage, tmp_path: Path) -> None:
    """With the report on stdout the path goes to stderr; interrupted, the socket is gone."""
    path = tmp_path / "socket"
    command = [*COMMAND, "restore", *stage.where, "--json", "--serve", path]
    process = start(command, stdin=subprocess.DEVNULL)
    assert process.stderr is not None
    assert process.stderr.readline() == f"serving 2 tasks on {path}\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    one_line(err, "interrupted")
    assert json.loads(out)["status"] == 130
    assert not path.exists()
    assert stage.look() == stage.before


def test_serving_where_something_is(stage: Stage, tmp_path: Path) -> None:
    """A path that is taken is refused first of all, and what is there stays."""
    path = tmp_path / "socket"
    path.write_text("something else")
    missing = tmp_path / "no images here"
    done = ghostpool("restore", "-D", missing, "-t", stage.target.pid, "--serve", path)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "--serve .*/socket: Address already in use")
    assert path.read_text() == "something else"
    assert stage.look() == stage.before


def test_socket_in_the_run_directory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is made in a directory of ours alone, and printed."""
    monkeypatch.delenv("GHOSTPOOL_RUN_DIR")
    with (
        live(lambda: mount_tmpfs(Path("/run"))) as other,
        serving(*stage.where, prefix=entering(other)) as served,
    ):
        directory = Path(served.socket).parent
        assert directory == Path("/run/ghostpool")
        seen = look(other.fd, "/run").files
        assert stat.S_IMODE(seen[str(directory)][0]) == 0o700
        assert seen[served.socket][0] == stat.S_IFSOCK | 0o600
        enter = entering(other)
        for done in fetched_at_once(served.socket, (1, 2), "--", "true", prefix=enter).values():
            assert done.returncode == 0
        assert served.process.wait(timeout=30) == 0
        assert set(look(other.fd, "/run").files) == {"/run", "/run/ghostpool"}


@pytest.mark.parametrize(("mode", "owner"), [(0o711, 0), (0o770, 0), (0o700, 1)])
def test_run_directory_of_others(
    stage: Stage, mode: int, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory that others can enter, or own, is refused before anything is touched."""
    monkeypatch.delenv("GHOSTPOOL_RUN_DIR")

    def setup() -> None:
        mount_tmpfs(Path("/run"))
        os.mkdir("/run/ghostpool")
        os.chown("/run/ghostpool", owner, owner)
        os.chmod("/run/ghostpool", mode)

    with live(setup) as other:
        done = stage.run(prefix=entering(other))
        assert set(look(other.fd, "/run").files) == {"/run", "/run/ghostpool"}
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "/run/ghostpool is open to others: name .* with GHOSTPOOL_RUN_DIR")
    assert stage.look() == stage.before


# -- Plans --------------------------------------------------------------------------------------


def planned(case: str, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`ghostpool plan` as people see it and as JSON, for namespaces that it must not change."""
    images, truth = corpus(case)
    specs = specs_from_truth(truth)
    numbers = {task["pid"]: task["mntns"] for task in truth["tasks"]}
    ids = {numbers[task.pid]: task.namespace for task in images.tasks}
    with built(specs) as fds:
        words = [
            f"--ns={ids[spec.id]}=/proc/{os.getpid()}/fd/{fd}"
            for spec, fd in zip(specs, fds, strict=True)
        ]
        before = [look(fd) for fd in fds]
        arguments = ("plan", "-D", CORPUS / case / "images", *words, *options)
        shown = ghostpool(*arguments, env={**os.environ, "COLUMNS": "200"})
        parsed = ghostpool(*arguments, "--json")
        assert [look(fd) for fd in fds] == before
    assert (parsed.returncode, parsed.stderr) == (shown.returncode, "")
    return shown, json.loads(parsed.stdout)


@pytest.mark.parametrize("case", ["01-ro-basic", "06-nested-mntns", "10-ro-bind-shared"])
def test_plan_names_the_mounts_to_be_made_writable(case: str) -> None:
    """Exactly the read-only ones that hold ghosts, each with its flags of now."""
    shown, document = planned(case)
    assert shown.returncode == 0
    _, truth = corpus(case)
    holding = {
        (entry["mount_ns"], entry["mount"])
        for task in truth["tasks"]
        for entry in task["fds"]
        if entry["remap"] == "ghost"
    }
    flags = {(m["ns"], m["mountpoint"]): set(m["flags"]) for m in truth["mounts"]}
    wanted = sorted(
        (point, "ro" in flags[ns, point], sorted(flags[ns, point] - {"ro"}))
        for ns, point in holding
    )
    got = sorted(
        (mount["mountpoint"], mount["made_writable"], sorted(set(mount["options"]) - {"ro", "rw"}))
        for mount in document["mounts"]
    )
    assert got == wanted
    assert shown.stdout.count("made writable") == sum(writable for _, writable, _ in wanted)
    for task in truth["tasks"]:
        for entry in task["fds"]:
            assert (entry["path"] in shown.stdout) == (entry["remap"] == "ghost")


def test_plan_says_under_which_other_name_a_ghost_is_opened() -> None:
    """Names that living files have taken meanwhile, one on each kind of mount."""
    shown, document = planned("04-shared")
    assert shown.returncode == 0
    names = {entry["path"]: entry["name"] for entry in document["opens"]}
    assert {path: name for path, name in names.items() if name != Path(path).name} == {
        "/data/rw/ursa.db": "ursa.db.cr_link",
        "/data/ro/lotus.idx": "lotus.idx.cr_link",
    }
    assert len(document["warnings"]) == 2
    for warning in document["warnings"]:
        assert f"warning: {warning}" in shown.stdout
        assert "is not touched" in warning


def test_plan_says_what_is_refused_and_why() -> None:
    """Devices and setuid files, each with the option that lets it through; exit status 2."""
    shown, document = planned("02-types")
    assert shown.returncode == 2
    reasons = [refusal["message"] for refusal in document["refusals"]]
    assert sum("--allow-devices" in reason for reason in reasons) == 4
    assert sum("--allow-setuid" in reason for reason in reasons) == 4
    assert len(reasons) == 8
    privileged = document["privileged"]
    kinds = [kind.split()[-2:] for entry in privileged for kind in entry["kinds"]]
    assert sum("device" in words for words in kinds) == 4
    assert sum(words in (["setuid"], ["setgid"]) for words in kinds) >= 4
    assert not any(entry["allowed"] for entry in privileged)
    for entry in privileged:
        line = f"privileged: {entry['path']}: {' and '.join(entry['kinds'])}, refused"
        assert line in shown.stdout
    for refusal in document["refusals"]:
        assert f"refused: {refusal['subject']}: {refusal['message']}" in shown.stdout
    assert "can be restored" not in shown.stdout

    shown, document = planned("02-types", "--allow-devices")
    assert shown.returncode == 2
    assert len(document["refusals"]) == 4
    assert sum(entry["allowed"] for entry in document["privileged"]) == 4

    shown, document = planned("02-types", "--allow-devices", "--allow-setuid")
    assert (shown.returncode, document["refusals"]) == (0, [])
    assert "25 ghosts, 25 opens: can be restored" in shown.stdout
    assert [{**entry, "allowed": True} for entry in privileged] == document["privileged"]
    assert shown.stdout.count(", allowed\n") == len(privileged)


def test_plan_for_rebuilt_namespaces() -> None:
    """Without targets it plans for what restore would rebuild."""
    done = ghostpool("plan", "-D", CORPUS / "06-nested-mntns" / "images", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert len(document["mounts"]) == 6
    assert all(f"mountpoints-{m['namespace']}.img" in m["target"] for m in document["mounts"])
    done = ghostpool("plan", "-D", CORPUS / "03-sparse-fiemap" / "images")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "/data/disk.*--external disk0=PATH")


def test_refused_restore_touches_nothing(stage: Stage, tmp_path: Path) -> None:
    """What the plan refuses, restore refuses: status 2, one line, and a report that says why."""
    made = ImageSet()
    made.mount("/")
    made.mount(f"{stage.base}/a", flags=0x200001)
    made.task(1)
    made.open(1, 3, f"{stage.base}/a/fine", ghost=made.ghost(b"fine"))
    device = made.ghost(mode=0o20600, rdev=os.makedev(1, 3))
    made.open(1, 4, f"{stage.base}/a/null", ghost=device)
    images = made.write(tmp_path / "device")
    report = tmp_path / "report"
    where = ("-D", images, "-t", stage.target.pid)
    done = ghostpool("restore", *where, "--report", report, "--", "touch", tmp_path / "ran")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, r"a/null.*device \(1:3\), refused without --allow-devices")
    document = json.loads(report.read_text())
    assert (document["status"], document["restored"]) == (2, False)
    assert len(document["errors"]) == 1
    assert not (tmp_path / "ran").exists()
    assert stage.look() == stage.before

"""The examples of docs/runtimes.md, called as systemd and CRIU call them.

Neither runs here. What the service manager does is done with its own commands, or by the test:
a datagram socket that is told what to keep, and a start with what was kept. CRIU is known by what
it gives its action scripts: variables, and a process in the namespaces that it has restored.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool.testing import built_targets
from tests.kernel.test_listenfds import passes
from tests.support.corpus import CORPUS, corpus
from tests.support.imagewriter import O_RDWR, ImageSet
from tests.support.restore import (
    COMMAND,
    LIMIT_S,
    end,
    ghostpool,
    live,
    look,
    mount_tmpfs,
    serving,
    start,
)
from tests.support.truth import specs_from_truth

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SYSTEMD = EXAMPLES / "systemd"
HELD = {1: {3: "log", 9: "data"}, 2: {5: "other"}}


def environment(**more: str) -> dict[str, str]:
    """With the commands of this package in PATH."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **more}


# -- systemd ------------------------------------------------------------------------------------


@pytest.fixture
def where(tmp_path: Path) -> Iterator[tuple[object, ...]]:
    """Options that name images and their target; the log of task 1 is open for writing."""
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/mnt", device=(0, 70))
    for task, held in HELD.items():
        images.task(task)
        for number, name in held.items():
            ghost = images.ghost(name.encode())
            flags = O_RDWR | os.O_APPEND if name == "log" else os.O_RDONLY
            images.open(task, number, f"/mnt/{name}", ghost=ghost, flags=flags)
    with live(lambda: mount_tmpfs(Path("/mnt"))) as target:
        yield "-D", images.write(tmp_path / "images"), "-t", target.pid


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self._socket.settimeout(LIMIT_S)

    def kept(self) -> dict[str, int]:
        """What it has been told to keep since."""
        self._socket.settimeout(0)
        found: dict[str, int] = {}
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self._socket, 1 << 12, 253)
            except BlockingIOError:
                return found
            assert not flags & socket.MSG_CTRUNC
            fields = dict(line.split("=") for line in data.decode().split("\n"))
            assert set(fields) == {"FDSTORE", "FDNAME", "FDPOLL"}, fields
            assert (fields["FDSTORE"], fields["FDPOLL"], len(fds)) == ("1", "0", 1)
            found[fields["FDNAME"]] = fds[0]

    def close(self) -> None:
        self._socket.close()


@contextmanager
def manager(address: str) -> Iterator[Manager]:
    made = Manager(address)
    try:
        yield made
    finally:
        made.close()


def unit(name: str, socket_path: Path) -> str:
    """A unit of the examples, for what is installed here."""
    text = (SYSTEMD / name).read_text()
    for there, here in (
        ("/usr/local/bin/ghostpool", shutil.which("ghostpool", path=environment()["PATH"])),
        ("/usr/local/lib/ghosts", SYSTEMD),
        ("/run/ghosts.sock", socket_path),
    ):
        text = text.replace(there, str(here))
    return text


@pytest.mark.needs_systemd
def test_units_are_what_systemd_expects(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say: no unknown key, no program that is not there."""
    names = sorted(path.name for path in SYSTEMD.iterdir() if path.suffix != ".py")
    assert names == ["ghosts.service", "ghosts.socket", "server.service"]
    for name in names:
        (tmp_path / name).write_text(unit(name, tmp_path / "socket"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / name for name in names)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("abstract", [False, True])
def test_what_is_given_to_the_service_manager(
    where: tuple[object, ...], tmp_path: Path, abstract: bool
) -> None:
    """Each descriptor by its number in the task, as the very open file that the command has."""
    address = f"@{tmp_path}" if abstract else f"{tmp_path}/notify"
    with manager(address) as notified:
        store = [SYSTEMD / "store.py", "-", "-", "true"]
        words = ("--listen-fds", "--", *store)
        done = ghostpool("restore", *where, *words, env=environment(NOTIFY_SOCKET=address))
        assert (done.returncode, done.stderr) == (0, "")
        kept = notified.kept()
    try:
        named = {str(number): name for held in HELD.values() for number, name in held.items()}
        assert {name: os.pread(fd, 100, 0).decode() for name, fd in kept.items()} == named
    finally:
        _linux.close_all(kept.values())


def test_a_service_keeps_its_files_over_a_crash(where: tuple[object, ...], tmp_path: Path) -> None:
    """Restored at the first start; at the next one it has what the service manager has kept."""
    path = tmp_path / "socket"
    (line,) = (
        line for line in unit("server.service", path).splitlines() if line.startswith("ExecStart=")
    )
    command = shlex.split(line.removeprefix("ExecStart="))
    address = f"{tmp_path}/notify"
    env = environment(NOTIFY_SOCKET=address)
    with manager(address) as notified, serving(*where, "--serve", path):
        other = start([*COMMAND, "fetch", "--socket", path, "--task", 2, "--", "true"])
        first = start(command, env=env)
        assert said(first) == ["3: 3 bytes", "9: 4 bytes"]
        assert (end(other), other.returncode) == ("", 0)
        first.kill()
        assert end(first) == ""
        kept = notified.kept()
        assert set(kept) == {"3", "9"}
        words = [f"fd:{fd}" for fd in kept.values()]
        env["LISTEN_FDNAMES"] = ":".join(kept)
        second = start([*passes(*words), *command], env=env, pass_fds=kept.values())
        _linux.close_all(kept.values())
        # What the first one wrote, and nothing restored a second time.
        added = len(f"started as process {first.pid}\n")
        assert said(second) == [f"3: {3 + added} bytes", "9: 4 bytes"]
        second.send_signal(signal.SIGTERM)
        assert end(second) == ""
        assert second.returncode == 0
        assert notified.kept() == {}


def said(process: subprocess.Popen[str]) -> list[str]:
    """What the service says until it is ready."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        if line == "ready\n":
            return lines
        lines.append(line.rstrip("\n"))
    raise AssertionError(f"{lines}, then {end(process)}")


# -- CRIU ---------------------------------------------------------------------------------------

# Of a restore, in order; the pid of the root task is known from the second one on.
ACTIONS = (
    *("pre-restore", "setup-namespaces", "post-setup-namespaces"),
    *("post-restore", "network-unlock", "pre-resume", "post-resume"),
)


def act(action: str, images: int, pid: int, **more: str) -> subprocess.CompletedProcess[str]:
    """Call the script as CRIU does: the images are a descriptor of CRIU's process."""
    env = environment(CRTOOLS_SCRIPT_ACTION=action, **more)
    env["CRTOOLS_IMAGE_DIR"] = f"/proc/{os.getpid()}/fd/{images}"
    if action != "pre-restore":
        env["CRTOOLS_INIT_PID"] = str(pid)
    return subprocess.run(
        [EXAMPLES / "criu" / "keep-ghosts.sh"],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


@contextmanager
def criu(case: str, images: Path) -> Iterator[tuple[int, int, int]]:
    """Images as a descriptor, the root task, and a descriptor of its mount namespace."""
    (spec,) = specs_from_truth(corpus(case)[1])
    directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with built_targets(spec) as targets:
            target = targets[spec.id]
            yield directory, target.pid, target.fd
    finally:
        os.close(directory)


@pytest.mark.parametrize("case", ["01-ro-basic", "10-ro-bind-shared"])
def test_criu_restores_with_deleted_files_by_name(case: str) -> None:
    """Checked before anything is there, done when all is there; mounts as they were."""
    entries = [fd for task in corpus(case)[1]["tasks"] for fd in task["fds"]]
    wanted = {entry["path"]: entry["sha256"] for entry in entries if entry["remap"] == "ghost"}
    assert wanted
    with criu(case, CORPUS / case / "images") as (images, pid, namespace):
        before = look(namespace)
        for action in ACTIONS:
            done = act(action, images, pid)
            assert (done.returncode, done.stderr) == (0, ""), action
            if action == "post-restore":
                break
            assert look(namespace) == before
        after = look(namespace)
        assert after.mounts == before.mounts
        assert {path: after.files[path][-1] for path in wanted} == wanted
        for action in ACTIONS[ACTIONS.index("post-restore") + 1 :]:
            assert act(action, images, pid).returncode == 0
        assert look(namespace) == after


def test_criu_gives_up_if_a_ghost_is_damaged(tmp_path: Path) -> None:
    """Before there is a process; and if it had gone on all the same, nothing would be kept."""
    images = tmp_path / "images"
    shutil.copytree(CORPUS / "01-ro-basic" / "images", images)
    damaged = images / "ghost-file-1.img"
    os.truncate(damaged, damaged.stat().st_size - 100)
    with criu("01-ro-basic", images) as (fd, pid, namespace):
        before = look(namespace)
        for action in ("pre-restore", "post-restore"):
            done = act(action, fd, pid)
            assert done.returncode == 2
            assert "ghost-file-1.img" in done.stderr
        assert look(namespace) == before


def test_criu_gives_up_if_a_ghost_is_refused() -> None:
    """And goes on with the option that lets it through."""
    with criu("02-types", CORPUS / "02-types" / "images") as (images, pid, namespace):
        before = look(namespace)
        assert act("pre-restore", images, pid).returncode == 2
        assert act("post-restore", images, pid).returncode == 2
        assert look(namespace) == before
        options = "--allow-devices --allow-setuid"
        for action in ("pre-restore", "post-restore"):
            done = act(action, images, pid, GHOSTPOOL_OPTIONS=options)
            assert done.returncode == 0, done.stderr
        assert look(namespace).files.keys() > before.files.keys()


def test_what_criu_mounts_from_outside(tmp_path: Path) -> None:
    """Only the check that comes before there is a process has to be told what that is."""
    with criu("03-sparse-fiemap", CORPUS / "03-sparse-fiemap" / "images") as (images, pid, _):
        refused = act("pre-restore", images, pid)
        assert refused.returncode == 2
        assert "--external disk0=PATH" in refused.stderr
        for action in ("pre-restore", "post-restore"):
            done = act(action, images, pid, GHOSTPOOL_PLAN=f"--external disk0={tmp_path}")
            assert (done.returncode, done.stderr) == (0, "")

"""Whatever ends a run in the middle, everything is undone.

Signals and --timeout are swept over the whole duration of a restore of 300 ghosts on ten
read-only mounts in two namespaces; some moments are also met on purpose, by watching the
target: temporaries there, mounts writable, mounts read-only again. After each: the mount table
and every file as before (the times of directories excepted), no process, no socket.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ghostpool._linux import Attr
from ghostpool.testing import Snapshot
from ghostpool.testing._namespace import enter
from tests.support.crash import journals
from tests.support.imagewriter import ImageSet
from tests.support.live import (
    ROOT,
    RUN_S,
    Live,
    Run,
    assert_gone,
    descendants,
    host_programs,
    live,
    process,
    read_lines,
    read_only,
    run,
    running,
)

pytestmark = pytest.mark.needs_mount_ns

MOUNTS = 5
"""In each of two namespaces."""
GHOSTS = 300
OPENS = 6
"""Of each ghost, which make the time between the changes of the mounts longer."""
SIZE = 64 << 10
EVERYTHING_UNDONE = "ghostpool: interrupted; everything was undone\n"


class Scene:
    """Images, two targets, and what these are like while nothing runs."""

    def __init__(self, images: Path, targets: Sequence[Live]) -> None:
        self.images = images
        self.targets = targets
        self.before = self.look()
        self.arguments: list[str | Path | int] = ["restore", "-D", images, "--jobs", 4]
        for number, target in enumerate(targets):
            self.arguments += ["--ns", f"{10 + number}={target.pid}"]

    def look(self) -> list[Snapshot]:
        return [target.snapshot().without_directory_times() for target in self.targets]

    def assert_as_before(self) -> None:
        for before, now in zip(self.before, self.look(), strict=True):
            assert now.mountinfo == before.mountinfo
            assert now.files == before.files

    def any_writable(self) -> bool:
        """Whether one of the read-only mounts is writable now."""
        return any(
            options[0] == "rw"
            for target in self.targets
            for point, options in target.options().items()
            if point != b"/"
        )

    def temporaries(self) -> bool:
        """Whether a temporary name is on the first mount now."""
        names = os.listdir(f"/proc/{self.targets[0].pid}/root/m0/d0")
        return any(name.startswith(".ghostpool-") for name in names)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = ImageSet()
    for number in (10, 11):
        made.mount("/", ns=number)
        for mount in range(MOUNTS):
            made.mount(f"/m{mount}", ns=number, flags=0x200001)
    made.task(1, ns=10)
    made.task(2, ns=11)
    for number in range(GHOSTS):
        ghost = made.ghost(number.to_bytes(2, "little") * (SIZE // 2))
        name = f"/m{number % MOUNTS}/d{number % 3}/gone-{number}"
        for again in range(OPENS):
            made.open(1 + number % 2, 3 + OPENS * number + again, name, ghost=ghost)
    images = made.write(tmp_path_factory.mktemp("images"))
    # The third directory is missing, so that there are parents to make and to take away.
    mounts = [read_only(10 + n, b"/m%d" % n, "d0/", "d1/", "keep") for n in range(MOUNTS)]
    with live(mounts, mounts) as targets:
        yield Scene(images, targets)


@pytest.fixture(scope="module")
def work_s(scene: Scene) -> float:
    """Seconds from the first worker to the end of a restore, at the least."""
    seconds = []
    for _ in range(3):
        with running(*scene.arguments, "--discard") as restore:
            assert wait_for(lambda pid=restore.pid: bool(workers(pid)), restore)  # type: ignore[misc]
            begun = time.monotonic()
            assert finish(restore).status == 0
        seconds.append(time.monotonic() - begun)
    return min(seconds)


def fork_servers(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def workers(pid: int) -> list[psutil.Process]:
    """Children of the fork server, which is the first child of the command.

    Without the guardian, which has a session of its own.
    """
    server = fork_servers(pid)
    return [w for w in server[0].children() if session_of(w.pid) != w.pid] if server else []


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def wait_for(condition: Callable[[], bool], restore: subprocess.Popen[str]) -> bool:
    """Wait for a moment of a run; False if the run ended before."""
    deadline = time.monotonic() + RUN_S
    while not condition():
        assert time.monotonic() < deadline
        if restore.poll() is not None:
            return False
    return True


def sweep(end: float, count: int) -> list[float]:
    """Delays from 0 to `end` seconds."""
    return [end * number / (count - 1) for number in range(count)]


def send(restore: subprocess.Popen[str], *numbers: signal.Signals) -> None:
    """Send signals, with a few milliseconds in between: the second one meets the undoing."""
    for number in numbers:
        restore.send_signal(number)
        time.sleep(0.004)


HOW: dict[str, Callable[[subprocess.Popen[str]], None]] = {
    "SIGINT": lambda restore: send(restore, signal.SIGINT),
    "SIGTERM": lambda restore: send(restore, signal.SIGTERM),
    "SIGINT twice": lambda restore: send(restore, signal.SIGINT, signal.SIGINT),
    "both, and again": lambda restore: send(
        restore, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    ),
    # As a terminal does for Ctrl-C: fork server and workers get it too.
    "SIGINT to the group": lambda restore: os.killpg(restore.pid, signal.SIGINT),
}


def finish(restore: subprocess.Popen[str]) -> Run:
    out, err = restore.communicate(timeout=RUN_S)
    return Run(restore.returncode, out, err, 0.0)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.long] * (how != "SIGINT")) for how in HOW]
)
def test_signal_at_any_moment(scene: Scene, work_s: float, how: str) -> None:
    """Exit status 130, or 0 where the run was done before the signal came."""
    # While the command still imports what it needs; then from its first worker to its end.
    delays = [(fork_servers, delay) for delay in (0.0, 0.03, 0.08)]
    delays += [(workers, delay) for delay in sweep(0.9 * work_s, 6)]
    ended: Counter[int] = Counter()
    for look, delay in delays:
        with running(*scene.arguments, "--discard", start_new_session=True) as restore:
            assert wait_for(lambda: bool(look(restore.pid)), restore)  # noqa: B023
            time.sleep(delay)
            pids = descendants(restore.pid)
            HOW[how](restore)
            done = finish(restore)
        assert done.status in (0, 130), (delay, done)
        assert done.err in ("", "\n", EVERYTHING_UNDONE), (delay, done)
        assert_gone(pids)
        scene.assert_as_before()
        ended[done.status] += 1
    assert ended[130] >= 6, ended


MOMENTS: dict[str, Callable[[Scene, subprocess.Popen[str]], bool]] = {
    "a worker is there": lambda scene, restore: wait_for(
        lambda: bool(workers(restore.pid)), restore
    ),
    "ghosts are being made": lambda scene, restore: wait_for(scene.temporaries, restore),
    "mounts are writable": lambda scene, restore: wait_for(scene.any_writable, restore),
    "mounts are read-only again": lambda scene, restore: (
        wait_for(scene.any_writable, restore)
        and wait_for(lambda: not scene.any_writable(), restore)
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_at_a_chosen_moment(scene: Scene, moment: str) -> None:
    with running(*scene.arguments, "--discard", start_new_session=True) as restore:
        assert MOMENTS[moment](scene, restore)
        os.killpg(restore.pid, signal.SIGINT)
        restore.send_signal(signal.SIGINT)
        done = finish(restore)
    scene.assert_as_before()
    if moment != "mounts are read-only again" or done.status:
        assert (done.status, done.err) == (130, EVERYTHING_UNDONE)


@pytest.mark.long
def test_timeout_at_any_moment(scene: Scene, work_s: float) -> None:
    """Exit status 1, and the line says what was waited for."""
    ended: Counter[int] = Counter()
    for delay in sweep(0.9 * work_s, 8):
        limit = 0.002 + delay
        done = run(*scene.arguments, "--discard", "--timeout", f"{limit:.4f}")
        assert done.status in (0, 1), done
        if done.status:
            assert re.fullmatch(
                r"ghostpool: not done within [\d.]+ s; everything was undone\n", done.err
            )
        scene.assert_as_before()
        ended[done.status] += 1
    assert ended[1] >= 5, ended


@pytest.mark.long
def test_worker_killed_at_any_moment(scene: Scene, work_s: float) -> None:
    """Exit status 1 and everything undone by other workers; 0 if it was not needed any more."""
    ended: Counter[int] = Counter()
    for delay in sweep(0.6 * work_s, 8):
        with running(*scene.arguments, "--discard") as restore:
            assert wait_for(lambda pid=restore.pid: bool(workers(pid)), restore)  # type: ignore[misc]
            time.sleep(delay)
            try:
                victim = workers(restore.pid)[-1]
                victim.kill()
            except (psutil.NoSuchProcess, IndexError):
                pass
            done = finish(restore)
        assert done.status in (0, 1), done
        if done.status:
            assert len(done.err.splitlines()) == 1
            assert f" {victim.pid} " in done.err
        scene.assert_as_before()
        ended[done.status] += 1
    assert ended[1] >= 3, ended


@pytest.mark.parametrize("moment", ["ghosts are being made", "mounts are writable"])
def test_all_workers_killed(scene: Scene, moment: str) -> None:
    with running(*scene.arguments, "--discard") as restore:
        assert MOMENTS[moment](scene, restore)
        for worker in workers(restore.pid):
            worker.kill()
        done = finish(restore)
    assert (done.status, done.err.count("\n")) == (1, 1), done
    assert "worker" in done.err
    scene.assert_as_before()


# -- After the restore --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signal_while_serving(scene: Scene, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "socket"
    with running(*scene.arguments, "--serve", path) as restore:
        assert read_lines(restore, 1) == [f"serving 2 tasks on {path}"]
        assert path.is_socket()
        assert not scene.any_writable()
        restore.send_signal(number)
        done = finish(restore)
    assert (done.status, done.err) == (130, EVERYTHING_UNDONE)
    assert not path.exists()
    scene.assert_as_before()


def test_socket_is_gone_whenever_the_signal_comes(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    seen = 0
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        with running(*scene.arguments, "--serve", path) as restore:
            assert wait_for(path.exists, restore)
            time.sleep(delay)
            restore.send_signal(signal.SIGTERM)
            done = finish(restore)
        assert done.status == 130, done
        assert not path.exists()
        scene.assert_as_before()
        seen += 1
    assert seen == 5


CMD = """
trap 'echo "$GHOSTPOOL_TASK got TERM"; exit 7' TERM
for n in 3 4 5 6 7 8 9; do test "$(cat <&$n)" = content || exit 9; done
echo "$GHOSTPOOL_TASK ready"
while :; do sleep 0.02; done
"""


@contextmanager
def with_programs(*mounts: Any) -> Iterator[Live]:
    """A target with these mounts, in which commands of the machine run."""
    nodes, programs = host_programs(500)
    with live([ROOT._replace(nodes=nodes), *programs, *mounts]) as (target,):
        yield target


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signal_while_commands_run(tmp_path: Path, number: signal.Signals) -> None:
    """The commands get SIGTERM and are waited for."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    for pid in (1, 2):
        made.task(pid)
        for fd in range(3, 10):
            made.open(pid, fd, f"/data/gone-{pid}-{fd}", ghost=made.ghost(b"content"))
    images = made.write(tmp_path)
    with with_programs(read_only(2, b"/data", "keep")) as target:
        before = target.snapshot().without_directory_times()
        shell = ["--", "sh", "-c", CMD]
        with running("restore", "-D", images, "-t", target.pid, *shell) as restore:
            assert set(read_lines(restore, 2)) == {"1 ready", "2 ready"}
            pids = descendants(restore.pid)
            restore.send_signal(number)
            done = finish(restore)
        assert done.status == 130, done
        assert set(done.out.splitlines()) == {"1 got TERM", "2 got TERM"}
        assert_gone(pids)
        assert target.snapshot().without_directory_times() == before


# -- Failures in the middle ---------------------------------------------------------------------


FLAGS = {
    "everything": Attr.RDONLY
    | Attr.NOSUID
    | Attr.NODEV
    | Attr.NOEXEC
    | Attr.NOSYMFOLLOW
    | Attr.STRICTATIME
    | Attr.NODIRATIME,
    "noatime": Attr.RDONLY | Attr.NOSUID | Attr.NOATIME,
}


@contextmanager
def intruder(target: Live, path: bytes) -> Iterator[int]:
    """A process of the target that opens `path` for writing as soon as the mount allows it."""

    def body(ready: Callable[[], None]) -> None:
        enter(target.fd)
        ready()
        while True:
            try:
                fd = os.open(path, os.O_RDWR)
                break
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
        while fd:
            signal.pause()

    with process(body) as pid:
        yield pid


@pytest.mark.long
@pytest.mark.parametrize("flags", FLAGS)
def test_mount_that_stays_busy(tmp_path: Path, flags: str) -> None:
    """Somebody opened a file for writing meanwhile: exit status 3, with the command that mends.

    That command, run when the writer is gone, gives every flag back.
    """
    made = ImageSet()
    made.mount("/")
    made.mount("/my data", flags=0x200001)
    made.mount("/other", flags=0x200001)
    made.task(1)
    ghost = made.ghost(b"content")
    for number in range(1000):
        made.open(1, 3 + number, f"/my data/gone-{number}", ghost=ghost)
    made.open(1, 2000, "/other/gone", ghost=made.ghost(b"content"))
    images = made.write(tmp_path)
    mounts = (
        read_only(2, b"/my data", "keep", attributes=int(FLAGS[flags])),
        read_only(3, b"/other", "keep"),
    )
    with with_programs(*mounts) as target, ExitStack() as stack:
        before = target.snapshot().without_directory_times()
        stack.enter_context(intruder(target, b"/my data/keep"))
        done = run("restore", "-D", images, "-t", target.pid, "--discard")
        assert done.status == 3, done
        assert len(done.err.splitlines()) == 1, done
        assert "/my data" in done.err
        assert "stays writable" in done.err
        assert "EBUSY" in done.err or os.strerror(errno.EBUSY) in done.err
        mend = done.err.strip().partition("to put it back: ")[2]
        words = shlex.split(mend)
        assert {str(target.pid), "/my data"} <= set(words), mend
        assert words[words.index("-o") + 1].startswith("remount,bind,ro,"), mend
        # Only the one mount is left, and no file is.
        assert target.is_writable(b"/my data".replace(b" ", rb"\040"))
        left = target.snapshot().without_directory_times()
        assert left.files == before.files
        assert not target.is_writable(b"/other")

        busy = subprocess.run(words, capture_output=True, text=True, check=False)
        assert busy.returncode != 0  # the writer is still there
        stack.close()
        mended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (mended.returncode, mended.stderr) == (0, "")
        assert target.snapshot().without_directory_times() == before
        # Its journal stays until somebody looks: recover would have done the same.
        (journal,) = journals()
        recovered = run("recover")
        assert (recovered.status, journals()) == (0, []), recovered
        assert recovered.out.splitlines()[1].endswith(": is read-only")
        assert journal.removesuffix(".journal") in recovered.out

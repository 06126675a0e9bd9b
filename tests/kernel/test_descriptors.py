"""RLIMIT_NOFILE: a run works under it, or is refused in the plan with the number it needs."""

from __future__ import annotations

import os
import re
import resource
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ghostpool._needs import STRANGERS
from ghostpool._protocol import BlockingChannel
from ghostpool.testing._forked import in_child
from tests.support.imagewriter import ImageSet, ghosts_on
from tests.support.live import Live, Run, command, live, read_only, run_argv
from tests.support.restore import end, fetched_at_once, serving

pytestmark = pytest.mark.needs_mount_ns


def limited(limit: int, *arguments: Any) -> Run:
    """Run ghostpool under a hard limit of descriptors."""
    return run_argv(["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command(*arguments)])


def many_files() -> ImageSet:
    return ghosts_on("/m0", (f"gone-{number}" for number in range(300)), b"x")


def many_mounts() -> ImageSet:
    made = ImageSet()
    made.mount("/")
    made.task(1)
    for number in range(60):
        made.mount(f"/m{number}", flags=0x200001)
        made.open(1, 3 + number, f"/m{number}/gone", ghost=made.ghost(b"x"))
    return made


def many_directories() -> ImageSet:
    return ghosts_on("/m0", (f"new-{number}/a/b/gone" for number in range(150)), b"x")


SHAPES: dict[str, Callable[[], ImageSet]] = {
    "files": many_files,
    "mounts": many_mounts,
    "directories": many_directories,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with live([read_only(10 + n, b"/m%d" % n, "keep") for n in range(60)]) as (one,):
        yield one


@pytest.mark.parametrize(("shape", "jobs"), [("files", 1), ("mounts", 16), ("directories", 16)])
def test_the_number_needed_is_enough(target: Live, tmp_path: Path, shape: str, jobs: int) -> None:
    """The refusal's number is true: with it the run works, with one less it is refused."""
    before = target.snapshot().without_directory_times()
    images = SHAPES[shape]().write(tmp_path)
    arguments = ("restore", "-D", images, "-t", target.pid, "-j", jobs, "--discard")
    refused = limited(64, *arguments)
    assert refused.status == 2, refused
    found = re.search(r"need (\d+) descriptors at once in .*, but the limit is 64:", refused.err)
    assert found is not None, refused.err
    need = int(found[1])
    assert limited(need - 1, *arguments).status == 2
    done = limited(need, *arguments)
    assert (done.status, done.err) == (0, ""), done
    assert target.snapshot().without_directory_times() == before


def test_flood_of_connections_takes_none_that_is_needed(target: Live, tmp_path: Path) -> None:
    """The number that is needed counts those who connect and say nothing, as many as are kept."""
    images = many_files().write(tmp_path)
    path = str(tmp_path / "socket")
    arguments = ("restore", "-D", images, "-t", target.pid, "-j", 1, "--serve", path)
    found = re.search(r"need (\d+) descriptors", limited(64, *arguments).err)
    assert found is not None
    prefix = ["sh", "-c", f'ulimit -n {found[1]}; exec "$@"', "sh"]
    with serving(*arguments[1:], prefix=prefix) as served, ExitStack() as stack:
        for _ in range(3 * STRANGERS):
            silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(silent).connect(path)
        (done,) = fetched_at_once(path, [1], "--", "true").values()
        assert (done.returncode, done.stderr) == (0, "")
        assert (end(served.process), served.process.returncode) == ("", 0)


def test_numbers_of_a_command_are_seen_in_the_plan(tmp_path: Path) -> None:
    """A descriptor that could not be put at its number rules the restore out before it begins."""
    images = ghosts_on("/m0", ["gone"], b"x", first=900).write(tmp_path)
    with live([read_only(10, b"/m0", "keep")]) as (one,):
        before = one.snapshot()
        where = ("restore", "-D", images, "-t", one.pid)
        done = limited(900, *where, "--", "true")
        assert done.status == 2, done
        assert "descriptors at once in a command, but the limit is 900" in done.err
        assert one.snapshot() == before
        assert limited(900, *where, "--discard").status == 0


def test_discarded_files_are_not_held(tmp_path: Path) -> None:
    """Whoever has opened and checked them closes them, so there may be more than descriptors."""
    images = many_files().write(tmp_path)
    with live([read_only(10, b"/m0", "keep")]) as (one,):
        before = one.snapshot().without_directory_times()
        arguments = ("restore", "-D", images, "-t", one.pid, "-j", 1)
        assert limited(250, *arguments, "--", "true").status == 2
        done = limited(250, *arguments, "--discard")
        assert (done.status, done.err) == (0, ""), done
        assert one.snapshot().without_directory_times() == before


def test_kept_files_are_not_held(tmp_path: Path) -> None:
    """Their names are enough, so there may be more of them than descriptors."""
    images = many_files().write(tmp_path)
    with live([read_only(10, b"/m0", "keep")]) as (one,):
        done = limited(250, "restore", "-D", images, "-t", one.pid, "-j", 1, "--keep")
        assert (done.status, done.err) == (0, ""), done
        assert len(os.listdir(f"/proc/{one.pid}/root/m0")) == 301


def test_more_namespaces_than_descriptors(tmp_path: Path) -> None:
    made = ImageSet()
    for number in range(100):
        made.mount("/", ns=10 + number, device=(0, 100 + number))
        made.task(1 + number, ns=10 + number)
        made.open(1 + number, 3, "/gone", ghost=made.ghost(b"x"))
    images = made.write(tmp_path)
    begun = time.monotonic()
    rebuilt = limited(64, "restore", "-D", images, "--discard")
    named = [f"--ns={10 + number}={os.getpid()}" for number in range(100)]
    pinned = limited(64, "restore", "-D", images, *named, "--discard")
    for done in (rebuilt, pinned):
        assert done.status == 2, done
        assert re.fullmatch(
            r"ghostpool: 100 mount namespaces need \d+ descriptors at once in the run, but the "
            r"limit is 64: raise it \(ulimit -Hn, LimitNOFILE=\)\n",
            done.err,
        ), done
    assert time.monotonic() - begun < 5


def test_sender_waits_for_descriptors_in_flight() -> None:
    """Without privilege a user may have no more in flight than the limit: unix(7)."""

    def child() -> int:
        import _socket

        os.setgroups([])
        os.setresgid(65533, 65533, 65533)
        os.setresuid(65533, 65533, 65533)
        here, there = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        null = os.open("/dev/null", os.O_RDONLY)
        if os.fork() == 0:
            here.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            sender = BlockingChannel(there.detach())
            for number in range(20):
                sender.send(number, [null] * 25)
            os._exit(0)
        there.close()
        receiver = BlockingChannel(here.detach())
        received = 0
        for number in range(20):
            time.sleep(0.01)
            message, fds = receiver.receive()
            assert message == number
            received += len(fds)
            for fd in fds:
                os.close(fd)
        _, status = os.wait()
        assert status == 0
        return received

    assert in_child(child) == 500

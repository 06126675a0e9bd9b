"""Children of a test: what comes back from them, and that they are gone when nobody needs them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool._capabilities import Cap
from ghostpool.testing import MountSpec, NamespaceSpec, built_targets, private_namespace
from ghostpool.testing._forked import fork, in_child, staying
from ghostpool.testing._missing import lacks_mount_namespaces
from tests.support.namespaces import become_ordinary_user

WITHIN_S = 5.0


def is_there(pid: int) -> bool:
    """Alive, and no zombie either."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "XZ"


def test_values_come_back() -> None:
    assert in_child(lambda: {"a": [1, b"x", None]}) == {"a": [1, b"x", None]}


def test_errors_come_back() -> None:
    def fails() -> None:
        os.open("/nowhere", os.O_RDONLY)

    with pytest.raises(FileNotFoundError, match="in fails") as caught:
        in_child(fails)
    assert caught.value.errno == errno.ENOENT

    def wrong() -> None:
        raise KeyError("what was looked for")

    with pytest.raises(AssertionError, match="KeyError: 'what was looked for'"):
        in_child(wrong)


def test_what_can_not_come_back_is_an_error() -> None:
    with pytest.raises(AssertionError, match="unmarshallable"):
        in_child(object)


def test_death_of_a_child_is_an_error() -> None:
    with pytest.raises(AssertionError, match="the child ended with -9"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_one_that_stays_holds_nothing_of_the_test() -> None:
    """A peer sees the end of a connection although a child was forked while it was open."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, staying(lambda: None) as pid:
            names = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            theirs.close()
            ours.settimeout(WITHIN_S)
            assert ours.recv(1) == b""
            assert names == {"/dev/null", "anon_inode:[pidfd]"}
        assert not is_there(pid)


def test_one_that_stays_keeps_what_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with staying(lambda: os.open(path, os.O_RDWR | os.O_CREAT)) as pid:
        assert str(path) in {
            os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
        }


def test_preparing_may_fail() -> None:
    def fails() -> None:
        raise PermissionError(errno.EPERM, "no")

    with pytest.raises(PermissionError), staying(fails):
        raise AssertionError


@pytest.mark.needs_mount_ns
def test_a_namespace_is_gone_with_a_test_that_was_killed() -> None:
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        with private_namespace() as namespace:
            os.write(writer, str(namespace.pid).encode())
            signal.pause()
    os.close(writer)
    holder = int(os.read(reader, 20))
    os.close(reader)
    assert is_there(holder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    give_up = time.monotonic() + WITHIN_S
    while is_there(holder):
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.needs_mount_ns
def test_propagation_is_cut() -> None:
    """Where all mounts are shared, as on most machines, nothing comes out and nothing goes in."""

    def child() -> tuple[list[str], list[str], list[str]]:
        _linux.unshare(_linux.CLONE_NEWNS)
        _linux.mount(b"own", b"/mnt", b"tmpfs", 0)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_SHARED)
        os.mkdir("/mnt/a")
        os.mkdir("/mnt/b")
        with private_namespace() as namespace:
            namespace.mount_tmpfs("/mnt/a", {"theirs": b""})
            _linux.mount(b"own", b"/mnt/b", b"tmpfs", 0)
            Path("/mnt/b/ours").touch()
            theirs = namespace.run(lambda: os.listdir("/mnt/a"))
            return theirs, os.listdir("/mnt/a"), namespace.run(lambda: os.listdir("/mnt/b"))

    assert in_child(child) == (["theirs"], [], [])


@pytest.mark.needs_mount_ns
def test_root_without_the_capability_is_told_so() -> None:
    def child() -> str | None:
        lacks_mount_namespaces.cache_clear()
        _, permitted, _ = _linux.capget()
        kept = permitted & ~Cap.SYS_ADMIN
        _linux.capset(kept, kept, 0)
        return lacks_mount_namespaces()

    problem = "CAP_SYS_ADMIN, to make a mount namespace (Operation not permitted)"
    assert in_child(child) == problem


@pytest.mark.needs_mount_ns
@pytest.mark.needs_userns
def test_the_root_of_a_user_namespace_is_root_enough() -> None:
    def child() -> tuple[str | None, list[bytes], bytes]:
        become_ordinary_user()
        lacks_mount_namespaces.cache_clear()
        spec = NamespaceSpec(1, (MountSpec(1, 0, b"/", 1), MountSpec(2, 1, b"/data", 2)))
        with built_targets(spec) as targets, private_namespace() as namespace:
            namespace.mount_tmpfs("/mnt", {"file": b"text"}, read_only=True)
            points = [mount.mountpoint for mount in targets[1].table()]
            text = namespace.run(Path("/mnt/file").read_bytes)
            return lacks_mount_namespaces(), points, text

    assert in_child(child) == (None, [b"/", b"/data"], b"text")

"""UNIX sockets whose names are gone: bound by them again, and nobody's file is met on the way."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool import _linux
from ghostpool._outcome import EXIT_SKIPPED
from ghostpool._sockets import SocketBinder
from ghostpool.testing import Namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import (
    host_programs,
    live,
    process,
    read_lines,
    read_only,
    run,
    running,
)
from tests.support.usernamespaces import container

pytestmark = pytest.mark.needs_mount_ns
STREAM, DGRAM, SEQPACKET = 1, 2, 5
CLOSED, LISTENING, CONNECTED = 7, 10, 1
OWNER = (0o140640, 7, 8)
_SIOCUNIXFILE = 0x89E0


@pytest.fixture
def target() -> Iterator[Namespace]:
    with live([read_only(2, b"/data", "taken", "dir/")]) as (made,):
        before = made.snapshot()
        yield made
        assert made.snapshot() == before


def images() -> ImageSet:
    """Images of one task that has nothing yet."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    return made


def taken(made: ImageSet, directory: Path, target: Namespace, **options: Any) -> dict[int, Any]:
    """The sockets of task 1 by number, by a restore that is over."""

    async def main() -> dict[int, int]:
        path = made.write(directory)
        async with ghostpool.restore(path, tree=target.pid, **options) as restored:
            return await restored.tasks[1].take_fds()

    fds = anyio.run(main, backend="trio")
    return {number: socket.socket(fileno=fd) for number, fd in fds.items()}


def file_of(one: socket.socket) -> os.stat_result:
    """What the socket is bound to, name or no name: unix(7), SIOCUNIXFILE."""
    fd = fcntl.ioctl(one.fileno(), _SIOCUNIXFILE)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def listens(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def close(sockets: dict[int, Any]) -> None:
    for one in sockets.values():
        one.close()


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_types_names_and_owners(target: Namespace, tmp_path: Path, strategy: str) -> None:
    """As dumped, whether the directories of the name are there or not; no mount is touched."""
    made = images()
    made.socket(1, 3, b"/data/dir/s\0", state=LISTENING, backlog=5, perms=OWNER, cloexec=True)
    made.socket(1, 4, b"/gone/far/away/d", type=DGRAM, flags=0o4002)
    made.socket(1, 5, b"/data/q", type=SEQPACKET, state=LISTENING, perms=(0o140777, 0, 0))
    made.socket(1, 6, b"/" + b"x" * 106)
    shared = made.socket(1, 7, b"relative/../s", directory=b"/data", type=DGRAM)
    made.fd(1, 8, shared, kind=5)
    sockets = taken(made, tmp_path, target, strategy=strategy)
    try:
        assert {n: one.getsockname() for n, one in sockets.items()} == {
            3: "/data/dir/s",
            4: "/gone/far/away/d",
            5: "/data/q",
            6: "/" + "x" * 106,
            7: "relative/../s",
            8: "relative/../s",
        }
        assert [sockets[n].type for n in (3, 4, 5, 6)] == [
            *(socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM)
        ]
        assert [listens(sockets[n]) for n in (3, 4, 5, 6, 7)] == [True, False, True, False, False]
        assert [os.get_blocking(one.fileno()) for one in sockets.values()] == [
            *(True, False, True, True, True, True)
        ]
        status = file_of(sockets[3])
        assert (status.st_mode, status.st_uid, status.st_gid, status.st_nlink) == (*OWNER, 0)
        assert stat.S_IMODE(file_of(sockets[5]).st_mode) == 0o777
        assert file_of(sockets[7]).st_ino == file_of(sockets[8]).st_ino
    finally:
        close(sockets)


def test_in_a_user_namespace(tmp_path: Path) -> None:
    """The owner is the one that the container's processes see, and bytes wait in its fifos."""
    made = images()
    made.socket(1, 3, b"/data/s", state=LISTENING, perms=(0o140640, 0, 5))
    pipe = made.ghost(mode=stat.S_IFIFO | 0o600, uid=5)
    made.open_fifo(1, 4, "/data/gone/fifo", ghost=pipe)
    made.fifo_data(77, b"waiting", size=4096)
    path = made.write(tmp_path)

    async def main(pid: int) -> dict[int, int]:
        async with ghostpool.restore(path, tree=pid) as restored:
            return await restored.tasks[1].take_fds()

    with container(read_only(2, b"/data"), maps=("0 100000 10", "0 200000 10")) as target:
        before = target.snapshot().without_directory_times()
        fds = anyio.run(main, target.pid, backend="trio")
        assert target.snapshot().without_directory_times() == before
    with socket.socket(fileno=fds[3]) as one:
        assert one.getsockname() == "/data/s"
        assert (file_of(one).st_uid, file_of(one).st_gid) == (100000, 200005)
    assert os.fstat(fds[4]).st_uid == 100005
    assert os.read(fds[4], 100) == b"waiting"
    os.close(fds[4])
    made.socket(1, 5, b"/data/t", perms=(0o140640, 10, 0))
    path = made.write(tmp_path / "refused")
    with container(read_only(2, b"/data"), maps=("0 100000 10", "0 200000 10")) as target:
        done = run("restore", "-D", path, "-t", target.pid, "--discard")
        assert done.status == 2
        assert "/data/t: its owner 10:0 has no id" in done.err
        done = run("restore", "-D", path, "-t", target.pid, "--discard", "--on-error=skip")
        assert "/data/t: its owner 10:0 has no id" in done.err
        assert done.status == EXIT_SKIPPED


def test_options(target: Namespace, tmp_path: Path) -> None:
    made = images()
    made.socket(1, 3, b"/a", buffers=(8192, 16384), limits=(1, 500000, 0, 0), passcred=True)
    made.socket(1, 4, b"/b", type=DGRAM, shutdown=1)
    sockets = taken(made, tmp_path, target)
    try:
        one = sockets[3]

        def option(name: int) -> int:
            value: int = one.getsockopt(socket.SOL_SOCKET, name)
            return value

        assert (option(socket.SO_SNDBUF), option(socket.SO_RCVBUF)) == (8192, 16384)
        assert option(socket.SO_PASSCRED) == 1
        limit = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
        assert struct.unpack("ll", limit) == (1, 500000)
        assert sockets[4].recv(1) == b""  # shut down for reading: it does not wait
    finally:
        close(sockets)


@pytest.mark.parametrize("backlog", [1 << 31, (1 << 32) - 1])
def test_a_backlog_that_listen_does_not_take(
    target: Namespace, tmp_path: Path, backlog: int
) -> None:
    """It is as long as the kernel makes it."""
    made = images()
    made.socket(1, 3, b"/a", state=LISTENING, backlog=backlog)
    sockets = taken(made, tmp_path, target)
    try:
        assert listens(sockets[3])
    finally:
        close(sockets)


def test_dgram_sends_by_its_name(target: Namespace, tmp_path: Path) -> None:
    """Whoever gets a datagram of it sees the old name as its sender."""
    made = images()
    made.socket(1, 3, b"/data/who", type=DGRAM)
    sockets = taken(made, tmp_path / "images", target)
    path = str(tmp_path / "receiver")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        try:
            sockets[3].sendto(b"hello", path)
            assert receiver.recvfrom(10) == (b"hello", "/data/who")
        finally:
            close(sockets)


def test_living_socket_of_the_same_name_goes_on(tmp_path: Path) -> None:
    """Its clients neither see the new one nor lose the old one, not even for a moment."""
    with live([read_only(2, b"/data", attributes=0)]) as (target,):

        def serve(ready: Any) -> None:
            _linux.setns(target.fd, _linux.CLONE_NEWNS)
            server = socket.socket(socket.AF_UNIX)
            server.bind("/data/sock")
            server.listen(1000)
            ready()
            while True:
                client, _ = server.accept()
                client.sendall(b"living")
                client.close()

        def ask(ready: Any) -> None:
            _linux.setns(target.fd, _linux.CLONE_NEWNS)
            ready()
            while True:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect("/data/sock")
                    assert client.recv(10) == b"living"

        made = images()
        for number in (3, 4):  # two of them that have one name
            made.socket(1, number, b"/data/sock", state=LISTENING, backlog=5)
        with process(serve), process(ask) as client:
            before = target.snapshot()
            sockets = taken(made, tmp_path, target)
            assert target.snapshot() == before
            assert os.waitpid(client, os.WNOHANG) == (0, 0)
        try:
            assert [one.getsockname() for one in sockets.values()] == ["/data/sock"] * 2
            assert file_of(sockets[3]).st_ino != file_of(sockets[4]).st_ino
            sockets[3].setblocking(False)
            with pytest.raises(BlockingIOError):
                sockets[3].accept()
        finally:
            close(sockets)


def test_links_of_the_container_are_not_followed(tmp_path: Path) -> None:
    """A parent that is a link now leads nowhere: what it points to is not written to."""
    with live([read_only(2, b"/data", attributes=0)]) as (target,):

        def exchange(ready: Any) -> None:
            _linux.setns(target.fd, _linux.CLONE_NEWNS)
            os.mkdir("/data/victim")
            os.symlink("/data/victim", "/data/dir")
            ready()
            while True:
                os.read(os.pipe()[0], 1)

        made = images()
        made.socket(1, 3, b"/data/dir/sock")
        with process(exchange):
            before = target.snapshot()
            sockets = taken(made, tmp_path, target)
            assert target.snapshot() == before
        close(sockets)


def test_what_can_not_be_restored_is_named(target: Namespace, tmp_path: Path) -> None:
    made = images()
    made.socket(1, 3, b"/data/accepted", state=CONNECTED, peer=77)
    made.socket(1, 4, b"/data/connected", type=DGRAM, peer=78)
    made.socket(1, 5, b"/data/outside", kind=1)
    made.socket(1, 6, b"/data/odd", type=DGRAM, state=LISTENING)
    made.socket(1, 7, b"/data/..", type=DGRAM)
    made.socket(1, 8, b"/" + b"x" * 107)
    path = made.write(tmp_path)
    done = run("plan", "-D", path, "-t", target.pid, "--json")
    warnings = json.loads(done.out)["warnings"]
    for word, why in {
        "/data/accepted": "peer",
        "/data/connected": "peer",
        "/data/outside": "own",
        "/data/odd": "type",
        "/data/..": "bound",
        "xxx": "bound",
    }.items():
        assert [line for line in warnings if word in line and why in line], word
    assert len(warnings) == 6


def test_kept_and_discarded(target: Namespace, tmp_path: Path) -> None:
    made = images()
    made.socket(1, 3, b"/data/sock", state=LISTENING)
    where = ("restore", "-D", made.write(tmp_path), "-t", target.pid)
    done = run(*where, "--discard")
    assert (done.status, done.err) == (0, "")
    done = run(*where, "--keep")
    assert done.status == 0
    assert "/data/sock: a UNIX socket" in done.err


TELL = """
import os, socket
found = {}
for number in (3, 7):
    with socket.socket(fileno=os.dup(number)) as one:
        print(number, one.getsockname(), one.type.name, flush=True)
print(os.environ["GHOSTPOOL_CLOEXEC"])
"""


@pytest.mark.parametrize("how", ["command", "fetch"])
def test_delivery(tmp_path: Path, how: str) -> None:
    """At their numbers, beside files, to a command and through the task socket."""
    made = images()
    made.socket(1, 3, b"/data/s", state=LISTENING)
    made.open(1, 4, "/data/gone", ghost=made.ghost(b"content"))
    made.socket(1, 7, b"/data/d", type=DGRAM, cloexec=True)
    path = made.write(tmp_path / "images")
    links, programs = host_programs(10)
    root = ghostpool.MountSpec(
        1, 0, b"/", superblock=1, source="rootfs", options="size=1m,mode=755", nodes=links
    )
    tell = ("--", sys.executable if how == "fetch" else "/usr/bin/python3", "-c", TELL)
    with live([root, read_only(2, b"/data"), *programs]) as (target,):
        where = ("restore", "-D", path, "-t", target.pid)
        if how == "command":
            done = run(*where, *tell)
        else:
            listener = tmp_path / "socket"
            with running(*where, "--serve", listener) as restore:
                read_lines(restore, 1)
                done = run("fetch", "--socket", listener, "--task", 1, *tell)
                assert restore.wait(30) == 0
    assert done.out.splitlines() == ["3 /data/s SOCK_STREAM", "7 /data/d SOCK_DGRAM", "7"], done
    assert done.status == 0


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """Of ghosts that were made before it, either, nor of sockets that were bound."""
    made = images()
    made.open(1, 3, "/data/gone/far", ghost=made.ghost(b"content"))
    made.socket(1, 4, b"/data/good")
    made.socket(1, 5, b"/data/bad")
    real = SocketBinder._bind_op

    def unknown_type(self: SocketBinder, one: ghostpool.Socket) -> Any:
        operation = real(self, one)
        return operation if one.name == b"/data/good" else operation._replace(type=99)

    with live([read_only(2, b"/data")]) as (target,), pytest.MonkeyPatch.context() as patch:
        before = target.snapshot().without_directory_times()
        patch.setattr(SocketBinder, "_bind_op", unknown_type)
        with pytest.raises(ExceptionGroup) as caught:
            taken(made, tmp_path, target)
        assert target.snapshot().without_directory_times() == before
    (error,) = caught.value.exceptions
    assert isinstance(error, ghostpool.KernelError)
    assert "/data/bad" in str(error)
    assert "socket" in str(error)
    with open("/proc/net/unix") as table:
        assert "/data/good" not in table.read()


def test_other_ghosts_are_opened_after_it(tmp_path: Path) -> None:
    """The worker that has bound them has the namespace's root again, by the same slot."""
    made = images()
    made.socket(1, 3, b"/data/sock")
    for number in range(4, 8):
        made.open(1, number, f"/data/dir/{number}", ghost=made.ghost(b"content"))
    path = made.write(tmp_path)
    with live([read_only(2, b"/data", "dir/")]) as (target,):
        before = target.snapshot().without_directory_times()
        done = run("restore", "-D", path, "-t", target.pid, "--jobs", 1, "--discard")
        assert (done.status, done.err) == (0, "")
        assert target.snapshot().without_directory_times() == before

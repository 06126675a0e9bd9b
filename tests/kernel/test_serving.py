"""The socket that serves descriptors, seen by those who are not meant to get them."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._errors import PlanError
from ghostpool._listener import Listener
from ghostpool.testing._forked import in_child
from tests.kernel.test_capabilities import make_data, make_images
from tests.support.live import process
from tests.support.restore import Live, ghostpool, live, serving

pytestmark = pytest.mark.needs_mount_ns
NOBODY = 65534


@pytest.fixture
def target() -> Iterator[Live]:
    with live(make_data) as made:
        yield made


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(30)
    connection.connect(path)
    return connection


def say(connection: socket.socket, message: object) -> dict[str, Any]:
    """Send a message; the answer, its descriptors closed."""
    try:
        connection.send(json.dumps(message).encode())
    except BrokenPipeError:
        pass  # whoever is not served may hear so before he has spoken
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 253)
    _linux.close_all(fds)
    answer: dict[str, Any] = json.loads(data)
    return {**answer, "descriptors": len(fds)}


HELLO = {"type": "hello", "version": 1, "task": 1}


def as_nobody(function: Callable[[], Any]) -> Any:
    def child() -> Any:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return function()

    return in_child(child)


def test_one_consumer_at_a_time(target: Live, tmp_path: Path) -> None:
    """While one has them, another one is sent away; and nonsense ends no server."""
    where = ("-D", make_images(tmp_path / "images"), "-t", target.pid)
    with serving(*where, "--serve", tmp_path / "socket") as served:
        first = connect(served.socket)
        assert say(first, HELLO)["descriptors"] == 3
        with connect(served.socket) as second:
            answer = say(second, HELLO)
        assert (answer["type"], answer["descriptors"]) == ("abort", 0)
        assert "another consumer" in answer["reason"]
        for nonsense in (b"[" * 60_000, b"\xff", b"{}", b"7", b'{"type": "hello", "version": 1}'):
            with connect(served.socket) as third:
                third.send(nonsense)
                third.recv(1 << 16)  # an abort, or its end
        assert say(first, {"type": "ready"})["type"] == "released"
        first.close()
        assert served.process.wait(timeout=30) == 0


def test_other_users_get_nothing(target: Live, tmp_path: Path) -> None:
    """The mode keeps them out; and should somebody widen it, the kernel's word on who they are."""
    where = ("-D", make_images(tmp_path / "images"), "-t", target.pid)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    with serving(*where, "--serve", tmp_path / "socket") as served:
        with pytest.raises(PermissionError):
            as_nobody(lambda: connect(served.socket).close())
        os.chmod(served.socket, 0o666)
        answer = as_nobody(lambda: say(connect(served.socket), HELLO))
        assert (answer["type"], answer["descriptors"]) == ("abort", 0)
        assert f"user {NOBODY} is not served" in answer["reason"]
        with connect(served.socket) as connection:
            assert say(connection, HELLO)["descriptors"] == 3


def test_a_server_of_another_user_is_not_believed(tmp_path: Path) -> None:
    """What it handed over would be in a process that trusts it."""
    tmp_path.chmod(0o777)
    for directory in tmp_path.parents[:2]:
        directory.chmod(0o755)
    path = tmp_path / "socket"

    def body(ready: Callable[[], None]) -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            ready()
            connection, _ = listener.accept()
            connection.recv(1 << 16)

    with process(body):
        done = ghostpool("fetch", "--socket", path, "--task", 1, "--", "true")
    assert done.returncode == 2
    assert f"user {NOBODY} serves there" in done.stderr


@pytest.mark.parametrize(
    ("mode", "owner", "accepted"),
    [
        (0o700, 0, True),
        (0o755, 0, True),
        (0o1777, 0, True),
        (0o777, 0, False),
        (0o1777, NOBODY, False),
        (0o755, NOBODY, False),
    ],
)
def test_where_others_could_put_theirs(
    tmp_path: Path, mode: int, owner: int, accepted: bool
) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    directory.chmod(mode)
    os.chown(directory, owner, owner)
    path = directory / "socket"
    if not accepted:
        with pytest.raises(PlanError, match="others may rename"):
            Listener(str(path))
        assert not path.exists()
        return
    listener = Listener(str(path))
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    listener.close()
    assert not path.exists()


def test_a_name_that_is_another_ones_now_is_left(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = Listener(str(path))
    path.rename(tmp_path / "aside")
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"

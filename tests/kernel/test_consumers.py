"""The consumers that others will copy: what they make of a server's words, said by the test."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _fetch, _linux
from ghostpool._errors import PlanError
from tests.support.consumers import EXAMPLES, NAMES, command_line
from tests.support.restore import PROBE

CONSUMERS = [
    pytest.param(name, marks=[pytest.mark.needs_cc] if name == "fetch.c" else []) for name in NAMES
]
LIMIT_S = 30
FEW = 30
"""Descriptors that a consumer may have which is to be sent more."""


class Server:
    """Listens, and says what it is told to one consumer, a process."""

    def __init__(self, name: str, directory: Path, compiled: Path) -> None:
        self.path = directory / "socket"
        self._name = name
        self._compiled = compiled
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.settimeout(LIMIT_S)
        self.connection: socket.socket | None = None
        self.process: subprocess.Popen[str] | None = None

    def start(self, *command: object, **options: Any) -> None:
        """Start the consumer and hear its hello."""
        self.process = subprocess.Popen(
            command_line(self._name, self._compiled, str(self.path), 7, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(LIMIT_S)
        assert self.hear() == {"type": "hello", "version": 1, "task": 7}

    def say(self, text: str, fds: Sequence[int] = ()) -> None:
        assert self.connection is not None
        socket.send_fds(self.connection, [text.encode()], fds)

    def hear(self) -> dict[str, Any]:
        assert self.connection is not None
        data = self.connection.recv(1 << 16)
        message: dict[str, Any] = json.loads(data) if data else {}
        return message

    def ended(self) -> tuple[int, str]:
        """Exit status of the consumer, and what it said to people."""
        assert self.process is not None
        _, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, err

    def close(self) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(params=CONSUMERS)
def server(request: pytest.FixtureRequest, tmp_path: Path, where: Path) -> Iterator[Server]:
    made = Server(request.param, tmp_path, where)
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[int], list[int]]]:
    """Makes so many open files, whose content is their number in the list."""
    made: list[int] = []

    def make(count: int) -> list[int]:
        for number in range(count):
            path = tmp_path / f"file{number}"
            path.write_text(str(number))
            made.append(os.open(path, os.O_RDWR))
        return made

    yield make
    _linux.close_all(made)


def row(number: int, *, close_on_exec: bool = False) -> dict[str, object]:
    return {"fd": number, "flags": 2, "offset": 0, "close_on_exec": close_on_exec}


def test_whatever_the_message_looks_like(
    server: Server, files: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """In any order, with fields of the future; numbers that are taken, or each other's."""
    fds = files(6)
    server.start(*PROBE, "--to", tmp_path)
    server.say(
        ' {\t"more" : true,\r\n "later": {"files": [{"fd": 99}], "type": "abort", "n": [[]]},'
        '"files":[ {"close_on_exec":false,"fd":4,"offset":null, "flags" : 2},'
        '{"offset":0,"flags":2,"fd":3,"x":[{"fd":98},"\\"}],[{\\\\",-1.5E+3,null,true,{}],'
        '"close_on_exec" :true}, '
        '{"fd": 2, "offset": 17, "close_on_exec": false, "flags": 2, '
        '"why": "\\u00e9\\ud83d\\ude00"} ],"type":"files",'
        ' "even later": [[{"type": "abort", "fd": 97, "more": false}]]}',
        fds[:3],
    )
    server.say(json.dumps({"type": "files", "more": True, "files": []}, indent=1))
    some = [row(0), row(7, close_on_exec=True), row(200)]
    server.say(json.dumps({"files": some, "more": False, "type": "files"}), fds[3:])
    assert server.hear() == {"type": "ready"}
    server.say('{"at": 17, "type": "released"}')
    assert server.ended() == (0, "")
    facts = json.loads((tmp_path / "7.json").read_text())
    # Through which open file each number leads to its content.
    found = {
        int(fd): (tmp_path / facts["descriptors"][fd]["link"]).read_text()
        for fd in facts["descriptors"]
        if fd != "1"
    }
    assert found == {4: "0", 3: "1", 2: "2", 0: "3", 7: "4", 200: "5"}
    assert (facts["task"], facts["cloexec"]) == ("7", "3,7")


def test_no_files(server: Server, tmp_path: Path) -> None:
    server.start(*PROBE, "--to", tmp_path)
    server.say('{"type": "files", "files": [], "more": false}')
    assert server.hear() == {"type": "ready"}
    server.say('{"type": "released"}')
    assert server.ended() == (0, "")
    facts = json.loads((tmp_path / "7.json").read_text())
    assert (set(facts["descriptors"]), facts["cloexec"]) == ({"0", "1", "2"}, "")


def test_refused(server: Server) -> None:
    server.start("true")
    server.say('{"type": "abort", "reason": "no task 7 here, but 8", "refused": true}')
    status, err = server.ended()
    assert status == 2
    assert "no task 7 here, but 8" in err


def test_refused_before_it_has_spoken(server: Server) -> None:
    """It can not even say hello, and still hears why."""
    listener = server._listener
    process = subprocess.Popen(
        command_line(server._name, server._compiled, str(server.path), 7, "true"),
        stderr=subprocess.PIPE,
        text=True,
    )
    server.process = process
    server.connection, _ = listener.accept()
    server.say('{"type": "abort", "reason": "user 7 is not served", "refused": true}')
    server.connection.shutdown(socket.SHUT_RD)
    status, err = server.ended()
    assert (status, "user 7 is not served" in err) == (2, True)


@pytest.mark.parametrize("when", ["before the files", "between them", "while it waits"])
def test_aborted(server: Server, files: Callable[[int], list[int]], when: str) -> None:
    """People read why, even if a file of the task has taken the number of stderr."""
    fds = files(2)
    server.start("true")
    if when != "before the files":
        more = when == "between them"
        message = {"type": "files", "files": [row(2), row(1)], "more": more}
        server.say(json.dumps(message), fds)
    if when == "while it waits":
        assert server.hear() == {"type": "ready"}
    server.say('{"type": "abort", "reason": "task 8 said \\"no\\"", "refused": false}')
    status, err = server.ended()
    assert status == 1
    assert 'task 8 said "no"' in err
    assert [os.fstat(fd).st_size for fd in fds] == [1, 1]


@pytest.mark.parametrize("when", ["before the files", "while it waits"])
def test_server_is_gone(server: Server, when: str) -> None:
    server.start("true")
    if when == "while it waits":
        server.say('{"type": "files", "files": [], "more": false}')
        assert server.hear() == {"type": "ready"}
    assert server.connection is not None
    server.connection.close()
    status, err = server.ended()
    assert (status, err.count("\n")) == (1, 1)


NONSENSE = [
    "",
    "{",
    "[",
    "7",
    "nonsense",
    '{"type": "files", "files": [{"fd": 3, "close_on_exec": false}], "more": false}',
    '{"type": "files", "files": [}], "more": false}',
    '{"type": "files", "files": [], "more": false, "x": "no end}',
    '{"type": "files", "files": [], "more": false, "x": "\\u00',
    '{"type": "files", "files": [], "more": false, "x": }',
    '{"type": "files" "files": [], "more": false}',
    '{"type": "welcome", "files": [], "more": false}',
    '{"type": "released"}',
    "{" * 200,
    '{"a":' * 5000,
    "[" * 60_000,
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense(server: Server, text: str) -> None:
    """It is taken for no answer: the consumer ends, which ends it for all."""
    server.start("true")
    server.say(text)
    status, err = server.ended()
    assert status == 1, err
    assert err.count("\n") == 1, err


def test_more_descriptors_than_it_may_have(
    server: Server, files: Callable[[int], list[int]]
) -> None:
    """The kernel leaves out what does not fit; to go on with some would be wrong."""
    fds = files(2) * (FEW // 2)

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, FEW))

    server.start("true", preexec_fn=few)
    rows = [row(100 + number) for number in range(len(fds))]
    server.say(json.dumps({"type": "files", "files": rows, "more": False}), fds)
    status, err = server.ended()
    assert status == 1
    assert "RLIMIT_NOFILE" in err


def test_number_that_it_may_not_have(server: Server, files: Callable[[int], list[int]]) -> None:
    fds = files(1)

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    server.start("true", preexec_fn=few)
    server.say(json.dumps({"type": "files", "files": [row(100)], "more": False}), fds)
    assert server.hear().get("type") != "ready"
    assert server.ended()[0] == 1


@pytest.mark.parametrize("server", CONSUMERS[1:], indirect=True)
def test_command_that_is_not_there(server: Server, tmp_path: Path) -> None:
    """The first of the consumers looks for it before it says hello."""
    server.start(tmp_path / "none")
    server.say('{"type": "files", "files": [], "more": false}')
    assert server.hear() == {"type": "ready"}
    server.say('{"type": "released"}')
    status, err = server.ended()
    assert status == 1
    assert "No such file" in err


def test_what_was_said_last_is_heard_before_the_end() -> None:
    """A send that comes too late is no error: the reason has come before it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here:
        there.send(b'{"type": "abort", "reason": "too late", "refused": true}')
        there.close()
        _fetch._send(here, {"type": "hello"})
        with pytest.raises(PlanError, match="too late"):
            _fetch._receive(here, "files")


def test_the_example_in_c_is_short() -> None:
    lines = (EXAMPLES / "fetch.c").read_text().splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) <= 100

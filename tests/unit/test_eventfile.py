"""The file of --events: whole lines, whatever reads it, and nobody waits for whoever does not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostpool import __version__
from ghostpool._errors import PlanError
from ghostpool._eventfile import FLUSH_S, EventFile
from ghostpool._events import TaskArrived

SOON_S = FLUSH_S / 2
MANY = 5000
"""Lines that do not fit into a pipe."""


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def write(path: object, count: int) -> float:
    """So many events; the seconds that it took."""
    begun = time.monotonic()
    with EventFile(str(path)) as file:
        for number in range(count):
            file.send_nowait(TaskArrived(task=number))
        file.close()
    return time.monotonic() - begun


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def check(found: list[dict[str, Any]], count: int) -> None:
    first, *between, last = found
    assert (first["event"], first["schema"], first["version"]) == ("run", 1, __version__)
    assert first["pid"] == os.getpid()
    assert [one["task"] for one in between] == list(range(count))
    assert set(last) == {"event", "at"}
    assert last["event"] == "end"


def test_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events"
    path.write_text("of an earlier run" * 100)
    write(path, 100)
    check(lines(path.read_text()), 100)
    assert caplog.text == ""


def test_a_line_is_there_when_it_has_happened(tmp_path: Path) -> None:
    """While the run goes on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    with open(reader, encoding="utf-8") as stream, EventFile(str(fifo)) as file:
        assert json.loads(stream.readline())["event"] == "run"
        file.send_nowait(TaskArrived(task=7))
        assert json.loads(stream.readline())["task"] == 7
        file.finish()
        assert json.loads(stream.readline())["event"] == "end"
        assert stream.readline() == ""


def test_a_fifo_whose_reader_comes_late(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It gets everything, more than a pipe holds too."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[str] = []
    opened = threading.Event()

    def read() -> None:
        with open(fifo, encoding="utf-8") as stream:
            opened.set()
            found.append(stream.read())

    file = EventFile(str(fifo))
    for number in range(MANY):
        file.send_nowait(TaskArrived(task=number))
    reader = threading.Thread(target=read)
    reader.start()
    assert opened.wait(30)
    file.finish()
    reader.join()
    check(lines(found[0]), MANY)
    assert caplog.text == ""


def test_a_fifo_that_nobody_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert write(fifo, MANY) < SOON_S
    assert f"{MANY + 2} events were not written: nobody reads it" in caplog.text


def test_a_reader_that_does_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has a moment. What it finds later is counted, and what is missing is told."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert FLUSH_S <= write(fifo, MANY) < 2 * FLUSH_S
        taken = b""
        while data := os.read(reader, 1 << 16):
            taken += data
    finally:
        os.close(reader)
    missing = MANY + 2 - taken.count(b"\n")
    assert missing > 0
    assert f"{missing} events were not written: nothing was taken for 2 s" in caplog.text


def test_a_reader_that_goes_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    file = EventFile(str(fifo))
    os.read(reader, 1 << 16)
    os.close(reader)
    for number in range(MANY):
        file.send_nowait(TaskArrived(task=number))
    begun = time.monotonic()
    file.finish()
    assert time.monotonic() - begun < SOON_S
    assert f"{MANY + 1} events were not written: Broken pipe" in caplog.text


def test_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    assert write("/dev/full", 3) < SOON_S
    assert "5 events were not written: No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "Is a directory"),
        ("no/file", "No such file or directory"),
        ("socket", "No such device or address"),
    ],
)
def test_what_can_not_be_written(tmp_path: Path, name: str, problem: str) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        with pytest.raises(PlanError, match=f"--events .*{name}: {problem}"):
            EventFile(str(tmp_path / name))

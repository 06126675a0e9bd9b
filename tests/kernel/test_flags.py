"""No flag of a mount is lost while the mount is writable, not even for a moment.

One target has a read-only mount for every combination of nosuid, nodev, noexec, nosymfollow and
atime mode. While a restore holds all of them writable, the target's mount table is read over and
over, and at once when poll(2) says that it changed: only ro and rw may differ from before.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool._linux import Attr
from ghostpool.testing._namespace import options_of
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, argv_of, live, read_only, run_argv

pytestmark = pytest.mark.needs_mount_ns

PLAIN = (Attr.NOSUID, Attr.NODEV, Attr.NOEXEC, Attr.NOSYMFOLLOW)
ATIME = [
    mode | nodiratime
    for mode in (Attr(0), Attr.NOATIME, Attr.STRICTATIME)
    for nodiratime in (Attr(0), Attr.NODIRATIME)
]
SETS = [
    Attr.RDONLY | atime | sum(plain, Attr(0))
    for atime in ATIME
    for count in range(len(PLAIN) + 1)
    for plain in itertools.combinations(PLAIN, count)
]
READ_ONLY_BIT = re.compile(rb"^((?:\S+ ){5})r[ow]\b", re.MULTILINE)
OPENS = 1500
"""Of one more task, which all others wait for at the barrier: that makes the window long."""


class Sampler:
    """Reads the mount table of a process until it is told to stop."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.stop = threading.Event()
        self.samples: list[bytes] = []
        """Texts of the table; equal neighbours only once."""
        self.announced = 0
        """How often poll(2) reported a change."""

    def __call__(self) -> None:
        fd = os.open(f"/proc/{self._pid}/mountinfo", os.O_RDONLY)
        try:
            # A change is what POLLERR and POLLPRI mean here: proc(5), "mounts".
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            while not self.stop.is_set():
                self.announced += bool(poll.poll(1))
                os.lseek(fd, 0, os.SEEK_SET)
                text = b""
                while piece := os.read(fd, 1 << 20):
                    text += piece
                if not self.samples or text != self.samples[-1]:
                    self.samples.append(text)
        finally:
            os.close(fd)


@contextmanager
def sampled(target: Live) -> Iterator[Sampler]:
    """A sampler of the target's table for the time of the block."""
    sampler = Sampler(target.pid)
    thread = threading.Thread(target=sampler)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.stop.set()
        thread.join()


def test_the_combinations_are_all_there() -> None:
    assert len(SETS) == len(set(SETS)) == 6 * 2**4


@pytest.mark.parametrize("mount_setattr", [True, False], ids=["mount_setattr", "mount"])
def test_flags_at_every_moment(tmp_path: Path, mount_setattr: bool) -> None:
    """Every mount was seen writable, and never with any other flag changed."""
    made = ImageSet()
    made.mount("/")
    for number in range(len(SETS)):
        made.mount(f"/m{number}", flags=0x200001)
    made.mount("/long", flags=0x200001)
    made.task(1)
    for number in range(len(SETS)):
        made.open(1, 3 + number, f"/m{number}/gone", ghost=made.ghost(b"content"))
    made.task(2)
    ghost = made.ghost(b"content")
    for number in range(OPENS):
        made.open(2, 3 + number, f"/long/gone-{number}", ghost=ghost)
    images = made.write(tmp_path / "images")
    mounts = [
        read_only(10 + number, b"/m%d" % number, attributes=int(flags))
        for number, flags in enumerate(SETS)
    ]
    points = [mount.mountpoint for mount in mounts]

    with live([*mounts, read_only(2, b"/long")]) as (target,):
        before = target.mountinfo()
        argv = argv_of(images, target, mount_setattr=mount_setattr, jobs=2)
        with sampled(target) as sampler:
            done = run_argv(argv)
        assert done.status == 0, done
        assert target.mountinfo() == before

    usual = options_of(before)
    assert len({tuple(usual[point]) for point in points}) == len(SETS)
    assert all(usual[point][0] == "ro" for point in points)
    assert sampler.announced >= 2
    seen_writable = dict.fromkeys(points, 0)
    for sample in sampler.samples:
        now = options_of(sample)
        for point in points:
            assert now[point][1:] == usual[point][1:], (point, now[point])
            seen_writable[point] += now[point][0] == "rw"
        # All else in the table is as before: no mount has come or gone.
        assert READ_ONLY_BIT.sub(rb"\1", sample) == READ_ONLY_BIT.sub(rb"\1", before)
    assert all(seen_writable.values()), [point for point in points if not seen_writable[point]]

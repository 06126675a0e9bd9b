"""Large ghosts out of archives: no more memory than small ones, nothing left if it fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.archives import with_large_ghost
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, command, live, read_only, run_argv, running

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]

_MEASURE = """
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""The largest resident set of any process below a command. It is executed by a small process, since
the maximum of the one that executes it is where it begins."""


@pytest.fixture(scope="module")
def target() -> Iterator[Live]:
    with live([read_only(10, b"/m", "keep")]) as (one,):
        yield one


def archive(tmp_path: Path, packing: str, size: int) -> Path:
    made = ImageSet()
    made.mount("/")
    made.task(1)
    made.mount("/m", flags=0x200001)
    made.open(1, 3, "/m/gone", ghost=made.ghost(b""), size=size)
    images = made.write(tmp_path / f"images-{size}")
    return with_large_ghost(images, packing, size, tmp_path / f"archive-{size}")


def boots(child: psutil.Process) -> bool:
    """Whether it is the unpacker."""
    try:
        return "import _unpacker as u" in " ".join(child.cmdline())
    except psutil.Error:
        return False


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_memory_does_not_depend_on_the_size_of_a_ghost(
    packing: str, target: Live, tmp_path: Path
) -> None:
    """The peak of coordinator, reader, unpacker and workers, each: within 32 MiB."""
    before = target.snapshot().without_directory_times()
    peaks = []
    for size in (1 << 20, 1 << 30):
        images = archive(tmp_path, packing, size)
        words = command("restore", "-D", images, "-t", target.pid, "--discard")
        peak = tmp_path / "peak"
        done = run_argv([sys.executable, "-I", "-S", "-c", _MEASURE, str(peak), *words])
        assert done.status == 0, done
        peaks.append(int(peak.read_text()) << 10)
        assert target.snapshot().without_directory_times() == before
    assert abs(peaks[1] - peaks[0]) < 32 << 20


def test_the_death_of_the_unpacker(target: Live, tmp_path: Path) -> None:
    """One error that names it, and everything undone."""
    before = target.snapshot().without_directory_times()
    images = archive(tmp_path, "gzip", 1 << 30)
    with running("restore", "-D", images, "-t", target.pid, "--discard") as process:
        found: list[int] = []
        deadline = time.monotonic() + 30
        while not found and time.monotonic() < deadline:
            found = [child.pid for child in psutil.Process(process.pid).children() if boots(child)]
        os.kill(found[0], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert "the process that unpacks the archive was ended by SIGKILL" in err
    assert target.snapshot().without_directory_times() == before

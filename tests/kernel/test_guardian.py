"""A coordinator that is killed at any of its steps: the guardian puts everything back.

The coordinator is a process of its own, which kills itself before or after its n-th call to a
child; n runs over all calls that a restore makes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.kernel.test_steps import CASE, names
from tests.support.corpus import CORPUS, corpus
from tests.support.namespaces import built, inside, mountinfo
from tests.support.truth import specs_from_truth

pytestmark = pytest.mark.needs_mount_ns

WITHIN_S = 5.0
"""Generous for a loaded machine; what the guardian takes is milliseconds."""

COORDINATOR = """
import os, signal, sys
import anyio
from ghostpool import _deliver, _run
from ghostpool._launch import launch
from ghostpool._process import Worker
from ghostpool._report import Report

images, step, when, whom, *where = sys.argv[1:]
calls = 0
call = Worker.call

def die():
    if whom == "all":
        import psutil
        for child in psutil.Process().children(recursive=True):
            if child.pid not in guardians:
                child.kill()
    os.kill(os.getpid(), signal.SIGKILL)

guardians = set()

async def counted(self, request, *args, **keywords):
    global calls
    number, calls = calls, calls + 1
    if request in ("owe", "watch"):
        guardians.add(self.child.pid)
    if number == int(step) and when == "before":
        die()
    result = await call(self, request, *args, **keywords)
    if number == int(step):
        die()
    return result

Worker.call = counted
namespaces = dict(zip((10, 11, 12, 13), where))
request = _run.Request(images, 2, namespaces=namespaces)

async def main():
    await _run.run_restore(request, launch(), Report(), _deliver.discard)

anyio.run(main, backend="trio")
print(calls)
"""


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[int]]:
    _, truth = corpus(CASE)
    with built(specs_from_truth(truth)) as fds:
        yield fds


def look(fds: list[int]) -> list[object]:
    return [(mountinfo(fd), inside(fd, names)) for fd in fds]


def coordinate(fds: list[int], step: int, when: str, whom: str) -> subprocess.CompletedProcess[str]:
    where = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    images = str(CORPUS / CASE / "images")
    arguments = (images, str(step), when, whom, *where)
    return subprocess.run(
        [sys.executable, "-c", COORDINATOR, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WITHIN_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def children() -> list[str]:
    """Command lines of fork servers and their children that are still there."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "_forkserver" in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


@pytest.mark.parametrize("whom", ["coordinator", "all"])
def test_killed_at_each_step(namespaces: list[int], whom: str) -> None:
    """`all`: the fork server and the workers die with it; only the guardian is left."""
    before = look(namespaces)
    done = coordinate(namespaces, -1, "before", whom)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps >= 30
    undone = 0
    for step in range(4, steps, 1 if whom == "coordinator" else 3):
        when = ("before", "after")[step % 2]
        done = coordinate(namespaces, step, when, whom)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(lambda: look(namespaces) == before), (step, when)
        assert wait_for(lambda: not children()), (step, when)
        undone += "the run ended abruptly" in done.stderr
    # Most steps lie between the first change and the last.
    assert undone >= 5

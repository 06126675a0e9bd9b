"""What ghostpool costs, as ratios of one run: a change that doubles one of them fails here.

Not the targets, which `python -m bench` measures on a quiet machine, and no times. CPU seconds of a
command and all its children, since those stay much the same whatever else runs meanwhile; and of
all rounds the cheapest, since nothing makes a command cheaper than it is. Rounds go on for as long
as a ratio is too high and there is time: noise passes, a regression does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import rivals
from bench.images import Shape, write_images
from bench.scene import in_private_namespace, live_namespace

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

FEW, MANY = 100, 4_000
LEAST_ROUNDS, MOST_S = 2, 35.0

BOUNDS = {
    "further ghost, 1 job, over C": 5.6,
    "further ghost, 1 job, over the shell in bulk": 2.6,
    "further ghost, detached over remount": 1.5,
    "wall time, 2 jobs over 1": 1.5,
    "2,000 mounts over 10": 1.7,
    "one ghost over the imports": 4.0,
}
"""Each is some 60 % above what was measured when it was set; lower it when that has become less."""


class Cost(NamedTuple):
    """Seconds of a command."""

    cpu: float
    wall: float


def cost(command: Sequence[str]) -> Cost:
    """Run it to its end; what it and the children that it waited for took."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return Cost(usage.ru_utime + usage.ru_stime, wall)


def commands(scratch: Path, stack: ExitStack) -> dict[str, list[str]]:
    """What is compared, by name; `stack` holds the live namespaces."""
    found: dict[str, list[str]] = {"imports": [sys.executable, "-c", "import trio, anyio"]}
    base = bytes(scratch / "live")
    pid = stack.enter_context(live_namespace(Shape(0, mounts=10, base=base)))
    program = rivals.compile_c(scratch)
    for ghosts in (1, FEW, MANY):
        shape = Shape(ghosts, mounts=10, base=base)
        images = scratch / f"images-{ghosts}"
        write_images(images, shape)
        found[f"1 job: {ghosts}"] = rivals.ghostpool(images, jobs=1, pid=pid)
        if ghosts == 1:
            continue
        files = rivals.write_files(scratch / f"files-{ghosts}", shape)
        found[f"2 jobs: {ghosts}"] = rivals.ghostpool(images, jobs=2, pid=pid)
        found[f"detached: {ghosts}"] = rivals.ghostpool(
            images, jobs=1, pid=pid, strategy="detached"
        )
        found[f"C: {ghosts}"] = rivals.c(program, images, pid=pid)
        found[f"shell: {ghosts}"] = rivals.shell_bulk(pid, shape, files)
    shape = Shape(1, mounts=10, further_mounts=1_990, base=base)
    write_images(scratch / "images-mounts", shape)
    pid = stack.enter_context(live_namespace(shape))
    found["mounts"] = rivals.ghostpool(scratch / "images-mounts", jobs=1, pid=pid)
    return found


def ratios(least: Mapping[str, Cost]) -> dict[str, float]:
    """Those of BOUNDS."""

    def further(name: str) -> float:
        return least[f"{name}: {MANY}"].cpu - least[f"{name}: {FEW}"].cpu

    values = (
        further("1 job") / further("C"),
        further("1 job") / further("shell"),
        further("detached") / further("1 job"),
        least[f"2 jobs: {MANY}"].wall / least[f"1 job: {MANY}"].wall,
        least["mounts"].cpu / least["1 job: 1"].cpu,
        least["1 job: 1"].cpu / least["imports"].cpu,
    )
    return dict(zip(BOUNDS, values, strict=True))


def measure(scratch: Path) -> dict[str, float]:
    """The ratios, as soon as they are within their bounds, or when there is no time left."""
    least: dict[str, Cost] = {}
    until = time.monotonic() + MOST_S
    with ExitStack() as stack:
        compared = commands(scratch, stack)
        rounds = 0
        while True:
            for name, command in compared.items():
                new = cost(command)
                old = least.get(name, new)
                least[name] = Cost(min(old.cpu, new.cpu), min(old.wall, new.wall))
            rounds += 1
            found = ratios(least)
            within = all(0 < found[name] <= bound for name, bound in BOUNDS.items())
            if (within and rounds >= LEAST_ROUNDS) or time.monotonic() > until:
                return found


# Idle threads of an earlier test's event loop; the child uses nothing that they hold.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.needs_cc
def test_nothing_costs_twice_as_much_as_it_did(tmp_path: Path) -> None:
    """Every ratio is within its bound, in one round or another."""
    file = tmp_path / "ratios.json"

    def body(scratch: Path) -> None:
        file.write_text(json.dumps(measure(scratch)), encoding="utf-8")

    assert in_private_namespace(body) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    too_high = {name: found[name] for name, bound in BOUNDS.items() if not 0 < found[name] <= bound}
    assert not too_high, found


# As above.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_mounts_are_made_in_linear_time(tmp_path: Path) -> None:
    """A bind whose source is below a mount with many others takes the longer the more there are:
    has_locked_children in fs/namespace.c looks at each. Those of a scene are no such binds."""
    file = tmp_path / "seconds.json"

    def seconds(scratch: Path, mounts: int) -> float:
        shape = Shape(0, mounts=1, further_mounts=mounts, base=bytes(scratch / f"live-{mounts}"))
        begun = time.perf_counter()
        with live_namespace(shape):
            return time.perf_counter() - begun

    def body(scratch: Path) -> None:
        file.write_text(json.dumps([seconds(scratch, count) for count in (2_000, 20_000)]))

    assert in_private_namespace(body) == 0
    few, many = json.loads(file.read_text(encoding="utf-8"))
    assert many < 30 * few  # ten times as many mounts; such binds took 70 times as long

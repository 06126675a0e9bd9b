"""Whether a restore blocks the event loop of the program that embeds it: the worst gap.

The program has nothing to do but to beat every millisecond, on trio and on asyncio, while a
restore with many ghosts runs in it. A gap is the time between two beats beyond that, less the
time that the thread was ready and waited for a CPU, which is the machine's doing:
/proc/thread-self/schedstat, second field. What Python's collector of garbage takes, whose full
passes look at all that the restore has planned, is in it, unless the program has switched it off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bench.images import Shape
from bench.measure import Answer, Setting, spread
from bench.scene import BenchError, restorable, workplace

_NO_GC = ", without garbage collection"
_MOUNTS = 10
_NAMESPACES = 16
_LIMIT = 19_000
"""Ghosts: the program holds all descriptors, and may have 20,000 where hard limits are low."""

_PROGRAM = """
import gc, json, os, sys, time
import anyio
import ghostpool

BEAT_S = 0.001

def waited_s():
    with open("/proc/thread-self/schedstat") as file:
        return int(file.read().split()[1]) / 1e9

async def beat(gaps):
    last, waited = time.monotonic(), waited_s()
    while True:
        await anyio.sleep(BEAT_S)
        now, waits = time.monotonic(), waited_s()
        gaps.append(max(0.0, now - last - BEAT_S - (waits - waited)))
        last, waited = now, waits

async def main():
    images, pids, gaps = sys.argv[2], json.loads(sys.argv[3]), []
    if sys.argv[4:]:
        gc.disable()
    namespaces = {int(number): pid for number, pid in pids.items()}
    async with anyio.create_task_group() as group:
        group.start_soon(beat, gaps)
        await anyio.sleep(10 * BEAT_S)
        async with ghostpool.restore(images, namespaces=namespaces, jobs=2):
            pass
        group.cancel_scope.cancel()
    print(json.dumps([max(gaps), len(gaps)]))

anyio.run(main, backend=sys.argv[1])
"""


def measure(setting: Setting) -> Answer:
    """Milliseconds."""
    ghosts = 2_000 if setting.quick else _LIMIT
    samples: dict[str, list[float]] = {
        f"{backend}{end}": [] for end in ("", _NO_GC) for backend in ("trio", "asyncio")
    }
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "loop"))
        shape = Shape(ghosts, namespaces=_NAMESPACES, mounts=_MOUNTS, base=bytes(home / "live"))
        images = home / "images"
        pids = stack.enter_context(restorable(images, shape))
        targets = {shape.namespace_id(number): pid for number, pid in enumerate(pids)}
        for _ in range(setting.rounds):
            for backend, gaps in samples.items():
                gaps.append(_worst_gap(backend, images, targets))
    rows = [(backend, spread(gaps, 1e3)) for backend, gaps in samples.items()]
    return Answer(
        "loop",
        f"worst gap between beats in a program that restores {ghosts:,} ghosts meanwhile",
        ("event loop", "worst gap of a run, ms (min–max)"),
        rows,
        samples,
        figures={
            "worst gap ms": 1e3
            * max(max(gaps) for name, gaps in samples.items() if not name.endswith(_NO_GC))
        },
    )


def _worst_gap(backend: str, images: Path, targets: dict[int, int]) -> float:
    command = [sys.executable, "-c", _PROGRAM, backend.removesuffix(_NO_GC), str(images)]
    command += [json.dumps(targets), *([_NO_GC] if backend.endswith(_NO_GC) else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the program on {backend}: {done.stderr.strip()[-500:]}")
    worst, beats = json.loads(done.stdout)
    if beats < 50:
        raise BenchError(f"the program on {backend} had {beats} beats")
    return float(worst)

"""How much memory a restore of many ghosts takes: the coordinator's peak, and a worker's own.

The coordinator's is the peak of its resident set (VmHWM). A worker shares most of its pages with
the fork server, so what it costs is its proportional share (PSS), the largest that was seen in
samples; the guardian's and the fork server's stand beside it.
"""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from bench import rivals
from bench.images import Shape
from bench.measure import Answer, Setting, spread
from bench.scene import BenchError, restorable, workplace

_NAMESPACES = 16
_MOUNTS = 10
_JOBS = 2
_ROUNDS = 3
"""At most: memory hardly depends on what else the machine does."""
_SAMPLE_S = 0.02
_COORDINATOR = "coordinator, peak RSS"
_WORKER = "worker, largest PSS"
_HELPER = "another child of the fork server (the guardian), largest PSS"
_SERVER = "child of the coordinator (fork server, reader), largest PSS"


def measure(setting: Setting) -> Answer:
    """MiB."""
    ghosts = 3_200 if setting.quick else 100_000
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "memory"))
        shape = Shape(ghosts, namespaces=_NAMESPACES, mounts=_MOUNTS, base=bytes(home / "live"))
        images = home / "images"
        pids = stack.enter_context(restorable(images, shape))
        command = rivals.ghostpool(images, jobs=_JOBS, pids=pids)
        for _ in range(min(setting.rounds, _ROUNDS)):
            for name, value in _peaks(command, home / "events").items():
                samples.setdefault(name, []).append(value)
    rows = [(name, spread(values, 1)) for name, values in samples.items()]
    return Answer(
        "memory",
        f"{ghosts:,} ghosts of 4 KiB in {_NAMESPACES} namespaces, {_JOBS} jobs",
        ("process", "MiB (min–max)"),
        rows,
        samples,
        figures={
            "coordinator MiB": median(samples[_COORDINATOR]),
            "worker PSS MiB": median(samples[_WORKER]),
        },
    )


def _peaks(command: list[str], events: Path) -> dict[str, float]:
    """The most that each kind of process took in one run."""
    peaks = dict.fromkeys((_COORDINATOR, _WORKER, _HELPER, _SERVER), 0.0)
    seen: dict[int, float] = {}
    depths: dict[int, int] = {}
    with subprocess.Popen(
        [*command, "--events", str(events)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            peaks[_COORDINATOR] = max(peaks[_COORDINATOR], _kib(process.pid, "status", "VmHWM"))
            for pid, depth in _descendants(process.pid):
                depths[pid] = depth
                seen[pid] = max(seen.get(pid, 0.0), _kib(pid, "smaps_rollup", "Pss"))
            time.sleep(_SAMPLE_S)
        assert process.stderr is not None
        complaint = process.stderr.read()
    if process.returncode:
        raise BenchError(f"{command[0]}: {complaint.decode(errors='replace').strip()[-500:]}")
    documents = map(json.loads, events.read_text(encoding="utf-8").splitlines())
    workers = {one["worker"] for one in documents if one["event"] == "entered"}
    for pid, pss in seen.items():
        kind = _WORKER if pid in workers else _HELPER if depths[pid] > 1 else _SERVER
        peaks[kind] = max(peaks[kind], pss)
    if not all(peaks.values()):
        raise BenchError(f"a kind of process was never seen: {peaks}")
    return {kind: kib / 1024 for kind, kib in peaks.items()}


def _descendants(pid: int, depth: int = 1) -> list[tuple[int, int]]:
    """Pid and generation."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    found = []
    for child in map(int, text.split()):
        found += [(child, depth), *_descendants(child, depth + 1)]
    return found


def _kib(pid: int, file: str, field: str) -> float:
    """A field in KiB, 0 if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    return 0.0

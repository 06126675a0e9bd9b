"""Load: many namespaces and many ghosts in one run, with figures: `python -m tests.load`.

Each case writes an image directory, restores it with the real command into namespaces that are
rebuilt from the images or were there before, and says how long it took and what it used.
As root; everything happens in private mount namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.images import Shape, write_images
from ghostpool._buildspec import MountSpec, NamespaceSpec
from ghostpool._linux import Attr
from ghostpool.testing._targets import built
from tests.support.namespaces import mountinfo

FIRST_NAMESPACE = 10
DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
"""All that this process may have; it holds the namespaces of some cases itself."""


class Case(NamedTuple):
    """One run."""

    shape: Shape
    jobs: int
    descriptors: int = DESCRIPTORS
    rebuilt: bool = True
    """False: into namespaces that the caller holds, each named by --ns."""
    outcome: str = "--discard"


_NAMESPACES = Shape(1000, namespaces=1000, mounts=1)
_GHOSTS = Shape(50_000, mounts=10, tasks=10, directories=10, size=512)
CASES = {
    "1,000 namespaces, rebuilt": Case(_NAMESPACES, 16),
    "1,000 namespaces, named": Case(_NAMESPACES, 16, rebuilt=False),
    "1,000 namespaces, 1024 descriptors": Case(_NAMESPACES, 16, descriptors=1024),
    "50,000 ghosts": Case(_GHOSTS, 16),
    "50,000 ghosts, kept": Case(_GHOSTS, 16, outcome="--keep"),
    "50,000 ghosts, 1024 descriptors": Case(_GHOSTS, 16, descriptors=1024),
    "50,000 ghosts, kept, 1024 descriptors": Case(_GHOSTS, 16, descriptors=1024, outcome="--keep"),
}
"""The files of all ghosts are open at one time, unless they are kept: that takes a descriptor
each, so what works depends on the machine's own limit too."""


class Outcome(NamedTuple):
    """What came of a run."""

    status: int
    err: str
    elapsed_s: float
    peak_rss: int
    """Of the coordinator, in bytes; the others are its children's children."""
    untouched: bool
    """The mount tables of the namespaces that were there before are as before."""
    report: dict[str, object]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "status": self.status,
            "elapsed_s": round(self.elapsed_s, 3),
            "untouched": self.untouched,
            "line": self.line(),
        }

    def line(self) -> str:
        workers = self.report["workers"]
        return (
            f"status {self.status}, {self.elapsed_s:.2f} s, coordinator {self.peak_rss >> 20} MiB, "
            f"workers {workers}"
        )


def specs(shape: Shape) -> Sequence[NamespaceSpec]:
    """The namespaces of a shape, alive."""
    found = []
    for number in range(shape.namespaces):
        base = number * (shape.mounts + 1) + 1
        root = MountSpec(base, 0, b"/", base, source="rootfs")
        mounts = [
            MountSpec(
                base + 1 + mount,
                base,
                shape.mountpoint(mount),
                base + 1 + mount,
                attributes=int(Attr.RDONLY),
            )
            for mount in range(shape.mounts)
        ]
        found.append(NamespaceSpec(FIRST_NAMESPACE + number, (root, *mounts)))
    return found


@contextmanager
def many_descriptors() -> Iterator[None]:
    """Raise the limit of this process, which holds the namespaces of some cases."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def run(case: Case, directory: Path) -> Outcome:
    """Write the images and restore them, below an empty directory."""
    images, report = directory / "images", directory / "report"
    write_images(images, case.shape)
    with many_descriptors(), ExitStack() as stack:
        fds = [] if case.rebuilt else stack.enter_context(built(specs(case.shape)))
        looked_at = fds[:: max(1, len(fds) // 20)]
        before = [mountinfo(fd) for fd in looked_at]
        named = [
            f"--ns={FIRST_NAMESPACE + number}=/proc/{os.getpid()}/fd/{fd}"
            for number, fd in enumerate(fds)
        ]
        command = [sys.executable, "-m", "ghostpool", "restore", "-D", str(images), *named]
        command += ["-j", str(case.jobs), "--report", str(report), case.outcome]
        script = f'ulimit -n {case.descriptors}; exec "$@"'
        begun = time.monotonic()
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command], stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stderr is not None
            err = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        elapsed_s = time.monotonic() - begun
        untouched = [mountinfo(fd) for fd in looked_at] == before
    document = json.loads(report.read_text(encoding="utf-8"))
    peak = usage.ru_maxrss * 1024
    return Outcome(process.returncode, err, elapsed_s, peak, untouched, document)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for the images, in memory where the machine has a place for that."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    return tempfile.TemporaryDirectory(prefix="ghostpool-load-", dir=place)


def main() -> int:
    """Run all cases, or those whose names hold a word; 1 if one was neither done nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=main.__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came out")
    options = parser.parse_args()
    results = {}
    for name, case in CASES.items():
        if options.words and not any(word in name for word in options.words):
            continue
        with scratch() as directory:
            outcome = run(case, Path(directory))
        print(f"{name}: {outcome.line()}", flush=True)
        if outcome.err:
            print(f"    {outcome.err.strip()}", flush=True)
        results[name] = outcome.document()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    good = all(one["status"] in (0, 2) and one["untouched"] for one in results.values())
    return 0 if results and good else 1


if __name__ == "__main__":
    sys.exit(main())

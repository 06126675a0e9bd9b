"""The soak: restores of random plans under random kills, and zero leftovers.

    python -m tests.soak --restores N --seed S [--json FILE]

Each restore has images and namespaces of its own (one to three, with read-only and writable mounts,
superblocks of one namespace or of all, ghosts of every kind, missing parents, names that are
taken) and one fault: at a call to a child, or at any moment. Both event loops take turns. After
each the mount tables, all files, the processes and descriptors and the run directory are as
before; at once, or after `ghostpool recover` where everything was killed. As root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ghostpool._buildspec import MountSpec, Node
from ghostpool.testing._area import Fault
from ghostpool.testing._forked import fork
from tests.faults.running import Call, Case, Outcome, become_reaper, faults_of_call, run_case
from tests.faults.scenes import (
    _ROOT,
    MS_RO,
    O_DIRECTORY,
    O_NOFOLLOW,
    O_PATH,
    RO,
    SHARED,
    Definition,
    standing,
)
from tests.matrix import BACKENDS, JOBS
from tests.support.imagewriter import O_RDWR, ImageSet

MOMENT_S = 0.12
"""A restore takes about as long, so a fault comes anywhere in it, or too late."""
KINDS = ("plain", "holes", "empty", "fifo", "link", "directory", "device", "path")


# -- Plans -----------------------------------------------------------------------------------------


class Mounted(NamedTuple):
    """A mount of one namespace."""

    read_only: bool
    shared: bool
    """Its superblock is that of all namespaces' mounts of this kind."""


class Ghost(NamedTuple):
    """A file to bring back."""

    kind: str
    mount: int
    depth: int
    """How many of its parents are missing."""
    taken: bool
    opens: int
    write: bool


class Space(NamedTuple):
    """One namespace, and the task in it."""

    mounts: tuple[Mounted, ...]
    ghosts: tuple[Ghost, ...]
    tasks: int


class Blow(NamedTuple):
    """A fault, and when; many a restore is over by then."""

    fault: Fault
    call: int
    after: bool
    moment_s: float | None
    """Instead of a call."""


GHOSTS = st.builds(
    Ghost,
    kind=st.sampled_from(KINDS),
    mount=st.integers(0, 2),
    depth=st.integers(0, 2),
    taken=st.booleans(),
    opens=st.integers(1, 2),
    write=st.booleans(),
)
SPACES = st.builds(
    Space,
    mounts=st.lists(
        st.builds(Mounted, read_only=st.booleans(), shared=st.booleans()), min_size=1, max_size=3
    ).map(tuple),
    ghosts=st.lists(GHOSTS, min_size=1, max_size=5).map(tuple),
    tasks=st.integers(1, 2),
)
BLOWS = st.builds(
    Blow,
    fault=st.sampled_from(list(faults_of_call())),
    call=st.integers(0, 60),
    after=st.booleans(),
    moment_s=st.none() | st.floats(0, MOMENT_S),
)
PLANS = st.tuples(st.lists(SPACES, min_size=1, max_size=3), BLOWS)


def definition_of(spaces: list[Space]) -> Definition:
    """Images of the plan, and targets that match them."""
    made = ImageSet()
    for number, space in enumerate(spaces):
        made.mount("/", ns=10 + number)
        for at, mount in enumerate(space.mounts):
            flags = MS_RO if mount.read_only else MS_RO - 1
            device = (0, 100 + at if mount.shared else 200 + 10 * number + at)
            made.mount(f"/m{at}", ns=10 + number, flags=flags, device=device)
        for task in range(space.tasks):
            made.task(1 + 10 * number + task, ns=10 + number)
        for which, ghost in enumerate(space.ghosts):
            _add(made, number, space, which, ghost)
    return Definition("soak", lambda: made, tuple(map(_targets, spaces)))


def _targets(space: Space) -> tuple[MountSpec, ...]:
    mounts = [_ROOT]
    for at, mount in enumerate(space.mounts):
        taken = tuple(
            Node(_path(space, which, ghost).encode(), 0o100600, data=b"somebody else's")
            for which, ghost in enumerate(space.ghosts)
            if ghost.taken and not ghost.depth and ghost.mount % len(space.mounts) == at
        )
        # What is on a superblock of all is made for the first mount of it only.
        superblock = SHARED + at if mount.shared else 2 + at
        spec = MountSpec(2 + at, 1, b"/m%d" % at, superblock, "tmpfs", "m", "size=1m", b"/")
        nodes = () if mount.shared else taken
        mounts.append(spec._replace(attributes=RO if mount.read_only else 0, nodes=nodes))
    return tuple(mounts)


def _path(space: Space, which: int, ghost: Ghost) -> str:
    parents = "".join(f"/gone-{which % 2}-{level}" for level in range(ghost.depth))
    return f"/m{ghost.mount % len(space.mounts)}{parents}/ghost-{which}"


def _add(made: ImageSet, number: int, space: Space, which: int, ghost: Ghost) -> None:
    path = _path(space, which, ghost).replace("ghost-", f"ghost-{number}-")
    if ghost.taken and not ghost.depth:
        path = _path(space, which, ghost)
    writable = not space.mounts[ghost.mount % len(space.mounts)].read_only
    flags = O_RDWR if ghost.write and writable else 0o100000
    first = 3 + 4 * which
    pid = 1 + 10 * number + which % space.tasks
    if ghost.kind == "fifo":
        made.open_fifo(pid, first, path, ghost=made.ghost(mode=0o10640), pipe=10 * number + which)
        return
    if ghost.kind == "holes":
        content = made.ghost(chunks=[(4096, b"x" * 100), (12288, b"y")], size=20000)
    elif ghost.kind == "link":
        content, flags = made.ghost(mode=0o120777, target="away"), O_PATH | 0o400000
    elif ghost.kind == "directory":
        content, flags = made.ghost(mode=0o40750), O_DIRECTORY
    elif ghost.kind == "device":
        content = made.ghost(mode=0o20666, rdev=0x103)
    elif ghost.kind == "path":
        content, flags = made.ghost(b"content"), O_NOFOLLOW
    else:
        content = made.ghost(b"content" * (ghost.kind == "plain"), uid=7)
    for again in range(ghost.opens):
        made.open(pid, first + again, path, ghost=content, flags=flags)


def case_of(blow: Blow, number: int) -> Case:
    """The fault of one restore; the event loops take turns."""
    backend = BACKENDS[number % 2]
    if blow.moment_s is not None:
        return Case(blow.fault, backend=backend, moment_s=blow.moment_s)
    return Case(blow.fault, call=Call(blow.call, blow.after), backend=backend)


# -- Running ---------------------------------------------------------------------------------------


@dataclass
class Soak:
    """What came of many restores."""

    restores: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    recovered: int = 0
    leftovers: list[dict[str, Any]] = field(default_factory=list)

    def add(self, plan: Any, case: Case, outcome: Outcome) -> None:
        self.restores += 1
        self.ends[outcome.error or "restored"] += 1
        if outcome.fired:
            self.faults[" ".join(case.fault)] += 1
        self.recovered += outcome.recovered
        if not outcome.fired and outcome.error:
            outcome.red.append(f"failed without a fault: {outcome.error}: {outcome.said}")
        if outcome.red:
            self.leftovers.append(
                {"plan": repr(plan), "error": outcome.error, "problems": outcome.red}
            )


def run_soak(restores: int, number: int) -> Soak:
    """That many restores, of the plans that hypothesis draws with the seed `number`."""
    soak = Soak()

    @seed(number)
    @settings(
        max_examples=restores,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(PLANS)
    def restore(plan: tuple[list[Space], Blow]) -> None:
        spaces, blow = plan
        case = case_of(blow, soak.restores)
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            with standing(definition_of(spaces), directory / "images") as scene:
                soak.add(plan, case, run_case(scene, case, directory, again=False))

    restore()
    return soak


def run_all(restores: int, number: int, jobs: int = JOBS) -> Soak:
    """The same in several processes, which are the reapers of what their runs leave."""
    begun = []
    for job in range(min(jobs, restores)):
        reader, writer = os.pipe()
        share = restores // jobs + (job < restores % jobs)
        pid = fork()
        if pid == 0:
            _runner(share, number * jobs + job, writer)
        os.close(writer)
        begun.append((pid, reader))
    total = Soak()
    for pid, reader in begun:
        with open(reader, encoding="utf-8") as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError("a runner of the soak has failed; see above")
        part = json.loads(text)
        total.restores += part["restores"]
        total.ends.update(part["ends"])
        total.faults.update(part["faults"])
        total.recovered += part["recovered"]
        total.leftovers += part["leftovers"]
    return total


def _runner(restores: int, number: int, writer: int) -> None:
    status = 1
    try:
        become_reaper()
        soak = run_soak(restores, number)
        with open(writer, "w", encoding="utf-8") as pipe:
            json.dump(soak.__dict__, pipe)
        status = 0
    except BaseException:  # noqa: BLE001  the parent sees the status
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--restores", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the numbers and all leftovers")
    options = parser.parse_args()
    begun = time.monotonic()
    soak = run_all(options.restores, options.seed)
    elapsed = time.monotonic() - begun
    print(f"{soak.restores} restores, {len(soak.leftovers)} with leftovers, in {elapsed:.0f} s")
    for title, counts in (("ended", soak.ends), ("faults", soak.faults)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for one in soak.leftovers:
        print(f"\nRED {one['plan']}\n    ended with: {one['error']}", file=sys.stderr)
        for problem in one["problems"]:
            print(f"    {problem}", file=sys.stderr)
    if options.json:
        document = {**soak.__dict__, "seed": options.seed, "elapsed_s": round(elapsed, 1)}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if soak.leftovers else 0


if __name__ == "__main__":
    sys.exit(main())

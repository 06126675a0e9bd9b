"""Coordinators that are killed at a chosen call to a child, alone or with others.

The coordinator is a process of its own, which kills itself, and whom else it is told to, before or
after its n-th call to a child (or its n-th call of one kind).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import psutil

import ghostpool

Whom = Literal["coordinator", "all but the guardian", "guardian", "everything", "fork server"]
"""The fork server: it alone, and the coordinator goes on."""
WITHIN_S = 5.0
"""Generous for a loaded machine; what a guardian takes is milliseconds."""

_COORDINATOR = """
import os, signal, sys
import anyio
from ghostpool import _deliver, _run
from ghostpool._launch import launch
from ghostpool._planned import Policy
from ghostpool._workerclient import WorkerClient
from ghostpool._report import Report

images, kind, number, when, whom, mount_setattr, keep, meanwhile, *where = sys.argv[1:]
calls = matching = 0
call = WorkerClient.call
guardians = set()

def die():
    import psutil
    exec(meanwhile)
    if whom == "fork server":
        for child in psutil.Process().children():
            if "_forkserver" in " ".join(child.cmdline()):
                child.kill()
        return
    for child in psutil.Process().children(recursive=True):
        which = "guardian" if child.pid in guardians else "all but the guardian"
        if whom in (which, "everything"):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass  # it ended with its fork server
    if whom != "guardian":
        os.kill(os.getpid(), signal.SIGKILL)

async def counted(self, request, *args, **keywords):
    global calls, matching
    if request == "journal":
        guardians.add(self.child.pid)
    calls += 1
    mine = False
    if kind in ("", request):
        mine = matching == int(number)
        matching += 1
    if mine and when == "before":
        die()
    result = await call(self, request, *args, **keywords)
    if mine and when == "after":
        die()
    return result

WorkerClient.call = counted
namespaces = {int(number): path for number, _, path in (one.partition("=") for one in where)}
request = _run.Request(
    images, 2, namespaces=namespaces,
    policy=Policy(keep=keep == "keep", consume_link_remaps=keep == "consume"),
    mount_setattr=mount_setattr == "yes",
)

async def main():
    await _run.run_restore(request, launch(), Report(), _deliver.discard)

anyio.run(main, backend="trio")
print(calls)
"""


def coordinate(
    images: Path,
    namespaces: Mapping[int, str],
    number: int = -1,
    *,
    kind: str = "",
    when: Literal["before", "after"] = "after",
    whom: Whom = "everything",
    mount_setattr: bool = True,
    keep: bool = False,
    consume: bool = False,
    meanwhile: str = "",
    stderr: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Restore and discard; die at the `number`-th call, of those of one `kind` if that is given.

    Without `number` it lives, and prints how many calls it made. `meanwhile` is Python code that
    is run just before.
    """
    where = [f"{ns}={path}" for ns, path in namespaces.items()]
    options = ["yes" if mount_setattr else "no", "", meanwhile]
    options[1] = "keep" if keep else "consume" if consume else ""
    arguments = [str(images), kind, str(number), when, whom, *options, *where]
    return subprocess.run(
        [sys.executable, "-c", _COORDINATOR, *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
    )


def own_paths(namespaces: Mapping[int, int]) -> dict[int, str]:
    """Descriptors of this process as paths that another one can name."""
    return {ns: f"/proc/{os.getpid()}/fd/{fd}" for ns, fd in namespaces.items()}


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes to hold within a moment."""
    end = time.monotonic() + WITHIN_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def children() -> list[str]:
    """Command lines of fork servers of this package, and their children, that are still there."""
    above = repr(str(Path(ghostpool.__file__).parent.parent))
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if "_forkserver" in line and above in line:
            found += [line] * (process.info["status"] != psutil.STATUS_ZOMBIE)
    return found


def run_directory() -> Path:
    """Where this session's runs have their journals."""
    return Path(os.environ["GHOSTPOOL_RUN_DIR"])


def journals() -> list[str]:
    """What is in the run directory."""
    return sorted(os.listdir(run_directory()))

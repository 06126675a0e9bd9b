"""Images of many tasks, the namespaces that they go to, and what must come back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import ghostpool
from ghostpool.testing import Snapshot, Targets, built_targets
from tests.support.imagewriter import ImageSet
from tests.support.live import ROOT, read_only

LOOPS = (
    pytest.param(("trio", {}), id="trio"),
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
)
"""Every event loop that programs run on, for a fixture `anyio_backend`."""


class Scene(NamedTuple):
    """Images, the namespaces that they go to, and what must come back."""

    images: str
    targets: Targets
    contents: dict[int, dict[int, bytes]]
    """Of each task, by number."""

    @property
    def namespaces(self) -> dict[int, int]:
        return self.targets.pids


@contextmanager
def scene(directory: Path, namespaces: int, tasks: int, files: int = 2) -> Iterator[Scene]:
    """Namespaces with a read-only mount each; tasks with ghosts on it.

    The last number of each task is a dup of its first, and number 90 an open file that it shares
    with the task before it.
    """
    images = ImageSet()
    contents: dict[int, dict[int, bytes]] = {}
    specs = []
    for number in range(namespaces):
        ns, base = 10 + number, 10 * number
        root = ROOT._replace(id=base + 1, superblock=base + 1)
        data = read_only(base + 2, b"/data")._replace(parent=base + 1, superblock=base + 2)
        specs.append(ghostpool.NamespaceSpec(ns, (root, data)))
        images.mount("/", ns=ns, device=(0, 100 + number))
        images.mount("/data", ns=ns, device=(0, 200 + number), flags=0x200001)
    shared = None
    for number in range(namespaces * tasks):
        pid, ns = number + 1, 10 + number % namespaces
        images.task(pid, ns=ns)
        mine = contents[pid] = {}
        for fd in range(3, 3 + files):
            mine[fd] = f"file {fd} of task {pid}".encode()
            reg = images.open(pid, fd, f"/data/{pid}-{fd}", ghost=images.ghost(mine[fd]))
            if fd == 3:
                images.fd(pid, 80, reg)
                mine[80] = mine[3]
        if shared is not None and number % namespaces:
            images.fd(pid, 90, shared)
            mine[90] = contents[pid - 1][3 + files - 1]
        shared = reg
    directory.mkdir(exist_ok=True)
    images.write(directory)
    with built_targets(*specs) as targets:
        before = look(targets)
        yield Scene(str(directory), targets, contents)
        assert look(targets) == before


def look(targets: Targets) -> dict[int, Snapshot]:
    return {ns: one.snapshot().without_directory_times() for ns, one in targets.items()}


def read(fds: Mapping[int, int]) -> dict[int, bytes]:
    """The content of each, by number."""
    return {number: os.pread(fd, 1000, 0) for number, fd in fds.items()}

"""The shortest programs that the library is made for, as a text, run as they stand.

Only the targets are put in: `4242` and `...` stand for them.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool._linux import close_all
from tests.kernel.test_openpool import NAMESPACES, TASKS
from tests.support.scene import LOOPS, Scene, look, scene

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio, pytest.mark.long]

RESTORE = """
async with ghostpool.restore("img/", namespaces={11: 4242}, jobs=16) as restored:
    for task in restored.tasks.values():          # keyed by pid in the image
        fds = await task.take_fds()
"""

POOL = """
async with ghostpool.open_pool("img/", namespaces=..., jobs=16) as pool:
    async with anyio.create_task_group() as tg:
        for pid in pool.tasks:
            tg.start_soon(bring_up, pool, pid)
    report = await pool.finish()                  # mounts are back; temporaries gone
"""

BRING_UP = """
async def bring_up(pool, pid):
    async with pool.task(pid) as task:            # leases what this task needs
        fds = await task.open_files()
        ...                                       # fork, hand over, wait for readiness
"""


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    chosen: tuple[str, dict[str, Any]] = request.param
    return chosen


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with scene(tmp_path / "img", NAMESPACES, TASKS) as made:
        monkeypatch.chdir(tmp_path)
        before = look(made.targets)
        yield made
        assert look(made.targets) == before


def open_descriptors() -> list[int]:
    """Without that of the listing itself."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return [number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")]


async def run(snippet: str, put_in: dict[str, object], **names: object) -> dict[str, Any]:
    """What the names of the snippet stand for when it is over."""
    for what, value in put_in.items():
        assert what in snippet
        snippet = snippet.replace(what, repr(value))
    text = f"async def main():\n{textwrap.indent(snippet, '    ')}    return locals()\n"
    space: dict[str, Any] = {"anyio": anyio, "ghostpool": ghostpool, **names}
    exec(compile(text, "<snippet>", "exec"), space)
    found: dict[str, Any] = await space["main"]()
    return found


async def test_a_restore(made: Scene) -> None:
    open_before = set(open_descriptors())
    found = await run(RESTORE, {"{11: 4242}": made.namespaces})
    taken = set(open_descriptors()) - open_before
    try:
        assert len(found["restored"].tasks) == NAMESPACES * TASKS
        last = made.contents[found["task"].pid]
        assert {number: os.pread(fd, 99, 0) for number, fd in found["fds"].items()} == last
        assert found["restored"].report.restored
    finally:
        close_all(taken)


async def test_a_pool(made: Scene) -> None:
    space: dict[str, Any] = {}
    exec(compile(BRING_UP, "<snippet>", "exec"), space)
    found = await run(POOL, {"...": made.namespaces}, bring_up=space["bring_up"])
    assert found["report"].restored
    assert len(found["pool"].tasks) == NAMESPACES * TASKS

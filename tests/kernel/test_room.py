"""Disk space and inodes: what does not fit is refused in the plan; what is filled up by somebody
else meanwhile fails and is undone."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _deliver, _linux, _run
from ghostpool._errors import KernelError
from ghostpool._launch import launch
from ghostpool._pool import WorkerPool
from ghostpool._report import Report
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, assert_refused, live, read_only, run

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

BLOCK = 4096


def images_with(*contents: bytes | tuple[int, bytes]) -> ImageSet:
    """One ghost for each content; an offset with it makes a hole before it."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    for number, content in enumerate(contents):
        if isinstance(content, bytes):
            ghost = made.ghost(content)
        else:
            ghost = made.ghost(chunks=[content], size=content[0] + len(content[1]))
        made.open(1, 3 + number, f"/data/gone-{number}", ghost=ghost)
    return made


def data(options: str) -> Any:
    return read_only(2, b"/data", options=f"mode=755,{options}")


def outcomes(images: Path, options: str, *flags: str) -> tuple[int, int]:
    """Exit status of plan and of restore, which agree, into a tmpfs with these options."""
    with live([data(options)]) as (target,):
        before = target.snapshot()
        keep = [flag for flag in flags if flag == "--keep"]
        planned = run("plan", "-D", images, "-t", target.pid, *keep)
        assert target.snapshot() == before
        done = run("restore", "-D", images, "-t", target.pid, *(flags or ["--discard"]))
        if done.status:
            assert done.err.startswith("ghostpool: refused: /data in mnt:["), done
            assert target.snapshot() == before
        return planned.status, done.status


@pytest.mark.parametrize("spare", [0, -1])
def test_space_to_the_last_block(tmp_path: Path, spare: int) -> None:
    """Several ghosts on one superblock add up, each rounded to blocks; holes take nothing."""
    contents: list[Any] = [bytes(1), bytes(BLOCK), bytes(BLOCK + 1), (10 * BLOCK - 1, bytes(2))]
    images = images_with(*contents).write(tmp_path)
    blocks = 1 + 1 + 2 + 2
    status = 0 if spare == 0 else 2
    assert outcomes(images, f"size={(blocks + spare) * BLOCK}") == (status, status)


@pytest.mark.parametrize("spare", [0, -1])
def test_inodes_to_the_last_one(tmp_path: Path, spare: int) -> None:
    """The root, two ghosts, the two parents of one, and a name: on tmpfs a link takes one."""
    made = images_with(b"x")
    made.open(1, 20, "/data/new/deep/gone", ghost=made.ghost(b"x"))
    images = made.write(tmp_path)
    status = 0 if spare == 0 else 2
    assert outcomes(images, f"nr_inodes={1 + 2 + 2 + 1 + spare}") == (status, status)


@pytest.mark.parametrize("spare", [0, -1])
def test_inodes_of_names_that_stay(tmp_path: Path, spare: int) -> None:
    """With --keep all names are there at one time, and all parents."""
    made = images_with(b"x", b"y", b"z")
    ghost = made.ghost(b"x")
    made.open(1, 20, "/data/new/deep/gone", ghost=ghost)
    made.open(1, 21, "/data/new/gone", ghost=ghost)
    images = made.write(tmp_path)
    inodes = 1 + 4 + 5 + 2
    status = 0 if spare == 0 else 2
    assert outcomes(images, f"nr_inodes={inodes + spare}", "--keep") == (status, status)


def test_refusal_names_mount_and_numbers(tmp_path: Path) -> None:
    images = images_with(bytes(40 * BLOCK)).write(tmp_path)
    with live([data(f"size={10 * BLOCK}")]) as targets:
        before = [target.snapshot() for target in targets]
        words = (f"need {40 * BLOCK} bytes", f"only {10 * BLOCK} are free", "/data in mnt:[")
        where = ("-D", images, "-t", targets[0].pid)
        assert_refused(run("restore", *where, "--discard"), before, targets, *words)
        planned = run("plan", *where, "--json")
        assert planned.status == 2
        (refusal,) = json.loads(planned.out)["refusals"]
        assert refusal["subject"].startswith("/data in mnt:[")
        assert refusal["type"] == "PlanError"


# -- Filled by somebody else --------------------------------------------------------------------


def restore_filled(
    monkeypatch: pytest.MonkeyPatch,
    images: Path,
    target: Live,
    *,
    request: str,
    number: int,
    place: bytes,
    limit: str,
) -> None:
    """A restore during which, before such a request of that number, a limit of the superblock at
    `place` is set to what is used."""
    seen = 0
    original = WorkerPool.call

    def shrink() -> None:
        used = os.statvfs(place)
        new = {
            "size": (used.f_blocks - used.f_bfree) * used.f_frsize,
            "nr_inodes": used.f_files - used.f_ffree,
        }[limit]
        at = os.open(place, os.O_PATH)
        context = _linux.fspick(at)
        _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, limit.encode(), b"%d" % new)
        _linux.fsconfig(context, _linux.FSCONFIG_CMD_RECONFIGURE)
        _linux.close_all((at, context))

    async def call(self: WorkerPool, slot: int, name: str, *args: Any, **keywords: Any) -> Any:
        nonlocal seen
        seen += name == request
        if name == request and seen == number:
            target.run(shrink)
        return await original(self, slot, name, *args, **keywords)

    async def story() -> None:
        wanted = _run.Request(str(images), 1, tree=target.pid)
        await _run.run_restore(wanted, launch(), Report(), _deliver.discard)

    monkeypatch.setattr(WorkerPool, "call", call)
    with pytest.raises(OSError, match="ENOSPC") as caught:
        anyio.run(story, backend="trio")
    assert isinstance(caught.value, KernelError)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.mount == place.decode()
    assert seen >= number


def shared_images(ghosts: int) -> ImageSet:
    """Each ghost is opened by two files, so it keeps its temporary name beside its old ones."""
    made = images_with()
    for number in range(ghosts):
        ghost = made.ghost(b"x")
        made.open(1, 3 + 2 * number, f"/data/gone-{number}", ghost=ghost)
        made.open(1, 4 + 2 * number, f"/data/also-{number}", ghost=ghost)
    return made


FILLED: dict[str, tuple[str, str, Callable[[], ImageSet]]] = {
    "content": ("create", "size", lambda: images_with(*[bytes(1 << 20)] * 20)),
    "names": ("open", "nr_inodes", lambda: shared_images(200)),
}


@pytest.mark.parametrize("what", FILLED)
def test_file_system_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Some ghosts, or names, fit; they are gone again, though there was no room left."""
    request, limit, made = FILLED[what]
    images = made().write(tmp_path)
    with live([data("size=64m,nr_inodes=2000")]) as (target,):
        before = target.snapshot().without_directory_times()
        restore_filled(
            monkeypatch, images, target, request=request, number=2, place=b"/data", limit=limit
        )
        assert target.snapshot().without_directory_times().files == before.files


def test_last_of_several_tasks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ghost can be made, but not linked: on tmpfs a link takes an inode of the limit."""
    made = ImageSet()
    made.mount("/")
    for number in range(4):
        made.mount(f"/m{number}", flags=0x200001)
    for number in range(4):
        made.task(number + 1)
        made.open(number + 1, 3, f"/m{number}/gone", ghost=made.ghost(b"content"))
        made.open(number + 1, 4, f"/m{number}/a/b/gone-2", ghost=made.ghost(b"content"))
    images = made.write(tmp_path)
    mounts = [read_only(10 + n, b"/m%d" % n, "keep", options="nr_inodes=9") for n in range(4)]
    with live(mounts) as (target,):
        before = target.snapshot().without_directory_times()
        restore_filled(
            monkeypatch, images, target, request="open", number=1, place=b"/m3", limit="nr_inodes"
        )
        assert target.snapshot().without_directory_times().files == before.files

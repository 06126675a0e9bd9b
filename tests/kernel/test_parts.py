"""The parts that need no restore: reading images, planning, namespaces from a list of mounts."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import (
    Attr,
    ImageError,
    MountTable,
    NamespaceNotFound,
    NamespaceSpec,
    Node,
    PlanError,
    Sandbox,
    SandboxError,
    UnsupportedError,
    _reading,
    make_plan,
    open_leases,
    read_images,
)
from ghostpool._process import ForkServer
from tests.support.corpus import CORPUS, corpus
from tests.support.crash import children
from tests.support.imagewriter import ghosts_on, small
from tests.support.live import ROOT, Live, live, read_only, tmpfs
from tests.support.namespaces import inside, mountinfo

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]
CASE = "06-nested-mntns"
FLAGS = int(Attr.RDONLY | Attr.NOSUID)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_descriptor_stays() -> Iterator[None]:
    """Nor is the limit of descriptors another one."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


def cancelling(
    monkeypatch: pytest.MonkeyPatch, where: type, name: str, when: str = "before"
) -> anyio.CancelScope:
    """A scope that is cancelled before or after a call of the method."""
    scope = anyio.CancelScope()
    method = getattr(where, name)

    async def cancel(self: Any, *args: Any, **options: Any) -> Any:
        if when == "before":
            scope.cancel()
        result = await method(self, *args, **options)
        scope.cancel()
        return result

    monkeypatch.setattr(where, name, cancel)
    return scope


# -- Images -------------------------------------------------------------------------------------


async def test_images() -> None:
    """Of one case: how they are read is tested in test_reader.py."""
    assert await read_images(CORPUS / CASE / "images") == corpus(CASE)[0]


async def test_images_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="name the directory that was given to criu dump -D"):
        await read_images(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=r"^inventory\.img: "):
        await read_images(tmp_path)
    images = small().images()
    images["inventory.img"] = [b"\x02\0\0\0\x08\x09"]
    with pytest.raises(UnsupportedError, match="image format version 9 is unknown"):
        await read_images(small().write(tmp_path, images))


async def test_the_largest_ghost(tmp_path: Path) -> None:
    images = ghosts_on("/data", ["gone"], b"content").write(tmp_path)
    assert len((await read_images(images, max_size=7)).ghosts) == 1
    with pytest.raises(ImageError, match="size"):
        await read_images(images, max_size=6)


async def test_reading_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with cancelling(monkeypatch, _reading._Conversation, "images") as scope:
        await read_images(CORPUS / CASE / "images")
    assert scope.cancelled_caught


# -- Plans --------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Live]:
    ghosts_on("/data", ["d/gone", "d/other"], b"content").write(tmp_path)
    with live([read_only(2, b"/data", "d/", "keep", attributes=FLAGS)]) as (one,):
        before = one.snapshot()
        yield one
        assert one.snapshot() == before


async def test_a_plan(target: Live, tmp_path: Path) -> None:
    plan = await make_plan(tmp_path, tree=target.pid)
    assert plan.refusals == []
    plan.check()
    assert [len(task.opens) for task in plan.tasks] == [2]
    assert sorted(ghost.directory for ghost in plan.ghosts.values()) == [b"d", b"d"]
    (leased,) = plan.leased
    assert plan.mounts[leased].mount in MountTable.of_process(target.pid).stack(b"/data")


async def test_a_plan_by_namespaces(target: Live, tmp_path: Path) -> None:
    for where in (target.pid, f"/proc/{target.pid}/ns/mnt"):
        plan = await make_plan(tmp_path, namespaces={10: where}, jobs=1)
        assert plan.refusals == []
    with pytest.raises(NamespaceNotFound, match="the images have no mount namespace 99"):
        await make_plan(tmp_path, namespaces={99: target.pid})


async def test_refusals_are_in_the_plan(tmp_path: Path) -> None:
    made = ghosts_on("/data", ["gone"], b"content")
    made.open(1, 9, "/data/root", ghost=made.ghost(b"content", mode=stat.S_IFREG | 0o4755))
    images = made.write(tmp_path)
    with live([read_only(2, b"/data")]) as (target,):
        plan = await make_plan(images, tree=target.pid)
        (refusal,) = plan.refusals
        assert refusal.subject.startswith("/data/root")
        with pytest.raises(PlanError, match=r"^refused: /data/root"):
            plan.check()
        (privileged,) = plan.privileged
        assert (privileged.kinds, privileged.allowed) == (("setuid",), False)
        assert (await make_plan(images, tree=target.pid, allow_setuid=True)).refusals == []


async def test_a_plan_with_rebuilt_namespaces() -> None:
    plan = await make_plan(CORPUS / CASE / "images")
    assert plan.refusals == []
    assert {planned.namespace.id for planned in plan.mounts.values()} <= {10, 11, 12, 13}
    assert not children()


async def test_planning_is_cancelled(
    target: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cancelling(monkeypatch, ForkServer, "fork") as scope:
        await make_plan(tmp_path, tree=target.pid)
    assert scope.cancelled_caught
    assert not children()


# -- Sandboxes ----------------------------------------------------------------------------------


async def test_a_sandbox() -> None:
    node = Node(b"/data/file", stat.S_IFREG | 0o640, data=b"of mine")
    data = tmpfs(2, b"/data", attributes=Attr.RDONLY | Attr.NOSUID, nodes=(node,))
    # The same superblock, in another namespace.
    other = data._replace(id=4, parent=3, attributes=0, nodes=())
    specs = (
        NamespaceSpec(7, (ROOT, data)),
        NamespaceSpec(9, (ROOT._replace(id=3, superblock=3), other)),
    )
    async with Sandbox.built(specs) as sandbox:
        assert not children()  # nobody lives there
        assert sandbox.specs == specs
        assert repr(sandbox) == "<Sandbox 2 mount namespaces>"
        assert list(sandbox.paths) == list(sandbox.fds) == [7, 9]
        for number, fd in sandbox.fds.items():
            assert os.path.samestat(os.stat(sandbox.paths[number]), os.fstat(fd))
            assert inside(fd, lambda: Path("/data/file").read_bytes()) == b"of mine"
        table = {mount.mountpoint: mount for mount in mountinfo(sandbox.fds[7])}
        assert table[b"/data"].attributes & FLAGS == FLAGS
        async with open_leases(sandbox.paths[7], ["/data"]) as leases, leases.hold(["/data"]):
            inside(sandbox.fds[7], lambda: os.unlink("/data/file"))
        assert inside(sandbox.fds[9], lambda: os.listdir("/data")) == []


async def test_a_sandbox_from_images(tmp_path: Path) -> None:
    directory = CORPUS / CASE / "images"
    images = await read_images(directory)
    async with Sandbox.from_images(images) as sandbox:
        assert sorted(sandbox.paths) == sorted(images.mounts)
        for number, mounts in images.mounts.items():
            found = sorted(mount.mountpoint for mount in mountinfo(sandbox.fds[number]))
            assert found == sorted(mount.mountpoint for mount in mounts)
        plan = await make_plan(directory, namespaces=sandbox.paths)
        assert plan.refusals == []
    with pytest.raises(SandboxError, match="no mount of the images has that key"):
        async with Sandbox.from_images(images, {"nothing": str(tmp_path)}):
            raise AssertionError("it was not refused")


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([NamespaceSpec(1, (ROOT, tmpfs(2, b"/x", fstype="nofs")))], "ENODEV|No such device"),
        ([NamespaceSpec(1, (ROOT,)), NamespaceSpec(1, (ROOT._replace(id=2),))], "have one id"),
    ],
)
async def test_a_sandbox_that_can_not_be(specs: list[NamespaceSpec], words: str) -> None:
    with pytest.raises(SandboxError, match=words):
        async with Sandbox.built(specs):
            raise AssertionError("it was built")
    assert not children()


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with Sandbox.built([NamespaceSpec(1, (ROOT,))]):
            raise KeyError


@pytest.mark.parametrize("name", ["fork", "build"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_building_is_cancelled(monkeypatch: pytest.MonkeyPatch, name: str, when: str) -> None:
    """Whatever was built by then is gone: see the fixture above."""
    with cancelling(monkeypatch, ForkServer, name, when) as scope:
        async with Sandbox.built([NamespaceSpec(1, (ROOT,))]):
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not children()


async def test_nothing_at_all() -> None:
    async with Sandbox.built([]) as sandbox:
        assert sandbox.paths == {}

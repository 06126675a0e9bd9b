"""Targets that belong to a user namespace: the dumped owners, as the container sees them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import anyio
import pytest

import ghostpool
from ghostpool import _linux
from ghostpool._buildspec import MountSpec
from ghostpool._linux import Attr
from ghostpool.testing import Namespace, private_namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import ROOT, RUN_S, host_programs, live, read_only, run
from tests.support.usernamespaces import container, copied, owners_inside, seen_inside

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.long]
O_DIRECTORY, O_PATH, O_NOFOLLOW = 0o300000, 0o12000000, 0o500000


def images(directory: Path, *, own: bool = True, uid: int = 1000, gid: int = 100) -> Path:
    """Every kind of ghost but devices, of an ordinary user and of root."""
    made = ImageSet(own_user_namespace=own)
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content", uid=uid, gid=gid), pos=3)
    made.open(1, 4, "/data/away/deep/gone", ghost=made.ghost(b"of root"), flags=O_NOFOLLOW)
    twice = made.ghost(b"twice", uid=uid, mode=0o100600)
    made.open(1, 5, "/data/dir/one", ghost=twice)
    made.open(1, 6, "/data/dir/two", ghost=twice)
    made.open(1, 7, "/data/taken", ghost=made.ghost(b"ghost", gid=gid))
    made.open_fifo(1, 8, "/data/pipe", ghost=made.ghost(mode=0o10640, uid=uid))
    link = made.ghost(mode=0o120777, target="away", uid=uid, gid=gid)
    made.open(1, 9, "/data/link", ghost=link, flags=O_PATH | 0o400000)
    directory_ghost = made.ghost(mode=0o40750, uid=uid)
    made.open(1, 10, "/data/lost/sub", ghost=directory_ghost, flags=O_DIRECTORY)
    return made.write(directory)


DATA = read_only(2, b"/data", "taken", "dir/")
OWNERS = {
    3: (1000, 100),
    4: (0, 0),
    5: (1000, 0),
    6: (1000, 0),
    7: (0, 100),
    8: (1000, 0),
    9: (1000, 100),
    10: (1000, 0),
}
NAMES = {
    3: "/data/gone",
    4: "/data/away/deep/gone",
    5: "/data/dir/one",
    6: "/data/dir/two",
    7: "/data/taken.cr_link",
    8: "/data/pipe",
    9: "/data/link",
    10: "/data/lost/sub",
}


def restored_into(target: Namespace, images: Path, **options: Any) -> dict[int, dict[str, Any]]:
    """What the container's root sees of all descriptors of task 1."""

    async def restore() -> dict[int, dict[str, Any]]:
        with anyio.fail_after(RUN_S):
            async with ghostpool.restore(images, tree=target.pid, **options) as restored:
                fds = await restored.tasks[1].take_fds()
        try:
            return seen_inside(target, fds)
        finally:
            for fd in fds.values():
                os.close(fd)

    return anyio.run(restore)


@pytest.mark.parametrize("strategy", ["remount", "detached"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "host"])
def test_owners_are_those_of_the_images_inside(tmp_path: Path, own: bool, strategy: str) -> None:
    """Whether the dumped tasks had a user namespace or not: their ids are seen again."""
    with container(DATA) as target:
        before = target.snapshot().without_directory_times()
        seen = restored_into(target, images(tmp_path, own=own), strategy=strategy)
        assert {number: one["owner"] for number, one in seen.items()} == OWNERS
        assert {number: one["name"] for number, one in seen.items()} == {
            number: f"{name} (deleted)" for number, name in NAMES.items()
        }
        assert {one["links"] for one in seen.values()} == {0}
        (mount,) = {mount.mnt_id for mount in target.table() if mount.mountpoint == b"/data"}
        assert {int(one["mnt_id"]) for one in seen.values()} == {mount}
        assert seen[3]["pos"] == "3"
        assert stat.S_IMODE(seen[10]["mode"]) == 0o750
        assert target.snapshot().without_directory_times() == before


def test_kept_files_and_their_parents_belong_to_the_container(tmp_path: Path) -> None:
    with container(DATA) as target:
        done = run("restore", "-D", images(tmp_path), "-t", target.pid, "--keep")
        assert done.status == 0, done
        names = ["/data/gone", "/data/away", "/data/away/deep", "/data/dir/one", "/data/link"]
        assert owners_inside(target, names) == {
            "/data/gone": (1000, 100),
            "/data/away": (0, 0),
            "/data/away/deep": (0, 0),
            "/data/dir/one": (1000, 0),
            "/data/link": (1000, 100),
        }


def test_ids_that_the_container_has_not_are_refused_with_the_map(tmp_path: Path) -> None:
    with container(DATA, maps=("0 100000 500\n1000 300000 1", "0 200000 50")) as target:
        before = target.snapshot()
        done = run("plan", "-D", images(tmp_path), "-t", target.pid)
        assert done.status == 2, done
        (line,) = [one for one in done.out.splitlines() if one.startswith("refused: /data/gone")]
        assert "its owner 1000:100 has no id in the user namespace of mnt:[" in line
        assert "uids 0-499 are 100000-100499, 1000 are 300000" in line.replace(" is ", " are ")
        assert "gids 0-49 are 200000-200049" in line
        assert target.snapshot() == before


def test_a_container_without_root_has_somebody_else_make_them(tmp_path: Path) -> None:
    with container(DATA, maps=("0 100000 1\n1000 300000 1", "0 200000 1\n100 70 1")) as target:
        before = target.snapshot().without_directory_times()
        seen = restored_into(target, images(tmp_path))
        assert {number: one["owner"] for number, one in seen.items()} == OWNERS
        assert target.snapshot().without_directory_times() == before


def test_the_plan_says_whose_ids_they_are(tmp_path: Path) -> None:
    with container(DATA) as target, live([DATA]) as (host,):
        plan = json.loads(run("plan", "-D", images(tmp_path), "-t", target.pid, "--json").out)
        assert any(
            "belongs to a user namespace" in line and "uids 0-65535 are 100000-165535" in line
            for line in plan["warnings"]
        )
        plan = json.loads(run("plan", "-D", images(tmp_path), "-t", host.pid, "--json").out)
        assert any("no user namespace of its own" in line for line in plan["warnings"])
        assert plan["refusals"] == []


def test_images_of_a_user_namespace_into_a_target_without_one(tmp_path: Path) -> None:
    """The ids that were seen inside are given as they are."""
    with live([DATA]) as (target,):
        before = target.snapshot().without_directory_times()
        done = run("restore", "-D", images(tmp_path), "-t", target.pid, "--keep")
        assert done.status == 0, done
        owners = target.run(lambda: [os.stat("/data/gone").st_uid, os.stat("/data/gone").st_gid])
        assert owners == [1000, 100]
        assert target.snapshot().without_directory_times() != before


# -- File systems of the host, mounted in a container ---------------------------------------------

WRITABLE = DATA._replace(attributes=0)


def make_read_only() -> None:
    """By the container's own root, so that nothing about it is locked."""
    fd = os.open("/data", os.O_PATH)
    _linux.mount_setattr(fd, attr_set=int(Attr.RDONLY))
    os.close(fd)


def chown_all() -> None:
    for path in ("/data", "/data/dir"):
        os.chown(path, 100000, 100000)


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_on_a_file_system_of_the_host(tmp_path: Path, strategy: str) -> None:
    with live([WRITABLE]) as (host,):
        host.run(chown_all)
        with copied(host, setup=make_read_only) as target:
            before = [one.snapshot().without_directory_times() for one in (host, target)]
            seen = restored_into(target, images(tmp_path), strategy=strategy)
            assert {number: one["owner"] for number, one in seen.items()} == OWNERS
            assert before == [one.snapshot().without_directory_times() for one in (host, target)]


def device_images(directory: Path) -> Path:
    made = ImageSet(own_user_namespace=True)
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    null = made.ghost(mode=0o20666, rdev=0x103, uid=1000, gid=100)
    made.open(1, 3, "/data/null", ghost=null, mode=0o20666)
    return made.write(directory)


def test_devices_are_made_from_outside(tmp_path: Path) -> None:
    """mknod(2) is refused to the root of a user namespace; the host's file system shows them."""
    where = device_images(tmp_path)
    with live([WRITABLE]) as (host,), copied(host, setup=make_read_only) as target:
        before = target.snapshot().without_directory_times()
        seen = restored_into(target, where, allow_devices=True)
        assert seen[3]["owner"] == (1000, 100)
        assert stat.S_ISCHR(seen[3]["mode"])
        assert target.snapshot().without_directory_times() == before


def test_a_failure_is_undone(tmp_path: Path) -> None:
    """A device on a file system of the container can be made, but not opened: when that is found,
    everything is made, and some of it open."""
    made = ImageSet(own_user_namespace=True)
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content", uid=1000))
    sub = made.ghost(mode=0o40750, uid=1000)
    made.open(1, 4, "/data/lost/sub", ghost=sub, flags=O_DIRECTORY)
    null = made.ghost(mode=0o20666, rdev=0x103, uid=1000)
    made.open(1, 5, "/data/away/null", ghost=null, mode=0o20666)
    where = made.write(tmp_path)
    with container(DATA) as target:
        before = target.snapshot().without_directory_times()
        done = run("restore", "-D", where, "-t", target.pid, "--allow-devices", "--discard")
        assert done.status == 1, done
        assert "/data/away/null" in done.err or "away/null" in done.err
        assert "Permission denied" in done.err
        assert target.snapshot().without_directory_times() == before


# -- Everything else of a run ---------------------------------------------------------------------


def test_a_command_is_the_containers_root_and_no_more(tmp_path: Path) -> None:
    links, programs = host_programs(10)
    mounts = [mount for mount in programs if mount.mountpoint != b"/proc"]
    proc = [mount for mount in programs if mount.mountpoint == b"/proc"]
    root = ROOT._replace(nodes=links)
    script = "cat /proc/self/uid_map /proc/self/status; id -u; stat -L -c %u:%g /proc/self/fd/3"
    with (
        live([root, WRITABLE, *proc, *mounts]) as (host,),
        copied(host, setup=make_read_only) as target,
    ):
        before = target.snapshot().without_directory_times()
        where = ("-D", images(tmp_path), "-t", target.pid)
        done = run("restore", *where, "--", "/bin/sh", "-c", script)
        assert done.status == 0, done
        lines = done.out.splitlines()
        assert lines[0].split() == ["0", "100000", "65536"]
        assert lines[-2:] == ["0", "1000:100"]
        (bounding,) = [line.split()[1] for line in lines if line.startswith("CapBnd")]
        assert not int(bounding, 16) & (1 << 21 | 1 << 27)
        assert target.snapshot().without_directory_times() == before


def test_a_namespace_file_without_a_process(tmp_path: Path) -> None:
    """No process is needed to learn the maps."""
    with container(DATA) as target:
        path = f"/proc/{os.getpid()}/fd/{target.fd}"
        done = run("restore", "-D", images(tmp_path), "--ns", f"10={path}", "--discard")
        assert done.status == 0, done


def test_rebuilt_from_images_of_a_user_namespace(tmp_path: Path) -> None:
    """Privately, in our own: the ids are those that were seen inside."""
    done = run("restore", "-D", images(tmp_path), "--discard", "--json")
    assert done.status == 0, done
    plan = json.loads(run("plan", "-D", tmp_path, "--json").out)
    assert any("no user namespace of its own" in line for line in plan["warnings"])


# -- Locked flags ---------------------------------------------------------------------------------

LOCKED = read_only(2, b"/data", "taken", "dir/")
SUBTREE = (
    read_only(2, b"/volume", "pod/", "pod/taken", "pod/dir/", "other", attributes=0),
    read_only(3, b"/data", superblock=2, source="t2", root=b"/pod"),
)


def where(images: Path, target: Namespace, lender: Namespace) -> tuple[str | Path, ...]:
    """Options that restore into one namespace, and name the other too."""
    return ("-D", images, "--ns", f"10={target.pid}", "--ns", f"11={lender.pid}")


def two(directory: Path) -> Path:
    """As `images`, and another task in a namespace of its own, with no ghosts."""
    images(directory)
    made = ImageSet(own_user_namespace=True)
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.mount("/", ns=11)
    made.task(1)
    made.task(2, ns=11)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"content", uid=1000, gid=100))
    made.open(1, 4, "/data/away/deep/gone", ghost=made.ghost(b"of root"))
    made.open(1, 5, "/data/taken", ghost=made.ghost(b"ghost", gid=100))
    sub = made.ghost(mode=0o40750, uid=1000)
    made.open(1, 6, "/data/lost/sub", ghost=sub, flags=O_DIRECTORY)
    return made.write(directory / "two")


@pytest.mark.parametrize("strategy", ["remount", "detached"])
@pytest.mark.parametrize("mounts", [(LOCKED,), SUBTREE], ids=["same", "subtree"])
def test_a_locked_flag_is_answered_by_a_mount_that_is_not(
    tmp_path: Path, mounts: tuple[MountSpec, ...], strategy: str
) -> None:
    """The container's mount never changes, nor that which lends its clone."""
    with live(mounts) as (host,), copied(host) as target:
        both = host, target
        before = [one.snapshot().without_directory_times() for one in both]
        options = where(two(tmp_path), target, host)
        plan = json.loads(run("plan", *options, "--strategy", strategy, "--json").out)
        assert plan["refusals"] == []
        assert any("its read-only flag is locked" in line for line in plan["warnings"])
        (data,) = plan["mounts"]
        assert (data["strategy"], data["made_writable"]) == ("detached", False)

        namespaces = {10: target.pid, 11: host.pid}
        seen = restored_into(target, tmp_path / "two", namespaces=namespaces, strategy=strategy)
        assert {
            number: (one["owner"], one["name"], one["links"]) for number, one in seen.items()
        } == {
            3: ((1000, 100), "/data/gone (deleted)", 0),
            4: ((0, 0), "/data/away/deep/gone (deleted)", 0),
            5: ((0, 100), "/data/taken.cr_link (deleted)", 0),
            6: ((1000, 0), "/data/lost/sub (deleted)", 0),
        }
        (mount,) = {mount.mnt_id for mount in target.table() if mount.mountpoint == b"/data"}
        assert {int(one["mnt_id"]) for one in seen.values()} == {mount}
        assert before == [one.snapshot().without_directory_times() for one in both]


def test_a_mount_of_ghostpools_own_namespace_lends_too(tmp_path: Path) -> None:
    """The usual case: the container was made from where ghostpool runs."""
    point, work = tmp_path / "data", tmp_path / "images"
    point.mkdir()

    def mount() -> None:
        _linux.mount(b"t2", os.fsencode(point), b"tmpfs", 0)
        (point / "dir").mkdir()
        (point / "taken").write_bytes(b"taken")
        fd = os.open(point, os.O_PATH)
        _linux.mount_setattr(fd, attr_set=int(Attr.RDONLY))
        os.close(fd)

    def restore() -> list[Any]:
        done = run("restore", "-D", work, "-t", target.pid, "--discard")
        return [done.status, done.err.splitlines()[-1]]

    made = ImageSet(own_user_namespace=True)
    made.mount("/")
    made.mount(str(point), flags=0x200001)
    made.task(1)
    made.open(1, 3, f"{point}/gone", ghost=made.ghost(b"content", uid=1000))
    made.write(work)
    with private_namespace(mount) as here, copied(here) as target:
        below = os.fsencode(point)
        both = here, target
        before = [one.snapshot(below).without_directory_times() for one in both]
        status, said = here.run(restore)
        assert status == 0
        assert f"a private clone of {point} in this mount namespace" in said
        assert before == [one.snapshot(below).without_directory_times() for one in both]


def test_what_nobody_lends_is_refused_with_the_reason(tmp_path: Path) -> None:
    with live([LOCKED]) as (host,), copied(host) as target:
        before = [one.snapshot() for one in (host, target)]
        done = run("restore", "-D", images(tmp_path), "-t", target.pid, "--discard")
        assert done.status == 2, done
        assert "its read-only flag is locked" in done.err
        assert "can be reached, neither in the targets nor from here" in done.err
        assert before == [one.snapshot() for one in (host, target)]


def test_a_failure_on_a_locked_mount_is_undone(tmp_path: Path) -> None:
    made = ImageSet(own_user_namespace=True)
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.mount("/", ns=11)
    made.task(1)
    made.task(2, ns=11)
    made.open(1, 3, "/data/away/gone", ghost=made.ghost(b"content", uid=1000))
    null = made.ghost(mode=0o60666, rdev=0xFFF00, uid=1000)  # nothing drives it: ENXIO
    made.open(1, 4, "/data/null", ghost=null, mode=0o60666)
    made.write(tmp_path)
    with live([LOCKED]) as (host,), copied(host) as target:
        before = [one.snapshot().without_directory_times() for one in (host, target)]
        done = run("restore", *where(tmp_path, target, host), "--discard", "--allow-devices")
        assert done.status == 1, done
        assert before == [one.snapshot().without_directory_times() for one in (host, target)]


# -- One ghost in several user namespaces ---------------------------------------------------------


def shared(directory: Path) -> Path:
    """One ghost that two tasks hold, in two namespaces: writable in the first, not in the other."""
    made = ImageSet(own_user_namespace=True)
    for number in (10, 11):
        made.mount("/", ns=number)
        made.mount("/data", ns=number, flags=0x200000 + number - 10)
    made.task(1)
    made.task(2, ns=11)
    ghost = made.ghost(b"content", uid=1000, gid=100)
    made.open(1, 3, "/data/away/gone", ghost=ghost)
    made.open(2, 3, "/data/gone", ghost=ghost)
    return made.write(directory)


def test_a_ghost_that_tasks_of_two_user_namespaces_hold(tmp_path: Path) -> None:
    """With the same maps both see its owner, though one mount is writable and one is not."""
    with live([WRITABLE]) as (host,):
        host.run(chown_all)
        with copied(host) as first, copied(host, setup=make_read_only) as second:
            before = [one.snapshot().without_directory_times() for one in (first, second)]
            options = where(shared(tmp_path), first, second)
            done = run("restore", *options, "--discard")
            assert done.status == 0, done
            assert before == [one.snapshot().without_directory_times() for one in (first, second)]
            assert run("restore", *options, "--keep").status == 0
            assert owners_inside(first, ["/data/away/gone"])["/data/away/gone"] == (1000, 100)
            assert owners_inside(second, ["/data/gone"])["/data/gone"] == (1000, 100)


def test_two_user_namespaces_that_would_need_two_owners(tmp_path: Path) -> None:
    with live([WRITABLE]) as (host,):
        others = ("0 300000 65536", "0 300000 65536")
        with copied(host) as first, copied(host, others, make_read_only) as second:
            before = [one.snapshot() for one in (first, second)]
            done = run("restore", *where(shared(tmp_path), first, second), "--discard")
            assert done.status == 2, done
            assert "would have to be somebody else through each of its mounts" in done.err
            assert before == [one.snapshot() for one in (first, second)]

"""Idmapped mounts: the dumped owners are seen through the task's own mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool.testing import Namespace
from tests.support.idmapped import mount_idmapped, user_namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import live, read_only, run
from tests.support.usernamespaces import MAP, copied, owners_inside

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.needs_idmapped, pytest.mark.long]
DATA = read_only(2, b"/volume", "dir/", "data/", attributes=0)
POINT = b"/volume/data"


def images(directory: Path, uid: int, own: bool = False) -> Path:
    made = ImageSet(own_user_namespace=own)
    made.mount("/")
    made.mount("/volume")
    made.mount("/volume/data", flags=0x200001)
    made.task(1)
    made.open(1, 3, "/volume/data/gone", ghost=made.ghost(b"content", uid=uid, gid=uid))
    made.open(1, 4, "/volume/data/dir/pipe/gone", ghost=made.ghost(b"x", uid=uid, gid=uid))
    sub = made.ghost(mode=0o40750, uid=uid, gid=uid)
    made.open(1, 5, "/volume/data/lost/sub", ghost=sub, flags=0o300000)
    return made.write(directory)


@contextmanager
def shifted(maps: str) -> Iterator[Namespace]:
    """A target with /volume, and what is in it once more with other ids on /volume/data."""
    with live([DATA]) as (target,), user_namespace((maps, maps)) as owner:
        target.run(lambda: mount_idmapped(b"/volume", POINT, owner))
        yield target


@pytest.mark.parametrize("strategy", ["remount", "detached"])
@pytest.mark.parametrize("uid", [5000, 5007])
def test_the_dumped_owner_is_seen_through_the_mount(
    tmp_path: Path, uid: int, strategy: str
) -> None:
    """On the file system it is another one. Nobody whom the mount has not can make files there."""
    with shifted("0 5000 100") as target:
        before = target.snapshot().without_directory_times()
        options = ("-D", images(tmp_path, uid), "-t", target.pid, "--strategy", strategy)
        done = run("restore", *options, "--discard")
        assert done.status == 0, done
        assert target.snapshot().without_directory_times() == before
        assert run("restore", *options, "--keep").status == 0
        names = [b"/volume/data/gone", b"/volume/gone", b"/volume/data/lost/sub"]
        owners = target.run(lambda: [os.stat(name).st_uid for name in names])
        assert owners == [uid, uid - 5000, uid]


def test_an_owner_that_the_mount_does_not_show_is_refused(tmp_path: Path) -> None:
    with shifted("0 5000 100") as target:
        before = target.snapshot()
        done = run("restore", "-D", images(tmp_path, 7), "-t", target.pid, "--discard")
        assert done.status == 2, done
        assert "its owner 7:7 is 7:7 here, whom the idmapped mount /volume/data" in done.err
        assert "uids 0-99 are 5000-5099" in done.err
        assert target.snapshot() == before


def test_in_a_container_whose_volume_is_idmapped_and_locked(tmp_path: Path) -> None:
    """Inside they see the dumped owner; the clone that makes it so shows other ids."""
    with shifted(MAP) as host, copied(host) as target:
        before = [one.snapshot().without_directory_times() for one in (host, target)]
        made = ImageSet(own_user_namespace=True)
        made.mount("/")
        made.mount("/volume")
        made.mount("/volume/data", flags=0x200001)
        made.mount("/", ns=11)
        made.task(1)
        made.task(2, ns=11)
        made.open(1, 3, "/volume/data/gone", ghost=made.ghost(b"content", uid=7, gid=7))
        made.open(1, 4, "/volume/data/lost/gone", ghost=made.ghost(b"x"))
        made.write(tmp_path)
        options = ("-D", tmp_path, "--ns", f"10={target.pid}", "--ns", f"11={host.pid}")
        done = run("restore", *options, "--discard")
        assert done.status == 0, done
        assert before == [one.snapshot().without_directory_times() for one in (host, target)]
        assert run("restore", *options, "--keep").status == 0
        names = ["/volume/data/gone", "/volume/data/lost/gone"]
        assert owners_inside(target, names) == {names[0]: (7, 7), names[1]: (0, 0)}
        assert host.run(lambda: os.stat("/volume/gone").st_uid) == 7

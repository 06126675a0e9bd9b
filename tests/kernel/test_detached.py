"""The detached strategy: the task's own mount never changes, and everything else is the same."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ghostpool.testing import Namespace
from tests.support.imagewriter import ImageSet
from tests.support.live import live, read_only, run

pytestmark = pytest.mark.needs_mount_ns
O_DIRECTORY = 0o200000


@pytest.fixture
def target() -> Iterator[Namespace]:
    with live([read_only(2, b"/data", "taken", "dir/")]) as (made,):
        before = made.snapshot().without_directory_times()
        yield made
        assert made.snapshot().without_directory_times() == before


def images(directory: Path) -> Path:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.task(1)
    made.task(2)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"one"))
    made.open(1, 4, "/data/missing/parents/gone", ghost=made.ghost(b"two"))
    made.open(2, 3, "/data/taken", ghost=made.ghost(b"three"))
    made.open(2, 4, "/data/dir/sub", ghost=made.ghost(mode=0o40755), flags=O_DIRECTORY)
    return made.write(directory)


@contextmanager
def watched(target: Namespace) -> Iterator[list[int]]:
    """Counts changes of the namespace's mount table: its pollers are woken by each (proc(5))."""
    changes = [0]
    with open(f"/proc/{target.pid}/mountinfo", "rb") as table:
        table.read()
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        assert not poll.poll(0)
        yield changes
        changes[0] = len(poll.poll(0))


@pytest.mark.parametrize(("strategy", "woken"), [("remount", 1), ("detached", 0)])
def test_nobody_who_watches_the_mounts_is_woken(
    target: Namespace, tmp_path: Path, strategy: str, woken: int
) -> None:
    """The kernel's own word: not one change of a mount in the task's namespace."""
    where = ("-D", images(tmp_path), "-t", target.pid)
    with watched(target) as changes:
        done = run("restore", *where, "--strategy", strategy, "--discard", "--json")
    assert done.status == 0, done
    assert changes == [woken]


def test_the_plan_says_what_it_does_and_what_would_change_less(
    target: Namespace, tmp_path: Path
) -> None:
    where = ("-D", images(tmp_path), "-t", target.pid)
    plans = {
        strategy: json.loads(run("plan", *where, "--strategy", strategy, "--json").out)
        for strategy in ("remount", "detached")
    }
    for strategy, plan in plans.items():
        assert plan["strategy"] == strategy
        assert plan["recommended_strategy"] == "detached"
        (data,) = plan["mounts"]
        assert (data["strategy"], data["made_writable"]) == (strategy, strategy == "remount")
    hint = "--strategy detached would leave read-only mounts as they are"
    assert hint in run("plan", *where).out
    assert hint not in run("plan", *where, "--strategy", "detached").out


def test_where_no_clone_can_be_made_it_is_remounted_and_said(tmp_path: Path) -> None:
    with live([read_only(2, b"/data", "taken", "dir/", unbindable=True)]) as (target,):
        where = ("-D", images(tmp_path), "-t", target.pid, "--strategy", "detached")
        plan = json.loads(run("plan", *where, "--json").out)
        assert plan["recommended_strategy"] == "remount"
        assert [mount["strategy"] for mount in plan["mounts"]] == ["remount"]
        assert any("no private clone can be made" in line for line in plan["warnings"])
        before = target.snapshot().without_directory_times()
        with watched(target) as changes:
            done = run("restore", *where, "--discard", "--json")
        assert done.status == 0, done
        assert changes == [1]
        (mount,) = json.loads(done.out)["mounts"]
        assert mount["made_writable"] == {"service": 0, "task": 1}
        assert target.snapshot().without_directory_times() == before


def test_kept_by_name(tmp_path: Path) -> None:
    with live([read_only(2, b"/data", "taken", "dir/")]) as (target,):
        where = ("-D", images(tmp_path), "-t", target.pid, "--strategy", "detached")
        with watched(target) as changes:
            done = run("restore", *where, "--keep")
        assert done.status == 0, done
        assert changes == [0]
        names = {path for path, _, _ in target.snapshot(b"/data").names()}
        assert {path.partition(":")[2] for path in names} >= {
            "/data/gone",
            "/data/missing/parents/gone",
            "/data/taken.cr_link",
            "/data/dir/sub",
        }

"""`--on-error=skip`: what can not be restored is left out and told; the tasks have the rest."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ghostpool._buildspec import Node
from ghostpool._images import read_images
from ghostpool._model import RegId
from ghostpool._skipping import without
from tests.support.imagewriter import ImageSet, ghosts_on
from tests.support.live import ROOT, host_programs, live, read_only, tmpfs
from tests.support.restore import fetched, ghostpool, serving

pytestmark = pytest.mark.needs_mount_ns


def mixed(directory: Path) -> Path:
    """Two tasks with files that can be restored (3, 9) and others that can not, each for a reason
    that is found at another time."""
    made = ImageSet()
    for point in ("/", "/data", "/hidden", "/missing", "/sb"):
        made.mount(point, flags=0x200001)
    made.task(1)
    made.task(2)
    made.open(1, 3, "/data/good", ghost=made.ghost(b"good"))
    made.open(1, 4, "/data/null", ghost=made.ghost(mode=0o020666, rdev=0x103))
    made.open(1, 5, "/data/taken", ghost=made.ghost(b"x"))
    made.open(1, 6, "/hidden/file", ghost=made.ghost(b"x"))
    made.open(1, 7, "/missing/file", ghost=made.ghost(b"x"))
    made.open(1, 8, "/sb/file", ghost=made.ghost(b"x"))
    made.open(2, 9, "/data/d/other", ghost=made.ghost(b"other"))
    made.open(2, 10, "/data/setuid", ghost=made.ghost(b"x", mode=0o104755))
    made.fd(2, 11, made.open(1, 12, "/data/link/file", ghost=made.ghost(b"x")))
    return made.write(directory)


def namespace() -> list[Any]:
    link = Node(b"/data/link", stat.S_IFLNK | 0o777, target=b"/")
    data = read_only(2, b"/data", "taken", "taken.cr_link")
    return [
        data._replace(nodes=(*data.nodes, link)),
        read_only(3, b"/hidden"),
        tmpfs(4, b"/hidden", parent=3),
        read_only(5, b"/sb", read_only_superblock=True),
    ]


SKIPPED = {
    "/data/null": "device",
    "/data/taken": "its name is taken by a living file",
    "/hidden/file": "",
    "/missing/file": "",
    "/sb/file": "read-only",
    "/data/setuid": "setuid",
    "/data/link/file": "symbolic link",
}


def check_skipped(skipped: list[dict[str, Any]]) -> None:
    for path, reason in SKIPPED.items():
        (one,) = [one for one in skipped if path in one["subject"]]
        assert reason in one["message"], one
        assert len(one["files"]) == 1
    assert len(skipped) == len(SKIPPED)


def test_the_tasks_have_the_rest(tmp_path: Path) -> None:
    images = mixed(tmp_path / "img")
    report = tmp_path / "report"
    options = ("-D", images, "--on-error=skip", "--report", report)
    with live(namespace()) as (target,):
        before = target.snapshot().without_directory_times()
        with serving("-t", target.pid, *options) as served:
            assert served.tasks == 2
            with fetched(served.socket, [1, 2]) as probes:
                first, second = ({*probes[task].descriptors} - {0, 1, 2} for task in (1, 2))
                assert (first & {*range(3, 13)}, second & {*range(3, 13)}) == ({3}, {9})
                assert probes[1].descriptors[3]["link"] == "/data/good (deleted)"
        assert served.process.returncode == 4
        assert target.snapshot().without_directory_times() == before
    document = json.loads(report.read_text())
    assert (document["status"], document["restored"], document["ghosts"]) == (4, True, 2)
    check_skipped(document["skipped"])
    assert document["refusals"] == document["errors"] == []


def test_each_is_told_on_a_line(tmp_path: Path) -> None:
    images = mixed(tmp_path / "img")
    with live(namespace()) as (target,):
        before = target.snapshot().without_directory_times()
        done = ghostpool("restore", "-D", images, "-t", target.pid, "--discard", "--on-error=skip")
        assert (done.returncode, done.stdout) == (4, "")
        lines = [line for line in done.stderr.splitlines() if "ghostpool: skipped: " in line]
        assert len(lines) == len(SKIPPED)
        for path in SKIPPED:
            assert any(path in line for line in lines)
        # By default they are all refused, together.
        done = ghostpool("restore", "-D", images, "-t", target.pid, "--discard")
        assert done.returncode == 2
        assert target.snapshot().without_directory_times() == before


def test_the_plan_says_so(tmp_path: Path) -> None:
    images = mixed(tmp_path / "img")
    with live(namespace()) as (target,):
        where = ("-D", images, "-t", target.pid, "--on-error=skip")
        done = ghostpool("plan", "--json", *where)
        assert done.returncode == 4
        document = json.loads(done.stdout)
        check_skipped(document["skipped"])
        assert {one["path"] for one in document["opens"]} == {"/data/good", "/data/d/other"}
        done = ghostpool("plan", *where)
        assert done.stdout.count("skipped: ") == len(SKIPPED)
        assert "2 ghosts, 2 opens: can be restored" in done.stdout


def test_where_there_is_nothing_to_skip(tmp_path: Path) -> None:
    images = ghosts_on("/data", ["a"], b"x").write(tmp_path)
    with live([read_only(2, b"/data")]) as (target,):
        where = ("-D", images, "-t", target.pid, "--discard", "--on-error=skip", "--json")
        done = ghostpool("restore", *where)
        assert (done.returncode, json.loads(done.stdout)["skipped"]) == (0, [])


def test_what_is_about_more_than_files_is_refused(tmp_path: Path) -> None:
    """There is no room: nobody has said which of the files are to go."""
    made = ghosts_on("/data", ["a", "b"], bytes(9_000_000))
    with live([read_only(2, b"/data", options="size=10m")]) as (target,):
        where = ("-D", made.write(tmp_path), "-t", target.pid, "--keep", "--on-error=skip")
        done = ghostpool("restore", *where)
        assert done.returncode == 2
        assert "refused: /data" in done.stderr


def test_the_status_of_commands_comes_first(tmp_path: Path) -> None:
    made = ImageSet()
    made.task(1)
    made.open(1, 3, "/null", ghost=made.ghost(mode=0o020666, rdev=0x103))
    nodes, mounts = host_programs(100)
    with live([ROOT._replace(nodes=nodes), *mounts]) as (target,):
        where = ("-D", made.write(tmp_path), "-t", target.pid, "--on-error=skip", "--")
        for status, expected in ((0, 4), (7, 7)):
            done = ghostpool("restore", *where, "/bin/sh", "-c", f"exit {status}")
            assert done.returncode == expected, done.stderr


def test_link_remaps_and_what_is_held_without_a_descriptor(tmp_path: Path) -> None:
    """A hidden name that is gone, one that is there and is not consumed for the other's sake, and a
    mapping of what can not be restored."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200000)
    made.task(1)
    gone, there = (made.open(1, number, f"/data/l{number}", mode=0o100644) for number in (3, 4))
    made.link(gone, "/data")
    hidden = made.link(there, "/data")
    good = made.open(1, 5, "/data/good", ghost=made.ghost(b"good"))
    null = made.open(1, 6, "/data/null", ghost=made.ghost(mode=0o020666, rdev=0x103))
    made.map(1, 0x1000, 0x2000, good)
    made.map(1, 0x3000, 0x4000, null)
    mount = tmpfs(2, b"/data")
    node = Node(f"/data/link_remap.{hidden}".encode(), stat.S_IFREG | 0o644, data=b"linked")
    with live([mount._replace(nodes=(node,))]) as (target,):
        where = ("-D", made.write(tmp_path), "-t", target.pid, "--on-error=skip", "--json")
        done = ghostpool("plan", *where)
        assert done.returncode == 4, done.stderr
        document = json.loads(done.stdout)
        assert sorted(one["files"] for one in document["skipped"]) == [[gone], [null]]
        done = ghostpool("restore", *where, "--discard")
        assert done.returncode == 4, done.stderr
        names = os.listdir(f"/proc/{target.pid}/root/data")
        assert names == [f"link_remap.{hidden}"]


def test_images_without_some_files(tmp_path: Path) -> None:
    """As if the tasks had never held them; tables stay shared."""
    made = ImageSet()
    made.task(1, files_id=5)
    made.task(2, files_id=5)
    ghost = made.ghost(b"x")
    first = made.open(1, 3, "/a", ghost=ghost)
    second = made.open(1, 4, "/b", ghost=ghost)
    third = made.open(1, 5, "/c", ghost=made.ghost(b"y"))
    made.map(1, 0x1000, 0x2000, third)
    images = read_images(made.write(tmp_path))
    less = without(images, {RegId(first), RegId(third)})
    assert [remap.origin for remap in less.remaps] == [second]
    assert sorted(less.ghosts) == [ghost]
    one, other = less.tasks
    assert one.descriptors is other.descriptors
    assert [row.number for row in one.descriptors] == [4]
    assert one.holders == ()
    assert without(images, set())._replace(tasks=images.tasks) == images

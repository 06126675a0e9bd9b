"""`ghostpool clean`: what it finds, what it removes, and whatever else there is stays."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _clean
from ghostpool._buildspec import MountSpec, Node
from ghostpool._linux import Attr
from ghostpool._protocol import NOTHING, OTHER, REMOVED, Remnant, Removed
from tests.support.crash import coordinate, journals
from tests.support.imagewriter import ghosts_on
from tests.support.live import Live, live, read_only, tmpfs
from tests.support.restore import fetched, ghostpool, serving
from tests.support.usernamespaces import container

pytestmark = pytest.mark.needs_mount_ns

DEAD = ".ghostpool-0123456789ab-1"
LEFT = (DEAD, "d/a.cr.1f.ghost", "d/b.cr_link", "link_remap.7")
OTHERS = ("a", "d/a.ghost", ".ghostpool", "link_remap.x", ".cr_link", "d/a.cr.1.ghost.txt")


def nodes(base: str, *names: str) -> tuple[Node, ...]:
    return (
        Node(f"{base}/d".encode(), stat.S_IFDIR | 0o755),
        *(Node(f"{base}/{name}".encode(), stat.S_IFREG | 0o644, data=b"1234") for name in names),
    )


def mount(number: int, point: str, *names: str, **fields: Any) -> MountSpec:
    return tmpfs(number, point.encode(), nodes=nodes(point, *names), **fields)


def names_in(target: Live, directory: str) -> set[str]:
    """Relative paths of all that is no directory."""
    top = Path(f"/proc/{target.pid}/root{directory}")
    found = (Path(path, file) for path, _, files in os.walk(top) for file in files)
    return {str(file.relative_to(top)) for file in found}


def clean(target: Live, *options: str) -> tuple[int, dict[str, Any]]:
    done = ghostpool("clean", "-t", target.pid, "--json", *options)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}


def states(document: dict[str, Any]) -> dict[str, str]:
    return {one["path"]: one["state"] for one in document["leftovers"]}


def test_it_lists_and_removes_what_is_left_and_nothing_else() -> None:
    """On writable and read-only mounts; these are never writable for anybody else."""
    read_only_too = int(Attr.RDONLY | Attr.NOSUID)
    specs = [mount(2, "/rw", *LEFT, *OTHERS), mount(3, "/ro", *LEFT, *OTHERS)]
    specs[1] = specs[1]._replace(attributes=read_only_too)
    with live(specs) as (target,):
        before, table = target.snapshot(), target.mountinfo()
        status, document = clean(target)
        assert status == 0
        expected = {f"{base}/{name}": "found" for base in ("/rw", "/ro") for name in LEFT}
        expected |= {"/rw/link_remap.7": "kept", "/ro/link_remap.7": "kept"}
        assert states(document) == expected
        assert target.snapshot() == before
        assert document["skipped"] == []

        done = ghostpool("clean", "--ns", f"/proc/{target.pid}/ns/mnt", "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert (
            "/ro/d/a.cr.1f.ghost: temporary file of CRIU, file of 4 bytes: removed" in done.stdout
        )
        assert done.stdout.endswith("8 found, 6 removed\n")
        for base in ("/rw", "/ro"):
            assert names_in(target, base) == {*OTHERS, "link_remap.7"}
        assert target.mountinfo() == table

        assert states(clean(target, "--yes", "--link-remaps")[1]) == {
            "/rw/link_remap.7": "removed",
            "/ro/link_remap.7": "removed",
        }
        assert ghostpool("clean", "--ns", target.pid).stdout == "nothing is left\n"


def test_what_is_said_of_a_leftover() -> None:
    odd = Node(b"/data/\x1b[2J\xff.cr_link", stat.S_IFIFO | 0o640, uid=5, gid=6, mtime_ns=10**18)
    with live([tmpfs(2, b"/data", nodes=(odd,))]) as (target,):
        _, document = clean(target)
        assert document["leftovers"] == [
            {
                "path": r"/data/\x1b[2J\xff.cr_link",
                "path_base64": "L2RhdGEvG1sySv8uY3JfbGluaw==",
                "kind": "cr_link",
                "type": "fifo",
                "mode": "0640",
                "owner": [5, 6],
                "size": 0,
                "mtime": 10**9,
                "mountpoint": "/data",
                "state": "found",
                "reason": "",
            }
        ]
        done = ghostpool("clean", "-t", target.pid)
        assert "\x1b" not in done.stdout
        assert done.stdout.endswith("1 found, --yes would remove 1\n")


def test_each_mount_is_looked_through_by_itself() -> None:
    """Through no link, not into another mount; what several mounts show is found once."""
    link = Node(b"/one/link", stat.S_IFLNK | 0o777, target=b"/two")
    one = mount(2, "/one", "a.cr_link")
    one = one._replace(nodes=(*one.nodes, link))
    bind = tmpfs(4, b"/bind", superblock=2)
    hidden = mount(5, "/hidden", "h.cr_link")
    inner = mount(3, "/one/d", "b.cr_link", parent=2)
    over = tmpfs(7, b"/hidden", parent=5)
    mounts = [one, inner, mount(6, "/two", "c.cr_link"), bind, hidden, over]
    with live(mounts) as (target,):
        found = states(clean(target)[1])
        assert sorted(path.rpartition("/")[2] for path in found) == [
            "a.cr_link",
            "b.cr_link",
            "c.cr_link",
        ]
        assert {"/one/d/b.cr_link", "/two/c.cr_link"} <= {*found}
        assert {*states(clean(target, "--mount", "/two")[1])} == {"/two/c.cr_link"}
        assert {*states(clean(target, "--mount", "/one", "--yes")[1])} == {"/one/a.cr_link"}
        assert {*states(clean(target)[1])} == {"/one/d/b.cr_link", "/two/c.cr_link"}
        status, document = clean(target, "--mount", "/one/link")
        assert status == 2
        assert "nothing is mounted on /one/link" in document["stderr"]


def test_directories() -> None:
    """Empty ones of ghostpool's go; what has something in it stays, with a failure."""
    directories = tuple(
        Node(f"/data/{name}".encode(), stat.S_IFDIR | 0o755)
        for name in (DEAD, f"{DEAD}f", "x.cr.1.ghost", "link_remap.3")
    )
    inside = Node(f"/data/{DEAD}f/mine".encode(), stat.S_IFREG | 0o644)
    with live([tmpfs(2, b"/data", nodes=(*directories, inside))]) as (target,):
        status, document = clean(target, "--yes", "--link-remaps")
        assert status == 1
        assert states(document) == {
            f"/data/{DEAD}": "removed",
            f"/data/{DEAD}f": "failed",
            "/data/x.cr.1.ghost": "kept",
            "/data/link_remap.3": "kept",
        }
        assert names_in(target, "/data") == {f"{DEAD}f/mine"}


def test_a_read_only_superblock() -> None:
    spec = mount(2, "/data", "a.cr_link")._replace(read_only_superblock=True)
    with live([spec]) as (target,):
        status, document = clean(target, "--yes")
        assert status == 1
        (left,) = document["leftovers"]
        assert (left["state"], left["reason"]) == ("failed", "its superblock is read-only")
        done = ghostpool("clean", "-t", target.pid, "--yes")
        assert done.stderr == "ghostpool: not everything could be removed\n"


def test_what_a_living_restore_owns_stays(tmp_path: Path) -> None:
    """Its ghosts, and whatever it may have beside a taken name; it ends well after that."""
    images = ghosts_on("/data", ["one", "two"], b"content").write(tmp_path)
    names = "one", "stale.cr_link", "link_remap.7"
    with live([read_only(2, b"/data", *names)]) as (target,):
        with serving("-D", images, "-t", target.pid) as served:
            assert served.tasks == 1
            mine = {name for name in names_in(target, "/data") if name.startswith(".ghostpool-")}
            assert len(mine) == 2
            status, document = clean(target, "--yes", "--link-remaps")
            assert status == 0
            assert {*states(document).values()} == {"kept"}
            assert {one["path"] for one in document["leftovers"]} == {
                "/data/stale.cr_link",
                "/data/link_remap.7",
                *(f"/data/{name}" for name in mine),
            }
            assert all("is alive" in one["reason"] for one in document["leftovers"])
            with fetched(served.socket, [1]) as probes:
                assert len(probes[1].descriptors) >= 2
        assert states(clean(target, "--yes", "--link-remaps")[1]) == {
            "/data/stale.cr_link": "removed",
            "/data/link_remap.7": "removed",
        }
        assert names_in(target, "/data") == {"one"}


def test_what_recover_knows_is_left_to_it(tmp_path: Path) -> None:
    """A run that was killed with its guardian; when its journal is dropped, nobody owns that."""
    images = ghosts_on("/data", ["one", "two"], b"content").write(tmp_path)
    with live([read_only(2, b"/data", "one")]) as (target,):
        coordinate(images, {10: str(target.pid)}, 0, kind="create")
        (journal,) = journals()
        assert len(names_in(target, "/data")) == 3
        status, document = clean(target, "--yes")
        assert status == 0
        assert {*states(document).values()} == {"kept"}
        assert len(document["leftovers"]) == 2
        assert all("ghostpool recover" in one["reason"] for one in document["leftovers"])
        run = Path(journal).name.removesuffix(".journal")
        assert ghostpool("recover", "--forget", run).returncode == 0
        assert {*states(clean(target, "--yes")[1]).values()} == {"removed"}
        assert names_in(target, "/data") == {"one"}


def test_while_criu_is_running_its_names_are_its_own() -> None:
    name = b"criu"
    with live([mount(2, "/data", *LEFT)]) as (target,):
        criu = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import ctypes; ctypes.CDLL(None).prctl(15, b'criu'); print(flush=True); input()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert criu.stdout is not None
            criu.stdout.readline()
            assert Path(f"/proc/{criu.pid}/comm").read_bytes() == name + b"\n"
            _, document = clean(target, "--yes", "--link-remaps")
        finally:
            criu.send_signal(signal.SIGKILL)
            criu.communicate()
        found = states(document)
        assert found.pop(f"/data/{DEAD}") == "removed"
        assert {*found.values()} == {"kept"}
        reasons = {one["reason"] for one in document["leftovers"] if one["state"] == "kept"}
        assert reasons == {f"criu is running (process {criu.pid}), and may have made it"}
        assert {*states(clean(target, "--yes")[1]).values()} == {"removed", "kept"}


def test_in_a_container_with_a_user_namespace() -> None:
    """On a file system that is its own, with owners that only it has."""
    left = Node(b"/data/a.cr_link", stat.S_IFREG | 0o600, uid=1000, gid=1000, data=b"1234")
    with container(tmpfs(2, b"/data", nodes=(left,))) as target:
        assert states(clean(target)[1]) == {"/data/a.cr_link": "found"}
        assert states(clean(target, "--yes")[1]) == {"/data/a.cr_link": "removed"}
        assert names_in(target, "/data") == set()


def test_a_file_that_takes_the_name_meanwhile() -> None:
    """Is not what was found."""
    planned: Any = None
    found = Remnant(b"", b"a.cr_link", "cr_link", 1, 2, 3, stat.S_IFREG, 0, 0, 0, 0)
    for removed, state in (
        (Removed(0, "", (), REMOVED), "removed"),
        (Removed(0, "", (), OTHER), "kept"),
        (Removed(0, "", (), NOTHING), "gone"),
        (Removed(5, "unlinkat", (), REMOVED), "failed"),
    ):
        leftover = _clean.Leftover(planned, found)
        _clean._note(leftover, removed)
        assert leftover.state == state


def test_what_is_asked_for_must_make_sense() -> None:
    for options, reason in (
        ((), "one of -t and --ns"),
        (("-t", "1", "--ns", "1"), "one of -t and --ns"),
        (("--ns", "/nowhere"), "No such file"),
        (("--ns", os.getpid(), "--yes"), "is the host's: name the mounts"),
    ):
        done = ghostpool("clean", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1

"""Several containers in one run: one plan, one barrier, one lease on what they share."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._linux import Attr
from ghostpool.testing import Targets, built_targets
from tests.support.crash import children, journals
from tests.support.imagewriter import ImageSet
from tests.support.live import host_programs, read_lines, run, running
from tests.support.restore import fetched, fetched_at_once, serving

pytestmark = pytest.mark.needs_mount_ns

O_DIRECTORY = 0o200000


def root(number: int, *nodes: Node) -> MountSpec:
    return MountSpec(number, 0, b"/", number, options="size=1m,mode=755", nodes=nodes)


def volume(number: int, above: int, mountpoint: bytes, *nodes: Node) -> MountSpec:
    """A read-only mount of the pod's one volume."""
    flags = int(Attr.RDONLY | Attr.NOSUID)
    return MountSpec(number, above, mountpoint, 2, attributes=flags, nodes=nodes)


@contextmanager
def pod() -> Iterator[Targets]:
    """Two containers that share a volume, at different places; programs of the machine in both."""
    mounts = []
    for first, point in (10, b"/data"), (50, b"/var/lib/shared"):
        nodes, programs = host_programs(first + 3)
        programs = tuple(m._replace(parent=first, superblock=m.id) for m in programs)
        mounts.append((root(first, *nodes), volume(first + 1, first, point), *programs))
    mounts[0] = (*mounts[0][:1], mounts[0][1]._replace(nodes=(taken(),)), *mounts[0][2:])
    with built_targets(NamespaceSpec(1, mounts[0]), NamespaceSpec(2, mounts[1])) as targets:
        before = targets.snapshot()
        before = {number: seen.without_directory_times() for number, seen in before.items()}
        yield targets
        after = targets.snapshot()
        assert {number: seen.without_directory_times() for number, seen in after.items()} == before
        assert not children()
        assert journals() == []


def taken() -> Node:
    return Node(b"/data/taken", stat.S_IFREG | 0o644, data=b"living")


def images(directory: Path, point: str, *, content: bytes) -> Path:
    """Each container has a task 1, a ghost 1 and a file 3, as each dump has."""
    made = ImageSet()
    made.mount("/")
    made.mount(point, device=(0, 70), flags=0x200003)
    made.task(1)
    made.task(2)
    made.open(1, 3, f"{point}/gone/log", ghost=made.ghost(content))
    made.open(1, 4, f"{point}/taken", ghost=made.ghost(b"taken " + content))
    made.open(2, 3, f"{point}/gone", ghost=made.ghost(mode=0o40755), flags=O_DIRECTORY)
    fifo = made.ghost(mode=0o10644)
    made.open_fifo(2, 5, f"{point}/fifo", ghost=fifo)
    made.fifo_data(77, b"waits in " + content)
    made.socket(2, 6, f"{point}/socket".encode())
    return made.write(directory)


def listed(tmp_path: Path, targets: Targets, **more: Any) -> Path:
    images(tmp_path / "web", "/data", content=b"of web")
    images(tmp_path / "db", "/var/lib/shared", content=b"of db")
    file = tmp_path / "pod.json"
    containers = [
        {"name": "web", "images": "web", "tree": targets[1].pid},
        {"images": "db", "namespaces": {"10": targets[2].path}},
    ]
    file.write_text(json.dumps({"containers": containers, **more}))
    return file


TELL = """
for n in 3 4 5 6; do
    [ -e /proc/$$/fd/$n ] || continue
    [ -S /proc/$$/fd/$n ] && echo "$GHOSTPOOL_CONTAINER $GHOSTPOOL_TASK $n socket" && continue
    link=$(readlink /proc/$$/fd/$n)
    links=$(stat -L -c %h /proc/$$/fd/$n)
    [ -d /proc/$$/fd/$n ] && content= || content=$(dd bs=99 count=1 status=none <&$n)
    echo "$GHOSTPOOL_CONTAINER $GHOSTPOOL_TASK $n $link $links $content"
done
"""


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_commands_of_all_containers(strategy: str, tmp_path: Path) -> None:
    with pod() as targets:
        file = listed(tmp_path, targets)
        report = tmp_path / "report"
        options = ("--pod", file, "--strategy", strategy, "--report", report)
        done = run("restore", *options, "--", "/bin/sh", "-c", TELL)
        assert done.status == 0, done
    assert sorted(done.out.splitlines()) == [
        "2 1 3 /var/lib/shared/gone/log (deleted) 0 of db",
        "2 1 4 /var/lib/shared/taken.cr_link (deleted) 0 taken of db",
        "2 2 3 /var/lib/shared/gone (deleted) 0 ",
        "2 2 5 /var/lib/shared/fifo (deleted) 0 waits in of db",
        "2 2 6 socket",
        "web 1 3 /data/gone/log (deleted) 0 of web",
        "web 1 4 /data/taken.cr_link (deleted) 0 taken of web",
        "web 2 3 /data/gone (deleted) 0 ",
        "web 2 5 /data/fifo (deleted) 0 waits in of web",
        "web 2 6 socket",
    ]
    document = json.loads(report.read_text())
    assert [one["name"] for one in document["containers"]] == ["web", "2"]
    made = {one["mountpoint"]: one["made_writable"]["task"] for one in document["mounts"]}
    assert made == {"/data": int(strategy == "remount"), "/var/lib/shared": 0}
    assert sorted(one["task"] % 10**10 for one in document["commands"]) == [1, 1, 2, 2]


@pytest.mark.long
def test_a_task_of_one_container_that_does_not_arrive(tmp_path: Path) -> None:
    """The barrier is that of all: without it nobody gets anything, and all is undone."""
    with pod() as targets:
        socket = tmp_path / "socket"
        options = ("--pod", listed(tmp_path, targets), "--serve", socket, "--timeout", "1.5")
        with running("restore", *options) as process:
            read_lines(process, 1)
            came = [10**10 + 1, 10**10 + 2, 2 * 10**10 + 1]
            done = fetched_at_once(socket, came, "--", "/bin/true")
            _, err = process.communicate()
        assert process.returncode == 1, err
        assert "20000000002" in err
        assert [one.returncode for one in done.values()] == [1, 1, 1]


def test_what_is_refused_in_one_container_refuses_all(tmp_path: Path) -> None:
    with pod() as targets:
        file = listed(tmp_path, targets)
        made = ImageSet()
        made.mount("/")
        made.mount("/var/lib/missing", device=(0, 70))
        made.task(1)
        made.open(1, 3, "/var/lib/missing/log", ghost=made.ghost(b""))
        made.write(tmp_path / "third")
        containers = json.loads(file.read_text())["containers"]
        containers.append({"name": "third", "images": "third", "tree": targets[2].pid})
        file.write_text(json.dumps({"containers": containers}))
        done = run("restore", "--pod", file, "--discard")
        assert done.status == 2, done
        assert "/var/lib/missing" in done.err


def test_plan(tmp_path: Path) -> None:
    with pod() as targets:
        done = run("plan", "--pod", listed(tmp_path, targets), "--json")
    assert done.status == 0, done
    plan = json.loads(done.out)
    assert plan["tasks"] == 4
    where = {(one["task"], one["path"]) for one in plan["opens"]}
    assert (10**10 + 1, "/data/gone/log") in where
    assert (2 * 10**10 + 1, "/var/lib/shared/gone/log") in where


def test_served(tmp_path: Path) -> None:
    """The number of a task tells its container."""
    with pod() as targets, serving("--pod", listed(tmp_path, targets)) as served:
        assert served.tasks == 4
        numbers = [container * 10**10 + pid for container in (1, 2) for pid in (1, 2)]
        with fetched(served.socket, numbers) as probes:
            links = {number: probe.descriptors[3]["link"] for number, probe in probes.items()}
    assert links == {
        10000000001: "/data/gone/log (deleted)",
        10000000002: "/data/gone (deleted)",
        20000000001: "/var/lib/shared/gone/log (deleted)",
        20000000002: "/var/lib/shared/gone (deleted)",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not of the form"),
        ("[]", "is not of the form"),
        ('{"containers": []}', "lists no container"),
        ('{"containers": [{"tree": 1}]}', "images"),
        ('{"containers": [{"images": "a"}]}', "neither tree nor namespaces"),
        ('{"containers": [{"images": "a", "tree": 1, "pid": 2}]}', "container 1 has pid"),
        ('{"containers": [{"images": "a", "tree": true}]}', "tree is the pid"),
        ('{"containers": [{"images": "a", "namespaces": {"x": 1}}]}', "is not of the form"),
    ],
)
def test_files_that_list_no_pod(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "pod.json"
    file.write_text(text)
    done = run("restore", "--pod", file, "--discard")
    assert done.status == 2, done
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_what_excludes_a_pod(tmp_path: Path) -> None:
    for option in ("-t", "1"), ("-D", "."), ("--external", "a=/b"):
        done = run("plan", "--pod", tmp_path / "missing", *option)
        assert done.status == 2, done
        assert "leave out" in done.err

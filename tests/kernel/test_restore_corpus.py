"""Every real dump comes back as its tasks saw themselves before it.

Two ways: into namespaces that truth.json describes (no line of the images is used to build them),
and into namespaces that the command rebuilds from the images. The command serves, a probe fetches
for each task and tells what it holds; that is compared with truth.json, the whole of it, and the
namespaces with what they were before.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ghostpool import _linux
from ghostpool._mountinfo import LiveMount
from ghostpool.testing._targets import built
from tests.support.archives import PACKED, packed
from tests.support.corpus import CORPUS, corpus
from tests.support.namespaces import mountinfo
from tests.support.restore import (
    Probe,
    Seen,
    Served,
    fetched,
    ghostpool,
    keeps_holes,
    look,
    same_open_file,
    serving,
)
from tests.support.truth import attributes_of, specs_from_truth

pytestmark = pytest.mark.needs_mount_ns

CASES = (
    "01-ro-basic",
    "02-types",
    "03-sparse",
    "03-sparse-fiemap",
    "04-shared",
    "05-link-remap",
    "06-nested-mntns",
    "10-ro-bind-shared",
    "11-deep-parents",
    "13-many",
)
ALLOWED = {"02-types": ("--allow-devices", "--allow-setuid")}
FLAT = 12288  # CRIU stores smaller files as they are, without their holes
BLOCK = 4096
O_TMPFILE = 0o20200000  # with the O_DIRECTORY that is part of it
KINDS = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "lnk",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
}

Place = tuple[int, int]
"""A task of the images, and the number of a descriptor in it."""
Entry = dict[str, Any]


class Truth(NamedTuple):
    """What truth.json says, as far as a restore can bring it back."""

    case: str
    entries: dict[Place, Entry]
    """Of every descriptor of a ghost or of a link remap."""
    tasks: dict[int, int]
    """Pid to number of the mount namespace in truth.json."""
    image_namespaces: dict[int, int]
    """Number in truth.json to the id in the images."""
    mounts: list[dict[str, Any]]

    @property
    def files(self) -> list[set[Place]]:
        """Descriptors that are one inode."""
        return partition((entry["group"], place) for place, entry in self.entries.items())

    @property
    def opens(self) -> list[set[Place]]:
        """Descriptors that are one open file description."""
        return partition((self._open_file(*place), place) for place in self.entries)

    def _open_file(self, task: int, fd: int) -> Any:
        entry = self.entries[task, fd]
        if "open_file" in entry:
            return entry["open_file"]
        # What a child has where its parent has the very same thing came to it by fork.
        inherited = [t for t in sorted(self.tasks) if self.entries.get((t, fd)) == entry]
        return inherited[0], fd

    def flags_of(self, mountpoint: str, namespace: int) -> list[str]:
        (flags,) = (
            mount["flags"]
            for mount in self.mounts
            if (mount["mountpoint"], mount["ns"]) == (mountpoint, namespace)
        )
        return list(flags)


def partition(pairs: Iterable[tuple[Any, Place]]) -> list[set[Place]]:
    """Places that have the same key, as sets in a stable order."""
    found: dict[Any, set[Place]] = {}
    for key, place in pairs:
        found.setdefault(key, set()).add(place)
    return sorted(found.values(), key=min)


def truth_of(case: str) -> Truth:
    """Only the pids and the ids of namespaces are looked up in the images."""
    images, truth = corpus(case)
    names = {
        node["group"]: node.get("nlink", 1)
        for mount in truth["mounts"]
        for node in mount.get("contents") or ()
        if "group" in node
    }
    tasks = {task["pid"]: task["mntns"] for task in truth["tasks"]}
    return Truth(
        case,
        {
            (task["pid"], entry["fd"]): {**entry, "names": names.get(entry["group"], 0)}
            for task in truth["tasks"]
            for entry in task["fds"]
            if entry["remap"] in ("ghost", "linked")
        },
        tasks,
        {tasks[task.pid]: task.namespace for task in images.tasks},
        truth["mounts"],
    )


# -- Descriptors --------------------------------------------------------------------------------


def microseconds(time: list[int]) -> int:
    """[seconds, nanoseconds] as the image keeps it, in nanoseconds."""
    return time[0] * 10**9 + time[1] // 1000 * 1000


def expected(entry: Entry, taken: set[str]) -> Entry:
    """What a probe is to find for an entry of truth.json; `taken`: names of living files."""
    name = entry["path"] + (".cr_link" if entry["path"] in taken else "")
    flags = entry["flags"]
    if flags & O_TMPFILE == O_TMPFILE:
        flags &= ~O_TMPFILE  # it is opened by a name now
    wanted: Entry = {
        "kind": entry["kind"],
        "mode": entry["mode"],
        "owner": (entry["uid"], entry["gid"]),
        "nlink": entry["names"],
        "atime": microseconds(entry["atime"]),
        "mtime": microseconds(entry["mtime"]),
        "flags": flags,
        "pos": entry["pos"],
        "link": f"{name} (deleted)",
        "mount": (entry["mount_ns"], entry["mount"]),
    }
    if entry["kind"] in ("reg", "lnk"):
        wanted["size"] = entry["size"]
    if "rdev" in entry:
        wanted["rdev"] = os.makedev(*entry["rdev"])
    for key in ("sha256", "target"):
        if key in entry:
            wanted[key] = entry[key]
    if "pending" in entry:
        wanted["pending"] = entry["pending"]
    if entry["remap"] == "linked":
        # The file itself is opened: nothing about it is set, or rounded.
        del wanted["atime"]
        wanted["mtime"] = entry["mtime"][0] * 10**9 + entry["mtime"][1]
    return wanted


def found(
    facts: Entry, content: Entry, places: Mapping[int, tuple[int, str]], wanted: Entry
) -> Entry:
    """The fields of `wanted`, as a probe found them."""
    everything = {
        "kind": KINDS[stat.S_IFMT(facts["mode"])],
        "mode": stat.S_IMODE(facts["mode"]),
        "owner": (facts["uid"], facts["gid"]),
        "nlink": facts["nlink"],
        "atime": facts["atime_ns"],
        "mtime": facts["mtime_ns"],
        "flags": facts["flags"],
        "pos": facts["pos"],
        "link": facts["link"],
        "mount": places.get(facts["mnt_id"], f"mount {facts['mnt_id']} of no namespace"),
        "size": facts["size"],
        "rdev": facts["rdev"],
        "sha256": content.get("sha256"),
        "target": content.get("target"),
        "pending": facts.get("pending"),
    }
    return {key: everything[key] for key in wanted}


def check_holes(entry: Entry, facts: Entry, content: Entry) -> None:
    """As many blocks as the data of truth.json need, within one for each extent, and there."""
    allocated = facts["blocks"] * 512
    size = entry["size"]
    if size < FLAT:
        assert allocated <= -(-size // BLOCK) * BLOCK
        return
    data = entry.get("data", [[0, size]])
    assert abs(allocated - sum(length for _, length in data)) <= BLOCK * len(data)
    for offset, length in content["data"]:
        assert any(
            start // BLOCK * BLOCK <= offset and offset + length <= -(-(start + n) // BLOCK) * BLOCK
            for start, n in data
        ), f"data at {offset}, {length} bytes, where there was a hole"


def check_descriptors(
    truth: Truth,
    probes: Mapping[int, Probe],
    places: Mapping[int, tuple[int, str]],
    taken: set[str],
    unknown: Container[str] = (),
) -> None:
    """Every descriptor of every task is as truth.json says, and there is no other one.

    `unknown`: what the images do not say.
    """
    known = {task: probe.descriptors for task, probe in probes.items()}
    for task, held in known.items():
        mine = {fd for owner, fd in truth.entries if owner == task}
        assert set(held) == mine | {0, 1, 2}
        assert probes[task].facts["task"] == str(task)
        listed = (fd for fd in mine if truth.entries[task, fd]["cloexec"])
        assert probes[task].facts["cloexec"] == ",".join(map(str, sorted(listed)))
    # Contents only now: to read one changes the access time that another task would report.
    contents = {task: probe.ask("content") for task, probe in probes.items()}
    wanted = {
        place: {k: v for k, v in expected(entry, taken).items() if k not in unknown}
        for place, entry in truth.entries.items()
    }
    got = {
        (task, fd): found(known[task][fd], contents[task][fd], places, wanted[task, fd])
        for task, fd in truth.entries
    }
    assert got == wanted
    for (task, fd), entry in truth.entries.items():
        if entry["kind"] == "reg":
            check_holes(entry, known[task][fd], contents[task][fd])
    check_sharing(truth, probes)


def check_sharing(truth: Truth, probes: Mapping[int, Probe]) -> None:
    """One inode where there was one, and one open file description where there was one."""
    known = {task: probe.descriptors for task, probe in probes.items()}
    inodes = {(t, fd): (known[t][fd]["dev"], known[t][fd]["ino"]) for t, fd in truth.entries}
    files = partition((inode, place) for place, inode in inodes.items())
    assert files == truth.files
    pids = {task: probe.facts["pid"] for task, probe in probes.items()}
    opens: list[set[Place]] = []
    for places in files:
        mine: list[set[Place]] = []
        for task, fd in sorted(places):
            for group in mine:
                other, number = min(group)
                if same_open_file((pids[task], fd), (pids[other], number)):
                    group.add((task, fd))
                    break
            else:
                mine.append({(task, fd)})
        opens += mine
    assert sorted(opens, key=min) == truth.opens
    for group in opens:
        check_position(group, truth, probes)


def check_position(group: set[Place], truth: Truth, probes: Mapping[int, Probe]) -> None:
    """What one task does to a shared position, every holder of it sees."""
    task, fd = min(group)
    if len(group) == 1 or truth.entries[task, fd]["flags"] & os.O_PATH:
        return
    probes[task].ask("move", fd, 7)
    after = {owner: probes[owner].ask("positions") for owner in {owner for owner, _ in group}}
    assert {after[owner][number] for owner, number in group} == {7}


# -- Mounts and the report ----------------------------------------------------------------------


def places_of(tables: Mapping[int, Iterable[LiveMount]]) -> dict[int, tuple[int, str]]:
    """Where each mount id of the live namespaces is: namespace of truth.json and mount point."""
    return {
        mount.mnt_id: (number, os.fsdecode(mount.mountpoint))
        for number, table in tables.items()
        for mount in table
    }


def check_report(
    truth: Truth,
    report: dict[str, Any],
    places: Mapping[int, tuple[int, str]],
    jobs: int,
    strategy: str = "remount",
) -> None:
    """The report counts what truth.json has, and each mount as often as it was needed."""
    linked = {place for place, entry in truth.entries.items() if entry["remap"] == "linked"}
    assert (report["schema"], report["strategy"], report["status"]) == (1, strategy, 0)
    counts = {
        key: report[key] for key in ("ghosts", "link_remaps", "remaps", "tasks", "namespaces")
    }
    assert counts == {
        "ghosts": len([file for file in truth.files if not file <= linked]),
        "link_remaps": len([one for one in truth.opens if one <= linked]),
        "remaps": len(truth.opens),
        "tasks": len(truth.tasks),
        "namespaces": len(set(truth.tasks.values())),
    }
    assert report["errors"] == report["refusals"] == report["left"] == report["commands"] == []
    assert report["workers"]["count"] >= 1
    assert report["workers"]["peak_rss_bytes"] > 0
    assert report["elapsed_s"] > 0
    if jobs == 1:
        assert report["workers"]["count"] == 1

    # Of an open file that several tasks hold, the lowest pid is to do the opening. A task that is
    # fetched before that one does it itself, with a lease of its own.
    openers: dict[tuple[int, str], set[int]] = {}
    holders: dict[tuple[int, str], set[int]] = {}
    for group in truth.opens:
        entry = truth.entries[min(group)]
        place = entry["mount_ns"], entry["mount"]
        openers.setdefault(place, set()).add(min(group)[0])
        holders.setdefault(place, set()).update(task for task, _ in group)
    wanted = {}
    leases = {}
    for (number, mountpoint), tasks in openers.items():
        times = int("ro" in truth.flags_of(mountpoint, number))
        key = (truth.image_namespaces[number], mountpoint)
        leased = times if strategy == "remount" else 0
        wanted[key] = ({"service": times, "task": leased}, True)
        most = len(holders[number, mountpoint])
        leases[key] = range(len(tasks) * leased, most * leased + 1)
    got = {}
    for mount in report["mounts"]:
        key = (mount["namespace"], mount["mountpoint"])
        got[key] = (mount["made_writable"], mount["reverted"])
        assert mount["leases"] in leases[key]
        assert (mount["window_s"] > 0) == bool(mount["leases"])
        number, mountpoint = places[mount["mount_id"]]
        assert (truth.image_namespaces[number], mountpoint) == key
    assert got == wanted


def finish(served: Served, path: Path) -> dict[str, Any]:
    """Wait for the server, which has nothing left to serve; its report."""
    assert served.process.wait(timeout=30) == 0
    assert not os.path.exists(served.socket)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def seen(namespaces: Mapping[int, int]) -> dict[int, Seen]:
    """All of them, but for the times at which files with a link remap were linked: linkat(2)."""
    found = {number: look(fd) for number, fd in namespaces.items()}
    for table in found.values():
        hidden = {file[3:5] for path, file in table.files.items() if "/link_remap." in path}
        for path, file in table.files.items():
            if file[3:5] in hidden:
                table.files[path] = (*file[:9], 0, *file[10:])
    return found


# -- The two ways -------------------------------------------------------------------------------


@pytest.mark.parametrize(("jobs", "strategy"), [(1, "remount"), (16, "remount"), (16, "detached")])
@pytest.mark.parametrize("case", CASES)
def test_into_namespaces_of_the_truth(case: str, jobs: int, strategy: str, tmp_path: Path) -> None:
    """Live namespaces get everything back, and differ from before in nothing at all."""
    check_restore(case, CORPUS / case / "images", jobs, strategy, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("case", CASES)
def test_from_an_archive(case: str, how: str, tmp_path: Path) -> None:
    """So they do with the same images in a checkpoint archive, whatever its name says it is."""
    archive = packed(CORPUS / case / "images", how, tmp_path / "checkpoint.tar.bz2")
    check_restore(case, archive, 4, "remount", tmp_path)


def check_restore(case: str, images: Path, jobs: int, strategy: str, tmp_path: Path) -> None:
    """Restore into namespaces of the truth, and compare everything before and after."""
    truth = truth_of(case)
    specs = specs_from_truth(corpus(case)[1])
    taken = {
        entry["path"]
        for mount in truth.mounts
        for entry in mount.get("contents") or ()
        if entry["kind"] != "dir"
    }
    report = tmp_path / "report"
    with built(specs) as fds:
        numbers = {spec.id: fd for spec, fd in zip(specs, fds, strict=True)}
        before = seen(numbers)
        places = places_of({number: mountinfo(fd) for number, fd in numbers.items()})
        targets = [
            word
            for number, fd in numbers.items()
            for word in ("--ns", f"{truth.image_namespaces[number]}=/proc/{os.getpid()}/fd/{fd}")
        ]
        options = (*targets, *ALLOWED.get(case, ()), "--jobs", jobs, "--report", report)
        options += ("--strategy", strategy)
        socket = tmp_path / "socket"
        with serving("-D", images, "--serve", socket, *options) as served:
            assert served.tasks == len(truth.tasks)
            with fetched(served.socket, truth.tasks) as probes:
                check_descriptors(truth, probes, places, taken)
                document = finish(served, report)
                assert seen(numbers) == before
        check_report(truth, document, places, jobs, strategy)
        assert seen(numbers) == before


def test_link_remaps_are_missing_from_what_is_rebuilt() -> None:
    """The files that they lead to are in no image: the plan says where, and what would help."""
    done = ghostpool("plan", "-D", CORPUS / "05-link-remap" / "images")
    assert done.returncode == 2
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refused) == len(
        [e for e in truth_of("05-link-remap").entries.values() if e["names"]]
    )
    for words in (
        "/data/rw/inlet-drift.lock",
        "/data/rw/link_remap.4 is not there on /data/rw in ",
        "a tmpfs",
        "restore with -t or --ns where that file system is mounted",
    ):
        assert words in refused[0]


@pytest.mark.parametrize("jobs", [1, 16])
@pytest.mark.parametrize("case", [case for case in CASES if case != "05-link-remap"])
def test_into_rebuilt_namespaces(case: str, jobs: int, tmp_path: Path) -> None:
    """So do namespaces rebuilt from the images, whose mounts are those of truth.json."""
    truth = truth_of(case)
    options: list[object] = [*ALLOWED.get(case, ()), "--jobs", jobs]
    disk = tmp_path / "disk"
    disk.mkdir()
    if case == "03-sparse-fiemap":
        if not keeps_holes(str(tmp_path)):
            pytest.skip("the file system of temporary files keeps no holes")
        options += ["--external", f"disk0={disk}"]
    report = tmp_path / "report"
    options += ["--serve", tmp_path / "socket", "--report", report]
    fds: list[int] = []
    try:
        with serving("-D", CORPUS / case / "images", *options) as served:
            fds += served.namespaces()
            numbers = identify(truth, fds)
            # The ghosts are there already, under other names: to look at them would touch them.
            before = {number: mountinfo(fd) for number, fd in numbers.items()}
            places = places_of(before)
            with fetched(served.socket, truth.tasks) as probes:
                check_descriptors(truth, probes, places, set())
                document = finish(served, report)
                after = {number: look(fd) for number, fd in numbers.items()}
        assert {number: mountinfo(fd) for number, fd in numbers.items()} == before
        assert identify(truth, fds) == numbers
    finally:
        _linux.close_all(fds)
    check_report(truth, document, places, jobs)
    points = {mount["mountpoint"] for mount in truth.mounts}
    for number, seen in after.items():
        for path in seen.files:
            assert any((point + "/").startswith(path.rstrip("/") + "/") for point in points), (
                f"{path} in namespace {number} was not there"
            )
    assert not list(disk.iterdir())


def identify(truth: Truth, fds: Iterable[int]) -> dict[int, int]:
    """Which of the live namespaces is which of truth.json: by every flag of every mount."""
    wanted: dict[int, list[tuple[str, int, bool]]] = {}
    for mount in truth.mounts:
        row = (mount["mountpoint"], attributes_of(mount["flags"]), mount["sb"] == "ro")
        wanted.setdefault(mount["ns"], []).append(row)
    live = {
        fd: sorted(
            (os.fsdecode(mount.mountpoint), mount.attributes, mount.superblock_read_only)
            for mount in mountinfo(fd)
        )
        for fd in fds
    }
    assert sorted(live.values()) == sorted(map(sorted, wanted.values()))
    return {
        number: fd
        for number, rows in wanted.items()
        for fd, table in live.items()
        if table == sorted(rows)
    }

"""The kernel's own record of a restore: how often a mount changes, and when.

strace writes down every system call of the command and all its children; nothing that ghostpool
counts itself is believed. The clone that ghosts are created through is told from the task's
mount by its descriptor: it is one that open_tree(OPEN_TREE_CLONE) returned in that process.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ghostpool._buildspec import MountSpec
from ghostpool._linux import Attr
from tests.support.imagewriter import ImageSet
from tests.support.live import Live, argv_of, live, read_only, run_argv

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.needs_strace]

TASKS = 8
# The first task's ghost is opened under nine names, so it is linked; the others are moved.
USES = {
    "linkat": TASKS + 1,
    "renameat2": TASKS - 1,
    "openat2": 2 * TASKS,
    "unlinkat": 2 * TASKS,
}
FLAGS = Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOEXEC | Attr.NOSYMFOLLOW | Attr.NODIRATIME
CALLS = (
    "mount_setattr,mount,open_tree,openat,openat2,linkat,renameat2,unlinkat,"
    "close,dup,dup2,fcntl,recvmsg"
)

_BEGIN = re.compile(r"(\d+) +(\d+\.\d+) (\w+)\((.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"(\d+) +(\d+\.\d+) <\.\.\. (\w+) resumed>(.*)\) += (.*) <(\d+\.\d+)>$")
_WHOLE = re.compile(r"(\d+) +(\d+\.\d+) (\w+)\((.*)\) += (.*) <(\d+\.\d+)>$")


class Call(NamedTuple):
    """One system call."""

    pid: int
    begun: float
    ended: float
    name: str
    arguments: str
    result: str

    @property
    def fd(self) -> int:
        """Its first argument."""
        return int(self.arguments.split(",")[0])


def parse(text: str) -> list[Call]:
    """The calls of a log of `strace -f -ttt -T`, in the order of their ends."""
    calls: list[Call] = []
    begun: dict[tuple[int, str], tuple[float, str]] = {}
    for line in text.splitlines():
        if match := _BEGIN.match(line):
            begun[int(match[1]), match[3]] = (float(match[2]), match[4])
        elif match := _RESUMED.match(line):
            start, arguments = begun.pop((int(match[1]), match[3]))
            calls.append(
                Call(
                    int(match[1]),
                    start,
                    start + float(match[6]),
                    match[3],
                    arguments + match[4],
                    match[5],
                )
            )
        elif match := _WHOLE.match(line):
            start = float(match[2])
            calls.append(
                Call(int(match[1]), start, start + float(match[6]), match[3], match[4], match[5])
            )
    return calls


def images(tmp_path: Path) -> Path:
    """Eight tasks, each with a ghost of its own and a second open of the first one's."""
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    shared = 0
    for number in range(TASKS):
        made.task(number + 1)
        ghost = made.ghost(b"content of %d" % number)
        shared = shared or ghost
        made.open(number + 1, 3, f"/data/d{number % 4}/gone-{number}", ghost=ghost)
        made.open(number + 1, 4, f"/data/d0/shared-{number}", ghost=shared)
    return made.write(tmp_path / "images")


def trace(
    tmp_path: Path,
    target: Live,
    *options: str,
    mount_setattr: bool = True,
    strategy: str = "remount",
) -> tuple[list[Call], list[Call]]:
    """A restore that succeeds: its calls, and those of them that change mounts."""
    log = tmp_path / "log"
    strace = ["strace", "-f", "-ttt", "-T", "-s", "200", "-e", f"trace={CALLS}", "-o", str(log)]
    restore = argv_of(images(tmp_path), target, mount_setattr=mount_setattr, strategy=strategy)
    before = target.snapshot().without_directory_times()
    done = run_argv([*strace, *options, *restore])
    assert done.status == 0, done
    assert target.snapshot().without_directory_times() == before
    calls = parse(log.read_text())
    assert len({call.pid for call in calls if call.name == "unlinkat"}) > 1  # several workers
    changes = [
        call
        for call in calls
        if call.name in ("mount", "mount_setattr") and not call.result.startswith("-1")
    ]
    # The coordinator makes its own interpreter's private mount read-only, and no other change.
    coordinator = min(calls, key=lambda call: call.begun).pid
    own = [call for call in changes if call.pid == coordinator]
    assert split_clones(calls, own) == ([], own)
    assert all(SET in call.arguments for call in own)
    return calls, [call for call in changes if call not in own]


def split_clones(calls: list[Call], changes: list[Call]) -> tuple[list[Call], list[Call]]:
    """The changes of the tasks' mounts, and those of detached clones."""
    of_mounts: list[Call] = []
    of_clones: list[Call] = []
    clones: set[tuple[int, int]] = set()
    for call in calls:
        if call.name == "open_tree" and "OPEN_TREE_CLONE" in call.arguments:
            if not call.result.startswith("-1"):
                clones.add((call.pid, int(call.result)))
        elif call.name == "close":
            clones.discard((call.pid, call.fd))
        elif call in changes:
            is_clone = call.name == "mount_setattr" and (call.pid, call.fd) in clones
            (of_clones if is_clone else of_mounts).append(call)
    return of_mounts, of_clones


def uses_of_names(calls: list[Call]) -> dict[str, list[Call]]:
    """Successful uses of old names, by name of the call."""
    found: dict[str, list[Call]] = {name: [] for name in USES}
    for call in calls:
        is_old_name = re.search(r'"(gone|shared)-\d+"', call.arguments)
        if call.name in found and is_old_name and not call.result.startswith("-1"):
            found[call.name].append(call)
    return found


def assert_window(calls: list[Call], first: Call, last: Call) -> None:
    """All work on the task's mount lies between the two changes."""
    assert first.ended <= last.begun
    used = uses_of_names(calls)
    assert {name: len(some) for name, some in used.items()} == USES
    for some in used.values():
        assert all(first.ended <= call.begun and call.ended <= last.begun for call in some)


def assert_covers_temporaries(calls: list[Call], first: Call, last: Call) -> None:
    """Without a clone the ghosts are made and removed through the task's mount, leased so long."""
    temporary = [call for call in calls if '".ghostpool-' in call.arguments]
    assert {"openat", "linkat", "renameat2", "unlinkat"} <= {call.name for call in temporary}
    assert all(first.ended <= call.begun and call.ended <= last.begun for call in temporary)


def target_mount(**fields: Any) -> MountSpec:
    directories = [f"d{number}/" for number in range(4)]
    return read_only(2, b"/data", *directories, attributes=int(FLAGS), **fields)


CLEARED = "{attr_set=0, attr_clr=MOUNT_ATTR_RDONLY,"
SET = "{attr_set=MOUNT_ATTR_RDONLY, attr_clr=0,"


def test_one_change_and_one_back(tmp_path: Path) -> None:
    """Eight tasks on one read-only mount: one change to writable, one back after the last open.

    And one of the service side, a clone of which nothing has to be put back.
    """
    with live([target_mount()]) as (target,):
        calls, changes = trace(tmp_path, target)
    assert not [call for call in changes if call.name == "mount"]
    (cleared, set_again), (cloned,) = split_clones(calls, changes)
    assert CLEARED in cleared.arguments
    assert SET in set_again.arguments
    assert CLEARED in cloned.arguments
    assert_window(calls, cleared, set_again)


def test_no_change_with_the_detached_strategy(tmp_path: Path) -> None:
    """Only the clone is made writable; the task's mount is opened through, and never changed."""
    with live([target_mount()]) as (target,):
        calls, changes = trace(tmp_path, target, strategy="detached")
    of_mounts, (cloned,) = split_clones(calls, changes)
    assert of_mounts == []
    assert CLEARED in cloned.arguments
    used = uses_of_names(calls)
    assert {name: len(some) for name, some in used.items()} == USES


def test_the_detached_strategy_falls_back_where_no_clone_can_be_made(tmp_path: Path) -> None:
    """An unbindable mount is made writable itself, and the run says so."""
    with live([target_mount(unbindable=True)]) as (target,):
        calls, changes = trace(tmp_path, target, strategy="detached")
    assert split_clones(calls, changes) == (changes, [])
    assert len(changes) == 2


def test_one_change_and_one_back_where_no_clone_can_be_made(tmp_path: Path) -> None:
    """An unbindable mount is itself the service side: still one change, and one back."""
    with live([target_mount(unbindable=True)]) as (target,):
        calls, changes = trace(tmp_path, target)
    cleared, set_again = changes
    assert split_clones(calls, changes) == (changes, [])
    assert CLEARED in cleared.arguments
    assert SET in set_again.arguments
    assert_window(calls, cleared, set_again)
    assert_covers_temporaries(calls, cleared, set_again)


@pytest.mark.parametrize("how", ["by request", "by ENOSYS"])
def test_one_change_and_one_back_with_mount(tmp_path: Path, how: str) -> None:
    """As before Linux 5.12: two calls of mount(2), every other flag restated in both."""
    options = () if how == "by request" else ("-e", "inject=mount_setattr:error=ENOSYS")
    with live([target_mount()]) as (target,):
        calls, changes = trace(tmp_path, target, *options, mount_setattr=bool(options))
    first, last = changes
    assert {call.name for call in changes} == {"mount"}
    flags = [set(call.arguments.split(", ")[3].split("|")) for call in changes]
    rest = {"MS_REMOUNT", "MS_BIND", "MS_NOSUID", "MS_NODEV", "MS_NOEXEC"}
    rest |= {"MS_NODIRATIME", "MS_RELATIME"}
    nosymfollow = {"MS_NOSYMFOLLOW", "0x100"}  # strace learned its name in 5.19
    assert flags[0] - nosymfollow == rest
    assert flags[1] - nosymfollow == rest | {"MS_RDONLY"}
    assert all(some & nosymfollow for some in flags)
    assert_window(calls, first, last)
    assert_covers_temporaries(calls, first, last)


def test_parse_joins_interrupted_lines() -> None:
    """A call that strace shows in two pieces counts once, with its whole duration."""
    text = (
        '7  10.5 openat2(3, "a", {x}, 24 <unfinished ...>\n'
        "8  10.6 close(4) = 0 <0.000010>\n"
        "7  10.9 <... openat2 resumed>) = 5 <0.500000>\n"
    )
    assert parse(text) == [
        Call(8, 10.6, 10.6 + 0.00001, "close", "4", "0"),
        Call(7, 10.5, 11.0, "openat2", '3, "a", {x}, 24', "5"),
    ]

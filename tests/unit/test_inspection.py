"""What `inspect` says of images: the document, and what people see of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ghostpool import _inspection
from ghostpool._errors import PlanError
from ghostpool._images import read_images
from ghostpool._inspection import inspection
from ghostpool._model import NsId, Pid, Task
from ghostpool._showimages import show_images, tree_lines
from tests.support.corpus import CASES, corpus
from tests.support.imagewriter import ImageSet, ghosts_on


def names_of(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Every name of a file that was removed, and its ghost."""
    for ghost in document["ghosts"]:
        for name in ghost["names"]:
            yield name, ghost
    for link in document["link_remaps"]:
        yield link, None


def made_document(directory: Path, made: ImageSet) -> dict[str, Any]:
    return inspection(read_images(made.write(directory)))


def shown(document: dict[str, Any]) -> str:
    out = io.StringIO()
    show_images(document, Console(file=out, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_the_tasks_saw_before_the_dump(case: str) -> None:
    images, truth = corpus(case)
    expected = {
        (task["pid"], fd["fd"]): (fd["path"], fd["remap"], fd["mount"])
        for task in truth["tasks"]
        for fd in task["fds"]
        if fd["remap"] != "none"
    }
    document = inspection(images)
    found = {
        (holder["task"], holder["descriptor"]): (
            name["path"],
            "ghost" if ghost else "linked",
            name["mountpoint"],
        )
        for name, ghost in names_of(document)
        for holder in name["held_by"]
        if "descriptor" in holder
    }
    assert found == expected


@pytest.mark.parametrize("case", CASES)
def test_every_held_name_is_in_the_tables_and_in_the_tree(case: str) -> None:
    document = inspection(corpus(case)[0])
    table, tree = shown(document), "\n".join(tree_lines(document))
    for ghost in document["ghosts"]:
        assert ghost["names"][0]["path"] in table
    for name, _ in names_of(document):
        for holder in name["held_by"]:
            key = f"fd {holder['descriptor']}" if "descriptor" in holder else holder["as"]
            assert f"    {key}: {name['path']} (" in tree
    for task in document["tasks"]:
        assert f"task {task['pid']}," in tree


def test_a_ghost_with_all_that_can_be_said_of_it(tmp_path: Path) -> None:
    made = ImageSet()
    made.mount("/")
    made.mount("/data", flags=0x200001)
    made.mount("/sb", flags=0x200000, sb_flags=1)
    made.task(1)
    ghost = made.ghost(chunks=[(4096, b"x" * 100)], size=1 << 30, uid=7, gid=8, mode=0o104755)
    reg = made.open(1, 3, "/data/a", ghost=ghost, flags=0o100002, pos=5)
    made.map(1, 0x1000, 0x3000, reg)
    made.open(1, 4, "/sb/b", ghost=ghost)
    (found,) = made_document(tmp_path, made)["ghosts"]
    first, second = found.pop("names")
    assert found == {
        "id": 1,
        "file": "ghost-file-1.img",
        "kind": "file",
        "mode": "4755",
        "owner": [7, 8],
        "size": 1 << 30,
        "content": 100,
        "atime": 1_600_000_000.000001,
        "mtime": 1_500_000_000.000002,
    }
    assert first == {
        "path": "/data/a",
        "file": reg,
        "position": 5,
        "access": "read and write",
        "flags": "0o100002",
        "namespace": 10,
        "mountpoint": "/data",
        "read_only": True,
        "held_by": [{"task": 1, "descriptor": 3}, {"task": 1, "as": "map:1000-3000"}],
    }
    assert (second["mountpoint"], second["read_only"]) == ("/sb", True)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    made = ImageSet()
    made.task(1)
    made.open(1, 3, "/link", ghost=made.ghost(mode=0o120777, target="x" * 100), flags=0o12100000)
    made.open(1, 4, "/null", ghost=made.ghost(mode=0o020666, rdev=0x103))
    made.open_fifo(1, 5, "/fifo", ghost=made.ghost(mode=0o010600))
    made.socket(1, 6, b"/run/gone\0")
    document = made_document(tmp_path, made)
    link, null, fifo = document["ghosts"]
    assert (link["kind"], link["target"], link["names"][0]["access"]) == (
        "symlink",
        "x" * 100,
        "path",
    )
    assert (null["kind"], null["device"], fifo["kind"]) == ("char device", [1, 3], "fifo")
    assert document["deleted_sockets"] == ["/run/gone"]
    text = shown(document)
    assert "1, 3" in text
    assert f"/link -> {'x' * 40}…" in text
    assert "/run/gone: a bound UNIX socket" in text


def test_names_can_not_act_on_the_terminal(tmp_path: Path) -> None:
    """Neither control characters, nor what turns text around, nor the tables' own markup."""
    hostile = "d/\x1b[2J\x1b]0;owned\x07\u202e\n[bold]name[/bold]"
    made = ghosts_on("/data", [hostile], b"x")
    document = made_document(tmp_path, made)
    for text in (shown(document), "\n".join(tree_lines(document))):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
        assert r"\x1b[2J\x1b]0;owned\x07\u202e\n[bold]name[/bold]" in text


def test_trees_of_any_depth_are_shown(tmp_path: Path) -> None:
    """65,536 tasks below each other: in lines of a bounded length, without recursion."""
    made = ghosts_on("/data", ["a"], b"x")
    images = read_images(made.write(tmp_path))
    tasks = [images.tasks[0]]
    tasks += [Task(Pid(pid), Pid(pid - 1), NsId(10), ()) for pid in range(2, 65_536)]
    lines = list(tree_lines(inspection(images._replace(tasks=tuple(tasks)))))
    assert len(lines) == 65_535 + 2
    assert max(map(len, lines)) < 100
    assert lines[-2].endswith("task 65535, mount namespace 10 (level 65534)")


def test_tasks_that_are_each_others_parents_are_shown_once(tmp_path: Path) -> None:
    images = read_images(ghosts_on("/data", ["a"], b"x").write(tmp_path))
    tasks = [*images.tasks, *(Task(Pid(a), Pid(b), NsId(10), ()) for a, b in ((5, 6), (6, 5)))]
    lines = list(tree_lines(inspection(images._replace(tasks=tuple(tasks)))))
    assert [line.strip() for line in lines if "task 5" in line or "task 6" in line] == [
        "task 5, mount namespace 10",
        "task 6, mount namespace 10",
    ]


def test_a_table_that_many_tasks_share_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_inspection, "MOST_HOLDERS", 100)
    images = read_images(ghosts_on("/data", map(str, range(10)), b"x").write(tmp_path))
    table = images.tasks[0].descriptors
    tasks = [*images.tasks, *(Task(Pid(n), Pid(1), NsId(10), table) for n in range(2, 11))]
    assert len(inspection(images._replace(tasks=tuple(tasks)))["tasks"]) == 10
    tasks.append(Task(Pid(11), Pid(1), NsId(10), table))
    with pytest.raises(PlanError, match="more than 100 descriptors and mappings"):
        inspection(images._replace(tasks=tuple(tasks)))

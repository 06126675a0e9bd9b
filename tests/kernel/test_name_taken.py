"""A living file has the old name: only the name beside it is left (docs/design.md, D-031).

It is never touched, by whoever looks at it meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool._buildspec import Node
from ghostpool.testing._namespace import leave_privately
from tests.kernel.test_places import images_of, mount, namespace, restore
from tests.support.live import live, read_only, run
from tests.support.namespaces import inside

pytestmark = pytest.mark.needs_mount_ns

LIVING = Node(b"/data/here", 0o100600, data=b"living")


def taken_errno(call: Callable[[], object]) -> str:
    """By what error a name can not be had."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "it can"


def link_everywhere() -> list[str]:
    """What giving a ghost the name of a living file says, in each view that one could make."""
    answers: list[str] = []
    Path("/data/ghost").write_bytes(b"ghost")

    def link(source: int, target: int) -> None:
        answers.append(
            taken_errno(partial(os.link, "ghost", "here", src_dir_fd=source, dst_dir_fd=target))
        )

    data = os.open("/data", os.O_PATH)
    link(data, data)
    # A clone is another mount of the same directories.
    clone = _linux.open_tree(data, b"", _linux.OPEN_TREE_CLONE)
    link(clone, clone)
    # In a copy of the namespace with something mounted on the name, or on its directory.
    leave_privately()
    _linux.mount(b"/data/ghost", b"/data/here", None, _linux.MS_BIND)
    copy = os.open("/data", os.O_PATH)
    link(copy, copy)
    _linux.mount(b"tmpfs", b"/data", b"tmpfs", 0)
    link(copy, copy)
    # What is mounted over the directory is another file system: no link leads there.
    over = os.open("/data", os.O_PATH)
    link(copy, over)
    return answers


def test_a_name_is_the_directorys_and_no_mounts() -> None:
    """No view of a directory has a name of its own in it: what is taken is taken in all."""
    with namespace(mount(2, "/data", attributes=0, nodes=(LIVING,))) as fd:
        answers = inside(fd, link_everywhere)
    assert answers == ["EEXIST", "EEXIST", "EEXIST", "EEXIST", "EXDEV"]


def test_living_file_is_never_touched(tmp_path: Path) -> None:
    """Whoever has it open, and whoever looks at it again and again, sees no difference."""
    images = images_of({"/data": "/"})
    for number in range(3, 40):
        images.open(1, number, "/data/here", ghost=images.ghost(b"%d" % number))
    images.write(tmp_path)
    with live([read_only(2, b"/data", "here")]) as (target,):
        path = f"/proc/{target.pid}/root/data/here"
        before = os.stat(path)
        seen: set[tuple[int, ...]] = set()
        problems: list[OSError] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                try:
                    now = os.stat(path)
                except OSError as error:
                    problems.append(error)
                    return
                seen.add((now.st_ino, now.st_nlink, now.st_ctime_ns, now.st_mtime_ns))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            done = run("restore", "-D", tmp_path, "-t", target.pid, "--discard")
        finally:
            stop.set()
            watcher.join()
    assert done.status == 0, done
    assert problems == []
    assert seen == {(before.st_ino, before.st_nlink, before.st_ctime_ns, before.st_mtime_ns)}


def test_many_ghosts_of_a_taken_name(tmp_path: Path) -> None:
    """They have the name beside it one after the other, as they would have had their own."""
    images = images_of({"/data": "/"})
    for number in range(3, 9):
        images.open(1, number, "/data/here", ghost=images.ghost(b"%d" % number))
    images.write(tmp_path)
    with namespace(mount(2, "/data", nodes=(LIVING,))) as fd:
        outcome = restore(tmp_path, fd)
    assert {n: f.content for n, f in outcome.files.items()} == {n: b"%d" % n for n in range(3, 9)}
    assert {f.link.rpartition("/")[2] for f in outcome.files.values()} == {"here.cr_link (deleted)"}

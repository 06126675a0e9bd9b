"""Images that contradict each other: each join that leads nowhere is one clear error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._images import read_images, read_source
from tests.support.imagewriter import (
    LINKED,
    REG,
    TTY,
    ImageSet,
    message,
    record,
    small,
)
from tests.support.imagewriter import Images as Records
from tests.support.memory import MemorySource, load

Change = Callable[[ImageSet], Records | None]


def pop(name: str, index: int = -1) -> Change:
    def change(made: ImageSet) -> Records:
        images = made.images()
        images[name].pop(index)
        return images

    return change


def repeat(name: str, index: int = 0) -> Change:
    def change(made: ImageSet) -> Records:
        images = made.images()
        images[name].append(images[name][index])
        return images

    return change


def drop(name: str) -> Change:
    def change(made: ImageSet) -> Records:
        images = made.images()
        del images[name]
        return images

    return change


def put(name: str, *records: bytes) -> Change:
    return lambda made: {**made.images(), name: list(records)}


def call(method: str, *args: Any, **kwargs: Any) -> Change:
    def change(made: ImageSet) -> None:
        getattr(made, method)(*args, **kwargs)

    return change


def steps(*made_by: Callable[[ImageSet], object]) -> Change:
    def change(made: ImageSet) -> None:
        for step in made_by:
            step(made)

    return change


def opened(**kwargs: Any) -> Change:
    """Another ghost, opened as /data/more."""

    def change(made: ImageSet) -> None:
        where = {key: kwargs.pop(key) for key in ("pos", "flags", "mnt_id") if key in kwargs}
        size = kwargs.get("size")
        made.open(1, 8, "/data/more", ghost=made.ghost(id=9, **kwargs), size=size, **where)

    return change


def inventory(*fields: tuple[int, int | bytes | None]) -> Change:
    host = message((1, 1), (2, 1), (3, 1), (4, 1), (9, 1), (10, 1))
    known: dict[int, int | bytes | None] = {1: 2, 2: True, 3: host, 4: True}
    known.update(dict(fields))
    return put("inventory.img", record(message(*known.items())))


def core(state: int | None) -> bytes:
    task = None if state is None else message((1, state))
    return record(message((1, 1), (3, task)))


def remapped(name: str, **kwargs: Any) -> Change:
    def change(made: ImageSet) -> None:
        reg = made.reg(name, **kwargs)
        made.fd(1, 8, reg)
        made.remap(reg, made.ghost(id=9))

    return change


CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "inventory twice": (repeat("inventory.img"), "inventory.img, record 1: .*one record only"),
    "no inventory record": (pop("inventory.img"), "inventory.img: holds no record"),
    "no root ids": (inventory((3, None)), "inventory.img, record 0: has no root_ids"),
    "required field": (
        put("pstree.img", record(message((1, 1)))),
        "pstree.img, record 0: .* lacks ppid",
    ),
    "no bytes of a message": (
        put("pstree.img", record(b"\x0b")),
        "pstree.img, record 0: the 1 bytes are no",
    ),
    "no pstree": (drop("pstree.img"), "pstree.img: is missing"),
    "empty pstree": (pop("pstree.img"), "pstree.img: holds no task"),
    "pid twice": (repeat("pstree.img"), "pstree.img, record 1: repeats pid 1"),
    "pid 0": (
        put("pstree.img", record(message((1, 0), (2, 0), (3, 1), (4, 1)))),
        "pstree.img, record 0: 0 is no pid",
    ),
    "root with a parent": (
        put("pstree.img", record(message((1, 1), (2, 5), (3, 1), (4, 1)))),
        "pstree.img, record 0: the first task has a parent, 5",
    ),
    "unknown parent": (
        call("task", 2, parent=7),
        "pstree.img, record 1: task 2 has parent 7, which no record before it lists",
    ),
    "task cut off": (
        lambda made: (made.task(2), pop("pstree.img")(made))[1],
        "pstree.img: core-2.img is there, but no record lists pid 2: is pstree.img cut",
    ),
    "zombie root": (put("core-1.img", core(6)), "pstree.img, record 0: .* is a zombie"),
    "no core": (drop("core-1.img"), "core-1.img: is missing, but pstree.img lists task 1"),
    "empty core": (pop("core-1.img"), "core-1.img: holds no record"),
    "thread's core": (put("core-1.img", core(None)), "core-1.img, record 0: is not that of a task"),
    "task state": (put("core-1.img", core(9)), "core-1.img, record 0: task state 9 is unknown"),
    "no ids": (drop("ids-1.img"), "ids-1.img: is missing, but core-1.img says .* alive"),
    "ids twice": (repeat("ids-1.img"), "ids-1.img, record 1: .*one record only"),
    "no mnt_ns_id": (
        put("ids-1.img", record(message((1, 1), (2, 101), (3, 1), (4, 1)))),
        "ids-1.img, record 0: has no mnt_ns_id",
    ),
    "no mountpoints": (
        drop("mountpoints-10.img"),
        "mountpoints-10.img: is missing, but task 1 lives in",
    ),
    "empty mountpoints": (put("mountpoints-10.img"), "mountpoints-10.img: holds no mount"),
    "no root mount": (pop("mountpoints-10.img"), "mountpoints-10.img, record 0: .*is it cut"),
    "a circle of mounts": (
        steps(
            lambda made: made.mount("/x", id=600, parent=601),
            lambda made: made.mount("/x/y", id=601, parent=600),
        ),
        "mountpoints-10.img, record 1: mount 600 is among its own ancestors",
    ),
    "only a circle of mounts": (
        steps(
            lambda made: made.mount("/", ns=11, id=600, parent=601),
            lambda made: made.mount("/y", ns=11, id=601, parent=600),
            lambda made: made.task(2, ns=11),
        ),
        'mountpoints-11.img: no mount is the root "/"',
    ),
    "two roots": (
        call("mount", "/", id=600, parent=2),
        "mountpoints-10.img, record [01]: mounts 500 and 600 are both the root",
    ),
    "unknown parent of a mount": (
        call("mount", "/x", id=600, parent=7),
        "mountpoints-10.img, record 0: mount 600 at b'/x' has parent 7",
    ),
    "mount twice": (
        call("mount", "/x", id=501),
        "mountpoints-10.img, record 1: repeats mnt_id 501",
    ),
    "mount twice in two namespaces": (
        steps(
            lambda made: made.mount("/", ns=11, id=501),
            lambda made: made.task(2, ns=11),
        ),
        "mountpoints-11.img: repeats mnt_id 501 of mountpoints-10.img",
    ),
    "mount point": (call("mount", "/x/../y"), "mountpoints-10.img, record 0: .* is no mount point"),
    "no files": (drop("files.img"), "files.img: is missing, but every task has files"),
    "empty files": (put("files.img"), "files.img: holds no file"),
    "file id twice": (repeat("files.img"), "files.img, record 5: repeats file id 1 of type 1"),
    "file without its entry": (
        call("file", REG, 50),
        "files.img, record 5: a file of type 1 without its reg entry",
    ),
    "two ids": (
        call("file", TTY, 50, (19, message((1, 51), (6, 99)))),
        "files.img, record 5: file id 50 holds an entry of id 51",
    ),
    "socket without a name": (
        call("socket", 1, 8, b"\0\0"),
        "files.img, record 5: b'' is no name that a socket was bound to",
    ),
    "socket without its buffers": (
        call(
            *("file", 5, 50),
            (16, message(*((n, 50 if n == 1 else 1) for n in range(1, 10)), (10, b""))),
        ),
        "files.img, record 5: file_entry lacks usk.opts.so_sndbuf",
    ),
    "socket of two names": (
        call("socket", 1, 8, b"/a\0b"),
        "files.img, record 5: b'/a",
    ),
    "fifo without its file": (
        call("file", 3, 50, (17, message((1, 50), (2, 1), (3, 99)))),
        "files.img, record 5: file id 50 was opened through id 99, which is not there",
    ),
    "terminal without its file": (
        call("file", TTY, 50, (19, message((1, 50), (6, 99)))),
        "files.img, record 5: file id 50 was opened through id 99, which is not there",
    ),
    "relative name": (call("reg", "gone"), "files.img, record 5: b'gone' is no absolute"),
    "name with ..": (call("reg", "/data/../x"), "files.img, record 5: .* is no absolute"),
    "name with .": (call("reg", "/data/."), "files.img, record 5: .* is no absolute"),
    "name with //": (call("reg", "/data//x"), "files.img, record 5: .* is no absolute"),
    "name that ends in /": (call("reg", "/data/"), "files.img, record 5: .* is no absolute"),
    "name with NUL": (call("reg", "/da\0ta"), "files.img, record 5: .* is no absolute"),
    "name with newline and ..": (call("reg", "/a\n/.."), "files.img, record 5: .* is no absolute"),
    "long component": (call("reg", "/" + "x" * 256), "files.img, record 5: .* is no absolute"),
    "long name": (call("reg", "/x" * 2048), "files.img, record 5: .* is no absolute"),
    "unknown mount": (
        call("reg", "/data/x", mnt_id=777),
        "files.img, record 5: b'/data/x' is on mount 777, which no mountpoints image holds",
    ),
    "fd to nowhere": (
        call("fd", 1, 9, 12),
        "fdinfo-101.img, record 2: refers to file id 12, which files.img does not hold",
    ),
    "pipe to nowhere": (
        call("fd", 1, 9, 12, kind=2),
        "fdinfo-101.img, record 2: refers to file id 12 of type 2, which files.img does not",
    ),
    "descriptor twice": (call("fd", 1, 3, 5), "fdinfo-101.img, record 2: repeats descriptor 3"),
    "descriptor -1": (
        call("fd", 1, -1 & 0xFFFFFFFF, 5),
        "fdinfo-101.img, record 2: 4294967295 is no number",
    ),
    "fdinfo missing": (drop("fdinfo-101.img"), "fdinfo-101.img: is missing, and nothing else"),
    "cwd to nowhere": (call("cwd", 1, 99), "fs-1.img, record 0: cwd refers to file id 99"),
    "mapping of nothing": (
        call("map", 1, 0x1000, 0x2000, 99),
        "mm-1.img, record 0: map:1000-2000 refers to file id 99",
    ),
    "empty mm": (put("mm-1.img"), "mm-1.img: holds no record"),
    "empty fs": (put("fs-1.img"), "fs-1.img: holds no record"),
    "remap of nothing": (
        call("remap", 99, 1),
        "remap-fpath.img, record 1: refers to file id 99, which files.img does not hold",
    ),
    "remap twice": (repeat("remap-fpath.img"), "remap-fpath.img, record 1: repeats file id"),
    "remap of an external file": (
        steps(lambda made: made.remap(made.reg("file[1:2]", ext=True), 1)),
        "remap-fpath.img, record 1: file id 6 is external",
    ),
    "link to nowhere": (
        call("remap", 5, 99, LINKED),
        "remap-fpath.img, record 1: leads to file id 99, which files.img does not hold",
    ),
    "hidden name without a remap": (
        call("reg", "/data/link_remap.70", id=70, mode=None, with_mount=False),
        "remap-fpath.img: no record refers to b'/data/link_remap.70'",
    ),
    "remap cut off": (
        pop("remap-fpath.img"),
        "remap-fpath.img: ghost-file-1.img is there, but no record refers to it: is remap-",
    ),
    "remap missing": (drop("remap-fpath.img"), "remap-fpath.img: ghost-file-1.img is there"),
    "ghost missing": (
        drop("ghost-file-1.img"),
        "ghost-file-1.img: is missing, but remap-fpath.img, record 0 needs it",
    ),
    "empty ghost image": (put("ghost-file-1.img"), "ghost-file-1.img: holds no record"),
    "size of a ghost": (
        call("open", 1, 8, "/data/x", ghost=1, size=8),
        "ghost-file-1.img, record 0: the ghost has 7 bytes, files.img, record 5 says 8",
    ),
    "mode of a ghost": (
        call("open", 1, 8, "/data/x", ghost=1, mode=0o100600),
        "ghost-file-1.img, record 0: the ghost has mode 0o100644, files.img, record 5 says",
    ),
    "socket": (opened(mode=0o140644), "ghost-file-9.img, record 0: mode 0o140644 is not"),
    "no type": (opened(mode=0o644), "ghost-file-9.img, record 0: mode 0o644 is not"),
    "mode too wide": (opened(mode=0o1100644), "ghost-file-9.img, record 0: mode 0o1100644 is"),
    "chunks without size": (opened(chunks=[]), "ghost-file-9.img, record 0: .*has no size"),
    "size beyond off_t": (opened(chunks=[], size=1 << 63), "ghost-file-9.img, record 0: size"),
    "chunk beyond the end": (
        opened(chunks=[(0, b"ab"), (9, b"ab")], size=10),
        "ghost-file-9.img, record 2: 2 bytes at 9 lie beyond the end of the ghost at 10",
    ),
    "overlapping chunks": (
        opened(chunks=[(0, b"ab"), (1, b"ab")], size=10),
        "ghost-file-9.img, record 2: begins at 1, the chunk before ends at 2",
    ),
    "short chunk": (
        put(
            "ghost-file-1.img",
            record(message((1, 0), (2, 0), (3, 0o100644), (9, 1), (10, 7))),
            record(message((1, 7), (2, 0)), b"sixsix"),
        ),
        "ghost-file-1.img, record 1: 7 bytes of content should follow, 6 do",
    ),
    "content of a directory": (
        opened(content=b"x", mode=0o40755),
        "ghost-file-9.img, record 0: content follows a file of mode 0o40755",
    ),
    "link without target": (opened(mode=0o120777), "ghost-file-9.img, record 0: is a symbolic"),
    "long target": (
        opened(mode=0o120777, target="x" * 4096),
        "ghost-file-9.img, record 0: is a symbolic",
    ),
    "target with NUL": (
        opened(mode=0o120777, target="x\0"),
        "ghost-file-9.img, record 0: is a symbolic",
    ),
    "device without rdev": (opened(mode=0o20666), "ghost-file-9.img, record 0: .*has no rdev"),
    "microseconds": (
        put(
            "ghost-file-1.img",
            record(
                message((1, 0), (2, 0), (3, 0o100644), (7, message((1, 0), (2, 1_000_000)))),
                b"content",
            ),
        ),
        "ghost-file-1.img, record 0: 1000000 microseconds are no fraction",
    ),
    "position": (opened(pos=1 << 63), "files.img, record 5: 9223372036854775808 is no position"),
    "flags": (opened(flags=1 << 31), "files.img, record 5: 0x80000000 are no open flags"),
    "ghost without a mount": (
        remapped("/data/x", with_mount=False),
        "files.img, record 5: b'/data/x' was removed, but .* which mount",
    ),
    "ghost beside its mount": (
        remapped("/database/x", mnt_id=501),
        "files.img, record 5: b'/database/x' is not below its mount 501 at b'/data'",
    ),
    "fifo data of no fifo": (
        call("fifo_data", 3, b"x"),
        "fifo-data.img, record 0: pipe id 3 is that of no fifo in files.img",
    ),
    "fifo data twice": (
        steps(
            lambda made: made.open_fifo(1, 8, "/data/f"),
            lambda made: made.fifo_data(77, b""),
            lambda made: made.fifo_data(77, b""),
        ),
        "fifo-data.img, record 1: repeats pipe id 77",
    ),
    "more fifo data than its pipe": (
        steps(
            lambda made: made.open_fifo(1, 8, "/data/f"),
            lambda made: made.fifo_data(77, b"12345", size=4),
        ),
        "fifo-data.img, record 0: 5 bytes waited in a pipe whose size is 4",
    ),
    "fifo data cut": (
        put("fifo-data.img", record(message((1, 3), (2, 5)), b"four")),
        "fifo-data.img, record 0: 5 bytes of data should follow, 4 do",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str, tmp_path: Path) -> None:
    """Images that contradict each other are refused, naming file and record."""
    change, expected = CONTRADICTIONS[name]
    made = small()
    images = change(made)
    made.write(tmp_path, images)
    with pytest.raises(ImageError, match="^" + expected) as caught:
        read_images(tmp_path)
    with pytest.raises(ImageError, match="^" + re.escape(str(caught.value)) + "$"):
        read_source(str(tmp_path), MemorySource(load(tmp_path)), all_mounts=False)


UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "image version": (inventory((1, 3)), "image format version 3 is unknown"),
    "0.4": (inventory((2, None)), "CRIU older than 0.4"),
    "0.8": (inventory((4, None)), "CRIU older than 0.8"),
    "remap type": (call("remap", 5, 1, 3), "remap-fpath.img, record 1: remap type 3 is unknown"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str, tmp_path: Path) -> None:
    change, expected = UNSUPPORTED[name]
    made = small()
    made.write(tmp_path, change(made))
    with pytest.raises(UnsupportedError, match=expected):
        read_images(tmp_path)


def test_mount_namespaces_below_a_task_that_has_none(tmp_path: Path) -> None:
    made = ImageSet(own_mounts=False)
    made.task(1)
    made.task(2)
    images = made.images()
    ids = message((1, 2), (2, 102), (3, 2), (4, 2), (9, 7), (10, 1))
    images["ids-2.img"] = [record(ids)]
    with pytest.raises(ImageError, match=r"ids-2\.img, record 0: names mount namespace 7"):
        read_images(made.write(tmp_path, images))


def test_a_mount_in_images_without_mounts(tmp_path: Path) -> None:
    made = ImageSet(own_mounts=False)
    made.task()
    made.open(1, 3, "/x", mnt_id=5)
    with pytest.raises(ImageError, match="is on mount 5, which no mountpoints image holds"):
        read_images(made.write(tmp_path))

"""Images as rows and back: nothing is lost, and nothing that makes no sense is believed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ghostpool._errors import ImageError
from ghostpool._imagerows import BATCH, KINDS, rows_of
from ghostpool._images import read_source
from ghostpool._limits import Limits
from ghostpool._model import Images, ShmFile
from ghostpool._rebuild import Rebuild
from tests.support.corpus import CASES, corpus
from tests.support.imagewriter import ImageSet, head
from tests.support.memory import MemorySource

Frames = list[list[Any]]


def rebuilt(frames: Frames, limits: Limits | None = None) -> Images:
    rebuild = Rebuild("images", limits or Limits())
    for frame in json.loads(json.dumps(frames)):
        rebuild.add(frame)
    return rebuild.images()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str) -> None:
    images, _ = corpus(case)
    back = rebuilt([list(frame) for frame in rows_of(images)])
    images_as_named = Images(**{**images._asdict(), "directory": "images"})
    assert back == images_as_named
    # Frozen and hashable as they were, lists nowhere.
    hash(back.tasks)
    hash(tuple(back.ghosts.values()))
    hash(tuple(back.mounts.values()))


def made() -> Images:
    images = ImageSet()
    images.mount("/")
    images.mount("/data")
    images.task()
    images.task(2)
    images.open(1, 3, "/data/gone", ghost=images.ghost(chunks=[(0, b"ab"), (5, b"c")], size=9))
    images.open(1, 4, "/data/link", ghost=images.ghost(mode=0o120777, target="to"))
    images.open(2, 3, "/data/device", ghost=images.ghost(mode=0o20600, rdev=259))
    images.open_fifo(1, 5, "/data/fifo", ghost=images.ghost(mode=0o10600), pipe=9)
    images.fifo_data(9, b"abc", size=4096)
    images.socket(1, 6, b"/run/gone")
    images.link(images.open(2, 8, "/linked"), "/")
    images.map(1, 0x1000, 0x2000, images.open(1, 9, "/data/mapped", ghost=images.ghost(b"x")))
    written = {name: head(name) + b"".join(r) for name, r in images.images().items()}
    shm = ShmFile(b"link_remap.7", 0o100600, 7, 8, 1_500_000_000_000_000, 32, 512)
    return read_source("images", MemorySource(written))._replace(devshm={shm.name: shm})


FRAMES: Frames = [list(frame) for frame in rows_of(made())]


def frames() -> Frames:
    return copy.deepcopy(FRAMES)


def index(kind: str) -> int:
    return [name for name, _ in FRAMES].index(kind)


def test_an_archive_of_nothing_is_not_none() -> None:
    archives: tuple[dict[bytes, ShmFile] | None, ...] = ({}, None)
    for devshm in archives:
        told = [list(frame) for frame in rows_of(made()._replace(devshm=devshm))]
        assert rebuilt(told).devshm == devshm


def test_every_kind_of_frame_is_there() -> None:
    """Or the tests below would prove nothing; further extents have a test of their own."""
    assert {kind for kind, _ in FRAMES} == set(KINDS) - {"extents"}
    assert rebuilt(frames()) == made()


U32, U64 = 1 << 32, 1 << 64

# (kind, row, column, value, part of the error)
LIES: list[tuple[str, int, int, Any, str]] = [
    ("mounts", 0, 0, True, "a bool is no number"),
    ("mounts", 0, 0, 1.0, "a float is no number"),
    ("mounts", 0, 0, U32, "is no number"),
    ("mounts", 0, 2, 0, "is no number from 1"),
    ("mounts", 1, 0, 500, "comes twice"),
    ("mounts", 1, 1, 77, "before its parent"),
    ("mounts", 0, 6, "/x", "is no root"),
    ("mounts", 1, 6, "/../x", "is nowhere"),
    ("mounts", 1, 6, "data", "is nowhere"),
    ("mounts", 1, 7, "a\0b", "holds a NUL"),
    ("mounts", 1, 8, "x" * 65536, "longer than"),
    ("mounts", 1, 8, "\u0100", "another shape"),
    ("mounts", 1, 13, 1, "neither true nor false"),
    ("mounts", 1, 14, 5, "a text that is none"),
    ("files", 0, 0, -1, "is no number"),
    ("files", 1, 0, 1, "comes twice"),
    ("files", 0, 2, U64, "is no number"),
    ("files", 0, 3, "relative", "is no absolute, normal path"),
    ("files", 0, 3, "/" + "x" * 300, "is no absolute, normal path"),
    ("files", 0, 4, 9999, "a reference to mount 9999"),
    ("files", 0, 4, None, ""),
    ("files", 0, 7, None, "neither true nor false"),
    ("ghosts", 0, 0, 2, "comes twice"),
    ("ghosts", 0, 1, 0o140777, "has mode"),
    ("ghosts", 0, 1, 0o300644, "is no number"),
    ("ghosts", 0, 1, 0o40755, "has mode"),
    ("ghosts", 0, 1, 0o120777, "has mode"),
    ("ghosts", 0, 4, 1 << 90, "is no number"),
    ("ghosts", 0, 6, 1 << 41, "the limit is 1T"),
    ("ghosts", 0, 6, 5, "is no number"),
    ("ghosts", 0, 7, [0, 1], "extents of another shape"),
    ("ghosts", 0, 7, [5, 1, 0, 0, 1, 0], "is no number from 6"),
    ("ghosts", 0, 7, [0, 3, 0, 2, 1, 0], "is no number from 3"),
    ("ghosts", 0, 7, [0, 10, 0], "is no number"),
    ("ghosts", 0, 7, [0, 0, 0], "is no number from 1"),
    ("ghosts", 0, 7, [0, 1, 1 << 63], "is no number"),
    ("ghosts", 0, 7, [0, 1, 0] * (BATCH + 1), "extents of another shape"),
    ("ghosts", 0, 8, 3, "is a device, or is none"),
    ("ghosts", 0, 9, "x", "is a link, or is none"),
    ("ghosts", 1, 9, None, "is a link, or is none"),
    ("ghosts", 1, 9, "x" * 4096, "longer than"),
    ("ghosts", 2, 8, None, "is a device, or is none"),
    ("remaps", 0, 1, 9999, "a reference to file 9999"),
    ("remaps", 0, 2, "exec", "a remap of file"),
    ("remaps", 0, 2, ["ghost"], "a remap of file"),
    ("remaps", 0, 3, 9999, "a reference to ghost 9999"),
    ("descriptors", 0, 1, 1 << 31, "is no number"),
    ("descriptors", 1, 1, 3, "comes twice"),
    ("descriptors", 0, 2, 9999, "a reference to file 9999"),
    ("descriptors", 0, 3, 1, "neither true nor false"),
    ("tasks", 0, 0, 0, "is no number from 1"),
    ("tasks", 0, 1, 5, "the first one of two"),
    ("tasks", 1, 1, 0, "the first one of two"),
    ("tasks", 1, 0, 1, "comes twice"),
    ("tasks", 1, 2, 11, "a reference to namespace 11"),
    ("tasks", 0, 2, [], "a reference to namespace a list"),
    ("holders", 0, 0, 9, "a reference to task 9"),
    ("holders", 0, 1, "fd", "in no known way"),
    ("holders", 0, 1, "map:0-1\n", "in no known way"),
    ("holders", 0, 2, 1, "a reference to remapped file 1"),
    ("holders", 0, 3, None, "with flags, or without"),
    ("holders", 0, 3, 1 << 31, "is no number"),
    ("holders", 0, 3, True, "a bool is no number"),
    ("holders", 0, 1, "cwd", "with flags, or without"),
    ("sockets", 0, 0, 1, "comes twice"),
    ("sockets", 0, 5, U32, "is no number"),
    ("sockets", 0, 7, 4, "is no number"),
    ("sockets", 0, 8, "", "has no name"),
    ("sockets", 0, 8, "x" * 109, "longer than"),
    ("sockets", 0, 9, "x\0", "holds a NUL"),
    ("sockets", 0, 10, [1, 2], "of another shape"),
    ("sockets", 0, 10, [1, 2, U32], "is no number"),
    ("sockets", 0, 11, [1, 2, 3, 4, True], "of another shape"),
    ("sockets", 0, 11, [1, 2, 3, 1 << 60, True, True], "is no number"),
    ("sockets", 0, 11, [1, 2, 3, 4, True, 1], "neither true nor false"),
    ("fifos", 0, 0, 9999, "a reference to file 9999"),
    ("fifos", 0, 1, 1 << 63, "is no number"),
    ("fifos", 0, 2, U32, "is no number"),
    ("fifos", 0, 3, U32, "is no number"),
    ("fifos", 0, 3, 2, "is no number"),
    ("devshm", 0, 0, "other", "a file of /dev/shm that is no link remap"),
    ("devshm", 0, 0, "../link_remap.7", "a file of /dev/shm that is no link remap"),
    ("devshm", 0, 1, 0o40755, "a file of /dev/shm that is no link remap"),
    ("devshm", 0, 2, U32, "is no number"),
    ("devshm", 0, 3, -1, "is no number"),
    ("devshm", 0, 4, 1 << 90, "is no number"),
    ("devshm", 0, 5, -1, "is no number"),
    ("devshm", 0, 5, 1 << 50, "the limit is 1T"),
    ("devshm", 0, 6, (1 << 63) - 1, "is no number"),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie[0]}-{lie[2]}-{str(lie[3])[:12]!r}")
def test_a_lie_is_refused(lie: tuple[str, int, int, Any, str]) -> None:
    kind, row, column, value, expected = lie
    told = frames()
    told[index(kind)][1][row][column] = value
    if not expected:
        rebuilt(told)
        return
    with pytest.raises(ImageError) as caught:  # noqa: PT011  the two kinds of errors differ
        rebuilt(told)
    assert expected in caught.value.problem


def test_a_key_is_one_file() -> None:
    told = frames()
    rows = told[index("holders")][1]
    rows.append(rows[0])
    with pytest.raises(ImageError, match="holds map:1000-2000 twice"):
        rebuilt(told)


def test_what_was_removed_must_be_openable_again() -> None:
    """As the reader checks it itself, files below a mount of theirs with sane flags."""
    origins = [row[1] for row in FRAMES[index("remaps")][1]]
    at = next(n for n, row in enumerate(FRAMES[index("files")][1]) if row[0] == origins[0])
    for column, value in ((1, 1 << 31), (2, 1 << 63), (3, "/else"), (4, None), (7, True)):
        told = frames()
        told[index("files")][1][at][column] = value
        with pytest.raises(ImageError, match=r"opened again|below its mount|from no mount"):
            rebuilt(told)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_part_of_it(kind: str) -> None:
    told = frames()
    told.append([kind, []])
    if kind == "end":
        rebuilt(told)
    else:
        with pytest.raises(ImageError, match="comes out of order"):
            rebuilt(told)


NO_FRAMES: list[Any] = [
    *(None, [], [1], ["files"], ["files", None], ["files", {}], ["nothing", []], [[], []], "ab"),
    *(["files", [[]]], ["files", [1]], ["files", ["abcdefgh"]], ["files", [{}] * 9]),
    ["files", [[1] * 8] * (BATCH + 1)],
    *(["__init__", []], ["end", [1]]),
]


@pytest.mark.parametrize("frame", NO_FRAMES, ids=lambda frame: str(frame)[:30])
def test_frames_of_another_shape(frame: Any) -> None:
    told = frames()
    told.insert(1, frame)
    with pytest.raises(ImageError, match="makes no sense"):
        rebuilt(told)


def test_the_end_and_the_start_have_to_be_there() -> None:
    with pytest.raises(ImageError, match="the last frame is missing"):
        rebuilt(frames()[:-1])
    with pytest.raises(ImageError, match="out of order"):
        rebuilt(frames()[1:])
    with pytest.raises(ImageError, match="the first task is not in the root namespace"):
        rebuilt([["head", [3, False]], *frames()[1:]])


def test_limits_hold_for_the_reader_too() -> None:
    for limits in (Limits(files=3), Limits(ghosts=1), Limits(descriptors=1), Limits(mounts=1)):
        with pytest.raises(ImageError, match="the limit is"):
            rebuilt(frames(), limits)
    with pytest.raises(ImageError, match="the limit is 3"):
        rebuilt(frames(), Limits(size=3))


def test_further_extents() -> None:
    """They go on where the ghost's own row ended, and nowhere else."""
    told = frames()
    at = index("ghosts") + 1
    told.insert(at, ["extents", [[1, [6, 1, 70, 8, 1, 71]]]])
    ghost = next(iter(rebuilt(told).ghosts.values()))
    assert [extent.offset for extent in ghost.extents] == [0, 5, 6, 8]
    for row in ([1, [4, 1, 0]], [1, [9, 1, 0]], [99, [6, 1, 0]], [2, [0, 1, 0]], [1, 5], 3):
        told[at] = ["extents", [row]]
        with pytest.raises(ImageError, match="makes no sense"):
            rebuilt(told)


def test_descriptors_come_in_any_order() -> None:
    """They are in that of their numbers afterwards, and can be had one by one like those read."""
    told = frames()
    told[index("descriptors")][1].reverse()
    ours, theirs = rebuilt(told).tasks[0].descriptors, made().tasks[0].descriptors
    assert ours == theirs
    assert (ours[1], ours[-1], ours[1:3]) == (theirs[1], theirs[-1], theirs[1:3])
    assert len(ours) == len(theirs) > 3
    assert (hash(ours), repr(ours)) == (hash(theirs), repr(theirs))

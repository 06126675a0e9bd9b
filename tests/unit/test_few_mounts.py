"""Images read without the mounts that no plan looks at: nothing else differs, no check is lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from ghostpool._errors import GhostpoolError, ImageError
from ghostpool._imagerows import rows_of
from ghostpool._images import read_source
from ghostpool._limits import Limits
from ghostpool._match import Matcher, Namespace
from ghostpool._model import ImageMount, Images, MntId, NsId
from ghostpool._mountinfo import escape
from ghostpool._mounttable import MountTable
from ghostpool._rebuild import Rebuild
from ghostpool._targets import Target
from tests.support.corpus import CASES, CORPUS
from tests.support.imagewriter import ImageSet, head, small
from tests.support.memory import MemorySource, load


def both(images: dict[str, bytes]) -> tuple[Images, Images]:
    """With all mounts, and with few."""
    source = MemorySource(images)
    return read_source("images", source), read_source("images", source, all_mounts=False)


def written(made: ImageSet) -> dict[str, bytes]:
    return {name: head(name) + b"".join(records) for name, records in made.images().items()}


def stacks() -> ImageSet:
    """Mounts on each other in every order, mounts beside them, and a namespace without files."""
    made = ImageSet()
    made.mount("/", id=500)
    made.mount("/", id=501, parent=500)
    made.mount("/data", id=510, parent=501)
    made.mount("/data", id=511, parent=510, fstype="proc")
    made.mount("/data", id=512, parent=511, root="/sub")
    made.mount("/data/deep", id=513, parent=512)
    made.mount("/twice", id=520, parent=501)
    made.mount("/twice", id=521, parent=520)
    made.mount("/other", id=530, parent=501, source="x" * 100)
    made.mount("/other/on", id=531, parent=530)
    made.mount("/", ns=11, id=600)
    made.mount("/data", ns=11, id=601)
    made.task(1)
    made.task(2, ns=11)
    made.open(1, 3, "/data/gone", ghost=made.ghost(b"a"), mnt_id=511)
    made.open(1, 4, "/data/deep/gone", ghost=made.ghost(b"b"), mnt_id=513)
    made.open(1, 5, "/twice/there", mnt_id=520)
    made.open(1, 6, "/other/on/there", mnt_id=531)
    return made


def images_of(name: str) -> dict[str, bytes]:
    return written(stacks()) if name == "stacks" else load(CORPUS / name / "images")


SETS = (*CASES, "stacks")


def table_of(mounts: Iterable[ImageMount]) -> MountTable:
    """Live mounts that are as those of the images."""
    lines = [
        b"%d %d 0:%d %b %b rw - %b none rw\n"
        % (m.id, m.parent, m.device & 0xFF, m.root, escape(m.mountpoint), m.fstype.encode() or b"x")
        for m in mounts
    ]
    return MountTable(b"".join(lines))


def lives(mounts: tuple[ImageMount, ...]) -> Iterator[tuple[ImageMount, ...]]:
    """Live mounts that match, and some that do not: one is gone, or covered, or all but one are."""
    yield mounts
    for at, mount in enumerate(mounts[:40]):
        yield (*mounts[:at], *mounts[at + 1 :])
        yield (*mounts, mount._replace(id=MntId(9000), parent=mount.id, fstype="bpf"))
        yield tuple(m for m in mounts if m is mount or m.mountpoint != mount.mountpoint)


def sites(images: Images, live: dict[NsId, tuple[ImageMount, ...]]) -> list[Any]:
    """Where every remapped file is to be opened, or why it is not."""
    namespaces = {
        number: Namespace(
            number, Target(0, -1, (0, 0), f"namespace {number}", False, None), table_of(mounts)
        )
        for number, mounts in live.items()
    }
    matcher = Matcher(images, namespaces)
    found: list[Any] = []
    for remap in images.remaps:
        try:
            site = matcher.site(images.files[remap.origin])
            found.append((site.namespace.id, *site[1:]))
        except GhostpoolError as error:
            found.append((type(error), str(error)))
    return found


@pytest.mark.parametrize("name", SETS)
def test_every_file_is_found_where_it_is_with_all_mounts(name: str) -> None:
    every, few = both(images_of(name))
    seen = 0
    for number, mounts in every.mounts.items():
        for live in lives(mounts):
            tables = {**every.mounts, number: live}
            found = sites(every, tables)
            assert sites(few, tables) == found
            seen += len(found)
    assert seen


@pytest.mark.parametrize("name", SETS)
def test_it_is_the_mounts_alone_that_differ(name: str) -> None:
    every, few = both(images_of(name))
    assert few._replace(mounts=every.mounts) == every
    used = {file.mnt_id for file in every.files.values()}
    for number, mounts in every.mounts.items():
        points = {mount.mountpoint for mount in mounts if mount.id in used}
        wanted = [m for m in mounts if m is mounts[0] or m.mountpoint in points]
        assert list(few.mounts[number]) == wanted
    assert few.mounts.keys() == every.mounts.keys()


def test_mounts_that_no_file_is_on_are_left_out() -> None:
    every, few = both(written(stacks()))
    assert {number: [mount.id for mount in few.mounts[NsId(number)]] for number in (10, 11)} == {
        10: [500, 501, 510, 511, 512, 513, 520, 521, 531],
        11: [600],
    }
    assert len(every.mounts[NsId(10)]) == 10


def test_a_root_that_no_file_is_on_is_kept() -> None:
    """Of tasks in a chroot: their namespace is still one of the images."""
    made = ImageSet()
    made.mount("/", id=500)
    made.mount("/jail", id=501)
    made.task(1)
    in_root = made.images()["files.img"]
    for number in range(1, len(in_root) + 1):
        made.reg("/jail", id=number)
    images = written(made)
    images["files.img"] = head("files.img") + b"".join(made.images()["files.img"][len(in_root) :])
    every, few = both(images)
    assert {file.mnt_id for file in few.files.values()} == {501}
    assert few == every
    assert rebuilt(few) == few


def refusal(images: dict[str, bytes], *, all_mounts: bool) -> str:
    with pytest.raises(ImageError, match="mountpoints") as caught:
        read_source("images", MemorySource(images), all_mounts=all_mounts)
    return str(caught.value)


def test_no_cut_of_the_mounts_passes() -> None:
    made = small()
    made.mount("/other", source="x" * 100)
    made.mount("/", ns=11)
    made.mount("/other", ns=11)
    made.task(2, ns=11)
    images = written(made)
    for name in ("mountpoints-10.img", "mountpoints-11.img"):
        for length in range(len(images[name])):
            cut = {**images, name: images[name][:length]}
            assert refusal(cut, all_mounts=False) == refusal(cut, all_mounts=True)


# What is believed of the reader.


def rebuilt(images: Images, all_mounts: bool = False) -> Images:
    rebuild = Rebuild("images", Limits(), all_mounts=all_mounts)
    for frame in json.loads(json.dumps(rows_of(images))):
        rebuild.add(frame)
    return rebuild.images()


@pytest.mark.parametrize("name", SETS)
def test_there_and_back(name: str) -> None:
    _, few = both(images_of(name))
    assert rebuilt(few) == few


def test_parents_are_required_where_all_mounts_are_wanted() -> None:
    _, few = both(written(stacks()))
    with pytest.raises(ImageError, match="mount 531 comes before its parent"):
        rebuilt(few, all_mounts=True)


def without(images: Images, mnt_id: int) -> Images:
    mounts = {n: tuple(m for m in t if m.id != mnt_id) for n, t in images.mounts.items()}
    return images._replace(mounts=mounts)


@pytest.mark.parametrize(
    ("mnt_id", "problem"),
    [
        (500, "the first mount of namespace 10 is no root"),
        (501, "a reference to mount 501 that is not there"),
    ],
)
def test_what_is_referred_to_is_required_all_the_same(mnt_id: int, problem: str) -> None:
    _, few = both(written(small()))
    assert rebuilt(few) == few
    with pytest.raises(ImageError, match=problem):
        rebuilt(without(few, mnt_id))

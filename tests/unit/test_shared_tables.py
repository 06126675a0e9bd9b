"""Thousands of tasks may share one large table of descriptors, in images that are small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from ghostpool._images import read_images
from ghostpool._match import Namespace
from ghostpool._model import Descriptor, Images, NsId
from ghostpool._mounttable import MountTable
from ghostpool._plan import Planner
from ghostpool._planned import Policy
from ghostpool._pod import joined
from ghostpool._targets import Target
from tests.support.imagewriter import ImageSet

TASKS = 50


class Counting(Sequence[Descriptor]):
    """A table that knows how often it was gone through."""

    def __init__(self, rows: Sequence[Descriptor]) -> None:
        self._rows = rows
        self.times = 0

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Descriptor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Descriptor]: ...
    def __getitem__(self, index: int | slice) -> Descriptor | Sequence[Descriptor]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Descriptor]:
        self.times += 1
        return iter(self._rows)


def shared(directory: Path) -> Images:
    made = ImageSet()
    made.mount("/")
    for pid in range(1, TASKS + 1):
        made.task(pid, files_id=7)
    made.open(1, 3, "/gone", ghost=made.ghost(b""))
    return read_images(made.write(directory))


def test_a_plan_goes_through_it_a_few_times(tmp_path: Path) -> None:
    images = shared(tmp_path)
    table = Counting(images.tasks[0].descriptors)
    images = images._replace(tasks=tuple(t._replace(descriptors=table) for t in images.tasks))
    # Nothing is mounted there, so all is refused; but what holds what is looked at.
    target = Target(0, -1, (0, 0), "mnt:[1]", is_host=False, enter="1")
    namespaces = {NsId(10): Namespace(NsId(10), target, MountTable(b""))}
    planner = Planner(images, namespaces, Policy(), b"token")
    assert planner.counts("held").tasks == TASKS
    planner.finish({})
    assert 0 < table.times < 10


def test_a_pod_shares_it_too(tmp_path: Path) -> None:
    images = shared(tmp_path)
    both = joined([images, images])
    assert len({id(task.descriptors) for task in both.tasks}) == 2
    assert len(both.tasks) == 2 * TASKS

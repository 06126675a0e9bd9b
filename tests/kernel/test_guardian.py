"""A coordinator that is killed at any of its steps: the guardian puts everything back.

The number of the step runs over all calls to children that a restore makes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.kernel.test_steps import CASE, IDS, names
from tests.support.corpus import CORPUS, corpus
from tests.support.crash import Whom, children, coordinate, journals, own_paths, wait_for
from tests.support.namespaces import built, inside, mountinfo
from tests.support.truth import specs_from_truth

pytestmark = pytest.mark.needs_mount_ns
IMAGES = CORPUS / CASE / "images"


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[int]]:
    _, truth = corpus(CASE)
    with built(specs_from_truth(truth)) as fds:
        yield fds


def look(fds: list[int]) -> list[object]:
    return [(mountinfo(fd), inside(fd, names)) for fd in fds]


@pytest.mark.parametrize("whom", ["coordinator", "all but the guardian"])
def test_killed_at_each_step(namespaces: list[int], whom: Whom) -> None:
    """With all but the guardian, the fork server and the workers die too.

    A sample of the steps: tests/kernel/test_matrix.py goes through them all.
    """
    before = look(namespaces)
    where = own_paths(dict(zip(IDS, namespaces, strict=True)))
    done = coordinate(IMAGES, where)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps >= 30
    undone = 0
    for step in range(4, steps, 3):
        when = ("before", "after")[step % 2]
        done = coordinate(IMAGES, where, step, when=when, whom=whom)  # type: ignore[arg-type]
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(lambda: look(namespaces) == before), (step, when)
        assert wait_for(lambda: not children()), (step, when)
        assert journals() == [], (step, when)
        undone += "the run ended abruptly" in done.stderr
    # Most steps lie between the first change and the last.
    assert undone >= 3


def test_guardian_killed_at_each_step(namespaces: list[int]) -> None:
    """The restore fails, or was past its last change; the coordinator undoes it and tidies up."""
    before = look(namespaces)
    where = own_paths(dict(zip(IDS, namespaces, strict=True)))
    steps = int(coordinate(IMAGES, where).stdout)
    failed = 0
    for step in range(4, steps, 5):
        when = ("before", "after")[step % 2]
        done = coordinate(IMAGES, where, step, when=when, whom="guardian")  # type: ignore[arg-type]
        assert done.returncode in (0, 1), done.stderr
        failed += done.returncode
        assert look(namespaces) == before, (step, when)
        assert wait_for(lambda: not children()), (step, when)
        assert journals() == [], (step, when)
    assert failed >= 2

"""The raised limit of descriptors is shared: the first raises it, the last one out puts it back."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ghostpool._rlimit import all_descriptors

SOFT = 200


def limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit, with the soft one well below it."""
    before = limits()
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_raised_for_the_time_of_the_block(hard: int) -> None:
    with all_descriptors() as before:
        assert before == (SOFT, hard)
        assert limits() == (hard, hard)
    assert limits() == (SOFT, hard)


@pytest.mark.parametrize("first_out", ["outer", "inner"])
def test_the_last_one_out_puts_it_back(hard: int, first_out: str) -> None:
    """Whoever that is, and each is told what the program had."""
    outer, inner = ExitStack(), ExitStack()
    assert outer.enter_context(all_descriptors()) == (SOFT, hard)
    assert inner.enter_context(all_descriptors()) == (SOFT, hard)
    ends = [outer, inner] if first_out == "outer" else [inner, outer]
    ends[0].close()
    assert limits() == (hard, hard)
    ends[1].close()
    assert limits() == (SOFT, hard)


def test_an_error_puts_it_back(hard: int) -> None:
    with pytest.raises(KeyError), all_descriptors():
        raise KeyError
    assert limits() == (SOFT, hard)


def test_a_limit_that_the_program_sets_meanwhile_is_left_alone(hard: int) -> None:
    with all_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT + 1, hard))
    assert limits() == (SOFT + 1, hard)
    with all_descriptors() as before:
        assert before == (SOFT + 1, hard)
    assert limits() == (SOFT + 1, hard)


def test_threads(hard: int) -> None:
    """The limit is raised whenever one of many threads needs it, and is back after all of them."""
    found: list[bool] = []

    def use() -> None:
        for _ in range(200):
            with all_descriptors() as before:
                found.append((before, limits()) == ((SOFT, hard), (hard, hard)))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 1600
    assert limits() == (SOFT, hard)

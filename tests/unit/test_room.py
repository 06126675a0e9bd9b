"""How much room content takes."""

from __future__ import annotations

import pytest

from ghostpool._model import Extent
from ghostpool._room import blocks_of


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        ([], 0),
        ([(0, 0)], 0),
        ([(0, 1)], 1),
        ([(0, 4096)], 1),
        ([(0, 4097)], 2),
        ([(4095, 2)], 2),
        # Two in one block, and one that reaches into the next.
        ([(0, 10), (100, 10)], 1),
        ([(0, 10), (100, 4000)], 2),
        ([(0, 4096), (4096, 4096)], 2),
        ([(1 << 40, 1)], 1),
    ],
)
def test_blocks_that_content_touches(extents: list[tuple[int, int]], blocks: int) -> None:
    made = [Extent(offset, length, 0) for offset, length in extents]
    assert blocks_of(made, 4096) == blocks


def test_blocks_are_those_that_were_touched() -> None:
    """Against a set of them."""
    size = 16
    for first in range(0, 40, 3):
        for length in range(1, 40, 5):
            for gap in (0, 1, 20):
                second = first + length + gap
                extents = [Extent(first, length, 0), Extent(second, 7, 0)]
                touched = {
                    at // size for e in extents for at in range(e.offset, e.offset + e.length)
                }
                assert blocks_of(extents, size) == len(touched)

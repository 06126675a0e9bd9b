"""What the pages call process 4242."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostpool import Attr
from tests.support.imagewriter import ghosts_on
from tests.support.live import Live, live, read_only

FLAGS = int(Attr.RDONLY | Attr.NOSUID)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Live]:
    """A process in a container, with its dump in `img`."""
    ghosts_on("/data", ["d/scratch", "d/log"], b"content").write(tmp_path / "img")
    with live([read_only(2, b"/data", "d/", attributes=FLAGS)]) as (one,):
        yield one

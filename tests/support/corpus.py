"""The corpus of real dumps as the image tests read it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostpool._images import read_images
from ghostpool._model import Ghost, Images

CORPUS = Path(__file__).parents[1] / "corpus"
CASES = sorted(path.name for path in CORPUS.iterdir())


@functools.cache
def corpus(case: str) -> tuple[Images, dict[str, Any]]:
    """The images of a case, and what its tasks saw before the dump; read once."""
    truth = json.loads((CORPUS / case / "truth.json").read_text())
    return read_images(CORPUS / case / "images"), truth


def content(directory: Path, ghost: Ghost) -> Iterator[bytes]:
    """The file that the extents describe, holes as zeros."""
    at = 0
    with (directory / ghost.file).open("rb") as image:
        for extent in ghost.extents:
            yield bytes(extent.offset - at)
            image.seek(extent.position)
            yield image.read(extent.length)
            at = extent.offset + extent.length
    yield bytes(ghost.size - at)

"""Images in memory: a source for the readers that needs no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ghostpool._imagesource import OpenImage


class OpenBytes:
    """An image that is a string of bytes."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read(self, at: int, length: int) -> bytes:
        return self._data[at : at + length]

    def close(self) -> None:
        pass


class MemorySource:
    """Images by name."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self._images = images

    def names(self) -> Iterator[str]:
        return iter(self._images)

    def open(self, name: str) -> OpenImage | None:
        data = self._images.get(name)
        return None if data is None else OpenBytes(data)

    def first(self, name: str, length: int) -> tuple[bytes, int] | None:
        data = self._images.get(name)
        return None if data is None else (data[:length], len(data))

    def expect(self, names: list[str]) -> None:
        pass


def load(directory: Path) -> dict[str, bytes]:
    """The images of a directory, by name and in the order of names."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}

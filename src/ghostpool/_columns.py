"""Rows of which there are hundred thousands, kept by column; each is made when it is asked for.

A named tuple of four numbers takes 80 bytes beside them; numbers in an array take four each.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

_T = TypeVar("_T")


class Columns(Sequence[_T]):
    """Rows out of columns of the same length, each of which can be an array.

    Equal to a tuple of the same rows, and of its hash. Not to be changed any more.
    """

    __slots__ = ("_columns", "_make")

    def __init__(
        self, make: Callable[[tuple[Any, ...]], _T], columns: Iterable[Sequence[Any]]
    ) -> None:
        self._make = make
        self._columns = tuple(columns)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[_T]:
        return map(self._make, zip(*self._columns, strict=True))

    @overload
    def __getitem__(self, at: int) -> _T: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[_T, ...]: ...
    def __getitem__(self, at: int | slice) -> _T | tuple[_T, ...]:
        if isinstance(at, slice):
            return tuple(self)[at]
        return self._make(tuple([column[at] for column in self._columns]))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, Columns) else other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def numbers() -> array[int]:
    """A column for numbers of 32 bits."""
    return array("I")


__all__ = ["Columns", "numbers"]

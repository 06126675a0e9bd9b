"""Images as an older CRIU, or another machine, would have written them.

`older` takes from real images what a version did not write yet, `big_endian` turns every word of
the framing around. Both take the images apart and put them together again by themselves: nothing
here is shared with the reader.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tests.fuzz.mutate import kind_of
from tests.support.imagewriter import (
    COMMON_MAGIC,
    FIFO,
    MAGICS,
    PIPE,
    REG,
    TTY,
    UNIXSK,
    message,
)

Fields = list[tuple[int, int | bytes]]
Version = tuple[int, int]

VERSIONS: tuple[Version, ...] = (
    (3, 5),  # a fifo and its reg file have one id
    (3, 3),  # one list for each type of file, with ids of its own
    (3, 2),  # ghosts without chunks
    (2, 9),  # external mounts by their roots
    (2, 8),  # links without a type of remap
    (2, 3),  # files without modes
    (1, 9),  # ghosts without times
    (1, 7),  # mounts and superblocks with common flags
    (1, 5),  # one magic word
    (1, 3),  # ghosts told by bit 31
)
"""The last before each change of the images that matters here."""

_LISTS = {
    REG: ("reg-files.img", 3),
    FIFO: ("fifo.img", 17),
    UNIXSK: ("unixsk.img", 16),
    PIPE: ("pipes.img", 18),
    TTY: ("tty.img", 19),
}
"""The list of each type, and the field of file_entry."""
_GHOST_BIT = 1 << 31


class Record(NamedTuple):
    """A record, and the raw bytes behind it."""

    fields: Fields
    data: bytes = b""


def parse(data: bytes) -> Fields:
    """The fields of a message that has varints and lengths only."""
    fields: Fields = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value, at = _varint(data, at)
        if tag & 7 == 2:
            fields.append((tag >> 3, data[at : at + value]))
            at += value
        else:
            assert tag & 7 == 0
            fields.append((tag >> 3, value))
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at


def take_apart(name: str, data: bytes) -> list[Record]:
    """The records of an image of format 1.1, little-endian."""
    kind = kind_of(name)
    at = 4 if kind == "inventory" else 8
    found: list[Record] = []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        fields = parse(data[at + 4 : at + 4 + length])
        at += 4 + length
        follows = 0
        if kind == "fifo-data":
            follows = number(fields, 2)
        elif kind == "ghost-file":
            if found:
                follows = number(fields, 1)
            elif not has(fields, 9):
                follows = len(data) - at
        found.append(Record(fields, data[at : at + follows]))
        at += follows
    return found


def put_together(name: str, records: list[Record], *, magics: int = 2, order: str = "<") -> bytes:
    """An image; `magics` is how many words an image but the inventory begins with."""
    kind = kind_of(name)
    words = [MAGICS[kind]]
    if magics == 2 and kind != "inventory":
        words.insert(0, COMMON_MAGIC)
    out = struct.pack(f"{order}{len(words)}I", *words)
    for fields, data in records:
        payload = message(*fields)
        out += struct.pack(f"{order}I", len(payload)) + payload + data
    return out


def has(fields: Fields, wanted: int) -> bool:
    return any(field == wanted for field, _ in fields)


def number(fields: Fields, wanted: int) -> int:
    return next(value for field, value in fields if field == wanted and isinstance(value, int))


def inner(fields: Fields, wanted: int) -> Fields:
    return parse(next(v for field, v in fields if field == wanted and isinstance(v, bytes)))


def without(fields: Fields, *unwanted: int) -> Fields:
    return [(field, value) for field, value in fields if field not in unwanted]


def with_number(fields: Fields, wanted: int, value: int) -> Fields:
    """The same with another value of a field that is there."""
    return [(field, value if field == wanted else old) for field, old in fields]


def big_endian(images: Mapping[str, bytes], *, machine: int = 5) -> dict[str, bytes]:
    """The same dump, made on s390x (or another machine of core.proto)."""
    out = {}
    for name, data in images.items():
        records = take_apart(name, data)
        if kind_of(name) == "core":
            records = [Record(with_number(f, 1, machine), d) for f, d in records]
        out[name] = put_together(name, records, order=">")
    return out


def older(images: Mapping[str, bytes], version: Version) -> dict[str, bytes]:
    """The same dump, made by CRIU `version`."""
    parts = {name: take_apart(name, data) for name, data in images.items()}
    if version < (3, 6):
        _one_id_for_fifos(parts)
    if version < (3, 4):
        _one_list_for_each_type(parts)
    for before, kind, change in _CHANGES:
        if version < before:
            for name in [name for name in parts if kind_of(name) == kind]:
                parts[name] = list(change(parts[name]))
    words = 1 if version < (1, 6) else 2
    return {name: put_together(name, records, magics=words) for name, records in parts.items()}


def _one_id_for_fifos(parts: dict[str, list[Record]]) -> None:
    ids = {}
    files = parts["files.img"]
    for at, (fields, _) in enumerate(files):
        if number(fields, 1) == FIFO:
            fifo = inner(fields, 17)
            reg = ids[number(fields, 2)] = number(fifo, 3)
            fifo = with_number(without(fifo, 3), 1, reg)
            files[at] = Record([(1, FIFO), (2, reg), (17, message(*fifo))])
    for name in [name for name in parts if kind_of(name) == "fdinfo"]:
        parts[name] = [
            Record(with_number(f, 1, ids[number(f, 1)]) if number(f, 3) == FIFO else f, d)
            for f, d in parts[name]
        ]


def _one_list_for_each_type(parts: dict[str, list[Record]]) -> None:
    """Files other than fifos and what they were opened by get ids that reg files have as well."""
    others = {}
    for fields, _ in parts.pop("files.img"):
        kind = number(fields, 1)
        name, details = _LISTS[kind]
        entry = inner(fields, details)
        if kind not in (REG, FIFO):
            others[kind, number(fields, 2)] = len(parts.get(name, ())) + 1
            entry = with_number(entry, 1, others[kind, number(fields, 2)])
        parts.setdefault(name, []).append(Record(entry))
    for name in [name for name in parts if kind_of(name) == "fdinfo"]:
        parts[name] = [
            Record(with_number(f, 1, others.get((number(f, 3), number(f, 1)), number(f, 1))), d)
            for f, d in parts[name]
        ]


def _flat(records: list[Record]) -> Iterator[Record]:
    """A ghost without chunks: holes are zeros."""
    fields, data = records[0]
    if has(fields, 9):
        content = bytearray(number(fields, 10))
        for chunk, piece in records[1:]:
            at = number(chunk, 2)
            content[at : at + len(piece)] = piece
        data = bytes(content)
    yield Record(without(fields, 9, 10), data)


def _external(records: list[Record]) -> Iterator[Record]:
    for fields, _ in records:
        key = dict(fields).get(18)
        if key is None:
            yield Record(fields)
        else:
            yield Record([(f, key if f == 6 else v) for f, v in without(fields, 18)] + [(13, 1)])


def _each(change: Callable[[Fields], Fields]) -> Callable[[list[Record]], Iterator[Record]]:
    def changed(records: list[Record]) -> Iterator[Record]:
        return (Record(change(fields), data) for fields, data in records)

    return changed


def _first(change: Callable[[Fields], Fields]) -> Callable[[list[Record]], Iterator[Record]]:
    def changed(records: list[Record]) -> Iterator[Record]:
        yield Record(change(records[0].fields), records[0].data)
        yield from records[1:]

    return changed


def _no_type_of_links(fields: Fields) -> Fields:
    return without(fields, 3) if number(fields, 3) == 0 else fields


def _common_flags(fields: Fields) -> Fields:
    flags = number(fields, 5) | number(fields, 17)
    return with_number(without(fields, 17), 5, flags)


def _bit_31(fields: Fields) -> Fields:
    ghost = has(fields, 3) and number(fields, 3) == 1
    return with_number(without(fields, 3), 2, number(fields, 2) | (_GHOST_BIT if ghost else 0))


_CHANGES: tuple[tuple[Version, str, Callable[[list[Record]], Iterator[Record]]], ...] = (
    ((3, 3), "ghost-file", _flat),
    ((3, 0), "mountpoints", _external),
    ((2, 9), "remap-fpath", _each(_no_type_of_links)),
    ((2, 4), "reg-files", _each(lambda fields: without(fields, 10))),
    ((2, 0), "ghost-file", _first(lambda fields: without(fields, 7, 8))),
    ((1, 8), "mountpoints", _each(_common_flags)),
    ((1, 6), "inventory", _each(lambda fields: with_number(fields, 1, 1))),
    ((1, 4), "remap-fpath", _each(_bit_31)),
)
"""Before which version, and in which images, something was otherwise."""

"""Images that are almost right: what an attacker who knows the format would try.

A mutation works on bytes, on records or on the protobuf fields inside of a record; the deeper ones
keep the framing around them right, or nothing behind the first length would ever be reached.
Everything is drawn from one random.Random, so that a seed is a run.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping, Sequence

from tests.support.imagewriter import varint

Images = dict[str, bytes]

_NUMBERS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
NUMBERS = (*_NUMBERS, 1 << 32, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_PATHS = (b"", b"/", b"//", b"/..", b"a", b"/a/../b", b"/\0", b"/" + b"x" * 256, b"/\xff\xfe")
_COMMON_MAGIC = bytes.fromhex("19435654")
_MOST_KEPT = 500
_REPEAT = 4000  # how often a field is repeated now and then
_LONG = 1 << 20
_FLOOD = 17 << 20  # and how many bytes of it there are, rarely: more than the longest record
_KIND = re.compile(r"(core|ids|mm|fs|fdinfo|mountpoints|ghost-file)-[0-9a-f]+\.img")


def kind_of(name: str) -> str:
    """The kind of an image by its name."""
    match = _KIND.fullmatch(name)
    return match[1] if match else name.removesuffix(".img")


def times(data: bytes, count: int) -> bytes:
    """`data` repeated, but for what would be longer than a flood."""
    return data * max(1, min(count, _FLOOD // max(1, len(data))))


def records(data: bytes, head: int) -> list[tuple[int, int]] | None:
    """Where the payloads of the records of a list are; None if it is none."""
    found = []
    at = head
    while at < len(data):
        if at + 4 > len(data):
            return None
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            return None
        found.append((at + 4, at + 4 + length))
        at += 4 + length
    return found


def fields(data: bytes) -> list[tuple[int, int, bytes]] | None:
    """The fields of a message as (number and type, where the value begins in it, all of it).

    None if it is no message, or one so long that its fields would take more memory than a reader.
    """
    if len(data) > _LONG:
        return None
    found = []
    at = 0
    while at < len(data):
        start = at
        tag, at = _read(data, at)
        value_at = at
        wire = tag & 7
        if wire == 0:
            _, at = _read(data, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            length, at = _read(data, at)
            value_at = at
            at += length
        else:
            return None
        if at > len(data) or at == start:
            return None
        found.append((tag, value_at - start, data[start:at]))
    return found


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    return 0, len(data) + 1


class Mutator:
    """Draws mutated image sets from a corpus, which it may be given more of."""

    def __init__(self, seed: int, corpus: Sequence[Mapping[str, bytes]]) -> None:
        self._random = random.Random(seed)
        self._corpus = [dict(images) for images in corpus]
        self._kept: list[Images] = []
        self._of_kind: dict[str, list[bytes]] = {}
        for images in self._corpus:
            for name, data in images.items():
                self._of_kind.setdefault(kind_of(name), []).append(data)

    def keep(self, images: Images) -> None:
        """Draw from this one too; it takes the place of another one when there are many."""
        if len(self._kept) < _MOST_KEPT:
            self._kept.append(images)
        else:
            self._kept[self._random.randrange(_MOST_KEPT)] = images

    def draw(self) -> tuple[str, Images]:
        """The kind of image that was changed (the first one), and a whole set."""
        choice = self._random.choice
        kept = self._kept if self._kept and self._random.random() < 0.5 else self._corpus
        images = dict(choice(kept))
        first = ""
        for _ in range(choice((1, 1, 1, 2, 3))):
            if not images:
                break
            by_kind: dict[str, list[str]] = {}
            for name in images:
                by_kind.setdefault(kind_of(name), []).append(name)
            kind = choice(list(by_kind))
            self._change(images, choice(by_kind[kind]), kind)
            first = first or kind
            if sum(map(len, images.values())) > _FLOOD:
                break  # long enough: it is in memory, where images are not
        return first, images

    def _change(self, images: Images, name: str, kind: str) -> None:
        what = self._random.random()
        data = images[name]
        if what < 0.03:
            del images[name]
        elif what < 0.06:
            other = self._random.choice(list(images))
            images[other.replace("1", self._random.choice("0123f"), 1)] = data
        elif what < 0.12:
            images[name] = self._random.choice(self._of_kind.get(kind, [data]))
        elif what < 0.40:
            images[name] = self._bytes(data)
        else:
            images[name] = self._record(data, kind)

    def _bytes(self, data: bytes) -> bytes:
        rng = self._random
        # What matters of a large ghost is at its beginning.
        at = rng.randrange(min(len(data), rng.choice((64, 400, 4000))) + 1) if data else 0
        what = rng.randrange(6)
        if what == 0:
            return data[:at]
        if what == 1 and at < len(data):
            return data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :]
        if what == 2 and at < len(data):
            return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
        if what == 3:
            return data[:at] + data[at + rng.randrange(1, 20) :]
        if what == 4:
            end = at + rng.randrange(1, 40)
            return data[:end] + times(data[at:end], rng.choice((1, 1, 2, 100))) + data[end:]
        return data[:at] + struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF) + data[at + 4 :]

    def _record(self, data: bytes, kind: str) -> bytes:
        rng = self._random
        head = 8 if data.startswith(_COMMON_MAGIC) else 4
        if kind == "ghost-file":
            return self._ghost(data)
        found = records(data, head)
        if not found:
            return self._bytes(data)
        at = rng.randrange(len(found))
        start, end = found[at]
        what = rng.random()
        if what < 0.1:
            return data[: start - 4] + data[end:]
        if what < 0.2:
            other = rng.choice(self._of_kind.get(kind, [data]))
            others = records(other, head) or [(0, 0)]
            take = rng.choice(others)
            return data[: start - 4] + other[take[0] - 4 : take[1]] + data[start - 4 :]
        if what < 0.25:
            return data[:end] + times(data[start - 4 : end], rng.choice((1, 2, 50))) + data[end:]
        changed = self._message(data[start:end], 0)
        return data[: start - 4] + struct.pack("<I", len(changed)) + changed + data[end:]

    def _ghost(self, data: bytes) -> bytes:
        """The entry, or a chunk behind it: lengths are followed as far as they lead."""
        rng = self._random
        at = 8 if data.startswith(_COMMON_MAGIC) else 4
        places: list[tuple[int, int]] = []
        while at + 4 <= len(data) and len(places) < 6:
            (length,) = struct.unpack_from("<I", data, at)
            end = at + 4 + length
            inner = fields(data[at + 4 : end])
            if inner is None or end > len(data):
                break
            places.append((at + 4, end))
            at = end
            if len(places) > 1:
                values = {tag: value for tag, _, value in inner}
                size, _ = _read(values.get(8, b"\x08\0"), 1)
                at += size
        if not places:
            return self._bytes(data)
        start, end = rng.choice(places)
        changed = self._message(data[start:end], 0)
        return data[: start - 4] + struct.pack("<I", len(changed)) + changed + data[end:]

    def _message(self, data: bytes, depth: int) -> bytes:
        rng = self._random
        parts = fields(data)
        if not parts:
            return self._bytes(data)
        at = rng.randrange(len(parts))
        tag, value_at, raw = parts[at]
        what = rng.random()
        if what < 0.0005:
            raw = times(raw, rng.choice((1 << 16, 1 << 20, 15 << 20, _FLOOD)) // len(raw))
        elif what < 0.08:
            raw = b""
        elif what < 0.14:
            raw = times(raw, rng.choice((2, 2, 3, 10, _REPEAT)))
        elif what < 0.18:
            raw = varint(tag ^ rng.choice((1, 2, 5, 8, 16))) + raw[len(varint(tag)) :]
        elif what < 0.22:
            raw += rng.choice(parts)[2]
        elif tag & 7 == 0:
            raw = varint(tag) + varint(self._number(_read(raw, value_at)[0]))
        elif tag & 7 == 2:
            value = raw[value_at:]
            if what < 0.6 and depth < 3 and fields(value):
                value = self._message(value, depth + 1)
            elif what < 0.75:
                value = rng.choice(_PATHS)
            elif what < 0.8:
                value = bytes(rng.choice((1, 300, 5000, 70000)))
            else:
                value = self._bytes(value)
            raw = varint(tag) + varint(len(value)) + value
        else:
            raw = self._bytes(raw)
        return b"".join([*(part[2] for part in parts[:at]), raw, *(p[2] for p in parts[at + 1 :])])

    def _number(self, value: int) -> int:
        rng = self._random
        what = rng.random()
        if what < 0.4:
            return rng.choice(NUMBERS)
        if what < 0.8:
            return (value + rng.choice((-2, -1, 1, 2, 16))) % (1 << 64)
        return (value ^ 1 << rng.randrange(64)) % (1 << 64)


_VALUES: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    float("nan"),
    *NUMBERS,
    -(1 << 63),
    1 << 64,
    1 << 200,
    "",
    "/",
    "/data/x",
    "\0",
    "\xff",
    "\u0100",
    "\ud800",
    "ghost",
    "procfs",
    "map:0-1",
    "x" * 70_000,
    (),
    [],
    [[]],
    {},
    {"a": 1},
)


def mutate_rows(rng: random.Random, frames: Sequence[tuple[str, list[object]]]) -> list[object]:
    """Frames of rows with something changed in them, a copy."""
    copy: list[object] = [
        [kind, [list(r) if isinstance(r, list) else r for r in rows]] for kind, rows in frames
    ]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        what = rng.random()
        at = rng.randrange(len(copy))
        if what < 0.05:
            del copy[at]
        elif what < 0.10:
            copy.insert(at, copy[rng.randrange(len(copy))])
        elif what < 0.13:
            copy[at] = rng.choice(_VALUES)
        else:
            _mutate_frame(rng, copy[at])
        if not copy:
            break
    return copy


def _mutate_frame(rng: random.Random, frame: object) -> None:
    place = frame
    while isinstance(place, list) and place:
        at = rng.randrange(len(place))
        inner = place[at]
        if isinstance(inner, list) and inner and rng.random() < 0.93:
            place = inner
            continue
        what = rng.random()
        if what < 0.1:
            del place[at]
        elif what < 0.2:
            place.insert(at, inner)
        elif what < 0.5 and type(inner) is int:
            place[at] = inner + rng.choice((-1, 1, 2, 1 << 32))
        else:
            place[at] = rng.choice(_VALUES)
        return

"""Open flags of the machine that dumped, as this machine has them.

Images hold the numbers that the dumping kernel showed, and four of them are not the same
everywhere. Which machine it was, every core image says. Of one whose numbers are not in the table
below nobody can tell what a file was opened for: its images are refused by name. The modes of files
are the same on all machines, and so is all that protobuf encodes.
Source: enum march in CRIU 4.2, images/core.proto; asm-generic/fcntl.h, and asm/fcntl.h of arm and
powerpc, Linux 6.18.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, NamedTuple

from ghostpool._errors import UnsupportedError


class _Family(NamedTuple):
    """What differs."""

    direct: int
    largefile: int
    directory: int
    nofollow: int


_GENERIC: Final = _Family(0o40000, 0o100000, 0o200000, 0o400000)
_ARM: Final = _Family(0o200000, 0o400000, 0o40000, 0o100000)
_POWER: Final = _Family(0o400000, 0o200000, 0o40000, 0o100000)
_DIFFERENT: Final = sum(_GENERIC)
"""The same bits in each of them."""
_MACHINES: Final = {
    1: _GENERIC,  # x86-64
    2: _ARM,  # arm
    3: _ARM,  # aarch64
    4: _POWER,  # ppc64
    5: _GENERIC,  # s390x
    7: _GENERIC,  # loongarch64
    8: _GENERIC,  # riscv64
}
_MIPS: Final = 6
_HERE: Final = next(
    (
        family
        for family in (_GENERIC, _ARM, _POWER)
        if family._replace(largefile=0) == (os.O_DIRECT, 0, os.O_DIRECTORY, os.O_NOFOLLOW)
    ),
    None,
)


def flags_of(machine: int, core: str) -> Callable[[int], int] | None:
    """What makes flags of `machine` (a code in the image `core`) ours; None: nothing has to.

    UnsupportedError: nobody knows what they are.
    """
    family = _MACHINES.get(machine)
    if family is None or _HERE is None:
        name = "MIPS" if machine == _MIPS else f"number {machine}"
        raise UnsupportedError(
            f"{core}: dumped on a machine ({name}) whose open flags can not be read here"
        )
    if family == _HERE:
        return None
    pairs = tuple(zip(family, _HERE, strict=True))

    def ours(flags: int) -> int:
        return flags & ~_DIFFERENT | sum(here for there, here in pairs if flags & there)

    return ours


__all__ = ["flags_of"]

"""The fake kernel: no root, no kernel, no process.

`FakeKernel` keeps mount flags in memory and obeys the contract of `MountKernel`, in the order
of the real one: ask (hook "start"), change all mounts at once, answer (hook "end"). A call that
is cancelled at its start has changed nothing; one cancelled at its end has, and nobody knows.
"""

from __future__ import annotations

import errno as _errno
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, Literal, TypeVar

import anyio.lowlevel

from ghostpool._errors import KernelError
from ghostpool._linux import Attr

M = TypeVar("M", bound=Hashable)

_RDONLY = int(Attr.RDONLY)

Call = Literal["make_writable", "make_read_only"]
"""What leases ask of a kernel: see `MountKernel`."""
Stage = Literal["start", "end"]
"""Before anything was changed, or when all was and nobody knows yet."""
Hook = Callable[[Call, Stage, Sequence[M]], Awaitable[None]]
"""What a `FakeKernel` awaits; it may wait, raise and be cancelled."""


class FakeKernel(Generic[M]):
    """A `MountKernel` in memory.

    `mounts` maps each mount to its attributes, or lists mounts that are read-only. `hook`, if
    given, is awaited at the start and at the end of every call, and may sequence it, hang, be
    cancelled or raise (as a worker that dies does). A mount that is taken out of `flags` was
    unmounted.
    """

    def __init__(self, mounts: Mapping[M, int] | Iterable[M], hook: Hook[M] | None = None) -> None:
        if not isinstance(mounts, Mapping):
            mounts = dict.fromkeys(mounts, _RDONLY)
        self.flags: dict[M, int] = {mount: int(flags) for mount, flags in mounts.items()}
        self.hook = hook
        self.log: list[tuple[Literal["rw", "ro"], M]] = []
        """Every change of a read-only bit, in order; questions that change nothing are not in."""
        self.calls: list[tuple[Call, tuple[M, ...]]] = []
        """Every call, in the order of their starts."""
        self._found = dict(self.flags)
        self._ours: set[M] = set()
        self._others = {mount for mount in self.flags if self.is_writable(mount)}
        """Writable by somebody else's doing: never made read-only."""
        self._failures: dict[tuple[Call, M], deque[int | Exception]] = defaultdict(deque)

    def fail(self, call: Call, mount: M, error: int | Exception) -> None:
        """Let the next `call` fail for `mount`, with an errno or an exception; can be queued."""
        self._failures[call, mount].append(error)

    def is_writable(self, mount: M) -> bool:
        """Whether it is now. KeyError: there is no such mount."""
        return not self.flags[mount] & _RDONLY

    @property
    def changed(self) -> set[M]:
        """Mounts whose attributes are not as they were found."""
        return {mount for mount, flags in self.flags.items() if flags != self._found[mount]}

    async def make_writable(self, mounts: Sequence[M], /) -> list[bool | Exception]:
        """As `MountKernel.make_writable`; cancelled at its end, it has changed them."""
        await self._enter("make_writable", mounts)
        answer: list[bool | Exception] = []
        for mount in mounts:
            failure = self._failure("make_writable", mount)
            if failure is not None:
                answer.append(failure)
            elif self.is_writable(mount):
                if mount not in self._ours:
                    self._others.add(mount)
                answer.append(False)
            else:
                self.flags[mount] &= ~_RDONLY
                self._ours.add(mount)
                self._others.discard(mount)
                self.log.append(("rw", mount))
                answer.append(True)
        await self._leave("make_writable", mounts)
        return answer

    async def make_read_only(self, mounts: Sequence[M], /) -> list[Exception | None]:
        """As `MountKernel.make_read_only`; cancelled at its end, it has changed them."""
        await self._enter("make_read_only", mounts)
        answer: list[Exception | None] = []
        for mount in mounts:
            if mount not in self.flags:  # taken off: there is nothing left to put back
                answer.append(None)
                continue
            failure = self._failure("make_read_only", mount)
            answer.append(failure)
            if failure is not None or mount in self._others:
                continue
            self._ours.discard(mount)
            if self.is_writable(mount):
                self.flags[mount] |= _RDONLY
                self.log.append(("ro", mount))
        await self._leave("make_read_only", mounts)
        return answer

    async def _enter(self, call: Call, mounts: Sequence[M]) -> None:
        self.calls.append((call, tuple(mounts)))
        await anyio.lowlevel.checkpoint()
        if self.hook is not None:
            await self.hook(call, "start", mounts)

    async def _leave(self, call: Call, mounts: Sequence[M]) -> None:
        if self.hook is not None:
            await self.hook(call, "end", mounts)

    def _failure(self, call: Call, mount: M) -> Exception | None:
        if mount not in self.flags:
            return KernelError(_errno.EINVAL, "mount_setattr", str(mount))
        queued = self._failures[call, mount]
        error = queued.popleft() if queued else None
        if isinstance(error, int):
            return KernelError(error, "mount_setattr", str(mount), mount=str(mount))
        return error


__all__ = ["Call", "FakeKernel", "Hook", "Stage"]

"""Mount namespaces made from a list of mounts, each held by a process: targets of a restore."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from ghostpool import _linux
from ghostpool._build import build
from ghostpool._buildspec import BuildError, NamespaceSpec
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import Namespace, held
from ghostpool.testing._snapshot import Snapshot

_BATCH = 200


class Targets(Mapping[int, Namespace]):
    """Mount namespaces by the number of their spec, for the time of the block that made them."""

    def __init__(self, namespaces: Mapping[int, Namespace]) -> None:
        self._namespaces = dict(namespaces)

    def __getitem__(self, number: int) -> Namespace:
        return self._namespaces[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._namespaces)

    def __len__(self) -> int:
        return len(self._namespaces)

    @property
    def pids(self) -> dict[int, int]:
        """Number to pid of the process that holds it: what `namespaces=` takes."""
        return {number: one.pid for number, one in self.items()}

    def snapshot(self) -> dict[int, Snapshot]:
        """All of them: equal to an earlier one if nothing in any was touched in between."""
        return {number: one.snapshot() for number, one in self.items()}


class TargetFactory(Protocol):
    """The type of the fixture `ghostpool_sandbox`: `built_targets` until the end of the test."""

    def __call__(self, *specs: NamespaceSpec) -> Targets: ...


@contextmanager
def built_targets(*specs: NamespaceSpec) -> Iterator[Targets]:
    """The mount namespaces that the specs describe, for the time of the block.

    Numbers of mounts and superblocks are unique over all specs; two mounts with one superblock
    share their files, across namespaces too. What is not in the specs is not there: no /proc, no
    program. BuildError says which mount could not be made. Needs CAP_SYS_ADMIN, and Linux 5.15.
    """
    with built(specs) as fds, ExitStack() as stack:
        yield Targets(
            {spec.id: stack.enter_context(held(fd)) for spec, fd in zip(specs, fds, strict=True)}
        )


@contextmanager
def built(
    namespaces: Sequence[NamespaceSpec], *, before: Callable[[], object] | None = None
) -> Iterator[list[int]]:
    """Descriptors of the namespaces, built in a child that is gone by then; closed at the end.

    `before` is called in the child first.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []

    def child() -> tuple[int, tuple[Any, ...]]:
        if before is not None:
            before()
        try:
            made = build(namespaces)
        except BuildError as error:
            return 0, (error.errno, error.syscall, error.path, error.mount_id)
        for start in range(0, len(made), _BATCH):
            socket.send_fds(there, [b"."], made[start : start + _BATCH])
        return len(made), ()

    with here, there:
        try:
            # The messages wait in the socket: a few hundred descriptors fit its buffer.
            count, failed = in_child(child)
            if failed:
                raise BuildError(*failed)
            while len(fds) < count:
                fds += socket.recv_fds(here, 1, _BATCH)[1]
            yield fds
        finally:
            _linux.close_all(fds)

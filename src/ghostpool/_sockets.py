"""UNIX sockets whose names are gone: bound by those names, and handed to their tasks.

They touch nothing of the targets (D-034), so nothing is owed for them: they are made before the
first task opens anything, and are gone with the last descriptor of them.
"""

from __future__ import annotations

import os

from ghostpool import _linux
from ghostpool._batches import batches
from ghostpool._errors import KernelError
from ghostpool._mend import kernel_error
from ghostpool._model import Socket
from ghostpool._paths import text
from ghostpool._planned import Files, Plan
from ghostpool._pool import WorkerPool
from ghostpool._protocol import BindOp
from ghostpool._restored import Restored
from ghostpool._workerclient import WorkerFailure

_BATCH = 64
_BACKLOG_MAX = (1 << 31) - 1
"""Of listen(2), whose number has a sign; the kernel takes no more than net.core.somaxconn."""


class SocketBinder:
    """Makes the sockets of one plan."""

    def __init__(
        self, plan: Plan, pool: WorkerPool, restored: Restored, files: Files, *, own_owner: bool
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._restored = restored
        self._held = files == "held"
        self._owner = (os.geteuid(), os.getegid()) if own_owner else None

    async def bind(self) -> None:
        """Have all of them bound; they are held for their tasks, or closed if there are none."""
        for batch in batches(list(self._plan.sockets.values()), _BATCH):
            try:
                _, fds = await self._pool.call(
                    0, "bind", [tuple(self._bind_op(socket)) for socket in batch]
                )
            except WorkerFailure as error:
                raise self._failed(error, batch) from error
            if self._held:
                self._restored.fds.update(zip((one.id for one in batch), fds, strict=True))
            else:
                _linux.close_all(fds)

    def _failed(self, error: WorkerFailure, batch: list[Socket]) -> KernelError:
        if error.failure.at < 0:
            return kernel_error(error.failure, self._plan.mounts)
        name = text(batch[error.failure.at].path)
        return kernel_error(error.failure, self._plan.mounts, f"while restoring {name}")

    def _bind_op(self, socket: Socket) -> BindOp:
        owner = socket.owner
        if owner is not None and self._owner is not None:
            owner = owner[0], *self._owner
        return BindOp(
            socket.name,
            socket.type,
            min(socket.backlog, _BACKLOG_MAX) if socket.listening else None,
            socket.shutdown,
            bool(socket.flags & os.O_NONBLOCK),
            owner,
            socket.options,
        )

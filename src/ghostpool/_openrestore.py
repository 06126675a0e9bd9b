"""A whole restore as one block, for programs that only want the descriptors."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Unpack

from ghostpool._launch import launch
from ghostpool._openpool import grouped
from ghostpool._planned import Plan, PlannedTask
from ghostpool._report import Report
from ghostpool._request import Options, request_of
from ghostpool._restored import Restored
from ghostpool._run import prepared_to_restore


class RestoredTask:
    """A task whose files are open."""

    def __init__(self, restored: Restored, planned: PlannedTask) -> None:
        self._restored = restored
        self.planned: PlannedTask = planned
        """What is known of it from the images and the plan."""

    @property
    def pid(self) -> int:
        """Its pid in the images."""
        return self.planned.task.pid

    def __repr__(self) -> str:
        return f"<task {self.pid}>"

    def take_fds_nowait(self) -> dict[int, int]:
        """The task's ghosts: number in the task to descriptor here, owned by the caller.

        Each number has a descriptor of its own, close-on-exec, above the standard ones, with the
        access mode, flags and position of the dump; numbers that were dup'ed, or that tasks have
        in common, share an open file description still. What is not taken is closed at the end of
        the block. RuntimeError if it is done twice; OSError (EMFILE): none was taken.
        """
        return self._restored.take(self.planned)

    async def take_fds(self) -> dict[int, int]:
        """As `take_fds_nowait`; it does not wait at present, and is no checkpoint."""
        return self._restored.take(self.planned)

    def take_keys_nowait(self) -> dict[str, int]:
        """What the task held besides descriptors, by key: descriptor here, owned by the caller.

        Keys are `cwd`, `root`, `exe` and `map:<start>-<end>`, as in /proc/PID/maps; there are only
        those of ghosts. Each is open with the flags that it had: a directory to change into, a
        program to execute, a file to map. Else as `take_fds_nowait`.
        """
        return self._restored.take_keys(self.planned)

    async def take_keys(self) -> dict[str, int]:
        """As `take_keys_nowait`; it does not wait at present, and is no checkpoint."""
        return self._restored.take_keys(self.planned)


class RestoredRun:
    """A restore that has succeeded. Made by `restore`."""

    def __init__(self, restored: Restored, report: Report) -> None:
        self.tasks: Mapping[int, RestoredTask] = MappingProxyType(
            {
                int(planned.task.pid): RestoredTask(restored, planned)
                for planned in restored.plan.tasks
            }
        )
        """The tasks of the images by their pids there."""
        self.report: Report = report
        """What was done."""

    @property
    def plan(self) -> Plan:
        """What was planned."""
        plan = self.report.plan
        assert plan is not None
        return plan

    def __repr__(self) -> str:
        return f"<RestoredRun, {len(self.tasks)} tasks>"


@asynccontextmanager
async def restore(
    images: str | os.PathLike[str], *, keep: bool = False, **options: Unpack[Options]
) -> AsyncIterator[RestoredRun]:
    """Restore the ghosts of the image directory `images`, and have them in the block.

        async with ghostpool.restore("img/", namespaces={11: 4242}) as restored:
            for task in restored.tasks.values():
                fds = await task.take_fds()

    When the block begins everything is over: all files are open and verified, the mounts are as
    they were, the temporary names are gone (with `keep` the old names stay), no worker is left.
    Descriptors that nobody takes are closed at its end.

    Errors come out in an ExceptionGroup, as of `open_pool`; whichever comes before the block has
    everything undone. So has cancelling before it; in it, there is nothing left to undo.
    """
    report = Report()
    request = request_of(images, options, keep=keep)
    with grouped():
        async with (
            prepared_to_restore(request, launch(), report) as run,
            run.restored() as restored,
        ):
            yield RestoredRun(restored, report)


__all__ = ["RestoredRun", "RestoredTask", "restore"]

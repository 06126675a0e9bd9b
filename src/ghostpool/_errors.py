"""The exception tree, split by the state in which an error leaves the host.

    GhostpoolError
      PlanError        nothing was touched            exit status 2
      RestoreError     failed, everything was undone  exit status 1
      RevertError      the host needs its user        exit status 3

An error of the kernel keeps its fields (errno, system call, path, mount): they cross the
worker's socket as fields too, never as prose that somebody parses again.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator
from functools import partial
from typing import Any


class GhostpoolError(Exception):
    """Base of all errors that ghostpool raises on purpose."""


class PlanError(GhostpoolError):
    """The request, the images or the live mounts rule the restore out; nothing was touched."""


class ImageError(PlanError):
    """A CRIU image is missing, malformed or contradicts another one.

    `file` is the name of the image inside its directory, `record` says which record of it
    (a zero-based number, or None for the file as a whole).
    """

    def __init__(self, file: str, record: int | None, problem: str) -> None:
        self.file: str = file
        self.record: int | None = record
        self.problem: str = problem
        where = file if record is None else f"{file}, record {record}"
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, int | None, str]]:
        return ImageError, (self.file, self.record, self.problem)


class UnsupportedError(PlanError):
    """The images need something that this version of ghostpool does not restore."""


class NamespaceNotFound(PlanError):
    """A target does not exist, is not a mount namespace, or an image namespace has no target."""


class MountNotFound(PlanError):
    """No live mount corresponds to a mount of the images."""


class Overmounted(PlanError):
    """The mount is hidden by another one, so no path leads to it."""


class ReadOnlySuperblock(PlanError):
    """The superblock itself is read-only: making the mount writable would not help."""


class HostNamespace(PlanError):
    """A mount of the host's own mount namespace would have to be remounted."""


class SandboxError(PlanError):
    """A mount tree of the images can not be rebuilt (an external or unsupported mount)."""


class RestoreError(GhostpoolError):
    """The restore failed part way; everything it had done was undone."""


class KernelError(RestoreError, OSError):
    """A system call failed in a worker.

    Attributes besides those of OSError: `syscall`, `path` (as text, for people), `mount`
    (mount point, or None), `namespace` (how the namespace was named, or None) and `advice` (what
    may help, or None).
    """

    def __init__(
        self,
        errno: int,
        syscall: str,
        path: str,
        *,
        mount: str | None = None,
        namespace: str | None = None,
        advice: str | None = None,
    ) -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.syscall: str = syscall
        self.path: str = path
        self.mount: str | None = mount
        self.namespace: str | None = namespace
        self.advice: str | None = advice

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {"mount": self.mount, "namespace": self.namespace, "advice": self.advice}
        return partial(type(self), **rest), (self.errno, self.syscall, self.path)  # type: ignore[arg-type]

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        where = self.path
        if self.mount is not None:
            where += f" on mount {self.mount}"
        if self.namespace is not None:
            where += f" of {self.namespace}"
        text = f"{where}: {self.syscall}: {name} ({self.strerror})"
        return f"{text}: {self.advice}" if self.advice else text


class VerificationError(RestoreError):
    """A restored file is not what the images describe."""


class WorkerDied(RestoreError):
    """A worker process ended, or broke the protocol, while it owed an answer."""


class WorkerHung(WorkerDied):
    """A process showed no sign of life while it owed an answer, and was killed."""


class BarrierBroken(RestoreError):
    """Another task failed or was cancelled before all tasks had arrived."""


class ConsumerLost(RestoreError):
    """A consumer on the task socket was gone, or broke the protocol, before it was released.

    `task` is the pid in the images, `process` that of the consumer, `what` says what it did.
    """

    def __init__(self, task: int, process: int, what: str) -> None:
        self.task = task
        self.process = process
        self.what = what
        super().__init__(
            f"the consumer of task {task} (process {process}) {what} before it was released"
        )

    def __reduce__(self) -> tuple[type[ConsumerLost], tuple[int, int, str]]:
        return ConsumerLost, (self.task, self.process, self.what)


class CommandError(RestoreError):
    """A command could not be started in a task's mount namespace."""


class RevertError(GhostpoolError):
    """Something could not be put back; `command` is what the user runs to finish the job."""

    def __init__(self, problem: str, command: str) -> None:
        self.problem: str = problem
        self.command: str = command
        super().__init__(f"{problem}; to put it back: {command}")

    def __reduce__(self) -> tuple[type[RevertError], tuple[str, str]]:
        return RevertError, (self.problem, self.command)


def leaves(error: BaseException | None) -> Iterator[BaseException]:
    """The single errors inside a (group of) error(s), in order."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    elif error is not None:
        yield error


def alone(error: BaseException) -> BaseException:
    """The error inside groups of one; anything else as it is.

    Raise it outside of the except clause that caught the group: `raise … from None` would take
    away the cause that it carries.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def without_echoes(error: BaseException) -> BaseException:
    """A group without the broken barriers that other errors of it have caused."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    _, causes = error.split(BarrierBroken)
    return causes or error


def reportable(error: BaseException) -> list[Exception]:
    """The single errors inside, without those that only end a task (cancellation, Ctrl-C)."""
    return [leaf for leaf in leaves(error) if isinstance(leaf, Exception)]


def first_cause(error: BaseException) -> BaseException:
    """The error that made the others: not a broken barrier, and what needs the user first.

    A group comes back as a group only if a mount could not be put back besides a failure.
    """
    found = list(leaves(error))
    reverts = [leaf for leaf in found if isinstance(leaf, RevertError)]
    causes = [leaf for leaf in found if not isinstance(leaf, (BarrierBroken, RevertError))]
    real = [leaf for leaf in causes if isinstance(leaf, Exception)]
    if reverts and real:
        return ExceptionGroup("failed, and not everything could be put back", [*reverts, real[0]])
    if reverts:
        return reverts[0] if len(reverts) == 1 else ExceptionGroup("not put back", reverts)
    if real:
        return next((e for e in real if isinstance(e, GhostpoolError)), real[0])
    return causes[0] if causes else found[0]


__all__ = [
    "BarrierBroken",
    "CommandError",
    "ConsumerLost",
    "GhostpoolError",
    "HostNamespace",
    "ImageError",
    "KernelError",
    "MountNotFound",
    "NamespaceNotFound",
    "Overmounted",
    "PlanError",
    "ReadOnlySuperblock",
    "RestoreError",
    "RevertError",
    "SandboxError",
    "UnsupportedError",
    "VerificationError",
    "WorkerDied",
    "WorkerHung",
]

"""What happens in a run, as typed values for whoever follows it: a progress bar, a file, a trace.

Imported by who makes one, when somebody follows: eleven classes take 3.5 ms, a run without a
follower has none of them. _followers sends them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened in a run."""

    kind: ClassVar[str] = "event"
    """Name of the type, in documents."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970, by this machine's clock."""

    def document(self) -> dict[str, Any]:
        """As plain values: `event` is its kind, the others are its fields."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"event": self.kind, **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """There is a plan, and nothing has been changed yet."""

    kind = "planned"
    ghosts: int
    """How many files are to be made."""
    files: int
    """Opens of ghosts: what the tasks held."""
    tasks: int
    """All of the images, those without any ghost too."""
    mounts: int
    """Live mounts that ghosts are on."""
    to_make_writable: int
    """Mounts that tasks will be leased."""
    refusals: int
    """If there are any, the run ends here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered(Event):
    """A worker process has entered a target's mount namespace, for the first time."""

    kind = "entered"
    worker: int
    """Its pid here."""
    target: str
    """The mount namespace, as messages name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountWritable(Event):
    """A mount was read-only and is writable now, in its namespace's own view."""

    kind = "mount_writable"
    target: str
    """The mount namespace, as messages name it."""
    mountpoint: str
    """In that namespace."""
    mount_id: int
    """Its number in /proc/PID/mountinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostCreated(Event):
    """A ghost's file is there, with its content, under a temporary name."""

    kind = "ghost_created"
    ghost: int
    """Its id in the images."""
    mountpoint: str
    size: int
    """Bytes, holes included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOpened(Event):
    """A ghost was opened under its old name, which is gone again unless it is kept."""

    kind = "file_opened"
    task: int
    """Pid in the images of the one that opened it: several may have it."""
    file: int
    """Id of the open file description in the images."""
    path: str
    """The old name, in the task's mount namespace."""
    keys: str = ""
    """What tasks hold it as besides descriptors, with commas: cwd, root, exe, map:<start>-<end>."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArrived(Event):
    """A task has all its files open and is at the barrier."""

    kind = "task_arrived"
    task: int
    """Its pid in the images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reverted(Event):
    """A mount that was made writable is read-only again."""

    kind = "reverted"
    target: str
    """The mount namespace, as messages name it."""
    mountpoint: str
    """In that namespace."""
    mount_id: int
    """Its number in /proc/PID/mountinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned(Event):
    """The temporary names are gone, after a success or in undoing a failure."""

    kind = "cleaned"
    names: int
    """How many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The run has failed, or was cancelled; what it had done is undone by now. Also sent when
    everything was restored, but what the caller does with it failed."""

    kind = "failed"
    error: str
    """Name of the exception's type."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Event):
    """This reader's buffer was full: so many events are missing before the next one."""

    kind = "lost"
    events: int
    """How many."""

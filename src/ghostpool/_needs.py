"""How many descriptors each process of a run will hold at most, against RLIMIT_NOFILE; pure.

Computed before anything is opened: a run that would end in EMFILE half way is refused with the
number that it needs. The coordinator holds every namespace, mount and restored file; a worker what
it works on, which may be all of the namespaces and mounts; the guardian what it would undo.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ghostpool._errors import PlanError

Consumers = Literal["commands", "sockets", "nobody"]
"""Who takes the files over: a child per task, a connection per task, or nobody."""

# Standard streams, sockets and event loop, images, and what is open for a moment.
_COORDINATOR = 40
_CHILD = 24
_BUILDER = 40
MOST_KEYS = 2000
"""As many fit one string of an environment, which has 128 KiB at most: execve(2)."""
STRANGERS = 64
"""Most connections that are kept without a hello."""
_OF_COMMAND = 8
"""A command's status socket, namespace, standard streams, and copies of some of them."""
_CACHED_DIRECTORIES = 128
_IN_ANSWER = 200
"""Descriptors that a worker opens for one answer."""


class Counts(NamedTuple):
    """What a plan comes to, in numbers."""

    namespaces: int
    mounts: int
    """Each may get a private clone."""
    opens: int
    held: int
    """Opened files that are held until the end, and fifos that are kept open."""
    directories: int
    tasks: int
    most_of_task: int
    """Restored descriptors of the task that has most of them."""
    highest_number: int
    """Of a restored descriptor in its task; -1: there is none."""
    most_keys: int = 0
    """What a task holds besides descriptors, of the one that holds most."""


def mounts_alone(mounts: int) -> Counts:
    """Of work on so many mounts of one namespace, in which nothing is opened."""
    return Counts(
        namespaces=1,
        mounts=mounts,
        opens=0,
        held=0,
        directories=0,
        tasks=0,
        most_of_task=0,
        highest_number=-1,
    )


def check_namespaces(count: int, limit: int) -> None:
    """PlanError: so many namespaces can not even be held open."""
    need = max(_COORDINATOR, _BUILDER) + count
    if need > limit:
        raise _refused(f"{count} mount namespaces", need, limit, "the run")


def check(counts: Counts, jobs: int, consumers: Consumers | None, limit: int) -> None:
    """PlanError: a process of the run would need more than it may have."""
    if consumers == "commands" and counts.most_keys > MOST_KEYS:
        raise PlanError(
            f"{counts.most_keys} mappings and the like of one task, more than the {MOST_KEYS} that "
            "a command can be told of in GHOSTPOOL_KEYS: serve them (--serve), or use the library"
        )
    process, need = max(needs(counts, jobs, consumers).items(), key=lambda item: item[1])
    if need > limit:
        what = (
            f"{counts.opens} files on {counts.mounts} mounts in {counts.namespaces} mount "
            f"namespaces, with {counts.tasks} tasks,"
        )
        raise _refused(what, need, limit, process)


def needs(counts: Counts, jobs: int, consumers: Consumers | None) -> dict[str, int]:
    """The most descriptors of each kind of process, by its name."""
    workers = min(jobs, max(counts.namespaces, counts.directories, 1))
    worked_on = counts.namespaces + 2 * counts.mounts
    delivery = _COORDINATOR + counts.namespaces + counts.held
    if consumers == "commands":
        delivery += counts.tasks
    # Socket and pidfd of each worker, and of the guardian.
    restore = _COORDINATOR + worked_on + counts.held + 2 * (workers + 1)
    if consumers == "sockets":
        # The same of each consumer, and of those who have not said which task is theirs.
        restore += 2 * (counts.tasks + STRANGERS)
    found = {
        "the coordinator": max(restore, delivery),
        "a worker": _CHILD
        + worked_on
        + min(_CACHED_DIRECTORIES, counts.directories)
        + min(_IN_ANSWER, max(counts.mounts, counts.opens)),
        "the guardian": _CHILD + worked_on + workers,
        "the fork server": _CHILD + workers + 1,
    }
    if consumers == "commands":
        own = counts.most_of_task + _OF_COMMAND
        found["the fork server"] = max(found["the fork server"], _CHILD + counts.tasks + own)
        # They are moved above all numbers first, out of each other's way.
        above = max(counts.highest_number + 1, _CHILD + own)
        found["a command"] = above + own
    return found


def _refused(what: str, need: int, limit: int, process: str) -> PlanError:
    return PlanError(
        f"{what} need {need} descriptors at once in {process}, but the limit is {limit}: raise "
        "it (ulimit -Hn, LimitNOFILE=)"
    )

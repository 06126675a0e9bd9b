"""The LISTEN_FDS convention of sd_listen_fds(3), in both directions.

Descriptors are at 3, 4, …; LISTEN_FDS says how many, LISTEN_PID for which process, LISTEN_FDNAMES
what each is called. Who gets them takes the variables out of its environment, so that what it
executes does not take the descriptors for its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping

from ghostpool._errors import PlanError

FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def places(numbers: Iterable[int]) -> dict[int, int]:
    """The places that descriptors with these numbers in the task have by the convention."""
    return {number: FIRST + place for place, number in enumerate(sorted(numbers))}


def arranged(descriptors: Mapping[int, int]) -> dict[int, int]:
    """Descriptors by their numbers in the task, in these places."""
    return {place: descriptors[number] for number, place in places(descriptors).items()}


def variables(numbers: Iterable[int], keys: Mapping[str, int]) -> dict[str, str]:
    """What says so: each is called by its number in the task, or by its key if it has one. None
    for no descriptor at all.

    A name can have no colon: it is a hyphen there. Besides it takes LISTEN_PID, which only the
    process itself can know. LISTEN_FDS=0 would be an error to libsystemd.
    """
    called = {number: key.replace(":", "-") for key, number in keys.items()}
    names = [called.get(number, str(number)) for number in sorted(numbers)]
    return {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)} if names else {}


def take(environment: MutableMapping[str, str]) -> list[int]:
    """The descriptors that whoever started this process has passed to it; all variables go.

    They are close-on-exec from then on. PlanError: the variables do not say what is true.
    """
    pid, count, *_ = [environment.pop(name, "") for name in _VARIABLES]
    if pid != str(os.getpid()):
        return []
    found = []
    try:
        for fd in range(FIRST, FIRST + int(count)):
            os.set_inheritable(fd, False)
            found.append(fd)
    except (OSError, ValueError) as error:
        raise PlanError(f"LISTEN_FDS={count}: {error}") from error
    return found

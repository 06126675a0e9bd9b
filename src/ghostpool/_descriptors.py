"""Putting descriptors at their numbers, as the last thing before an exec."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Mapping


def place(targets: Mapping[int, int], keep: int, soft_limit: int) -> int:
    """Make each `targets` number an inheritable copy of its descriptor; the new place of `keep`.

    `keep` stays close-on-exec, somewhere above all numbers. RLIMIT_NOFILE becomes `soft_limit`
    again where the numbers allow. OSError: EBADF, or EMFILE for a number above the hard limit.
    """
    above = max(targets, default=2) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # First out of the way of each other's numbers, then each to its own.
    kept = fcntl.fcntl(keep, fcntl.F_DUPFD_CLOEXEC, above)
    moved = {
        number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for number, fd in targets.items()
    }
    for number, fd in moved.items():
        os.dup2(fd, number)
    if above <= soft_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard))
    return kept

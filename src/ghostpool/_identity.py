"""Who is meant by a number that the kernel gives out again: processes, mount namespaces.

A pid means something only together with the start time and the boot, an inode of nsfs only
together with the boot; what is written down for later is written down with them.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable

_START_TIME = 19
"""Index in /proc/PID/stat, counted from the field after the name: proc_pid_stat(5)."""


def boot_id() -> str:
    """A random number of this boot of the kernel: random(4)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def start_time(pid: int) -> int:
    """Clock ticks from the boot to the start of a process. ProcessLookupError: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name stands in parentheses and may hold anything, parentheses too.
            _, _, fields = file.read().rpartition(b")")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    return int(fields.split()[_START_TIME])


def has_ended(pidfd: int, within_s: float = 0.0) -> bool:
    """Whether the process has ended, or does so within so many seconds: pidfd_open(2)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def all_ended(pidfds: Iterable[int], within_s: float) -> bool:
    """Whether all of them have ended, or do so within so many seconds together."""
    give_up = time.monotonic() + within_s
    return all(has_ended(pidfd, max(0.0, give_up - time.monotonic())) for pidfd in pidfds)


def pid_namespace() -> int:
    """Inode of the pid namespace that this process numbers processes in."""
    return os.stat("/proc/self/ns/pid").st_ino


def is_initial() -> bool:
    """Whether this process is in the initial pid and user namespaces, where nothing is hidden.

    Their inodes are fixed: PROC_PID_INIT_INO and PROC_USER_INIT_INO of linux/proc_ns.h.
    """
    return pid_namespace() == 0xEFFFFFFC and os.stat("/proc/self/ns/user").st_ino == 0xEFFFFFFD

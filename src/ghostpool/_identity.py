"""Who is meant by a number that the kernel gives out again: processes, mount namespaces.

A pid means something only together with the start time and the boot, an inode of nsfs only
together with the boot; what is written down for later is written down with them.
"""

from __future__ import annotations

import os

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


def pid_namespace() -> int:
    """Inode of the pid namespace that this process numbers processes in."""
    return os.stat("/proc/self/ns/pid").st_ino


def is_initial() -> bool:
    """Whether this process is in the initial pid and user namespaces, where nothing is hidden.

    Their inodes are fixed: PROC_PID_INIT_INO and PROC_USER_INIT_INO of linux/proc_ns.h.
    """
    return pid_namespace() == 0xEFFFFFFC and os.stat("/proc/self/ns/user").st_ino == 0xEFFFFFFD

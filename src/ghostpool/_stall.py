"""Signs of life: whether a process that owes an answer is slow, or hangs.

What counts is not how long it takes but that it moves: whoever computes uses CPU time, and whoever
waits for a disk is woken now and then, which the kernel counts as a switch. A process that was
stopped, or waits for a file system that does not answer, does neither (docs/design.md, D-016). It
is looked at only while somebody waits for it, a few times per stall time, and is asked nothing.
"""

from __future__ import annotations

import os

STALL_S = 15.0
"""Seconds without a sign of life after which a process hangs, unless the operator says."""
_LOOKS = 4
"""Looks per stall time."""

_STATES = {
    "R": "running",
    "S": "asleep",
    "D": "in uninterruptible sleep",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "I": "idle",
    "Z": "dead, but not buried",
    "X": "dead",
}
_COMMON_CALLS = {
    428: "open_tree",
    429: "move_mount",
    437: "openat2",
    442: "mount_setattr",
    452: "fchmodat2",
    457: "statmount",
}
# What workers, builders and commands can be in the middle of; any other goes by its number.
_CALLS = {
    "x86_64": {
        0: "read",
        1: "write",
        3: "close",
        5: "fstat",
        8: "lseek",
        17: "pread64",
        18: "pwrite64",
        44: "sendto",
        45: "recvfrom",
        46: "sendmsg",
        47: "recvmsg",
        59: "execve",
        77: "ftruncate",
        91: "fchmod",
        93: "fchown",
        138: "fstatfs",
        165: "mount",
        257: "openat",
        258: "mkdirat",
        259: "mknodat",
        260: "fchownat",
        262: "newfstatat",
        263: "unlinkat",
        265: "linkat",
        266: "symlinkat",
        268: "fchmodat",
        280: "utimensat",
        308: "setns",
        316: "renameat2",
        332: "statx",
    },
    "aarch64": {
        33: "mknodat",
        34: "mkdirat",
        35: "unlinkat",
        36: "symlinkat",
        37: "linkat",
        40: "mount",
        44: "fstatfs",
        46: "ftruncate",
        52: "fchmod",
        53: "fchmodat",
        54: "fchownat",
        55: "fchown",
        56: "openat",
        57: "close",
        62: "lseek",
        63: "read",
        64: "write",
        67: "pread64",
        68: "pwrite64",
        79: "newfstatat",
        80: "fstat",
        88: "utimensat",
        206: "sendto",
        207: "recvfrom",
        211: "sendmsg",
        212: "recvmsg",
        221: "execve",
        268: "setns",
        276: "renameat2",
        291: "statx",
    },
}.get(os.uname().machine, {})

Sign = tuple[str, ...]


class Vigil:
    """Watches one process, by its pidfd, while it owes an answer."""

    def __init__(self, pidfd: int, stall_s: float) -> None:
        self.interval_s = stall_s / _LOOKS
        """Seconds between two looks."""
        self._pidfd = pidfd
        self._stall_s = stall_s
        self._last: Sign | None = None
        self._since = 0.0

    def hangs(self, now: float) -> bool:
        """Take a look; whether it has not moved for the whole stall time. `now`: any clock."""
        sign = _sign(_pid(self._pidfd))
        if sign is None or sign != self._last:
            self._last, self._since = sign, now
            return False
        return now - self._since >= self._stall_s


def condition(pidfd: int) -> str:
    """What a process is doing, in words for people."""
    pid = _pid(pidfd)
    state = _state(pid)
    if state is None:
        return "state unknown"
    words = _STATES.get(state, state)
    call = _read(pid, "syscall").split()
    if call and call[0].isdecimal():
        number = int(call[0])
        words += f", in {_CALLS.get(number) or _COMMON_CALLS.get(number) or f'call {number}'}"
    place = _read(pid, "wchan").strip()
    if place.strip("0"):
        words += f", at {place}"
    return words


def _sign(pid: int) -> Sign | None:
    """What changes when a process moves; None where nothing can be known."""
    # Runnable, but not on a CPU: then the machine is busy, or the process is throttled.
    fields = _stat(pid)
    switches = [line for line in _read(pid, "status").splitlines() if "ctxt_switches" in line]
    if len(fields) < 14 or not switches or fields[0] == "R":
        return None
    # User and system time: proc_pid_stat(5), fields 14 and 15, of which the first two are gone.
    return (fields[0], *fields[11:13], *switches)


def _state(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[0] if fields else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _pid(pidfd: int) -> int:
    """What /proc calls the process: it may be that of another pid namespace. 0: nothing."""
    if pidfd < 0:
        return 0
    for line in _read("self", f"fdinfo/{pidfd}").splitlines():
        if line.startswith("Pid:"):
            return max(0, int(line[4:]))
    return 0


def _read(pid: int | str, name: str) -> str:
    if not pid:
        return ""
    try:
        with open(f"/proc/{pid}/{name}", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # it has ended, or is not ours to look at

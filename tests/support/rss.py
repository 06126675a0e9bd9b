"""How much memory this process has had at most."""

from __future__ import annotations

from pathlib import Path


def peak_rss() -> int:
    """Bytes of the resident set at its largest, since this program was executed.

    getrusage(2) does not tell that: its maximum goes on over execve(2), so that a child of a large
    process begins with its parent's. VmHWM belongs to the address space (proc_pid_status(5)).
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10

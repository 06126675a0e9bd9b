"""How large the buffer of a pipe may be on this machine."""

from __future__ import annotations

_DEFAULT = 1 << 20


def pipe_limit() -> int:
    """Bytes: fs.pipe-max-size, proc_sys_fs(5), which holds for whoever lacks CAP_SYS_RESOURCE."""
    try:
        with open("/proc/sys/fs/pipe-max-size", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return _DEFAULT


__all__ = ["pipe_limit"]

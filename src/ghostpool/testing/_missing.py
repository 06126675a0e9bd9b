"""What this machine lacks of what the fixtures need: tried, once, by doing it in a child.

No version and no name of a distribution is looked at.
"""

from __future__ import annotations

import os
from functools import cache

from ghostpool import _linux
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import leave_privately


@cache
def lacks_mount_namespaces() -> str | None:
    """What is missing for making mount namespaces and mounting in them; None if nothing is."""
    if os.geteuid() != 0:
        return "root with CAP_SYS_ADMIN (this is an ordinary user)"
    try:
        in_child(_mount_privately)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        return f"CAP_SYS_ADMIN, to make a mount namespace ({problem})"
    return None


def _mount_privately() -> None:
    leave_privately()
    _linux.mount(b"probe", b"/", b"tmpfs", 0)

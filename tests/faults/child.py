"""The fork server of a run of the matrix: the package's observed one, with the faults of act.py."""

from __future__ import annotations

from functools import partial

from ghostpool.testing import _faultserver
from tests.faults.act import act

BOOT = (
    "import sys; sys.path.append({{path!r}}); sys.path.append({tests!r}); "
    "from tests.faults import child as c; c.main(3, {area!r}, {coordinator!r})"
)


def main(fd: int, path: str, coordinator: int) -> None:
    """Serve as the fork server does, under observation."""
    _faultserver.main(fd, path, partial(act, coordinator=coordinator))

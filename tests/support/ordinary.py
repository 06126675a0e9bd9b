"""What an ordinary user may run of this interpreter, wherever that lies."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ghostpool
from ghostpool import _linux
from tests.support.restore import entering, live, mount_tmpfs


def let_everybody_reach(*paths: str) -> None:
    """Make paths below directories that are closed to others reachable (in a private namespace).

    A closed directory is covered by an open one that holds nothing but the way there.
    """
    wanted: dict[Path, set[Path]] = {}
    for path in {Path(p).resolve() for p in paths}:
        closed = [above for above in path.parents if not above.stat().st_mode & stat.S_IXOTH]
        if closed:
            wanted.setdefault(closed[-1], set()).add(path)
    for directory, inside in wanted.items():
        trees = {
            path: _linux.open_tree(-1, os.fsencode(path), _linux.OPEN_TREE_CLONE) for path in inside
        }
        mount_tmpfs(directory)
        for path, tree in trees.items():
            path.mkdir(parents=True, exist_ok=True)
            _linux.move_mount(tree, -1, os.fsencode(path))
            os.close(tree)


@contextmanager
def ordinary_user(*paths: str | Path) -> Iterator[tuple[str, ...]]:
    """What to start a command with so that it runs as nobody, who can reach `paths`.

    /mnt is an empty directory for everybody.
    """
    own = Path(ghostpool.__file__).parents[1]

    def set_up() -> None:
        let_everybody_reach(sys.base_prefix, sys.prefix, str(own), *map(str, paths))
        mount_tmpfs(Path("/mnt"))
        os.chmod("/mnt", 0o1777)

    with live(set_up) as target:
        setpriv = shutil.which("setpriv") or "/usr/bin/setpriv"
        user = (setpriv, "--reuid", "65534", "--regid", "65534", "--clear-groups", "env")
        yield *entering(target), *user, "TMPDIR=/mnt", "HOME=/mnt"

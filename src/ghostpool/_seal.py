"""No module can be loaded any more: for processes that have another root, or soon will.

In a container's mount namespace, and below a directory of images, sys.path leads to somebody
else's files: an import that was forgotten would run their code, as root of the host
(docs/design.md, D-013).
"""

from __future__ import annotations

import sys


def seal_imports() -> None:
    """From now on an import of what is not loaded fails."""
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path.clear()
    sys.path_importer_cache.clear()

"""Paths of images, relative paths as bytes, and paths as text for people; pure.

Paths inside a mount or a file system have no leading "/"; b"" is the directory itself.
"""

from __future__ import annotations

import re
from typing import Final

_PATH: Final = re.compile(rb"(?:/(?!\.{1,2}(?:/|\Z))[^/\0]{1,255})+")
_PATH_MAX: Final = 4096


def is_image_path(path: bytes) -> bool:
    """Absolute, normal and short enough for the kernel: what a path of an image has to be.

    PATH_MAX counts the final NUL, NAME_MAX is 255: limits.h of the kernel.
    """
    return path == b"/" or (len(path) < _PATH_MAX and _PATH.fullmatch(path) is not None)


def ghost_file_name(ghost: int) -> str:
    """Ghost ids are hexadecimal in file names, without padding."""
    return f"ghost-file-{ghost:x}.img"


def join(above: bytes, below: bytes) -> bytes:
    """Two relative paths as one; b"" is the directory itself."""
    return above + b"/" + below if above and below else above or below


def is_below(path: bytes, root: bytes) -> bool:
    """Component-wise: `path` is `root` or inside it (both relative to the same directory)."""
    return not root or path == root or path.startswith(root + b"/")


def is_on_mount(path: bytes, mountpoint: bytes) -> bool:
    """The same for absolute paths: `path` is the mount point or below it."""
    return path.startswith(mountpoint.rstrip(b"/") + b"/") or path == mountpoint


def relative_to(path: bytes, root: bytes) -> bytes:
    """`path` as seen from `root`, which must hold it."""
    return path[len(root) + 1 :] if root else path


def text(path: bytes) -> str:
    """A path for people: what is not printable, or not UTF-8, as backslash escapes."""
    shown = path.decode(errors="backslashreplace")
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)

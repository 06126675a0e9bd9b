"""What the kernel can answer at each system call of a worker: man pages, section 2, ERRORS.

Left out are errors of the caller's own arguments (EFAULT, EBADF, EINVAL where no state of the
machine leads to it). A system call that is missing here fails the matrix.
"""

from __future__ import annotations

import errno

_PATH = "EACCES EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM ESTALE"
_NEW_NAME = f"{_PATH} EDQUOT EEXIST ENOSPC EROFS EMLINK EOVERFLOW"

_TABLE = {
    "bind": f"{_PATH} EADDRINUSE EINVAL EROFS",
    "capset": "EPERM",
    "chroot": f"{_PATH}",
    "dup": "EMFILE",
    "dup2": "EMFILE EBUSY EINTR",
    "execve": "E2BIG EACCES EIO ELIBBAD ELOOP EMFILE ENFILE ENOENT ENOEXEC ENOMEM ENOTDIR EPERM"
    " ETXTBSY EAGAIN",
    "fchdir": "EACCES EIO ENOENT",
    "fchmod": "EIO ENOMEM ENOSPC EDQUOT EPERM EROFS",
    "fchmodat": f"{_PATH} ENOSPC EDQUOT EROFS ENOTSUP",
    "fchown": "EIO ENOMEM ENOSPC EDQUOT EPERM EROFS EINVAL EOVERFLOW",
    "fchownat": f"{_PATH} ENOSPC EDQUOT EROFS EINVAL EOVERFLOW",
    "fcntl": "EPERM",
    "fcntl of the pipe": "EBUSY ENOMEM EPERM",
    "fdatasync": "EDQUOT EIO ENOSPC EROFS EINTR",
    "flock": "EAGAIN EINTR ENOLCK",
    "fork": "EAGAIN ENOMEM EPERM",
    "fstatvfs": "EINTR EIO ENOMEM ENOSYS EOVERFLOW",
    "fsync": "EDQUOT EIO ENOSPC EROFS EINTR",
    "fsconfig": "EBUSY EINVAL ENOMEM EPERM",
    "fsmount": "EBUSY EINVAL EMFILE ENFILE ENOMEM EPERM",
    "fsopen": "EMFILE ENFILE ENODEV ENOMEM ENOSYS EPERM",
    "fstat": "EIO ENOMEM EOVERFLOW ESTALE",
    "fstatat": f"{_PATH} EOVERFLOW",
    "ftruncate": "EFBIG EINTR EIO ENOSPC EDQUOT EPERM EROFS ETXTBSY EINVAL",
    "linkat": f"{_NEW_NAME} EXDEV",
    "listen": "EADDRINUSE EINVAL",
    "lseek": "EINVAL EOVERFLOW ESPIPE ENXIO",
    "mkdirat": _NEW_NAME,
    "mknodat": _NEW_NAME,
    "mount": f"{_PATH} EBUSY EINVAL EROFS ENOSPC",
    "mount_setattr": "EBUSY EINVAL ENOENT ENOMEM ENOSPC ENOSYS EPERM",
    "open of the image": f"{_PATH} EMFILE ENFILE ENXIO EINTR EOVERFLOW",
    "open_tree": f"{_PATH} EINVAL EMFILE ENFILE ENOSPC ENOSYS",
    "openat": f"{_NEW_NAME} EMFILE ENFILE ENXIO EINTR ETXTBSY EBUSY EISDIR EOPNOTSUPP EAGAIN",
    "openat2": f"{_PATH} EAGAIN EINTR EMFILE ENFILE ENOSYS ENXIO EXDEV EOVERFLOW EROFS EBUSY",
    "pidfd_open": "EMFILE ENFILE ENODEV ENOMEM ENOSYS EINVAL",
    "pwrite": "EAGAIN EDQUOT EFBIG EINTR EIO ENOSPC EPERM EROFS ENOMEM",
    "read": "EIO EINTR ENOMEM EINVAL",
    "read of the image": "EAGAIN EINTR EIO EISDIR EOVERFLOW ENXIO ENOMEM",
    "renameat": f"{_NEW_NAME} EBUSY EXDEV",
    "renameat2": f"{_NEW_NAME} EBUSY EINVAL ENOSYS ENOTEMPTY EXDEV",
    "rmdir": f"{_PATH} EBUSY ENOTEMPTY EROFS ENOSPC",
    "setrlimit": "EPERM",
    "setsockopt": "EINVAL ENOMEM EPERM",
    "setns": "EINVAL EIO ENOMEM EPERM ESRCH EUSERS",
    "shutdown": "ENOBUFS ENOTCONN",
    "socket": "EACCES EMFILE ENFILE ENOBUFS ENOMEM",
    "statmount": "EINVAL EINTR ENOENT ENOMEM ENOSYS EOVERFLOW EPERM",
    "statx": f"{_PATH} ENOSYS",
    "symlinkat": _NEW_NAME,
    "umount2": f"{_PATH} EAGAIN EBUSY EINVAL",
    "unshare": "EINVAL ENOMEM ENOSPC EPERM EUSERS",
    "unlinkat": f"{_PATH} EBUSY EISDIR EROFS ENOSPC",
    "utimensat": f"{_PATH} EROFS ENOSPC EDQUOT ENOSYS EOPNOTSUPP",
    "write to the pipe": "EAGAIN EINTR ENOMEM",
}

ERRNOS: dict[str, tuple[int, ...]] = {
    call: tuple(dict.fromkeys(int(getattr(errno, name)) for name in names.split()))
    for call, names in _TABLE.items()
}

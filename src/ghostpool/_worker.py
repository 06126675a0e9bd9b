"""The worker: does batches of file and mount work, pinned in one mount namespace at a time.

A child of the lean fork server: one thread, no event loop, nothing of trio. Everything it needs
is imported before it enters a namespace, since after that "/" is the container's; it acts only
on descriptors (mount roots and directories below them, found by openat2 inside the mount) and on
single names in them. What fails goes back as errno, system call, path and mount.
It holds no state that its coordinator can not rebuild: killed, it is replaced.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from typing import Any

from ghostpool import _linux
from ghostpool._linux import INSIDE, Attr
from ghostpool._mountinfo import parse_line
from ghostpool._protocol import (
    MAX_FDS,
    BlockingChannel,
    Created,
    CreateOp,
    EndOfStream,
    Failure,
    Look,
    MountFacts,
    Opened,
    OpenOp,
    Placed,
    PlaceOp,
    Removed,
    RemoveOp,
    Report,
)

_COPY_CHUNK = 1 << 20
_DIRECTORY_CACHE = 128
_PARENT_MODE = 0o755


class _Failed(Exception):
    """Carries a Failure up to the message loop."""

    def __init__(
        self, index: int, code: int, step: str, path: bytes, mount: int, done: Any = ()
    ) -> None:
        super().__init__()
        self.failure = Failure(index, code, step, path, mount, tuple(done))


class _Mismatch(Exception):
    """A check failed; its argument names it."""


class Worker:
    """State of one worker: descriptors that its coordinator sent or asked it to open."""

    def __init__(self, channel: BlockingChannel, mount_setattr: bool) -> None:
        self._channel = channel
        self._mount_setattr = mount_setattr
        self._images = -1
        self._namespaces: dict[int, int] = {}
        self._current: int | None = None
        self._mounts: dict[int, int] = {}
        self._unique: dict[int, int] = {}
        self._directories: dict[tuple[int, bytes], int] = {}
        # Opened while "/proc" still is the host's: the way to name a descriptor as a path.
        self._own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def serve(self) -> None:
        """Answer requests until the coordinator closes the socket."""
        while True:
            (namespace, new_namespaces, new_mounts, request, *arguments), fds = (
                self._channel.receive()
            )
            taken = iter(fds)
            for key in new_namespaces:
                self._namespaces[key] = next(taken)
            for handle in new_mounts:
                self._mounts[handle] = next(taken)
            out: list[int] = []
            try:
                if namespace >= 0 and namespace != self._current:
                    self._enter(namespace)
                if request == "images":
                    self._images = next(taken)
                    result: Any = ()
                else:
                    result = getattr(self, "do_" + request)(out, *arguments)
                self._answer(True, result, out)
            except _Failed as error:
                _linux.close_all(out)
                self._channel.send((False, tuple(error.failure)))
            except OSError as error:
                _linux.close_all(out)
                step = getattr(error, "syscall", request)
                self._channel.send((False, (-1, error.errno or errno.EIO, step, b"", -1, ())))

    def _answer(self, ok: bool, result: Any, fds: list[int]) -> None:
        # More descriptors than one frame carries travel ahead, in frames of their own.
        sent = 0
        while len(fds) - sent > MAX_FDS:
            self._channel.send(None, fds[sent : sent + MAX_FDS])
            sent += MAX_FDS
        self._channel.send((ok, result), fds[sent:])
        _linux.close_all(fds)

    def _enter(self, namespace: int) -> None:
        try:
            _linux.setns(self._namespaces[namespace], _linux.CLONE_NEWNS)
        except OSError as error:
            raise _Failed(-1, error.errno or 0, "setns", b"", -1) from error
        self._current = namespace

    # -- mounts ---------------------------------------------------------------------------------

    def do_ping(self, out: list[int]) -> int:
        """The worker's pid, once it is where the request wanted it."""
        return os.getpid()

    def do_mountinfo(self, out: list[int]) -> None:
        """A descriptor of this namespace's mount table: it stays that of the time of its open."""
        out.append(os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._own_fds))

    def do_open_mounts(self, out: list[int], points: list[tuple[int, bytes]]) -> list[Any]:
        """Open the visible top of each mount point; the descriptors go back in order.

        A mount point is looked up by the kernel, so what is found is what a task would see
        there: compared with the table, that decides "overmounted".
        """
        facts: list[Any] = []
        for index, (handle, mountpoint) in enumerate(points):
            step = "openat2"
            try:
                root = _linux.openat2(
                    _linux.AT_FDCWD,
                    mountpoint,
                    os.O_PATH | os.O_NOFOLLOW,
                    _linux.FROM_ROOT & ~_linux.Resolve.IN_ROOT,
                )
                step = "statx"
                facts.append(tuple(self._facts(root)))
            except OSError as error:
                raise _Failed(index, error.errno or 0, step, mountpoint, handle, facts) from error
            out.append(os.dup(root))
            self._mounts[handle] = root
        return facts

    def _facts(self, fd: int) -> MountFacts:
        identity = _linux.mount_identity(fd)
        attributes, superblock_read_only = self._state(fd, identity)
        return MountFacts(
            identity.mnt_id, identity.unique_id, identity.dev, attributes, superblock_read_only
        )

    def _state(self, fd: int, identity: _linux.MountIdentity) -> tuple[int, bool]:
        """Attributes of the mount at `fd` as they are now, and whether its superblock is ro."""
        if identity.unique_id:
            try:
                state = _linux.statmount(identity.unique_id)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
            else:
                return state.attr, state.superblock_read_only
        return self._state_of_mountinfo(identity.mnt_id)

    def _state_of_mountinfo(self, mnt_id: int) -> tuple[int, bool]:
        fd = os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._own_fds)
        with open(fd, "rb") as file:
            for line in file:
                if line.startswith(b"%d " % mnt_id):
                    mount = parse_line(line.rstrip(b"\n"))
                    return mount.attributes, mount.superblock_read_only
        raise OSError(errno.ENOENT, "the mount is gone")

    def do_clone(self, out: list[int], handles: list[tuple[int, int]]) -> list[Any]:
        """A detached, private, writable clone of each mount: service writability.

        It vanishes with its last descriptor, so it never needs a revert, and nobody who is not
        given the descriptor ever sees a writable mount. Per mount None, and its descriptor goes
        back; or errno and system call of a failure.
        """
        results: list[Any] = []
        for live, service in handles:
            step = "open_tree"
            try:
                clone = _linux.open_tree(self._mounts[live], b"", _linux.OPEN_TREE_CLONE)
                try:
                    step = "mount_setattr"
                    if not self._mount_setattr:
                        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
                    _linux.mount_setattr(clone, attr_clr=Attr.RDONLY)
                    self._mounts[service] = os.dup(clone)
                except OSError:
                    os.close(clone)
                    raise
            except OSError as error:
                results.append((error.errno or errno.EIO, step))
            else:
                out.append(clone)
                results.append(None)
        return results

    def do_make_writable(self, out: list[int], handles: list[tuple[int, int]]) -> list[Any]:
        """Clear the read-only bit; per mount whether that changed it and what its attributes
        are now, or errno and system call of a failure.

        Each comes with the unique id (or mnt_id) it had when it was found: the descriptor can
        not have moved to another mount, but the mount may have been taken off since.
        """
        results: list[Any] = []
        for handle, expected in handles:
            step = "statx"
            try:
                fd = self._mounts[handle]
                identity = _linux.mount_identity(fd)
                if expected not in (identity.unique_id, identity.mnt_id):
                    results.append((None, errno.ESTALE, "statx"))
                    continue
                step = "statmount"
                attributes, superblock_read_only = self._state(fd, identity)
                if superblock_read_only:
                    results.append((None, errno.EROFS, "statmount"))
                elif attributes & Attr.RDONLY:
                    step = "mount_setattr" if self._mount_setattr else "mount"
                    self._set_read_only(fd, attributes, False)
                    results.append((True, self._state(fd, identity)[0]))
                else:
                    results.append((False, attributes))
            except OSError as error:
                results.append((None, error.errno or 0, step))
        return results

    def do_make_read_only(self, out: list[int], handles: list[int]) -> list[Any]:
        """Set the read-only bit; per mount None, or a failure (EBUSY: somebody writes)."""
        results: list[Any] = []
        for handle in handles:
            step = "mount_setattr" if self._mount_setattr else "mount"
            try:
                fd = self._mounts[handle]
                attributes = 0
                if not self._mount_setattr:
                    attributes, _ = self._state(fd, _linux.mount_identity(fd))
                self._set_read_only(fd, attributes, True)
                results.append(None)
            except OSError as error:
                results.append((error.errno or 0, step))
        return results

    def _set_read_only(self, fd: int, attributes: int, read_only: bool) -> None:
        if self._mount_setattr:
            bit = int(Attr.RDONLY)
            try:
                _linux.mount_setattr(fd, attr_set=bit * read_only, attr_clr=bit * (not read_only))
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self._mount_setattr = False
                attributes, _ = self._state(fd, _linux.mount_identity(fd))
            else:
                return
        # mount(2) knows only paths. The magic link of our own descriptor leads to exactly this
        # mount; it is reached from the descriptor of the host's /proc, not by the container's.
        wanted = attributes | Attr.RDONLY if read_only else attributes & ~Attr.RDONLY
        flags = _linux.MS_REMOUNT | _linux.MS_BIND | _linux.mount_flags_of(wanted)
        here = os.open(".", os.O_PATH | os.O_DIRECTORY)
        try:
            os.fchdir(self._own_fds)
            _linux.mount(None, b"%d" % fd, None, flags)
        finally:
            os.fchdir(here)
            os.close(here)

    # -- directories ----------------------------------------------------------------------------

    def _directory(self, mount: int, path: bytes) -> int:
        """A cached O_PATH descriptor of an existing directory inside a mount."""
        if not path:
            return self._mounts[mount]
        key = (mount, path)
        fd = self._directories.get(key)
        if fd is None:
            if len(self._directories) >= _DIRECTORY_CACHE:
                os.close(self._directories.pop(next(iter(self._directories))))
            fd = _linux.openat2(self._mounts[mount], path, os.O_PATH | os.O_DIRECTORY, INSIDE)
            self._directories[key] = fd
        return fd

    def _make_directories(self, mount: int, path: bytes) -> list[bytes]:
        """Make what is missing of `path`; the paths that were made, outermost first."""
        try:
            self._directory(mount, path)
            return []
        except FileNotFoundError:
            pass
        made: list[bytes] = []
        at = b""
        try:
            for component in path.split(b"/"):
                below = at + b"/" + component if at else component
                try:
                    self._directory(mount, below)
                except FileNotFoundError:
                    os.mkdir(component, _PARENT_MODE, dir_fd=self._directory(mount, at))
                    made.append(below)
                    self._directory(mount, below)
                at = below
        except BaseException:
            self._remove_directories(mount, made)
            raise
        return made

    def _remove_directories(self, mount: int, paths: list[bytes]) -> list[bytes]:
        """Remove directories that we made, innermost first; those that somebody else uses stay,
        and are returned."""
        try:
            for number, path in enumerate(reversed(paths)):
                above, _, name = path.rpartition(b"/")
                try:
                    os.rmdir(name, dir_fd=self._directory(mount, above))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                        raise
                    return list(paths[: len(paths) - number])
            return []
        finally:
            if paths:
                # Descriptors of what is gone; other mounts may know it by other paths.
                self.do_forget_directories([])

    def do_look(
        self, out: list[int], places: list[tuple[int, bytes, tuple[bytes, ...]]]
    ) -> list[Any]:
        """What stands at old names: how much of the directory exists, and which are taken."""
        return [tuple(self._look(*place)) for place in places]

    def _look(self, mount: int, path: bytes, names: tuple[bytes, ...]) -> Look:
        components = path.split(b"/") if path else []
        existing = len(components)
        try:
            while True:
                try:
                    fd = self._directory(mount, b"/".join(components[:existing]))
                    break
                except FileNotFoundError:
                    existing -= 1
            status = os.stat(fd)
        except OSError as error:
            return Look(existing, 0, 0, (), error.errno or errno.EIO, ())
        whole = existing == len(components)
        taken = tuple(whole and _exists(fd, name) for name in names)
        alternative = tuple(
            is_taken and _exists(fd, name + b".cr_link")
            for name, is_taken in zip(names, taken, strict=True)
        )
        return Look(existing, status.st_dev, status.st_ino, taken, 0, alternative)

    def do_forget_directories(self, out: list[int]) -> None:
        """Drop cached directories: between planning and acting they may have been replaced."""
        _linux.close_all(self._directories.values())
        self._directories.clear()

    # -- creating -------------------------------------------------------------------------------

    def do_create(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Make ghosts under temporary names."""
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = CreateOp(*fields)
            self._step = "openat2"
            try:
                done.append(tuple(self._create(operation)))
            except _Mismatch as error:
                raise _Failed(
                    index, 0, str(error), operation.image, operation.mount, done
                ) from error
            except OSError as error:
                path = operation.directory + b"/" + operation.name
                code = error.errno or errno.EIO
                raise _Failed(index, code, self._step, path, operation.mount, done) from error
        return done

    def _create(self, operation: CreateOp) -> Created:
        directory = self._directory(operation.mount, operation.directory)
        kind = stat.S_IFMT(operation.mode)
        if kind == stat.S_IFREG:
            return self._create_regular(operation, directory)
        name = operation.name
        self._step = "mknodat"
        if kind == stat.S_IFDIR:
            self._step = "mkdirat"
            os.mkdir(name, 0o700, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            self._step = "symlinkat"
            os.symlink(operation.target, name, dir_fd=directory)
        else:
            os.mknod(name, operation.mode, operation.rdev, dir_fd=directory)
        try:
            self._step = "openat2"
            flags = os.O_NOFOLLOW
            flags |= os.O_RDONLY | os.O_DIRECTORY if kind == stat.S_IFDIR else os.O_PATH
            fd = _linux.openat2(directory, name, flags, INSIDE)
            try:
                status = os.fstat(fd)
                # A task of the container sees the name and may have swapped what it leads to.
                if (
                    stat.S_IFMT(status.st_mode) != kind
                    or status.st_rdev != operation.rdev
                    or status.st_uid != os.geteuid()
                ):
                    raise _Mismatch("identity of the new file")
                self._step = "fchownat"
                _linux.lchown_fd(fd, operation.uid, operation.gid)
                if kind != stat.S_IFLNK:
                    # A default ACL has changed the mode, or chown the setuid and setgid bits.
                    self._step = "fchmodat"
                    os.chmod(b"%d" % fd, stat.S_IMODE(operation.mode), dir_fd=self._own_fds)
                if operation.times is not None:
                    self._step = "utimensat"
                    _linux.utimens_fd(fd, *operation.times)
            finally:
                os.close(fd)
            return Created(status.st_dev, status.st_ino)
        except BaseException:
            remove = os.rmdir if kind == stat.S_IFDIR else os.unlink
            try:
                remove(name, dir_fd=directory)
            except OSError:
                pass
            raise

    def _create_regular(self, operation: CreateOp, directory: int) -> Created:
        name = operation.name
        self._step = "openat"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            try:
                self._fill(fd, operation)
                # chown clears the setuid and setgid bits, so chmod follows; times come last.
                self._step = "fchown"
                os.fchown(fd, operation.uid, operation.gid)
                self._step = "fchmod"
                os.fchmod(fd, stat.S_IMODE(operation.mode))
                if operation.times is not None:
                    self._step = "utimensat"
                    os.utime(fd, ns=operation.times)
                status = os.fstat(fd)
                return Created(status.st_dev, status.st_ino)
            finally:
                os.close(fd)
        except BaseException:
            try:
                os.unlink(name, dir_fd=directory)
            except OSError:
                pass
            raise

    def _fill(self, fd: int, operation: CreateOp) -> None:
        end = 0
        if operation.extents:
            self._step = "open of the image"
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            image = os.open(operation.image, flags, dir_fd=self._images)
            try:
                for offset, length, position in operation.extents:
                    self._copy(image, position, fd, offset, length)
                    end = offset + length
            finally:
                os.close(image)
        if end != operation.size:
            # The file ends in a hole (or is one): no content reaches its last byte.
            self._step = "ftruncate"
            os.ftruncate(fd, operation.size)

    def _copy(self, image: int, position: int, fd: int, offset: int, length: int) -> None:
        # Read and write: copy_file_range says EXDEV between file systems and is slower from
        # an offset that is no multiple of a block, which content in an image never has.
        while length:
            self._step = "read of the image"
            data = os.pread(image, min(length, _COPY_CHUNK), position)
            if not data:
                raise _Mismatch("length of the image: it was cut since the plan")
            self._step = "pwrite"
            _linux.write_all(fd, data, offset)
            position += len(data)
            offset += len(data)
            length -= len(data)

    def do_place(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Move directory ghosts to their old names."""
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = PlaceOp(*fields)
            self._step = "mkdirat"
            try:
                done.append(tuple(self._place(operation)))
            except OSError as error:
                path = b"/".join([operation.directory, *operation.parents, operation.final[0]])
                code = error.errno or errno.EIO
                raise _Failed(index, code, self._step, path, operation.mount, done) from error
        return done

    def _place(self, operation: PlaceOp) -> Placed:
        above = [operation.directory] if operation.directory else []
        place = b"/".join([*above, *operation.parents])
        made = self._make_directories(operation.mount, place)
        try:
            self._step = "renameat2"
            source = self._directory(operation.mount, operation.directory)
            to = self._directory(operation.mount, place)
            last = len(operation.final) - 1
            for number, name in enumerate(operation.final):
                try:
                    _linux.renameat2(source, operation.name, to, name, _linux.RENAME_NOREPLACE)
                except FileExistsError:
                    if number == last:
                        raise
                else:
                    break
            return Placed(number, len(made))
        except BaseException:
            self._remove_directories(operation.mount, made)
            raise

    # -- opening --------------------------------------------------------------------------------

    def do_open(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Link, open, check, unlink; the descriptors go back in order."""
        done: list[Any] = []
        for index, fields in enumerate(operations):
            operation = OpenOp(*fields)
            self._step = "openat2"
            path = operation.live_directory + b"/" + operation.names[0]
            try:
                done.append(tuple(self._open(operation, out)))
            except _Mismatch as error:
                raise _Failed(index, 0, str(error), path, operation.live) from error
            except OSError as error:
                code = error.errno or errno.EIO
                raise _Failed(index, code, self._step, path, operation.live) from error
        return done

    def _open(self, operation: OpenOp, out: list[int]) -> Opened:
        if not operation.temp_name:
            directory = self._directory(operation.live, operation.live_directory)
            out.append(self._open_checked(operation, directory, operation.names[0]))
            return Opened(0, ())
        self._step = "mkdirat"
        made = self._make_directories(operation.link, operation.link_directory)
        linked = False
        used = 0
        try:
            self._step = "openat2"
            link_to = self._directory(operation.link, operation.link_directory)
            self._step = "linkat"
            used = self._link(operation, link_to)
            linked = True
            self._step = "openat2"
            if operation.live == operation.link:
                directory = link_to
            else:
                directory = self._directory(operation.live, operation.live_directory)
            fd = self._open_checked(operation, directory, operation.names[used])
            out.append(fd)
            if operation.keep:
                return Opened(used, ())
            self._step = "unlinkat"
            os.unlink(operation.names[used], dir_fd=link_to)
            linked = False
        except BaseException:
            if linked:
                self._unlink_own(operation, link_to, operation.names[used])
            self._remove_directories(operation.link, made)
            raise
        self._step = "rmdir"
        left = self._remove_directories(operation.link, made) if made else ()
        return Opened(used, tuple(left))

    def _link(self, operation: OpenOp, link_to: int) -> int:
        source = self._directory(operation.link, operation.temp_directory)
        last = len(operation.names) - 1
        for number, name in enumerate(operation.names):
            try:
                os.link(
                    operation.temp_name,
                    name,
                    src_dir_fd=source,
                    dst_dir_fd=link_to,
                    follow_symlinks=False,
                )
            except FileExistsError:
                if operation.keep and self._is_ours(operation, link_to, name):
                    break
                if number == last:
                    raise
            else:
                break
        return number

    def _is_ours(self, operation: OpenOp, directory: int, name: bytes) -> bool:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (operation.device, operation.inode)

    def _unlink_own(self, operation: OpenOp, directory: int, name: bytes) -> None:
        if self._is_ours(operation, directory, name):
            try:
                os.unlink(name, dir_fd=directory)
            except OSError:
                pass

    def _open_checked(self, operation: OpenOp, directory: int, name: bytes) -> int:
        is_fifo = stat.S_ISFIFO(operation.mode)
        fd = self._open_own(operation, directory, name, is_fifo)
        try:
            status = os.fstat(fd)
            self._check_identity(operation, status)
            if operation.mode >= 0 and status.st_mode != operation.mode:
                raise _Mismatch(f"mode: {status.st_mode:o} instead of {operation.mode:o}")
            if operation.size >= 0 and status.st_size != operation.size:
                raise _Mismatch(f"size: {status.st_size} instead of {operation.size}")
            if operation.position >= 0 and not operation.flags & os.O_PATH and not is_fifo:
                self._step = "lseek"
                try:
                    os.lseek(fd, operation.position, os.SEEK_SET)
                except OSError as error:
                    # Some devices can not be seeked; then their position was never set either.
                    if error.errno != errno.ESPIPE or stat.S_ISREG(status.st_mode):
                        raise
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _check_identity(operation: OpenOp, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino) != (operation.device, operation.inode):
            raise _Mismatch("identity: another file has the name")

    def _open_own(self, operation: OpenOp, directory: int, name: bytes, is_fifo: bool) -> int:
        """Open the file of the expected identity, and no other: opening another one may block for
        ever (a fifo) or set off a device, and tasks of the container can exchange names."""
        path_flags = os.O_PATH | os.O_NOFOLLOW
        if operation.flags & os.O_PATH:
            return _linux.openat2(directory, name, operation.flags, INSIDE)
        path_fd = _linux.openat2(directory, name, path_flags, INSIDE)
        helper = -1
        try:
            self._check_identity(operation, os.fstat(path_fd))
            if operation.flags & os.O_NOFOLLOW:
                # Its flag would refuse the magic link, so it has to be opened by its name.
                return self._open_regular_by_name(operation, directory, name)
            own = b"%d" % path_fd
            if is_fifo:
                # A reader waits for a writer, a writer without a reader is refused: be both.
                helper = os.open(own, os.O_RDWR | os.O_NONBLOCK, dir_fd=self._own_fds)
            return os.open(own, operation.flags, dir_fd=self._own_fds)
        finally:
            os.close(path_fd)
            if helper >= 0:
                os.close(helper)

    @staticmethod
    def _open_regular_by_name(operation: OpenOp, directory: int, name: bytes) -> int:
        flags = operation.flags | os.O_NONBLOCK
        fd = _linux.openat2(directory, name, flags, INSIDE)
        if not operation.flags & os.O_NONBLOCK:
            os.set_blocking(fd, True)
        return fd

    # -- removing -------------------------------------------------------------------------------

    def do_remove(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Take names away; one that resists does not stop the others."""
        return [tuple(self._remove(RemoveOp(*fields))) for fields in operations]

    def _remove(self, operation: RemoveOp) -> Removed:
        step = "openat2"
        left: list[bytes] = []
        try:
            try:
                directory = self._directory(operation.mount, operation.directory)
                step = "fstatat"
                status = os.stat(operation.name, dir_fd=directory, follow_symlinks=False)
                own = (status.st_dev, status.st_ino) == (operation.device, operation.inode)
                if own or not operation.inode:
                    step = "unlinkat"
                    if stat.S_ISDIR(status.st_mode):
                        self._remove_directory(operation)
                    else:
                        os.unlink(operation.name, dir_fd=directory)
            except FileNotFoundError:
                pass
            step = "rmdir"
            if operation.parents:
                left = self._remove_directories(operation.mount, self._parent_paths(operation))
        except OSError as error:
            return Removed(error.errno or errno.EIO, step, ())
        return Removed(0, "", tuple(left))

    def _parent_paths(self, operation: RemoveOp) -> list[bytes]:
        components = operation.directory.split(b"/")
        outer = len(components) - len(operation.parents)
        return [b"/".join(components[: n + 1]) for n in range(outer, len(components))]

    def _remove_directory(self, operation: RemoveOp) -> None:
        self.do_forget_directories([])
        directory = self._directory(operation.mount, operation.directory)
        if operation.times is not None:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            fd = _linux.openat2(directory, operation.name, flags, INSIDE)
            try:
                _linux.utimens_fd(fd, *operation.times)
            finally:
                os.close(fd)
        os.rmdir(operation.name, dir_fd=directory)

    def do_finish(self, out: list[int]) -> tuple[int, ...]:
        """What this worker used, before it ends."""
        return tuple(Report(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        # A name that can not exist (too long) is not taken; linking will say why it fails.
        return error.errno != errno.ENAMETOOLONG
    return True


def main(fd: int, mount_setattr: bool) -> None:
    """Body of a forked worker; returns when the coordinator is gone or done."""
    os.umask(0)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    # The container must not reach our memory or executable through /proc (CVE-2019-5736).
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
    _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        Worker(BlockingChannel(fd), mount_setattr).serve()
    except (EndOfStream, ConnectionError, BrokenPipeError):
        pass

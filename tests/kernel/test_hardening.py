"""What must not reach a container, a command or a terminal; and limits that must not be lost."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostpool._directories import Directories
from ghostpool._failed import Mismatch
from ghostpool._launch import launch
from ghostpool._opening import OpenWork
from tests.support.imagewriter import ImageSet
from tests.support.operations import opening_of
from tests.support.restore import ghostpool, live, make_read_only, mount_tmpfs

pytestmark = pytest.mark.needs_mount_ns


@pytest.fixture
def opening(tmp_path: Path) -> Iterator[OpenWork]:
    """A worker's opening side in this process, with tmp_path as mount 0."""
    mounts = {0: os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)}
    own_fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    yield OpenWork(Directories(mounts), own_fds)
    os.close(mounts[0])
    os.close(own_fds)


@pytest.mark.parametrize("swapped", ["fifo", "symlink", "file", "device"])
def test_a_name_that_was_exchanged_is_not_opened(
    tmp_path: Path, opening: OpenWork, swapped: str
) -> None:
    """Identity is checked before the open, which could block on a fifo or set off a device."""
    path = tmp_path / "name"
    path.write_bytes(b"ours")
    expected = opening_of(path)
    path.rename(tmp_path / "aside")
    if swapped == "fifo":
        os.mkfifo(path)
    elif swapped == "symlink":
        path.symlink_to("aside")
    elif swapped == "device":
        os.mknod(path, 0o20666, os.makedev(1, 3))
    else:
        path.write_bytes(b"theirs")
    out: list[int] = []
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises((Mismatch, OSError)) as caught:
        opening._open(expected, out)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ELOOP
    assert out == []
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)


@pytest.mark.parametrize("extra", [0, os.O_NOFOLLOW, os.O_NONBLOCK, os.O_APPEND])
def test_the_flags_of_the_open_are_the_images(
    tmp_path: Path, opening: OpenWork, extra: int
) -> None:
    path = tmp_path / "name"
    path.write_bytes(b"ours")
    out: list[int] = []
    opening._open(opening_of(path, os.O_RDWR | extra), out)
    (fd,) = out
    with open(f"/proc/self/fdinfo/{fd}") as file:
        flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags"))
    os.close(fd)
    large = 0o100000  # the kernel's own O_LARGEFILE, where Python's is 0
    assert flags & ~os.O_CLOEXEC & ~large == os.O_RDWR | extra


def make_data() -> None:
    mount_tmpfs(Path("/mnt"))
    make_read_only(Path("/mnt"))


def images_with(count: int, directory: Path, name: str = "/mnt/f") -> Path:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/mnt", device=(0, 70), flags=0x200001)
    images.task(1)
    for number in range(3, 3 + count):
        images.open(1, number, f"{name}{number}", ghost=images.ghost(b"%d" % number))
    images.write(directory)
    return directory


def test_many_descriptors_with_a_low_soft_limit(tmp_path: Path) -> None:
    """The soft limit is the caller's; the hard one is what ghostpool goes by."""

    def lower() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    images = images_with(700, tmp_path)
    with live(make_data) as target:
        command = "cat <&3 && cat <&702 && ls /proc/self/fd | wc -l"
        done = ghostpool(
            *("restore", "-D", images, "-t", target.pid, "--", "bash", "-c", command),
            preexec_fn=lower,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3702"), done.stdout


def test_inherited_descriptors_reach_nobody(tmp_path: Path) -> None:
    """A descriptor that the caller left inheritable is in no command and in no worker."""
    images = images_with(1, tmp_path)
    secret = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with live(make_data) as target:
            done = ghostpool(
                *("restore", "-D", images, "-t", target.pid, "--"),
                *("bash", "-c", "ls -l /proc/self/fd"),
                pass_fds=(secret,),
            )
    finally:
        os.close(secret)
    assert done.returncode == 0, done.stderr
    assert "/mnt/f3" in done.stdout
    assert "/etc" not in done.stdout


def test_the_fork_server_holds_nothing_of_the_callers() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    launched = launch()
    try:
        os.close(writer)
        # If the fork server held the other end too, this would not end.
        os.set_blocking(reader, True)
        done = subprocess.run(["cat"], stdin=reader, timeout=20, check=False)
        assert done.returncode == 0
    finally:
        os.close(reader)
        os.close(launched.socket)
        os.close(launched.pidfd)
        os.waitpid(launched.pid, 0)


def test_names_of_images_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    images = images_with(1, tmp_path, "/mnt/\x1b[31mred\x07")
    with live(make_data) as target:
        overmount = ("mount", "-N", str(target.pid), "-t", "tmpfs", "-o", "ro", "x", "/mnt")
        subprocess.run(overmount, check=True, timeout=20)
        done = ghostpool("restore", "-D", images, "-t", target.pid, "--discard")
        shown = ghostpool("plan", "-D", images, "-t", target.pid)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr + shown.stdout + shown.stderr
    assert "\\x1b[31mred" in done.stderr

"""What every test may rely on: capability markers, and guards that nothing is left behind.

A marker `needs_*` runs a probe, once, that does the thing itself in a child process: no
distribution's name and no version is looked at. What the probe finds missing skips the test,
or fails it where GHOSTPOOL_REQUIRE_ALL=1 says that this machine is meant to have everything.
The guards compare the mounts, processes and descriptors of the test process with those before.
"""

from __future__ import annotations

import difflib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import uvloop
from hypothesis import settings

import ghostpool
from ghostpool.testing._missing import lacks_mount_namespaces
from ghostpool.testing.pytest_plugin import require

# How long a process that was killed, or saw its socket close, may take to be gone.
GRACE_S = float(os.environ.get("GHOSTPOOL_TEST_GRACE", "5"))
TESTS = Path(__file__).parent

# A shared machine has hiccups: an example that takes long is no failure.
settings.register_profile("ghostpool", deadline=None, print_blob=True)
settings.load_profile("ghostpool")


# -- Capabilities -------------------------------------------------------------------------------

# Run in a child, so that neither the namespaces nor the loop device of a probe can stay.
# As root this drops to nobody first: an ordinary user must be able to do it. A process that
# changed its ids is not dumpable, and its /proc/self/uid_map then belongs to root.
_PROBE_USERNS = """
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    _linux.prctl(_linux.PR_SET_DUMPABLE, 1)
uid, gid = os.getuid(), os.getgid()
_linux.unshare(_linux.CLONE_NEWUSER | _linux.CLONE_NEWNS)
for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
    with open(f"/proc/self/{name}", "wb") as file:  # no codec: nobody may not be able to load one
        file.write(text.encode())
_linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
_linux.mount(b"probe", b"/", b"tmpfs", 0)
"""

# LOOP_CTL_GET_FREE, then LOOP_SET_FD and LOOP_CLR_FD: loop(4).
_PROBE_LOOP = """
import errno, fcntl, tempfile
with tempfile.TemporaryFile() as backing, open("/dev/loop-control", "rb") as control:
    backing.truncate(1 << 20)
    for attempt in range(5):
        number = fcntl.ioctl(control, 0x4C82)
        with open(f"/dev/loop{number}", "r+b", buffering=0) as device:
            try:
                fcntl.ioctl(device, 0x4C00, backing.fileno())
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == 4:  # somebody else was faster
                    raise
                continue
            fcntl.ioctl(device, 0x4C01)
            break
"""


def _run_probe(code: str) -> str | None:
    """Run `code` in a child that has `os` and `_linux`; the last line it failed with, or None."""
    above = str(Path(ghostpool.__file__).parent.parent)
    prologue = f"import os, sys\nsys.path.insert(0, {above!r})\nfrom ghostpool import _linux\n"
    return _complaint([sys.executable, "-I", "-c", prologue + code])


def _complaint(command: list[str]) -> str | None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


@cache
def _lacks_strace() -> str | None:
    strace = shutil.which("strace")
    if strace is None:
        return "the command strace"
    problem = _complaint([strace, "-f", "-o", "/dev/null", "-e", "trace=openat", "true"])
    return problem and f"permission to ptrace its own children ({problem})"


@cache
def _lacks_loop() -> str | None:
    if os.geteuid() != 0:
        return "root, for loop devices (this is an ordinary user)"
    if shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        return "the command mkfs.ext4, to fill a loop device"
    problem = _run_probe(_PROBE_LOOP)
    return problem and f"a loop device that can be attached ({problem})"


@cache
def _lacks_maker(name: str) -> str | None:
    if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        return f"the command {name}, to fill a loop device"
    return _lacks_loop()


@cache
def _lacks_systemd() -> str | None:
    if shutil.which("systemd-socket-activate") is None:
        return "the commands of systemd"
    return _complaint([sys.executable, "-c", "import ctypes; ctypes.CDLL('libsystemd.so.0')"])


@cache
def _lacks_cc() -> str | None:
    if shutil.which("cc") is None:
        return "the command cc, a C compiler"
    program = "#include <stdio.h>\nint main(void) { return 0; }\n"
    done = subprocess.run(
        ["cc", "-x", "c", "-o", "/dev/null", "-"],
        input=program,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return f"a C compiler that works ({done.stderr.strip()})" if done.returncode else None


@cache
def _lacks_userns() -> str | None:
    problem = _run_probe(_PROBE_USERNS)
    return problem and f"user namespaces for ordinary users ({problem})"


@cache
def _lacks_idmapped() -> str | None:
    if problem := lacks_mount_namespaces():
        return problem
    from tests.support import idmapped  # a copy of this file has no such neighbour

    return idmapped.lacks()


@cache
def _lacks_runtime(name: str) -> str | None:
    if problem := lacks_mount_namespaces():
        return problem
    from tests.support import oci  # a copy of this file has no such neighbour

    return oci.lacks(name)


_CAPABILITIES: dict[str, tuple[Callable[[], str | None], str]] = {
    "needs_mount_ns": (
        lacks_mount_namespaces,
        "root that can make mount namespaces and mount in them",
    ),
    "needs_strace": (_lacks_strace, "strace, allowed to trace its own children"),
    "needs_loop": (_lacks_loop, "loop devices and mkfs.ext4"),
    "needs_xfs": (partial(_lacks_maker, "mkfs.xfs"), "loop devices and mkfs.xfs"),
    "needs_btrfs": (partial(_lacks_maker, "mkfs.btrfs"), "loop devices and mkfs.btrfs"),
    "needs_systemd": (_lacks_systemd, "systemd's commands and libsystemd; it need not run"),
    "needs_crun": (partial(_lacks_runtime, "crun"), "crun and busybox, to run a container"),
    "needs_runc": (partial(_lacks_runtime, "runc"), "runc and busybox, to run a container"),
    "needs_cc": (_lacks_cc, "a C compiler"),
    "needs_idmapped": (_lacks_idmapped, "idmapped mounts of a tmpfs, and Linux 6.15"),
    "needs_userns": (_lacks_userns, "user namespaces for ordinary users"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Register the capability markers: --strict-markers knows them by this list alone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell has its background jobs ignore it, and so would every command under test.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, (_, meaning) in _CAPABILITIES.items():
        config.addinivalue_line("markers", f"{name}: the test needs {meaning}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose markers name what this machine lacks."""
    for name, (lacks, _) in _CAPABILITIES.items():
        if item.get_closest_marker(name) is None:
            continue
        require(lacks())


# -- Nothing is left behind ---------------------------------------------------------------------

_SESSION = f"GHOSTPOOL_TEST_SESSION={uuid.uuid4()}"


def _mounts() -> bytes:
    """The mount namespace this process is in, and every mount of it."""
    return os.readlink(b"/proc/self/ns/mnt") + b"\n" + Path("/proc/self/mountinfo").read_bytes()


def _check_mounts(before: bytes) -> None:
    after = _mounts()
    if after != before:
        old, new = (text.decode(errors="replace").splitlines() for text in (before, after))
        changes = "\n".join(difflib.unified_diff(old, new, "before", "after", n=0, lineterm=""))
        pytest.fail(f"the mounts of the test process changed:\n{changes}", pytrace=False)


def _processes() -> set[psutil.Process]:
    """Descendants of this process, zombies too, and orphans of descendants.

    An orphan has another parent by now, but still the environment this session started it with.
    """
    found = set(psutil.Process().children(recursive=True))
    token = _SESSION.encode()
    for pid in psutil.pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if token in file.read().split(b"\0"):
                    found.add(psutil.Process(pid))
        except (OSError, psutil.Error):
            continue  # ended meanwhile, or not ours to read, hence not ours
    return found


def _check_processes(before: set[psutil.Process]) -> None:
    """Fail if a process is there that was not `before`, and does not end within the grace."""
    deadline = time.monotonic() + GRACE_S
    while (left := _processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)  # a killed process takes a moment to go
    if left:
        names = []
        for process in left:
            try:
                names.append(f"{process.pid} ({process.status()}): {process.cmdline()}")
            except psutil.Error:
                names.append(f"{process.pid}")
        pytest.fail("processes were left behind:\n" + "\n".join(sorted(names)), pytrace=False)


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def _check_descriptors(before: set[tuple[int, str]]) -> None:
    gc.collect()
    left = sorted(_descriptors() - before)
    if left:
        names = "\n".join(f"{number}: {target}" for number, target in left)
        pytest.fail(f"descriptors were left open:\n{names}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end the mounts are as at the start, no process is left, no descriptor is open.

    Runs have a run directory of the session's own, and leave no journal in it.
    """
    variable, _, value = _SESSION.partition("=")
    os.environ[variable] = value
    run_dir = tmp_path_factory.mktemp("run")
    os.environ["GHOSTPOOL_RUN_DIR"] = str(run_dir)
    # libuv makes a pipe for signals with the first loop of a process, and keeps it.
    uvloop.new_event_loop().close()
    mounts, processes, descriptors = _mounts(), _processes(), _descriptors()
    yield
    assert os.listdir(run_dir) == []
    _check_mounts(mounts)
    _check_processes(processes)
    _check_descriptors(descriptors)


@pytest.fixture(autouse=True)
def _kernel_test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same after each single test that works on the real kernel, to name the culprit."""
    if not request.path.is_relative_to(TESTS / "kernel"):
        yield
        return
    mounts, processes = _mounts(), _processes()
    yield
    _check_mounts(mounts)
    _check_processes(processes)

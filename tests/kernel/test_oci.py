"""Containers whose program finds its restored files: the hooks and the agent of docs/examples/oci.

Real containers of crun and runc, with next to nothing in them; images made for their mounts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import oci
from tests.support.imagewriter import ImageSet
from tests.support.restore import LIMIT_S, end, start

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.needs_cc, pytest.mark.long]
DOCS = Path(__file__).parents[2] / "docs" / "examples"
RUNTIMES = [
    pytest.param("crun", marks=pytest.mark.needs_crun),
    pytest.param("runc", marks=pytest.mark.needs_runc),
]
MOUNTS = (("/run", "nosuid"), ("/data", "ro,nosuid,noatime"))

# What the container's program says of what it has, and of what it can do. busybox has no more.
SAYS = """
echo task $GHOSTPOOL_TASK
/bin/busybox cat <&5
/bin/busybox ls /data
/bin/busybox grep -E ' /(data|run/ghosts) ' /proc/self/mountinfo | /bin/busybox cut -d ' ' -f 5,6
for name in /data /run/ghosts; do echo > $name/mine && echo $name can be written; done
exit 7
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the hook and a client of the task socket, which need nothing around them."""
    directory = tmp_path_factory.mktemp("programs")
    for source in (DOCS / "oci" / "ask-agent.c", DOCS / "fetch.c"):
        words = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-static"]
        subprocess.run(["cc", *words, "-o", directory / source.stem, source], check=True)
    return directory


def make_images(directory: Path, point: str = "/data") -> Path:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount(point, device=(0, 70), flags=0x200001)
    images.task(1)
    images.open(1, 5, f"{point}/ghost", ghost=images.ghost(b"what was deleted\n"))
    return images.write(directory)


def make_bundle(directory: Path, agent: Path, *argv: str) -> Path:
    return oci.make_bundle(
        directory,
        argv or ["/run/ghosts/fetch", "/run/ghosts/task.sock", "1", "/bin/sh", "-c", SAYS],
        mounts=MOUNTS,
        hooks={
            "createContainer": [(DOCS / "oci" / "bring-agent.py", agent)],
            "startContainer": [("/run/ghosts/ask-agent",)],
        },
    )


@contextmanager
def agent(images: Path, directory: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The agent, waiting at its socket."""
    process = start([sys.executable, DOCS / "oci" / "agent.py", images, directory, *more])
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"waiting at {directory}/agent.sock\n", end(process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        end(process)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_finds_its_files(runtime: str, programs: Path, tmp_path: Path) -> None:
    """Restored into its own mounts before its program runs, which finds them as they were."""
    bundle = make_bundle(tmp_path / "bundle", programs)
    with agent(make_images(tmp_path / "images"), programs) as process:
        done = oci.run_container(runtime, bundle)
        assert (done.returncode, process.wait(timeout=LIMIT_S)) == (7, 0), (done, end(process))
        assert process.stdout is not None
        assert process.stdout.read() == "the mounts are as they were\n"
    said = done.stdout.splitlines()
    assert said[:2] == ["task 1", "what was deleted"]
    mounts = dict(line.split() for line in said[2:])
    assert mounts == {
        "/data": "ro,nosuid,noatime",
        "/run/ghosts": mounts["/run/ghosts"],
    }
    assert mounts["/run/ghosts"].startswith("ro,nosuid,nodev")
    assert done.stderr.count("Read-only file system") == 2
    assert {path.name for path in programs.iterdir()} == {"ask-agent", "fetch"}
    assert not list((bundle / "rootfs/run").iterdir())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_is_not_started_without_its_files(
    runtime: str, programs: Path, tmp_path: Path
) -> None:
    """The agent says why, and the hook says it again; what it says crun leaves out."""
    bundle = make_bundle(tmp_path / "bundle", programs)
    with agent(make_images(tmp_path / "images", "/elsewhere"), programs) as process:
        done = oci.run_container(runtime, bundle)
        reason = end(process)
    assert (process.returncode, done.returncode, done.stdout) == (1, 1, "")
    assert re.fullmatch("agent.py: .*/elsewhere.*\n", reason), reason
    if runtime == "runc":
        assert f"ghosts: {reason.removeprefix('agent.py: ')}" in done.stderr


@pytest.mark.needs_runc
def test_a_container_is_not_started_without_its_agent(programs: Path, tmp_path: Path) -> None:
    """It is not there; or it dies before it has answered."""
    bundle = make_bundle(tmp_path / "bundle", programs)
    done = oci.run_container("runc", bundle)
    assert (done.returncode, done.stdout) == (1, "")
    assert "/run/ghosts/agent.sock: No such file" in done.stderr

    with agent(make_images(tmp_path / "images"), programs) as process:
        (programs / "task.sock").mkdir()  # which can not be bound: the end comes late
        try:
            done = oci.run_container("runc", bundle)
        finally:
            (programs / "task.sock").rmdir()
        assert process.wait(timeout=LIMIT_S) == 1
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("ghosts: .*task.sock: Address already in use", done.stderr)


@pytest.mark.needs_runc
def test_a_program_that_does_not_want_its_files(programs: Path, tmp_path: Path) -> None:
    """The agent waits for its time only; then the mounts are put back."""
    looks = "/bin/busybox grep ' /data ' /proc/self/mountinfo | /bin/busybox cut -d ' ' -f 6"
    waits = "while [ -e /run/ghosts/task.sock ]; do /bin/busybox usleep 10000; done"
    bundle = make_bundle(tmp_path / "bundle", programs, "/bin/sh", "-c", f"{waits}; {looks}")
    with agent(make_images(tmp_path / "images"), programs, "--timeout", "1") as process:
        done = oci.run_container("runc", bundle)
        reason = end(process)
    assert (process.returncode, reason) == (1, "agent.py: TimeoutError\n")
    assert (done.returncode, done.stdout) == (0, "ro,nosuid,noatime\n")


@pytest.mark.parametrize("run", ["link", "file", "missing"])
def test_nothing_is_mounted_where_a_root_leads(run: str, tmp_path: Path) -> None:
    """A link in the container's root is not followed to the machine."""
    bundle, outside = tmp_path / "bundle", tmp_path / "outside"
    (bundle / "rootfs").mkdir(parents=True)
    outside.mkdir()
    if run == "link":
        (bundle / "rootfs/run").symlink_to(outside)
    elif run == "file":
        (bundle / "rootfs/run").touch()
    (bundle / "config.json").write_text('{"root": {"path": "rootfs"}}')
    alone = ["unshare", "--mount", "--propagation", "private"]
    done = subprocess.run(
        [*alone, DOCS / "oci" / "bring-agent.py", tmp_path],
        input=json.dumps({"bundle": str(bundle)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search("(NotADirectoryError|FileNotFoundError): .*'run'", done.stderr)
    assert not list(outside.iterdir())

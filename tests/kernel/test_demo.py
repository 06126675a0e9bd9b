"""The demonstration, as root and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

import ghostpool
from tests.support.ordinary import ordinary_user

DEMO = (sys.executable, "-m", "ghostpool", "demo")


def demo(
    directory: Path, *prefix: str, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run it in an empty directory, with its temporary files there."""
    return subprocess.run(
        [*prefix, *DEMO, *options],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory), "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.needs_mount_ns
def test_as_root(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("/data/own3", "ro, noexec", "rw, noexec", "before", "during", "after", "window"):
        assert word in done.stdout
    assert "9 ghost files behind 13 descriptors" in done.stdout
    assert "owners not compared" not in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.needs_mount_ns
@pytest.mark.needs_userns
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """In a user namespace of its own, which maps one id."""
    os.chown(tmp_path, 65534, 65534)
    with ordinary_user() as user:
        left = ("sh", "-c", '"$@"; status=$?; ls -A /mnt >&2; exit $status', "sh")
        done = demo(Path("/"), *user, *left)
    assert done.returncode == 0, done.stderr
    assert "9 ghost files behind 13 descriptors" in done.stdout
    assert "owners not compared" in done.stdout
    assert done.stderr == ""


@pytest.mark.needs_userns
def test_where_user_namespaces_are_forbidden(tmp_path: Path) -> None:
    """One line that says what to do."""
    inner = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    nested = ("unshare", "--user", "--map-root-user", "sh", "-c", inner, "sh")
    done = demo(tmp_path, *nested, "setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run the demo as root" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_dump_alone(tmp_path: Path) -> None:
    """For the tutorial: readable by ghostpool, and never over something that is there."""
    options = ["--unpack", "dump"]
    done = demo(tmp_path, options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path / "dump")) == ["expected.json", "images"]
    images = anyio.run(ghostpool.read_images, tmp_path / "dump" / "images")
    assert len(images.ghosts) == 9
    again = demo(tmp_path, options=options)
    assert (again.returncode, again.stderr) == (2, "ghostpool: dump: File exists\n")

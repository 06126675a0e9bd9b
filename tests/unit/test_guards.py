"""The guards of tests/conftest.py themselves: a guard that never fires is worse than none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ghostpool

CONFTEST = Path(__file__).parent.parent / "conftest.py"

# A leaked `cat` reads a pipe that this module holds, so it ends when the check is over.
LEAKS = {
    "process": (
        """
import subprocess
def test_it():
    quiet = subprocess.DEVNULL
    globals()["kept"] = subprocess.Popen(["cat"], stdout=quiet, stderr=quiet)
""",
        "processes were left behind",
    ),
    "orphan": (
        """
import subprocess
def test_it():
    subprocess.run(["sh", "-c", "exec 3<&0; cat <&3 >/dev/null 2>&1 &"], check=True)
""",
        "processes were left behind",
    ),
    "descriptor": (
        """
import os
def test_it():
    os.open("/", os.O_PATH)
""",
        "descriptors were left open",
    ),
}


def run_pytest(folder: Path, test: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `test` as a suite of its own, below a copy of the conftest."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n", encoding="utf-8")
    shutil.copy(CONFTEST, folder / "conftest.py")
    kernel = folder / "kernel"
    kernel.mkdir()
    (kernel / "test_it.py").write_text(test, encoding="utf-8")
    above = str(Path(ghostpool.__file__).parent.parent)
    base = {"PYTHONPATH": above, "GHOSTPOOL_REQUIRE_ALL": "0", "GHOSTPOOL_TEST_GRACE": "0.2"}
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-ra", "-s", "-p", "no:cacheprovider", str(kernel)],
            cwd=folder,
            env={**os.environ, **base, **environ},
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_fails_the_run(kind: str, tmp_path: Path) -> None:
    """A test that leaves something behind passes by itself, but its run does not."""
    test, message = LEAKS[kind]
    done = run_pytest(tmp_path, test)
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout
    assert message in done.stdout


@pytest.mark.needs_mount_ns
def test_a_changed_mount_table_fails_the_run(tmp_path: Path) -> None:
    """A test that moves the test process into another mount namespace is found out."""
    test = (
        "from ghostpool import _linux\n"
        "def test_it():\n"
        "    _linux.unshare(_linux.CLONE_NEWNS)\n"
        "    _linux.mount(None, b'/', None, _linux.MS_REC | _linux.MS_PRIVATE)\n"
    )
    done = run_pytest(tmp_path, test)
    assert done.returncode == 1, done.stdout
    assert "the mounts of the test process changed" in done.stdout


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_missing_capability_skips_or_fails(required: str, outcome: str, tmp_path: Path) -> None:
    """Without strace its tests are skipped, and with GHOSTPOOL_REQUIRE_ALL=1 they fail."""
    test = "import pytest\n@pytest.mark.needs_strace\ndef test_it():\n    pass\n"
    done = run_pytest(tmp_path, test, GHOSTPOOL_REQUIRE_ALL=required, PATH=str(tmp_path))
    assert outcome in done.stdout
    assert "the command strace" in done.stdout
    assert done.returncode == int(required)

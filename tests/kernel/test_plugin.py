"""The pytest plugin, used as its users do: by test files that have nothing but the fixtures.

Each suite runs in this process, so the guards of these tests see what it leaves behind.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ghostpool import _launch
from ghostpool.testing._missing import lacks_mount_namespaces
from tests.support.imagewriter import ghosts_on, small

pytest_plugins = ["pytester"]

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "testing.md"
CONFTEST = """
import pathlib
import pytest

@pytest.fixture
def images():
    return pathlib.Path(__file__).with_name("images")
"""
SPECS = """
import errno, os
import pytest
from agent import bring_back
from ghostpool.testing import MountSpec, NamespaceSpec
ROOT = MountSpec(1, 0, b"/", 1)
DATA = MountSpec(2, 1, b"/data", 2, attributes=1)
ONE = NamespaceSpec(10, (ROOT, DATA))

@pytest.fixture
def targets(ghostpool_sandbox):
    made = ghostpool_sandbox(ONE)
    before = made[10].snapshot().without_directory_times()
    yield made
    assert made[10].snapshot().without_directory_times() == before

"""
Suite = Callable[[str], pytest.RunResult]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Iterator[Suite]:
    """Run a user's test file, and see that it leaves the process as it was."""
    pytester.makeconftest(CONFTEST)
    shutil.copy(TESTS / "support" / "agent.py", pytester.path)
    small().write(pytester.path / "images")
    pytester.syspathinsert()

    def run(source: str) -> pytest.RunResult:
        before = open_files()
        pytester.makepyfile(test_it=source)
        result = pytester.runpytest_inprocess("-ra", "-p", "no:cacheprovider")
        assert open_files() == before
        assert usual == _launch._BOOT
        return result

    usual = _launch._BOOT
    yield run
    lacks_mount_namespaces.cache_clear()


def open_files() -> list[str]:
    """Descriptors of this process, by what they lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return sorted(found)


def test_the_fixtures_are_found_and_described(pytester: pytest.Pytester) -> None:
    """By the entry point: nobody has named a plugin."""
    text = pytester.runpytest_inprocess("--fixtures").stdout.str()
    for name, words in (
        ("ghostpool_namespace", "A private copy of the machine's mount namespace"),
        ("ghostpool_sandbox", "Builds mount namespaces from lists of mounts"),
        ("ghostpool_faults", "Lets a system call of a real run"),
    ):
        assert re.search(rf"^{name} .*\n +{words}", text, re.MULTILINE), text


@pytest.mark.needs_mount_ns
def test_the_page_about_testing(suite: Suite) -> None:
    """Its examples, as they stand, are one test file that passes."""
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    source = "\n".join(["from agent import bring_back", *examples])
    suite(source).assert_outcomes(passed=source.count("def test_"))
    assert len(examples) == 5


# -- What a fixture lacks -----------------------------------------------------------------------

ORDINARY = """
import os
import pytest

@pytest.fixture
def ordinary_user():
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    yield
    os.seteuid(own)

def test_namespace(ordinary_user, ghostpool_namespace):
    raise AssertionError

def test_sandbox(ordinary_user, ghostpool_sandbox):
    raise AssertionError

def test_faults(ordinary_user, ghostpool_faults):
    assert ghostpool_faults.steps == []
"""


@pytest.mark.parametrize("required", [False, True])
def test_what_is_missing_is_named(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    """An ordinary user's test is skipped, or fails where everything is meant to be there."""
    # What the other user may not be able to load is loaded.
    importlib.import_module("ghostpool.testing._faults")
    importlib.import_module("ghostpool.testing._targets")
    monkeypatch.setenv("GHOSTPOOL_REQUIRE_ALL", str(int(required)))
    lacks_mount_namespaces.cache_clear()
    result = suite(ORDINARY)
    result.assert_outcomes(passed=1, **{"errors" if required else "skipped": 2})
    reason = "lacks root with CAP_SYS_ADMIN (this is an ordinary user)"
    assert f"{'this ' if required else ': '}{reason}" in result.stdout.str()


# -- Namespaces ---------------------------------------------------------------------------------


@pytest.mark.needs_mount_ns
def test_a_namespace_to_restore_into(suite: Suite, tmp_path: Path) -> None:
    """What is mounted in it is seen by nobody else, and a restore finds it by its pid."""
    place = tmp_path / "place"
    place.mkdir()
    ghosts_on(f"{place}/data", ["gone"], b"content").write(tmp_path / "images")
    suite(f"""
import os
from pathlib import Path
from agent import bring_back

def test_it(ghostpool_namespace):
    own = Path("/proc/self/mountinfo").read_bytes()
    assert os.readlink(ghostpool_namespace.path) != os.readlink("/proc/self/ns/mnt")
    assert os.stat(ghostpool_namespace.fd) == os.stat(ghostpool_namespace.path)
    place = Path({str(place)!r})
    ghostpool_namespace.mount_tmpfs(place)
    ghostpool_namespace.run(lambda: (place / "data").mkdir())
    ghostpool_namespace.mount_tmpfs(place / "data", {{"deep/file": b"text"}}, read_only=True)
    assert os.listdir(place) == []
    assert not any("shared" in line for line in ghostpool_namespace.mountinfo().decode().split())
    before = ghostpool_namespace.snapshot(bytes(place))
    assert {{path.partition(":")[2] for path in before.files}} == {{
        f"{{place}}", f"{{place}}/data", f"{{place}}/data", f"{{place}}/data/deep",
        f"{{place}}/data/deep/file",
    }}
    assert bring_back({str(tmp_path / "images")!r}, {{10: ghostpool_namespace.pid}})
    after = ghostpool_namespace.snapshot(bytes(place))
    assert after.mountinfo == before.mountinfo
    assert after != before  # a name was made and removed: the directory's times tell
    assert after.without_directory_times() == before.without_directory_times()
    before = after
    below = ghostpool_namespace.snapshot(bytes(place / "data"))
    ghostpool_namespace.run((place / "other").touch)
    assert ghostpool_namespace.snapshot(bytes(place)) != before
    assert ghostpool_namespace.snapshot(bytes(place / "data")) == below
    assert Path("/proc/self/mountinfo").read_bytes() == own
""").assert_outcomes(passed=1)


@pytest.mark.needs_mount_ns
def test_sandboxes_to_restore_into(suite: Suite) -> None:
    """Several at once, with a superblock in common, and only what was asked for."""
    suite(
        SPECS
        + """
def test_it(ghostpool_sandbox, images):
    first = ghostpool_sandbox(ONE)
    second = ghostpool_sandbox(
        NamespaceSpec(1, (ROOT._replace(id=7, superblock=7), DATA._replace(id=8, parent=7))),
        NamespaceSpec(2, (ROOT._replace(id=9, superblock=9), DATA._replace(id=3, parent=9))),
    )
    assert list(second) == [1, 2]
    assert [mount.mountpoint for mount in second[1].table()] == [b"/", b"/data"]
    assert second[1].run(lambda: os.stat("/data").st_dev) == second[2].run(
        lambda: os.stat("/data").st_dev)
    assert second[1].run(lambda: os.stat("/data").st_dev) != first[10].run(
        lambda: os.stat("/data").st_dev)
    untouched = second.snapshot()
    times = first[10].snapshot()
    assert bring_back(images, first.pids)
    assert first[10].snapshot() != times  # names were made and removed in it
    assert first[10].snapshot().without_directory_times() == times.without_directory_times()
    assert second.snapshot() == untouched
"""
    ).assert_outcomes(passed=1)


# -- Faults -------------------------------------------------------------------------------------


@pytest.mark.needs_mount_ns
def test_faults_of_a_real_run(suite: Suite) -> None:
    """Errors, deaths and a hang at a step of a worker or the guardian; all is undone each time.

    What a fault is for is seen: the run fails because of it, and without it succeeds.
    """
    suite(
        SPECS
        + """
def test_error(targets, ghostpool_faults, images):
    fault = ghostpool_faults.fail("open", "renameat2", errno.EIO)
    assert not bring_back(images, targets.pids)
    assert fault.count == 1
    assert bring_back(images, targets.pids)
    assert fault.count == 1

def test_errors_after_some(targets, ghostpool_faults, images):
    fault = ghostpool_faults.fail("open", "renameat2", errno.EIO, after=1, times=2)
    assert bring_back(images, targets.pids)
    assert fault.count == 0
    assert not bring_back(images, targets.pids)
    assert not bring_back(images, targets.pids)
    assert fault.count == 2
    assert bring_back(images, targets.pids)

def test_errors_for_ever(targets, ghostpool_faults, images):
    fault = ghostpool_faults.fail("make_writable", "mount_setattr", errno.EPERM, times=None)
    for count in (1, 2, 3):
        assert not bring_back(images, targets.pids)
        assert fault.count == count

def test_deaths(targets, ghostpool_faults, images):
    for victim in ("worker", "guardian", "forkserver"):
        fault = ghostpool_faults.kill("open", "renameat2", victim)
        done = bring_back(images, targets.pids)
        # A run that is about to end well needs no guardian any more. Workers die with the fork
        # server, but one may be faster with its last answer.
        assert done == (victim == "guardian") or victim == "forkserver"
        assert fault.count == 1
    assert bring_back(images, targets.pids)

def test_hang(targets, ghostpool_faults, images):
    fault = ghostpool_faults.stop("create", "pwrite")
    assert not bring_back(images, targets.pids, stall_s=0.3)
    assert fault.count == 1

def test_steps(targets, ghostpool_faults, images):
    assert bring_back(images, targets.pids)
    first = ghostpool_faults.steps
    assert {("create", "pwrite"), ("open", "renameat2"), ("owe", "fdatasync")} <= {
        step[:2] for step in first
    }
    assert len(set(first)) == len(first)
    assert bring_back(images, targets.pids)
    assert ghostpool_faults.steps == first
"""
    ).assert_outcomes(passed=6)


@pytest.mark.needs_mount_ns
def test_a_fault_that_never_happens_is_an_error(suite: Suite) -> None:
    result = suite(
        SPECS
        + """
def test_it(targets, ghostpool_faults, images):
    ghostpool_faults.fail("open", "linkat", errno.EIO)
    assert bring_back(images, targets.pids)

def test_without_a_run(ghostpool_faults):
    ghostpool_faults.kill("open", "renameat2")
"""
    )
    result.assert_outcomes(passed=2, errors=2)
    text = result.stdout.str()
    assert (
        "[<Fault open linkat fails with EIO, happened 0 times>] did not happen; the steps" in text
    )
    assert re.search(r"the steps were: .*, open renameat2, ", text)
    assert "[<Fault open renameat2 kills the worker, happened 0 times>] did not happen" in text
    assert "the steps were: none" in text


@pytest.mark.needs_mount_ns
def test_only_the_test_process_has_faults(suite: Suite) -> None:
    """Not the command, whatever its environment is; and nobody after the block."""
    suite(
        SPECS
        + """
import subprocess, sys
from ghostpool.testing import injected_faults

def test_it(targets, images):
    with injected_faults() as faults:
        fault = faults.fail("open", "renameat2", errno.EIO, times=None)
        command = [sys.executable, "-m", "ghostpool", "restore", "-D", images, "--discard"]
        subprocess.run([*command, "-t", str(targets[10].pid)], check=True)
        assert fault.count == 0
        assert not bring_back(images, targets.pids)
        with pytest.raises(RuntimeError, match="already"), injected_faults():
            pass
    assert fault.count == 1
    assert repr(fault) == "<Fault open renameat2 fails with EIO, happened 1 times>"
    assert ("open", "renameat2") in [step[:2] for step in faults.steps]
    assert bring_back(images, targets.pids)
    assert fault.count == 1
"""
    ).assert_outcomes(passed=1)

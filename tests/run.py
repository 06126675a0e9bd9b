#!/usr/bin/env python3
"""Run the whole test suite, doing every bit of its own set-up.

    python3 tests/run.py                        everything, on every CPython >= 3.11 found here
    python3 tests/run.py -e py311 -- tests/unit one environment of tox.ini, arguments for pytest
    python3 tests/run.py --list                 the interpreters that were found

tox goes into a virtual environment of its own below .tox; nothing else outside .tox is written.
System packages (strace and the like) are installed only when asked for: --system-packages, or
GHOSTPOOL_SYSTEM_PACKAGES=1. Standard library only, and plain enough for an old python3 to start.
"""

from __future__ import annotations

import argparse
import glob
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import IO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNNER = os.path.join(ROOT, ".tox", ".runner")
OLDEST = (3, 11)
TOX = "tox>=4.30"
STATIC = ["lint", "typing", "docs", "wheel"]
BESIDE = "long"

# Command that a test needs -> the Debian packages that make it work.
TOOLS = {
    "strace": ["strace"],
    "mkfs.ext4": ["e2fsprogs"],
    "mkfs.xfs": ["xfsprogs"],
    "mkfs.btrfs": ["btrfs-progs"],
    "mount": ["mount"],
    "unshare": ["util-linux"],
    "cc": ["gcc", "libc6-dev"],
    "systemd-socket-activate": ["systemd"],
    "crun": ["crun"],
    "runc": ["runc"],
    "busybox": ["busybox-static"],
}

NAME = re.compile(r"python3(\.\d+)?")

# Asked of each candidate, so that a pyenv shim without a version behind it, another
# implementation, a pre-release and a free-threaded build all drop out.
PROBE = """
import platform, sys, sysconfig
if (platform.python_implementation() == "CPython" and sys.version_info[3] == "final"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")):
    print(*sys.version_info[:3], getattr(sys, "_base_executable", None) or sys.executable)
"""


def say(text: str) -> None:
    """One line about what happens now."""
    print(f"tests/run.py: {text}", flush=True)


def interpreters() -> dict[tuple[int, int], str]:
    """The newest patch release of each CPython from 3.11 on, by minor version."""
    homes = {os.path.expanduser("~"), pwd.getpwuid(os.getuid()).pw_dir}
    pyenvs = {os.environ.get("PYENV_ROOT", ""), *(f"{home}/.pyenv" for home in homes)}
    patterns = [f"{pyenv}/versions/*/bin" for pyenv in pyenvs if pyenv]
    patterns += [f"{home}/.local/share/uv/python/*/bin" for home in homes]
    patterns += ["/usr/local/bin", "/usr/bin", "/opt/bin", "/opt/*/bin", "/opt/*/*/bin"]
    patterns += ["/opt/hostedtoolcache/Python/*/*/bin"]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    for pattern in patterns:
        folders += sorted(glob.glob(pattern))
    candidates = [sys.executable]
    for folder in folders:
        candidates += sorted(glob.glob(f"{folder}/python3*"))
    best: dict[tuple[int, int], tuple[int, str]] = {}
    seen: set[str] = set()
    for candidate in candidates:
        name = os.path.basename(candidate)
        # Shims are one file under many names and answer by name, so the name belongs to the key.
        key = os.path.realpath(candidate) + "\0" + name
        if key in seen or not (candidate is sys.executable or NAME.fullmatch(name)):
            continue
        seen.add(key)
        try:
            answer = subprocess.run(
                [candidate, "-I", "-c", PROBE],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
                cwd="/",
            ).stdout.split(None, 3)
        except (OSError, subprocess.SubprocessError):
            continue
        if len(answer) != 4:
            continue
        major, minor, patch = (int(part) for part in answer[:3])
        if (major, minor) >= OLDEST and patch > best.get((major, minor), (-1, ""))[0]:
            best[major, minor] = (patch, answer[3].strip())
    return {version: path for version, (_, path) in sorted(best.items())}


def install_system_packages() -> None:
    """Install the packages of TOOLS that are missing, or say why that can not be done."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [pkgs for tool, pkgs in TOOLS.items() if not shutil.which(tool, path=path)]
    wanted = sorted({pkg for pkgs in missing for pkg in pkgs})
    if not wanted:
        return
    apt_install(wanted)


def apt_install(packages: list[str]) -> bool:
    """apt-get install `packages`; False, and a line that says so, where that is not possible."""
    if os.getuid() != 0 or not shutil.which("apt-get"):
        say(f"missing: {' '.join(packages)}; installing them takes root and apt-get")
        return False
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages],
    ):
        say(" ".join(command))
        if subprocess.run(command, stdin=subprocess.DEVNULL, env=environ, check=False).returncode:
            say(f"failed: {' '.join(command)}")
            return False
    return True


def prepare_tox(pythons: list[str], *, may_install: bool) -> str:
    """The python of a virtual environment that holds tox, made now unless it is there."""
    python = os.path.join(RUNNER, "bin", "python")
    ready = "import sys, tox; sys.exit(tox.version.version_tuple < (4, 30))"
    if os.path.exists(python) and succeeds([python, "-I", "-c", ready]):
        return python
    # A Debian python3 has no ensurepip until python3-venv is there; another one may have it.
    able = [path for path in pythons if succeeds([path, "-I", "-c", "import ensurepip, venv"])]
    if not able and may_install and apt_install(["python3-venv"]):
        able = pythons
    if not able:
        sys.exit(
            "tests/run.py: no python here can make a virtual environment: install python3-venv"
            " (or run this with --system-packages as root)"
        )
    say(f"virtual environment for tox: {os.path.relpath(RUNNER, ROOT)} (by {able[0]})")
    run([able[0], "-m", "venv", "--clear", RUNNER])
    run([python, "-m", "pip", "install", "--quiet", TOX])
    return python


def succeeds(command: list[str]) -> bool:
    """Whether `command` ends with status 0; its output is of no interest."""
    return not subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


def run(command: list[str]) -> None:
    """Run a step of the set-up; its failure ends this script with a line that names it."""
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"tests/run.py: failed: {' '.join(command)}")


def start_tox(command: list[str], output: int | IO[str]) -> subprocess.Popen[str]:
    """Start tox."""
    environ = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def pass_on(lines: Iterable[str]) -> list[str]:
    """Print the output of a tox as it comes; the closing lines of pytest in it, by name."""
    closing: list[str] = []
    name = ""
    for line in lines:
        print(line, end="", flush=True)
        started = re.match(r"(\S+): commands\[\d+\]> ", line)
        name = started[1] if started else name
        if re.fullmatch(r"=+ (?=.*\d+ \w+).* in [\d.]+s.* =+", line.strip()):
            closing.append(f"{name}: {line.strip(' =' + chr(10))}")
    return closing


def run_tox(command: list[str], beside: list[str]) -> int:
    """Run tox, and `beside` it another one if there is one, whose output is shown at the end."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        other = start_tox(beside, said) if beside else None
        process = start_tox(command, subprocess.PIPE)
        try:
            assert process.stdout is not None
            closing = pass_on(process.stdout)
            status = process.wait()
            if other is not None:
                status = other.wait() or status
                said.seek(0)
                closing = [*pass_on(said), *closing]
        finally:
            for one in filter(None, (process, other)):
                one.terminate()
                one.wait()
    print()
    for line in closing:
        say(line)
    return status


def main() -> int:
    """Parse the arguments, find interpreters, prepare tox, run it."""
    parser = argparse.ArgumentParser(description="Run the tests of ghostpool.")
    parser.add_argument("-e", "--env", help="environments of tox.ini, comma-separated")
    parser.add_argument("-l", "--list", action="store_true", help="list the interpreters found")
    parser.add_argument(
        "--system-packages",
        action="store_true",
        default=os.environ.get("GHOSTPOOL_SYSTEM_PACKAGES") == "1",
        help="install missing system packages (apt-get, as root) that some tests need",
    )
    parser.add_argument("posargs", nargs="*", metavar="-- ARG", help="passed on to the command")
    options = parser.parse_args()
    began = time.monotonic()

    found = interpreters()
    for (major, minor), path in found.items():
        say(f"python {major}.{minor}: {path}")
    if not found:
        sys.exit("tests/run.py: no CPython from 3.11 on was found")
    if options.list:
        return 0
    if options.system_packages:
        install_system_packages()
    python = prepare_tox(list(found.values()), may_install=options.system_packages)

    tox = [python, "-m", "tox", "run", "--skip-missing-interpreters", "false"]
    tox += ["--discover", *found.values()]
    if options.env:
        names, others, beside = options.env, "", []
    else:
        # Two rows of about the same length, each of which keeps one CPU busy: what is run once
        # beside what every interpreter runs.
        names = ",".join(f"py{major}{minor}" for major, minor in found)
        others = ",".join([*STATIC, BESIDE])
        beside = [*tox, "--workdir", os.path.join(ROOT, ".tox", ".beside"), "-e", others]
    status = run_tox(
        [*tox, "-e", names, *(["--", *options.posargs] if options.posargs else [])], beside
    )
    names += f",{others}" if beside else ""
    say(f"{'passed' if status == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s: {names}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The rivals: ghostpool's own command, one process in C, and what a shell can do.

The program in C does the whole job, from the images to the last name that is gone. The shell gets
its ghosts as plain files with owner and times, already taken out of the images, and nobody holds
what it restores: it does less than ghostpool, which is in its favour. In bulk it enters the
namespace once and copies, links and removes all ghosts of a mount at a time; one by one it enters
the namespace for each ghost and opens it, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.images import Shape, content_of, name_of
from bench.scene import BenchError

_OWNER = 1000
_TIMES = (1_600_000_000, 1_500_000_000)

_COMPILE = ("cc", "-O2", "-Wall", "-Wextra")

_LIBRARY = """
import sys
import anyio
import ghostpool
async def main(images, jobs, pid, strategy):
    async with ghostpool.restore(images, tree=int(pid), jobs=int(jobs), strategy=strategy):
        pass
anyio.run(main, *sys.argv[1:4], sys.argv[5], backend=sys.argv[4])
"""

# $1 directory of the mount points, $2 directory of the plain files; both hold one per mount.
_BULK = """
set -e
for source in "$2"/*; do
    mount="$1/${source##*/}"
    mount -o remount,bind,rw "$mount"
    cd "$mount"
    mkdir .new
    cp -p "$source"/* .new/
    cp -l .new/* .
    rm -r .new f*
    mount -o remount,bind,ro "$mount"
done
"""

# $1 pid, $2 and $3 as above; the inner script gets mount point, plain file and name.
_ONE_BY_ONE = """
set -e
for source in "$3"/*; do
    for file in "$source"/*; do
        nsenter -t "$1" -m sh -ec '
            mount -o remount,bind,rw "$1"
            cp -p "$2" "$1/.new"
            ln "$1/.new" "$1/$3"
            : < "$1/$3"
            rm "$1/$3" "$1/.new"
            mount -o remount,bind,ro "$1"
        ' sh "$2/${source##*/}" "$file" "${file##*/}"
    done
done
"""

# $1 pid, $2 directory of the mount points; the rest is a command that keeps its ghosts.
_CLEANED = """
set -e
pid=$1 base=$2
shift 2
"$@"
nsenter -t "$pid" -m sh -ec '
    for mount in "$1"/m*; do
        mount -o remount,bind,rw "$mount"
        find "$mount" -type f -delete
        mount -o remount,bind,ro "$mount"
    done
' sh "$base"
"""


def ghostpool(
    images: Path,
    *,
    jobs: int,
    pid: int | None = None,
    pids: Sequence[int] = (),
    strategy: str = "remount",
    keep: bool = False,
) -> list[str]:
    """The whole command.

    `pid` or `pids`: whose mount namespaces those of the images are, in their order; without any
    it rebuilds them from the images.
    """
    command = [sys.executable, "-m", "ghostpool", "restore", "-D", str(images), "-j", str(jobs)]
    for target in _targets(pids if pid is None else [pid]):
        command += ["--ns", target]
    return [*command, "--strategy", strategy, "--keep" if keep else "--discard"]


def library(
    images: Path, *, jobs: int, pid: int, backend: str, strategy: str = "remount"
) -> list[str]:
    """The same from a program that has the descriptors for a moment, on an event loop."""
    arguments = [str(images), str(jobs), str(pid), backend, strategy]
    return [sys.executable, "-c", _LIBRARY, *arguments]


def compile_c(scratch: Path) -> Path:
    """The program in C, compiled once for each scratch directory. BenchError: it can not be."""
    program = scratch / "rival"
    if not program.exists():
        run([*_COMPILE, "-o", str(program), str(Path(__file__).with_name("rival.c"))])
    return program


def c(
    program: Path,
    images: Path,
    *,
    pid: int | None = None,
    pids: Sequence[int] = (),
    strategy: str = "clone",
    keep: bool = False,
) -> list[str]:
    """One process in C for the whole job: bench/rival.c. `strategy` is clone or remount."""
    targets = _targets(pids if pid is None else [pid])
    return [str(program), strategy, "keep" if keep else "discard", str(images), *targets]


def cleaned(command: Sequence[str], pid: int, shape: Shape) -> list[str]:
    """A command that keeps its ghosts by name, and their removal, which takes the same for all."""
    return ["sh", "-c", _CLEANED, "sh", str(pid), os.fsdecode(shape.base), *command]


def _targets(pids: Sequence[int]) -> list[str]:
    return [f"{Shape(0).namespace_id(number)}={pid}" for number, pid in enumerate(pids)]


def shell_bulk(pid: int, shape: Shape, files: Path) -> list[str]:
    """One nsenter for everything."""
    script = ["sh", "-c", _BULK, "sh", os.fsdecode(shape.base), str(files)]
    return ["nsenter", "-t", str(pid), "-m", *script]


def shell_one_by_one(pid: int, shape: Shape, files: Path) -> list[str]:
    """One nsenter for each ghost."""
    return ["sh", "-c", _ONE_BY_ONE, "sh", str(pid), os.fsdecode(shape.base), str(files)]


def write_files(directory: Path, shape: Shape) -> Path:
    """The ghosts of `shape` (one namespace, no directories) as plain files, by mount."""
    content = content_of(shape)
    directory.mkdir()
    for mount in range(min(shape.mounts, shape.ghosts)):
        (directory / os.fsdecode(os.path.basename(shape.mountpoint(mount)))).mkdir()
    for ghost in range(shape.ghosts):
        point = os.path.basename(shape.mountpoint(shape.place(ghost).mount))
        path = directory / os.fsdecode(point) / os.fsdecode(name_of(ghost))
        path.write_bytes(content[: shape.size])
        os.chown(path, _OWNER, _OWNER)
        os.utime(path, _TIMES)
    return directory


def run(command: Sequence[str]) -> None:
    """Run a command to its end. BenchError: it failed."""
    try:
        done = _finished(command)
    except OSError as error:
        raise BenchError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        shown = " ".join(command[:8]).replace("\n", " ")
        raise BenchError(f"{shown} …: status {done.returncode}: {done.stderr.strip()[-500:]}")


def _finished(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )

"""The list of all steps of a restore, from the code itself.

A worker's step is an assignment `self._step = "..."` (or `_undo_step`, for what takes a failed
operation back) ahead of a system call; a scan of the syntax trees of the children's side finds
them all, and every call that has none before it. What is left out says why, in one table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ghostpool

SOURCES = Path(ghostpool.__file__).parent

SCANNED = (
    "_binding",
    "_command",
    "_creating",
    "_directories",
    "_filling",
    "_finding",
    "_forkserver",
    "_guardian",
    "_journal",
    "_mountwork",
    "_opening",
    "_removing",
    "_uncovering",
    "_worker",
)

NOT_SCANNED = {
    "_capabilities": "capset(2) inside one's own sets; a refusal fails the request, or the child",
    "_build": "works in private namespaces, which are gone with it",
    "_buildfiles": "as _build",
    "_buildspec": "no system call",
    "_confine": "the reader's own: a layer that can not be had is told, and the others hold",
    "_descriptors": "one step of its caller: dup2",
    "_failed": "no system call",
    "_sweeping": "looks, for clean alone; what it can not look at is told, and nothing was changed",
    "_identity": "reads of /proc that a guardian does without",
    "_mountinfo": "no system call",
    "_seal": "no system call",
    "_usermaps": "before anything is changed: as a fork server that can not fork",
    "_protocol": "a channel that fails is an end that died: the columns of SIGKILL",
}

EXEMPT = {
    ("_journal", "read"): "the coordinator's and recover's, which say what they can not read",
    ("_worker", "main"): "before the first request: as a worker killed at its first call",
    ("_worker", "_last_words"): "getrusage(2) of oneself can not fail",
    (
        "_forkserver",
        "main",
    ): "before anything was changed: as if killed at the first fork",
    ("_forkserver", "_build_namespaces"): "as _build",
    ("_forkserver", "_reap"): "waitpid(2) of a child that has ended",
    ("_forkserver", "_become"): "closes, and says what went wrong",
    ("_command", "_execute"): "one step of its caller: execve",
    ("_command", "refuse_magic_links"): "looks, in a child that has changed nothing",
    ("_command", "_is_regular"): "as refuse_magic_links",
    ("_filling", "_read_all"): "one step of its caller: read of the image",
    ("_guardian", "main"): "before it is told of anything that is owed",
    ("_guardian", "_say"): "nothing depends on what it says",
    ("_journal", "pending"): "of the coordinator, before it changes anything",
    ("_journal", "remove"): "one step of its caller: unlinkat",
    ("_journal", "discard"): "one step of its caller: unlinkat",
}

# What a call of the children's side asks the kernel for; the step before it has one of the names.
CALLS = {
    "open": ("read",),
    "os.chmod": ("fchmodat",),
    "os.chown": ("fchownat",),
    "os.chroot": ("chroot",),
    "os.dup": ("dup",),
    "os.execve": ("execve",),
    "os.fchdir": ("fchdir",),
    "os.fchmod": ("fchmod",),
    "os.fchown": ("fchown",),
    "os.fdatasync": ("fdatasync",),
    "os.fork": ("fork",),
    "os.fstat": ("fstat",),
    "os.fstatvfs": ("fstatvfs",),
    "os.fsync": ("fsync",),
    "os.ftruncate": ("ftruncate",),
    "os.link": ("linkat",),
    "os.lseek": ("lseek",),
    "os.mkdir": ("mkdirat",),
    "os.mknod": ("mknodat",),
    "os.open": ("openat", "open of the image"),
    "os.pidfd_open": ("pidfd_open",),
    "os.pread": ("read of the image",),
    "os.read": ("read of the image",),
    "os.rename": ("renameat",),
    "os.rmdir": ("rmdir",),
    "os.set_blocking": ("fcntl",),
    "os.stat": ("fstatat",),
    "os.symlink": ("symlinkat",),
    "os.unlink": ("unlinkat",),
    "os.write": ("write to the pipe",),
    "os.utime": ("utimensat",),
    "_descriptors.place": ("dup2",),
    "fcntl.fcntl": ("fcntl of the pipe",),
    "fcntl.flock": ("flock",),
    "_linux.fsconfig": ("fsconfig",),
    "_linux.fsmount": ("fsmount",),
    "_linux.fsopen": ("fsopen",),
    "_linux.lchown_fd": ("fchownat",),
    "_linux.mount": ("mount",),
    "_linux.mount_identity": ("statx",),
    "_linux.mount_setattr": ("mount_setattr",),
    "_linux.open_tree": ("open_tree",),
    "_linux.openat2": ("openat2",),
    "_linux.renameat2": ("renameat2",),
    "_linux.setns": ("setns",),
    "_linux.statmount": ("statmount",),
    "_linux.umount2": ("umount2",),
    "_linux.unshare": ("unshare",),
    "_linux.utimens_fd": ("utimensat",),
    "_linux.write_all": ("pwrite",),
}

# No step: they can not fail, or nothing could be done about it.
HARMLESS = {
    "_linux.close_all",
    "_linux.mount_flags_of",
    "os._exit",
    "os.close",
    "os.getegid",
    "os.geteuid",
    "os.getpid",
    "os.getppid",
    "os.kill",  # of a child that has not been waited for
    "os.strerror",
    "os.waitpid",
    "os.waitstatus_to_exitcode",
}


class Step(NamedTuple):
    """One place where a system call is made."""

    module: str
    function: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.name}"


class Scan(NamedTuple):
    """What the source of the children's side says."""

    steps: frozenset[Step]
    missing: tuple[str, ...]
    """Calls without their step before them."""


def scan() -> Scan:
    """All steps of the modules that are scanned, and what is wrong with them."""
    steps: set[Step] = set()
    missing: list[str] = []
    for module in SCANNED:
        tree = ast.parse((SOURCES / f"{module}.py").read_text(encoding="utf-8"))
        for function in _functions(tree):
            found, lacking = scan_function(module, function)
            steps |= found
            missing += lacking
    return Scan(frozenset(steps), tuple(missing))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def scan_function(module: str, function: ast.FunctionDef) -> tuple[set[Step], list[str]]:
    """Steps of one function, and its calls that have none."""
    steps: set[Step] = set()
    missing: list[str] = []
    current = ""
    nodes = [node for node in ast.walk(function) if isinstance(node, (ast.Assign, ast.Call))]
    # An assignment to a step comes before the call that is next in the source.
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Assign):
            name = _step_of(node)
            if name is not None:
                current = name
                steps.add(Step(module, function.name, name))
            continue
        called = ast.unparse(node.func)
        if (module, function.name) in EXEMPT or called in HARMLESS:
            continue
        wanted = CALLS.get(called)
        if wanted is None:
            if called.startswith(("os.", "fcntl.", "_linux.")) and not called.startswith(
                "os.path."
            ):
                missing.append(f"{module}:{node.lineno}: {called} is not in the table of calls")
        elif current not in wanted:
            missing.append(f"{module}:{node.lineno}: {called} after the step {current!r}")
    return steps, missing


def _step_of(node: ast.Assign) -> str | None:
    for target in node.targets:
        if isinstance(target, ast.Attribute) and target.attr in ("_step", "_undo_step"):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
            assert isinstance(node.value.value, str), ast.unparse(node)
            return node.value.value
    return None

"""Containers for tests: bundles of next to nothing, run without a change to the machine's mounts.

The runtime runs in a mount namespace of its own, with propagation cut, in which the machine's
control groups are a single cgroup2 mount, whatever they are outside: crun does without, runc makes
one group there and removes it again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNTIMES: Mapping[str, Sequence[str]] = {
    "crun": ("crun", "--cgroup-manager=disabled"),
    "runc": ("runc",),
}
_ALONE = """
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"
"""
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def program(name: str) -> str | None:
    """A command of the machine, of root's too."""
    return shutil.which(name, path=_PATH)


def make_bundle(
    directory: Path,
    argv: Sequence[str],
    *,
    mounts: Sequence[tuple[str, str]] = (),
    hooks: Mapping[str, Sequence[Sequence[object]]] | None = None,
) -> Path:
    """A container whose root holds busybox; `mounts` are tmpfs with these mount points and options.

    `hooks`: command lines by the name of the hook.
    """
    busybox = program("busybox")
    assert busybox is not None
    for name in ("bin", "dev", "proc", *(point.strip("/") for point, _ in mounts)):
        (directory / "rootfs" / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, directory / "rootfs/bin/busybox")
    (directory / "rootfs/bin/sh").symlink_to("busybox")
    capabilities = ["CAP_KILL", "CAP_NET_BIND_SERVICE"]
    config: dict[str, Any] = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "cwd": "/",
            "env": ["PATH=/bin"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            *(_tmpfs(point, options) for point, options in (("/dev", "nosuid"), *mounts)),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts")]},
        "hooks": {
            name: [
                {"path": str(line[0]), "args": [*map(str, line)], "env": [f"PATH={_PATH}"]}
                for line in lines
            ]
            for name, lines in (hooks or {}).items()
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tmpfs(point: str, options: str) -> dict[str, Any]:
    words = [*options.split(","), "mode=755"]
    return {"destination": point, "type": "tmpfs", "source": "tmpfs", "options": words}


def run_container(
    runtime: str, bundle: Path, *, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; nothing of it is left, whatever happens."""
    state = bundle / "state"
    name = f"ghostpool-test-{os.getpid()}"
    command = [*RUNTIMES[runtime], "--root", str(state)]
    alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ALONE, "sh"]
    env = {**os.environ, "PATH": _PATH}
    try:
        return subprocess.run(
            [*alone, *command, "run", "--bundle", str(bundle), name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=env,
        )
    finally:
        if state.exists() and os.listdir(state):
            delete = [*alone, *command, "delete", "--force", name]
            subprocess.run(delete, capture_output=True, check=False, env=env, timeout=timeout_s)


def lacks(runtime: str) -> str | None:
    """Why it can not run a container here, or None: one is run."""
    import tempfile

    missing = [name for name in (runtime, "busybox", "unshare", "mount") if not program(name)]
    if missing:
        return f"the command {missing[0]}"
    with tempfile.TemporaryDirectory() as directory:
        bundle = make_bundle(Path(directory), ["/bin/sh", "-c", "exit 7"])
        done = run_container(runtime, bundle)
    if done.returncode == 7:
        return None
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return f"containers of {runtime} ({said[-1]})"

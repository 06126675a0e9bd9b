"""Ghostpool restores CRIU ghost files into live mount namespaces.

This module only re-exports the public names, each imported on first use (PEP 562): a worker
process imports `ghostpool._worker`, which runs this file too, and must not pay for trio.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Type checkers take this as true; importing typing only for it would cost every worker.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ghostpool._errors import (
        BarrierBroken,
        CommandError,
        GhostpoolError,
        HostNamespace,
        ImageError,
        KernelError,
        MountNotFound,
        NamespaceNotFound,
        Overmounted,
        PlanError,
        ReadOnlySuperblock,
        RestoreError,
        RevertError,
        SandboxError,
        UnsupportedError,
        VerificationError,
        WorkerDied,
        WorkerHung,
    )

__all__ = [
    "BarrierBroken",
    "CommandError",
    "GhostpoolError",
    "HostNamespace",
    "ImageError",
    "KernelError",
    "MountNotFound",
    "NamespaceNotFound",
    "Overmounted",
    "PlanError",
    "ReadOnlySuperblock",
    "RestoreError",
    "RevertError",
    "SandboxError",
    "UnsupportedError",
    "VerificationError",
    "WorkerDied",
    "WorkerHung",
    "__version__",
]

_HOME_OF = dict.fromkeys(set(__all__) - {"__version__"}, "ghostpool._errors")


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

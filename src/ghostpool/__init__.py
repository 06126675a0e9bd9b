"""Ghostpool restores CRIU ghost files into live mount namespaces.

This module only re-exports the public names, each imported on first use (PEP 562): a worker
process imports `ghostpool._worker`, which runs this file too, and must not pay for trio.
"""

from __future__ import annotations

__version__ = "0.1.0"
"""As SemVer has it."""

# Type checkers take this as true; importing typing only for it would cost every worker.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ghostpool._barrier import TaskBarrier
    from ghostpool._blocking import run_restore
    from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
    from ghostpool._errors import (
        BarrierBroken,
        CommandError,
        ConsumerLost,
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
    from ghostpool._events import (
        Cleaned,
        Entered,
        Event,
        Failed,
        FileOpened,
        GhostCreated,
        Lost,
        MountWritable,
        Planned,
        Reverted,
        TaskArrived,
    )
    from ghostpool._followers import EventSink
    from ghostpool._lease import MountKernel, MountLeases
    from ghostpool._lease_table import LeaseState, LeaseStatistics, MountUsage
    from ghostpool._linux import Attr
    from ghostpool._makeplan import make_plan
    from ghostpool._match import Namespace, Site
    from ghostpool._model import (
        Descriptor,
        Extent,
        FifoData,
        Ghost,
        GhostId,
        Holder,
        ImageMount,
        Images,
        Linked,
        MntId,
        MountHandle,
        NsId,
        Pid,
        RegFile,
        RegId,
        Remap,
        Socket,
        Task,
    )
    from ghostpool._mountinfo import LiveMount
    from ghostpool._mounttable import MountTable
    from ghostpool._openimages import read_images
    from ghostpool._openleases import open_leases
    from ghostpool._openpool import GhostPool, open_pool
    from ghostpool._openrestore import RestoredRun, RestoredTask, restore
    from ghostpool._opensandbox import Sandbox
    from ghostpool._planned import (
        Opening,
        Plan,
        PlannedGhost,
        PlannedKey,
        PlannedLink,
        PlannedMount,
        PlannedOpen,
        PlannedTask,
        Privileged,
        Refusal,
    )
    from ghostpool._protocol import Found
    from ghostpool._report import Report
    from ghostpool._request import Options
    from ghostpool._restore import PoolTask
    from ghostpool._targets import Target

__all__ = [
    "Attr",
    "BarrierBroken",
    "Cleaned",
    "CommandError",
    "ConsumerLost",
    "Descriptor",
    "Entered",
    "Event",
    "EventSink",
    "Extent",
    "Failed",
    "FifoData",
    "FileOpened",
    "Found",
    "Ghost",
    "GhostCreated",
    "GhostId",
    "GhostPool",
    "GhostpoolError",
    "Holder",
    "HostNamespace",
    "ImageError",
    "ImageMount",
    "Images",
    "KernelError",
    "LeaseState",
    "LeaseStatistics",
    "Linked",
    "LiveMount",
    "Lost",
    "MntId",
    "MountHandle",
    "MountKernel",
    "MountLeases",
    "MountNotFound",
    "MountSpec",
    "MountTable",
    "MountUsage",
    "MountWritable",
    "Namespace",
    "NamespaceNotFound",
    "NamespaceSpec",
    "Node",
    "NsId",
    "Opening",
    "Options",
    "Overmounted",
    "Pid",
    "Plan",
    "PlanError",
    "Planned",
    "PlannedGhost",
    "PlannedKey",
    "PlannedLink",
    "PlannedMount",
    "PlannedOpen",
    "PlannedTask",
    "PoolTask",
    "Privileged",
    "ReadOnlySuperblock",
    "Refusal",
    "RegFile",
    "RegId",
    "Remap",
    "Report",
    "RestoreError",
    "RestoredRun",
    "RestoredTask",
    "RevertError",
    "Reverted",
    "Sandbox",
    "SandboxError",
    "Site",
    "Socket",
    "Target",
    "Task",
    "TaskArrived",
    "TaskBarrier",
    "UnsupportedError",
    "VerificationError",
    "WorkerDied",
    "WorkerHung",
    "__version__",
    "make_plan",
    "open_leases",
    "open_pool",
    "read_images",
    "restore",
    "run_restore",
]

# Each name, and the module it is in: the imports above, for whoever runs this file.
_HOME_OF = {
    "Attr": "_linux",
    "BarrierBroken": "_errors",
    "Cleaned": "_events",
    "CommandError": "_errors",
    "ConsumerLost": "_errors",
    "Descriptor": "_model",
    "Entered": "_events",
    "Event": "_events",
    "EventSink": "_followers",
    "Extent": "_model",
    "FifoData": "_model",
    "Failed": "_events",
    "FileOpened": "_events",
    "Found": "_protocol",
    "Ghost": "_model",
    "GhostCreated": "_events",
    "GhostId": "_model",
    "GhostPool": "_openpool",
    "GhostpoolError": "_errors",
    "Holder": "_model",
    "HostNamespace": "_errors",
    "ImageError": "_errors",
    "ImageMount": "_model",
    "Images": "_model",
    "KernelError": "_errors",
    "LeaseState": "_lease_table",
    "LeaseStatistics": "_lease_table",
    "Linked": "_model",
    "LiveMount": "_mountinfo",
    "Lost": "_events",
    "MntId": "_model",
    "MountHandle": "_model",
    "MountKernel": "_lease",
    "MountLeases": "_lease",
    "MountNotFound": "_errors",
    "MountSpec": "_buildspec",
    "MountTable": "_mounttable",
    "MountUsage": "_lease_table",
    "MountWritable": "_events",
    "Namespace": "_match",
    "NamespaceNotFound": "_errors",
    "NamespaceSpec": "_buildspec",
    "Node": "_buildspec",
    "NsId": "_model",
    "Opening": "_planned",
    "Options": "_request",
    "Overmounted": "_errors",
    "Pid": "_model",
    "Plan": "_planned",
    "PlanError": "_errors",
    "Planned": "_events",
    "PlannedGhost": "_planned",
    "PlannedKey": "_planned",
    "PlannedLink": "_planned",
    "PlannedMount": "_planned",
    "PlannedOpen": "_planned",
    "PlannedTask": "_planned",
    "PoolTask": "_restore",
    "Privileged": "_planned",
    "ReadOnlySuperblock": "_errors",
    "Refusal": "_planned",
    "RegFile": "_model",
    "RegId": "_model",
    "Remap": "_model",
    "Socket": "_model",
    "Report": "_report",
    "RestoreError": "_errors",
    "RestoredRun": "_openrestore",
    "RestoredTask": "_openrestore",
    "RevertError": "_errors",
    "Reverted": "_events",
    "Sandbox": "_opensandbox",
    "SandboxError": "_errors",
    "Site": "_match",
    "Target": "_targets",
    "Task": "_model",
    "TaskArrived": "_events",
    "TaskBarrier": "_barrier",
    "UnsupportedError": "_errors",
    "VerificationError": "_errors",
    "WorkerDied": "_errors",
    "WorkerHung": "_errors",
    "make_plan": "_makeplan",
    "open_leases": "_openleases",
    "open_pool": "_openpool",
    "read_images": "_openimages",
    "restore": "_openrestore",
    "run_restore": "_blocking",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"ghostpool.{_HOME_OF[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

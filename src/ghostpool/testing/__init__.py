"""What tests of code that uses ghostpool need: a fake kernel, namespaces to restore into, faults.

Three parts, from the cheapest: `FakeKernel` needs nothing; `private_namespace` and
`built_targets` make real mount namespaces, held by children of the test process; and
`injected_faults` lets a chosen system call of a real run fail, or its process die or stop there.
pytest finds the last three as fixtures (`ghostpool.testing.pytest_plugin`).

Each name is imported on first use, as in `ghostpool` itself: pytest loads the plugin, and a fork
server under test a module of this package, and neither must pay for an event loop.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ghostpool._buildspec import BuildError, MountSpec, NamespaceSpec, Node
    from ghostpool.testing._fake import Call, FakeKernel, Hook, Stage
    from ghostpool.testing._faults import Fault, Faults, Step, Victim, injected_faults
    from ghostpool.testing._namespace import Namespace, private_namespace
    from ghostpool.testing._snapshot import Entry, Snapshot
    from ghostpool.testing._targets import TargetFactory, Targets, built_targets

__all__ = [
    "BuildError",
    "Call",
    "Entry",
    "FakeKernel",
    "Fault",
    "Faults",
    "Hook",
    "MountSpec",
    "Namespace",
    "NamespaceSpec",
    "Node",
    "Snapshot",
    "Stage",
    "Step",
    "TargetFactory",
    "Targets",
    "Victim",
    "built_targets",
    "injected_faults",
    "private_namespace",
]

_HOMES = {
    "ghostpool._buildspec": ("BuildError", "MountSpec", "NamespaceSpec", "Node"),
    "ghostpool.testing._fake": ("Call", "FakeKernel", "Hook", "Stage"),
    "ghostpool.testing._faults": ("Fault", "Faults", "Step", "Victim", "injected_faults"),
    "ghostpool.testing._namespace": ("Namespace", "private_namespace"),
    "ghostpool.testing._snapshot": ("Entry", "Snapshot"),
    "ghostpool.testing._targets": ("TargetFactory", "Targets", "built_targets"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

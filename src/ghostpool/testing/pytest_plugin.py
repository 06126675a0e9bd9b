"""Fixtures for tests of code that uses ghostpool; pytest finds them by the entry point.

Every run of pytest where ghostpool is installed loads this module, before anything that measures
coverage: it imports nothing but pytest, and the fixtures import what they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ghostpool.testing import Faults, Namespace, NamespaceSpec, TargetFactory, Targets


def require(missing: str | None) -> None:
    """Skip the test if something is missing, and name it.

    Fail it where GHOSTPOOL_REQUIRE_ALL=1 says that this machine is meant to have everything.
    """
    if missing is None:
        return
    if os.environ.get("GHOSTPOOL_REQUIRE_ALL") == "1":
        pytest.fail(f"GHOSTPOOL_REQUIRE_ALL=1, but this lacks {missing}", pytrace=False)
    pytest.skip(f"lacks {missing}")


@pytest.fixture
def ghostpool_namespace() -> Iterator[Namespace]:
    """A private copy of the machine's mount namespace, held by a process: to restore into.

    Propagation is cut: nothing that is mounted there is seen outside. Needs root (CAP_SYS_ADMIN);
    the test is skipped without it.
    """
    from ghostpool.testing._missing import lacks_mount_namespaces
    from ghostpool.testing._namespace import private_namespace

    require(lacks_mount_namespaces())
    with private_namespace() as namespace:
        yield namespace


@pytest.fixture
def ghostpool_sandbox() -> Iterator[TargetFactory]:
    """Builds mount namespaces from lists of mounts, each held by a process until the test's end.

    Call it with one `NamespaceSpec` for each. Needs root (CAP_SYS_ADMIN); the test is skipped
    without it.
    """
    from ghostpool.testing._missing import lacks_mount_namespaces
    from ghostpool.testing._targets import built_targets

    require(lacks_mount_namespaces())
    with ExitStack() as stack:

        def build(*specs: NamespaceSpec) -> Targets:
            return stack.enter_context(built_targets(*specs))

        yield build


@pytest.fixture
def ghostpool_faults() -> Iterator[Faults]:
    """Lets a system call of a real run of the test process fail, or its process die or stop.

    A fault that the test asks for and that never happens is an error of the test.
    """
    from ghostpool.testing._faults import injected_faults

    with injected_faults() as faults:
        yield faults
        try:
            faults.check()
        except AssertionError as error:
            pytest.fail(str(error), pytrace=False)

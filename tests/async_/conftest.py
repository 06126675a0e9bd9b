"""Every test marked `anyio` runs on both event loops, and none of them may hang."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

import anyio
import pytest

LIMIT_S = 60
LONG_LIMIT_S = 900


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """A wake-up that got lost is what these tests look for: let it be a failure.

    Only those marked `anyio`: on the clock of a test for trio, time may jump.
    """
    if pyfuncitem.get_closest_marker("anyio") is not None:
        long = pyfuncitem.get_closest_marker("long") is not None
        pyfuncitem.obj = limited(pyfuncitem.obj, LONG_LIMIT_S if long else LIMIT_S)


def limited(test: Callable[..., Awaitable[None]], limit_s: float) -> Callable[..., Awaitable[None]]:
    @wraps(test)
    async def wrapper(*args: object, **kwargs: object) -> None:
        with anyio.fail_after(limit_s):
            await test(*args, **kwargs)

    return wrapper

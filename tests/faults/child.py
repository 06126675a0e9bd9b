"""The fork server of a run under test: the real one, with a fault put at one of its steps.

It is executed as the real one is. Descriptors (in Python's sense) on the class that all workers
share see every assignment of a step before the system call is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ghostpool import _forkserver, _guardian, _worker
from ghostpool._failed import Work
from tests.faults.act import act
from tests.faults.area import Area, Fault

BOOT = (
    "import sys; sys.path.append({{path!r}}); sys.path.append({tests!r}); "
    "from tests.faults import child as c; c.main(3, {area!r}, {coordinator!r}, {plan!r})"
)

Plan = Sequence[tuple[str, Fault]]
"""Steps, as they are noted, and what is to happen at the first arrival at each."""


class Noted:
    """A data descriptor in the place of `_step` or `_undo_step`."""

    def __init__(self, name: str, run: Run) -> None:
        self._name = name
        self._run = run

    def __get__(self, work: Any, owner: Any) -> Any:
        return self if work is None else work.__dict__.get(self._name, "")

    def __set__(self, work: Any, step: str) -> None:
        work.__dict__[self._name] = step
        frame = sys._getframe(1)
        module = frame.f_globals["__name__"].rpartition(".")[2]
        self._run.reached(f"{module}.{frame.f_code.co_name}: {step}")


class Run:
    """What this process of a run is doing."""

    def __init__(self, area: Area, coordinator: int, plan: Plan) -> None:
        self._area = area
        self._coordinator = coordinator
        self._plan = list(enumerate(plan))
        self._forks = 0
        self.request = "start"

    def reached(self, step: str) -> None:
        key = f"{self.request} {step}"
        self._area.note(key)
        for number, (wanted, fault) in self._plan:
            if key == wanted and self._area.take(number):
                act(self._area, fault, self._coordinator, os.getpid())

    def fork(self, original: Callable[[], int]) -> Callable[[], int]:
        """Every child of the fork server gets a region of its own."""

        def fork() -> int:
            self._forks += 1
            pid = original()
            if pid == 0:
                self._area.enter(self._forks, self.request)
                self.request = "start"
            return pid

        return fork


def _name_requests(run: Run) -> None:
    """Have `run.request` name what a worker, or the fork server, was asked for."""

    def named(name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            run.request = name
            return request(*arguments)

        return call

    def naming(original: Callable[..., None]) -> Any:
        def init(self: Any, *arguments: Any) -> None:
            original(self, *arguments)
            self._requests = {name: named(name, do) for name, do in self._requests.items()}

        return init

    for kind in (_worker.Worker, _guardian.Guardian):
        kind.__init__ = naming(kind.__init__)  # type: ignore[method-assign]
    handle = _forkserver.ForkServer._handle

    def handled(self: Any, request: Any, fds: list[int]) -> None:
        run.request = request[0]
        handle(self, request, fds)

    _forkserver.ForkServer._handle = handled  # type: ignore[method-assign]


def main(fd: int, path: str, coordinator: int, plan: Plan) -> None:
    """Serve as the fork server does, under observation."""
    area = Area(path)
    area.enter(0, "forkserver")
    run = Run(area, coordinator, plan)
    os.fork = run.fork(os.fork)
    _name_requests(run)
    for name in ("_step", "_undo_step"):
        setattr(Work, name, Noted(name, run))
    _forkserver.main(fd)

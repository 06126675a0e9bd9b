"""Spans of real restores, as OpenTelemetry's own SDK gets them; and nothing without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

import ghostpool
from ghostpool import _tracing
from tests.kernel.test_events import FILES, GHOSTS, NAMESPACES, TASKS, restoring
from tests.support.restore import ghostpool as run
from tests.support.scene import Scene, scene

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path / "img", NAMESPACES, TASKS, FILES) as one:
        yield one


class Exported:
    """A tracer provider of the test, in place of the process's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        provider = TracerProvider(shutdown_on_exit=False, **options)
        self._exporter = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("the program")
        # A process can set its provider but once.
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    @property
    def spans(self) -> list[ReadableSpan]:
        """By their beginnings."""
        return sorted(self._exporter.get_finished_spans(), key=lambda one: one.start_time or 0)

    def named(self, name: str) -> ReadableSpan:
        (found,) = (one for one in self.spans if one.name == f"ghostpool.{name}")
        return found

    def phases(self) -> list[str]:
        names = (one.name.removeprefix("ghostpool.") for one in self.spans)
        return [name for name in names if name not in ("restore", "task", "program")]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    return Exported(monkeypatch)


def check_tree(exported: Exported) -> None:
    """One root, and everything else right below it and in its time; phases follow one another."""
    root = exported.named("restore")
    below = [one for one in exported.spans if one is not root and one.name != "program"]
    assert root.start_time is not None
    assert root.end_time is not None
    for one in below:
        assert one.parent == root.context
        assert one.start_time is not None
        assert one.end_time is not None
        assert root.start_time <= one.start_time <= one.end_time <= root.end_time
    phases = [one for one in below if one.name != "ghostpool.task"]
    for one, following in pairwise(phases):
        assert one.end_time == following.start_time


def noted(span: ReadableSpan) -> list[tuple[str, Any]]:
    return [(e.name, (e.attributes or {}).get("ghostpool.mountpoint")) for e in span.events]


async def test_a_restore(made: Scene, exported: Exported) -> None:
    with exported.tracer.start_as_current_span("program") as current:
        async with ghostpool.restore(made.images, namespaces=made.namespaces):
            assert trace.get_current_span() is current
    check_tree(exported)
    root = exported.named("restore")
    assert root.parent == current.get_span_context()
    assert root.status.status_code is StatusCode.UNSET
    assert root.events == ()
    assert dict(root.attributes or {}) == {
        "ghostpool.ghosts": GHOSTS,
        "ghostpool.files": GHOSTS,
        "ghostpool.tasks": NAMESPACES * TASKS,
        "ghostpool.mounts": NAMESPACES,
        "ghostpool.refusals": 0,
    }
    assert root.instrumentation_scope is not None
    assert root.instrumentation_scope.version == ghostpool.__version__
    assert exported.phases() == ["plan", "create", "open", "revert", "clean"]
    assert noted(exported.named("open")) == [("mount writable", "/data")] * NAMESPACES
    assert noted(exported.named("revert")) == [("mount reverted", "/data")] * NAMESPACES
    tasks = [dict(s.attributes or {}) for s in exported.spans if s.name == "ghostpool.task"]
    assert len(tasks) == NAMESPACES * TASKS
    assert {t["ghostpool.task"] for t in tasks} == set(made.contents)
    assert {t["ghostpool.files"] for t in tasks} == {FILES}


async def test_a_failure(made: Scene, exported: Exported) -> None:
    with pytest.raises(ExceptionGroup):  # noqa: PT012  what raises is the block
        async with (
            ghostpool.open_pool(made.images, namespaces=made.namespaces) as pool,
            pool.task(1) as task,
        ):
            await task.open_files()
            raise ZeroDivisionError("the program's own")
    check_tree(exported)
    root = exported.named("restore")
    assert (root.status.status_code, root.status.description) == (
        StatusCode.ERROR,
        "the program's own",
    )
    (event,) = root.events
    assert event.name == "exception"
    assert dict(event.attributes or {}) == {
        "exception.type": "ZeroDivisionError",
        "exception.message": "the program's own",
    }
    assert exported.phases() == ["plan", "create", "open", "undo"]
    states = {one.name.removeprefix("ghostpool."): one.status.status_code for one in exported.spans}
    failed = {name for name, state in states.items() if state is StatusCode.ERROR}
    assert failed == {"restore", "open", "task"}
    assert noted(exported.named("undo")) == [("mount reverted", "/data")]


async def test_a_refusal(made: Scene, exported: Exported) -> None:
    with pytest.raises(ExceptionGroup):
        async with ghostpool.restore(made.images, namespaces={99: 1}):
            pass
    check_tree(exported)
    assert exported.phases() == ["plan"]
    assert exported.named("plan").status.status_code is StatusCode.ERROR
    assert (exported.named("restore").events[0].attributes or {})["exception.type"] == (
        "NamespaceNotFound"
    )


def test_in_a_program_without_an_event_loop(made: Scene, exported: Exported) -> None:
    """The current span is that of the caller's thread."""
    with (
        exported.tracer.start_as_current_span("program") as current,
        ghostpool.run_restore(made.images, namespaces=made.namespaces),
    ):
        pass
    assert exported.named("restore").parent == current.get_span_context()


async def test_what_is_not_sampled(made: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody follows then: no event is made for it."""
    exported = Exported(monkeypatch, sampler=ALWAYS_OFF)
    assert _tracing.spans() == ()
    async with ghostpool.restore(made.images, namespaces=made.namespaces):
        pass
    assert exported.spans == []


def test_without_a_provider() -> None:
    """The API alone, which the tests have loaded."""
    assert _tracing._API in sys.modules
    assert _tracing.spans() == ()


_PROGRAM = """
import sys
import anyio
import ghostpool

async def main():
    async with ghostpool.restore(sys.argv[1], namespaces={10: sys.argv[2], 11: sys.argv[3]}):
        print(*sorted(name for name in sys.modules if name.startswith("opentelemetry")))

anyio.run(main)
"""


def test_who_does_not_trace_imports_nothing(made: Scene) -> None:
    """Although it is installed."""
    words = [made.images, *map(str, made.namespaces.values())]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


_SITE = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

provider = TracerProvider()
out = open({path!r}, "w")
exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(BatchSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""


def test_the_command(made: Scene, tmp_path: Path) -> None:
    """Set up by what starts the interpreter, as opentelemetry-instrument does; all is exported."""
    site, path = tmp_path / "site", tmp_path / "spans"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_SITE.format(path=str(path)))
    environment = {**os.environ, "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
    done = run(*restoring(made, "--discard"), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert names.count("ghostpool.task") == NAMESPACES * TASKS
    assert names[-1] == "ghostpool.restore"

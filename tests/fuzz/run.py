"""Running the readers on mutated images, and what must hold for every one of them.

- Nothing comes out but images, an ImageError or an UnsupportedError.
- What was read survives the way to the coordinator: rows and back give the same images.
- Hostile rows give an ImageError, or images; nothing else.
- No input takes a second, or more memory than 256 MiB above what the process had before.

A changed input that still gives images joins the corpus: that is what gets the mutations past the
first checks, and piles them up.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import random
import re
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ghostpool._errors import ImageError, UnsupportedError
from ghostpool._imagerows import Telling, rows_of
from ghostpool._images import read_source
from ghostpool._limits import Limits
from ghostpool._rebuild import Rebuild
from tests.fuzz.mutate import Mutator, mutate_rows
from tests.support.imagewriter import TTY, ImageSet, message
from tests.support.memory import MemorySource, load
from tests.support.older import big_endian, older
from tests.support.rss import peak_rss

CORPUS = Path(__file__).parents[1] / "corpus"
SLOW_S = 1.0
MEMORY = 256 << 20
ADDRESS_SPACE = 768 << 20
_EVERY = 8  # of so many inputs one is of rows
_TOO_LONG = 200_000  # bytes of a set that may join it
_NUMBERS = re.compile(r"b?'.*?'|b?\".*?\"|0x[0-9a-f]+|[0-9][0-9,]*|ghost-file-[0-9a-f]+")


@dataclass
class Outcome:
    """What a number of executions came to."""

    executions: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Executions by the kind of image that was changed; "rows" are those of the coordinator."""
    read: int = 0
    """Executions that gave images."""
    errors: Counter[str] = field(default_factory=Counter)
    """Distinct refusals, without the numbers in them."""
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""
    base_rss: int = 0
    peak_rss: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, other: Outcome) -> None:
        """Join what another process did."""
        self.executions += other.executions
        self.kinds += other.kinds
        self.read += other.read
        self.errors += other.errors
        self.crashes += other.crashes
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest = other.slowest_s, other.slowest
        if other.peak_rss - other.base_rss > self.peak_rss - self.base_rss:
            self.base_rss, self.peak_rss = other.base_rss, other.peak_rss
        self.cpu_s += other.cpu_s


class Hung(BaseException):
    """An execution did not end within seconds."""


def corpus() -> list[dict[str, bytes]]:
    """The real dumps but the one of many files, which only costs time; and what they lack."""
    cases = sorted(path for path in CORPUS.iterdir() if path.name != "13-many")
    types = load(CORPUS / "02-types" / "images")
    others = older(types, (3, 3)), older(types, (1, 3)), big_endian(types)
    return [*(load(case / "images") for case in cases), *others, *_made()]


def _made() -> list[dict[str, bytes]]:
    made = []
    for options in ({}, {"version": 1}, {"own_mounts": False, "own_user_namespace": True}):
        images = ImageSet(**options)
        images.task()
        images.task(2, zombie=True)
        images.task(3, threads=(4, 5), files_id=101)
        images.open(1, 3, "/gone", ghost=images.ghost(chunks=[(0, b"a"), (9, b"bc")], size=20))
        fifo = images.ghost(mode=0o10600)
        images.open_fifo(1, 5, "/fifo", ghost=fifo, pipe=9)
        images.fifo_data(9, b"pending")
        images.socket(1, 6, b"/run/gone\0")
        images.fd(1, 7, images.file(TTY, 90, (19, message((1, 90)))), kind=TTY)
        images.link(images.open(1, 8, "/linked"), "/")
        with tempfile.TemporaryDirectory() as directory:
            made.append(load(images.write(Path(directory))))
    return made


def documents(corpus: Sequence[Mapping[str, bytes]]) -> list[list[tuple[str, list[Any]]]]:
    """The frames in which the reader tells of each set."""
    return [rows_of(read_source("images", MemorySource(images))) for images in corpus]


def check(images: Mapping[str, bytes]) -> str:
    """Read one input; "" if it gives images, else the refusal. Any other exception is a crash."""
    frames: list[tuple[str, list[Any]]] = []
    telling = Telling(lambda kind, rows: frames.append((kind, rows)))
    try:
        found = read_source("images", MemorySource(images), None, telling)
    except ImageError as error:
        return f"{error.file}: {error.problem}"
    except UnsupportedError as error:
        return str(error)
    rebuild = Rebuild("images", Limits())
    telling.finish(found)
    for frame in frames:
        rebuild.add(frame)
    assert rebuild.images() == found, "the way through rows changed the images"
    few = read_source("images", MemorySource(images), all_mounts=False)
    rebuild = Rebuild("images", Limits(), all_mounts=False)
    for frame in rows_of(few):
        rebuild.add(frame)
    assert rebuild.images() == few, "the way through rows changed the images, with few mounts"
    assert few._replace(mounts=found.mounts) == found, "few mounts changed the rest of the images"
    return ""


def check_rows(frames: list[Any]) -> str:
    """Rebuild images from hostile frames; the refusal, or ""."""
    rebuild = Rebuild("images", Limits())
    try:
        for frame in frames:
            rebuild.add(frame)
        rebuild.images()
    except ImageError as error:
        return error.problem
    return ""


def run(executions: int, seed: int, crashes: str | None = None) -> Outcome:
    """So many executions in this process; the same ones for the same seed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, hard))
    found = corpus()
    mutator = Mutator(seed, found)
    rng = random.Random(seed + 1)
    rows = documents(found)
    outcome = Outcome(base_rss=peak_rss())
    cpu = time.process_time()
    alarm = _Alarm(outcome)
    gc.disable()
    try:
        for number in range(executions):
            if number % 20_000 == 0:
                gc.collect()
            work: Callable[[], str]
            if number % _EVERY == 0:
                frames = mutate_rows(rng, rng.choice(rows))
                kind, images = "rows", {"rows": repr(frames).encode(errors="backslashreplace")}
                work = lambda: check_rows(frames)  # noqa: B023, E731  called in this round
            else:
                kind, images = mutator.draw()
                work = lambda: check(images)  # noqa: B023, E731
            outcome.kinds[kind] += 1
            outcome.executions += 1
            start = time.process_time()
            try:
                said = work()
            except (Exception, Hung) as error:  # noqa: BLE001  that is what is looked for
                outcome.crashes.append(_crash(images, traceback.format_exc(), crashes))
                said = f"CRASH {type(error).__name__}"
            took = time.process_time() - start
            if took > outcome.slowest_s:
                outcome.slowest_s, outcome.slowest = took, f"{kind}: {said[:100] or 'read'}"
                if took > SLOW_S:
                    outcome.crashes.append(_crash(images, f"took {took:.1f} s", crashes))
            grown = (peak := peak_rss()) - outcome.base_rss
            if grown > MEMORY and peak > outcome.peak_rss:
                outcome.crashes.append(_crash(images, f"memory grew by {grown} bytes", crashes))
            outcome.peak_rss = max(outcome.peak_rss, peak)
            if said:
                outcome.errors[_NUMBERS.sub("N", said)] += 1
                continue
            outcome.read += 1
            if kind != "rows" and sum(map(len, images.values())) < _TOO_LONG:
                mutator.keep(images)
    finally:
        alarm.stop()
        gc.enable()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    outcome.cpu_s = time.process_time() - cpu
    return outcome


def run_piece(piece: tuple[int, int, str | None]) -> Outcome:
    """`run` with its arguments in one."""
    return run(*piece)


def replay(path: Path) -> str:
    """Run a kept input again; the refusal, or "" if it gives images."""
    document = json.loads(path.read_text())
    return check({name: base64.b64decode(data) for name, data in document["images"].items()})


class _Alarm:
    """Raises Hung in an execution that sees two ticks of the clock."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._seen = -1
        self._previous = signal.signal(signal.SIGVTALRM, self._tick)
        signal.setitimer(signal.ITIMER_VIRTUAL, 5, 5)

    def _tick(self, _: int, __: FrameType | None) -> None:
        if self._seen == self._outcome.executions:
            raise Hung
        self._seen = self._outcome.executions

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, self._previous)


def _crash(images: Mapping[str, bytes], reason: str, directory: str | None) -> str:
    """Keep the input that caused it: a JSON document that tests/unit/test_fuzz.py can replay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # the input may be what is large
    text = {name: base64.b64encode(data).decode() for name, data in images.items()}
    document = json.dumps({"reason": reason, "images": text}, indent=1)
    name = hashlib.sha256(document.encode()).hexdigest()[:16]
    if directory is not None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(document + "\n")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return f"{name}: {reason.strip().splitlines()[-1]}"

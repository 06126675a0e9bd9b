"""The fuzzer in small: no input breaks a rule, and one that did would be noticed and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostpool._imagefile import Window
from ghostpool._images import read_source
from ghostpool._model import Images
from tests.fuzz import run as fuzz
from tests.fuzz.mutate import Mutator
from tests.support.memory import MemorySource

ROOT = Path(__file__).parents[2]
CRASHES = sorted((ROOT / "tests" / "fuzz" / "crashes").glob("*.json"))


def test_what_was_found_once() -> None:
    """Inputs that broke a rule in the past, as the fuzzer has written them, are refused or read."""
    for path in CRASHES:
        fuzz.replay(path)


def test_no_input_breaks_a_rule(tmp_path: Path) -> None:
    """A few seconds of it; `python -m tests.fuzz` runs as long as one likes."""
    figures = tmp_path / "figures.json"
    arguments = ("--executions", "6000", "--seed", "20", "--json", str(figures))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments, "--crashes", str(tmp_path / "crashes")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(figures.read_text())
    assert outcome["executions"] == 6000
    assert outcome["crashes"] == []
    assert outcome["read"] > 500, "hardly anything got through"
    assert len(outcome["errors"]) > 200, "hardly any check was reached"
    assert min(outcome["kinds"].values()) > 20


def test_a_seed_is_a_run() -> None:
    first, second, other = (fuzz.run(300, seed) for seed in (3, 3, 4))
    assert (first.errors, first.kinds) == (second.errors, second.kinds)
    assert first.errors != other.errors


def test_reading_singly_is_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are taken in bulk, and a ghost image by one read, as long as nothing is wrong."""

    class Singly(MemorySource):
        def first(self, *_: object) -> None:
            return None

    mutator = Mutator(7, fuzz.corpus())
    drawn = [mutator.draw()[1] for _ in range(1500)]
    drawn = [images for images in drawn if sum(map(len, images.values())) < 1 << 20]
    at_once = [fuzz.check(images) for images in drawn]
    monkeypatch.setattr(Window, "records", lambda _, at: ([], at))
    monkeypatch.setattr(fuzz, "MemorySource", Singly)
    singly = [fuzz.check(images) for images in drawn]
    assert at_once == singly
    assert len(set(singly)) > 100


def test_a_mistake_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets another exception through is caught, with the input that did it."""

    def faulty(*arguments: Any, **options: Any) -> Images:
        images = read_source(*arguments, **options)
        if len(images.ghosts) % 2:
            raise KeyError("mistake")
        return images

    monkeypatch.setattr(fuzz, "documents", lambda _: [[("end", [])]])
    monkeypatch.setattr(fuzz, "read_source", faulty)
    outcome = fuzz.run(300, 1, str(tmp_path))
    assert outcome.crashes
    assert "KeyError: 'mistake'" in outcome.crashes[0]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) >= 1
    with pytest.raises(KeyError):
        fuzz.replay(kept[0])
    monkeypatch.undo()
    assert fuzz.replay(kept[0]) == ""

"""The report is made of what was run, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import reliability
from tests.reliability import Missing, Part, missing_parts, run_part, section_of


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Part]:
    """A part that runs the given code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(code: str) -> Part:
        (tmp_path / "some_evidence.py").write_text(f"import sys\n{code}\n")
        return Part("Title", "It says.", "some_evidence", ("-q",), ())

    return make


def test_a_part_that_is_not_there_is_named() -> None:
    parts = [
        Part("Title", "", module, (), ())
        for module in ("tests.matrix", "tests.no_such_part", "tests.faults", "pytest")
    ]
    assert missing_parts(parts) == ["tests.no_such_part", "tests.faults"]


def test_no_report_without_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reliability, "missing_parts", lambda: ["tests.gone"])
    assert reliability.main(["--write", str(tmp_path / "report.md")]) == 1
    assert "tests.gone missing" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_a_part_is_shown_as_it_was(part: Callable[[str], Part], tmp_path: Path) -> None:
    code = """print("7 of 7"); open(sys.argv[-1].partition("=")[2], "w").write('{"runs": 7}')"""
    section = run_part(part(code), False, tmp_path)
    assert "### Title\n\nIt says.\n\n`python -m some_evidence -q`, " in section
    assert section.endswith("```text\n7 of 7\n```\n")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("sys.exit(3)", "status 3"),
        ("pass", "wrote no results"),
        ("open(sys.argv[-1].partition('=')[2], 'w').write('{}')", "the results are empty"),
    ],
)
def test_a_part_that_shows_nothing_is_no_evidence(
    part: Callable[[str], Part], tmp_path: Path, code: str, problem: str
) -> None:
    with pytest.raises(Missing, match=problem):
        run_part(part(code), False, tmp_path)


def test_a_section_is_about_the_sources_that_it_was_made_with(
    part: Callable[[str], Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os
print("made by", os.getpid())
open(sys.argv[-1].partition("=")[2], "w").write('{"runs": 7}')"""
    made = part(code)
    first = section_of(made, False, tmp_path)
    assert section_of(made, False, tmp_path) == first
    monkeypatch.setattr(reliability, "sources", lambda _: "others")
    assert section_of(made, False, tmp_path) != first


def test_tests_that_were_not_there_are_no_evidence(tmp_path: Path) -> None:
    arguments = ("-q", "-k", "no_such_test", "tests/model")
    none = Part("Title", "", "pytest", arguments, (), output="--junitxml")
    with pytest.raises(Missing, match="status 5"):
        run_part(none, False, tmp_path)


def test_the_template_has_a_place_for_everything() -> None:
    text = reliability.TEMPLATE.read_text(encoding="utf-8")
    assert text.count("{machine}") == text.count("{parts}") == 1

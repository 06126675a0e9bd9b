"""A page says what was measured, and what is so of it; a run that stops can be gone on with."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as command
from bench import page, plots, record, sweeps
from bench.measure import Answer, Setting
from bench.profile import PHASES, split
from bench.scene import BenchError
from bench.targets import TARGETS, judge

CHECKOUT = Path(__file__).parents[2]
ONE, MANY = "1 ghost, remount, 1 job", "10,000 ghosts, remount, 1 job"

# The promises, once more: a limit that is moved to where a measurement is fails here.
LIMITS = {
    "slope: 1 job over C": 1.5,
    "slope: 2 jobs over C": 0.85,
    "many: 16 namespaces over C": 1.2,
    "many: many namespaces over few": 1.3,
    "leased: many mounts over few": 1.15,
    "mounts: command over mountinfo": 2.5,
    "start: command over imports": 1.5,
    "big: over cp": 1.05,
    "big: sparse over cp": 1.1,
    "guard: share of safety": 0.15,
    "memory: coordinator MiB": 120,
    "memory: worker PSS MiB": 6,
    "writable: made writable before its first ghost is ready": 0,
    "loop: worst gap ms": 50,
}


def answer(name: str, **figures: float) -> Answer:
    """An answer with one row."""
    samples = {"a rival": [0.5, 0.25]}
    return Answer(
        name, f"is {name} well?", ("rival", "s"), [("a rival", "0.5")], samples, [], figures
    )


def profiled() -> Answer:
    """A profile in which opening takes most of what grows, and the start most of one ghost."""
    shares = dict.fromkeys((phase.name for phase in PHASES), 0.01)
    figures = {f"{ONE}: {name}": share for name, share in (shares | {"start": 0.9}).items()}
    for name, share in (shares | {"create": 0.3, "open": 0.6}).items():
        figures[f"{MANY}: {name}"] = share
        figures[f"{MANY}: {name}, µs per further ghost"] = 100 * share
    samples = {f"{run}: {phase.name}": [0.1, 0.2] for run in (ONE, MANY) for phase in PHASES}
    return Answer("profile", "where is it?", ("phase", ONE, MANY), [], samples, [], figures)


def swept(sweep: sweeps.Sweep, *milliseconds: float) -> Answer:
    """A sweep whose sizes take so long; all samples but those of the smallest size agree."""
    sizes = sweep.sizes[: len(milliseconds)]
    samples = {size: [ms / 1e3] * 5 for size, ms in zip(sizes, milliseconds, strict=True)}
    return sweeps.answer(sweep, samples)


def document(*answers: Answer, quick: bool = False) -> dict[str, Any]:
    """What a run with these answers has written."""
    return {
        "schema": record.SCHEMA,
        "quick": quick,
        "rounds": 2,
        "machine": {"kernel": "6.18", "usable_cpus": 2, "load_average": [0.5, 1.0, 1.5]},
        "answers": [json.loads(json.dumps(one.document())) for one in answers],
    }


def row_of(text: str, measure: str) -> str:
    """The line of a table that begins with these words."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {measure}"))
    return found


def test_limits_are_those_that_were_promised() -> None:
    assert {f"{one.answer}: {one.figure}": one.limit for one in TARGETS} == LIMITS


def test_met_missed_and_not_measured() -> None:
    """Each with its value beside it; what was missed with by how much, and where the time is."""
    slope = answer("slope", **{"1 job over C": 1.8, "2 jobs over C": 0.85})
    slope.figures["1 job over C, detached"] = 1.25
    start = answer("start", **{"command over imports": 4.5})
    text = page.text(document(slope, start, profiled()), "performance")

    first, second = (target.measure for target in TARGETS[:2])
    assert row_of(text, first).endswith("| ≤ 1.50 | 1.80 | **missed** | 1.25 |")
    assert row_of(text, second).endswith("| ≤ 0.85 | 0.85 | met | – |")
    assert row_of(text, "ghost of 1 GiB").endswith("| ≤ 1.05 | – | not measured | – |")
    assert "Met: 1 of 14. Not measured in this run: 11." in text
    assert (
        f"- **{first}**: 1.80, where 1.50 is the limit; 20% over it. Of 97.0 µs per further ghost "
        f"({MANY}) the profile shows *open* 60.0 and *create* 30.0." in text
    )
    assert "4.50, where 1.50 is the limit; 3.0 times that. Of the whole command" in text
    assert f"({ONE}) the profile shows *start* 90%." in text
    assert f"**{second}**:" not in text


def test_nothing_allowed() -> None:
    """A limit of none has no ratio to it."""
    figure = "made writable before its first ghost is ready"
    fine = page.text(document(answer("writable", **{figure: 0.0})), "performance")
    assert "| none | 0 mounts | met |" in fine
    broken = page.text(document(answer("writable", **{figure: 3.0})), "performance")
    assert "| none | 3 mounts | **missed** |" in broken
    assert "ready**: 3 mounts; 3 mounts where none is allowed." in broken


def test_what_is_no_number_was_not_measured() -> None:
    """Noise may leave no ratio: that is neither met nor in the document, which is JSON."""
    slope = answer("slope", **{"1 job over C": math.nan, "2 jobs over C": math.inf})
    assert slope.document()["figures"] == {}
    first, second, *_ = judge([slope])
    assert first.met is None
    assert second.met is False


def test_everything_is_in_the_page() -> None:
    """Facts, words, a table of each answer, and the pictures that are drawn; no placeholder."""
    answers = (answer("slope"), profiled(), swept(sweeps.TASKS, 200, 210, 300, 1200))
    text = page.text(document(*answers), "beside")
    assert "- usable cpus: 2\n- load average: 0.5 1.0 1.5\n" in text
    for one in answers:
        assert f"### {one.name}: {one.question}" in text
        assert f"](beside/{one.name}.svg)" in text
    assert text.index("### profile") < text.index("### sweep-tasks") < text.index("### slope")
    assert "--quick" not in text
    assert not re.search(r"\{[a-z]+\}", text)
    assert "Small sizes (`--quick`)" in page.text(document(quick=True), "beside")


def test_the_page_in_the_documentation_is_that_of_its_samples() -> None:
    """Words and numbers are of one run: `python -m bench --page docs/performance/samples.json`."""
    home = CHECKOUT / "docs"
    made = page.text(record.read(home / "performance" / "samples.json"), "performance")
    assert (home / "performance.md").read_text(encoding="utf-8") == made
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    summary = page.summary(record.read(home / "performance" / "samples.json"))
    assert f"<!-- speed -->\n{summary}<!-- /speed -->" in readme
    for picture in re.findall(r"\]\((performance/[^)]+\.svg)\)", made):
        assert (home / picture).read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_a_readme_gets_the_first_targets(tmp_path: Path) -> None:
    """Between its marks, in place of what was there; without marks it is left as it is."""
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n", encoding="utf-8")
    run = document(answer("slope", **{"1 job over C": 1.25}))
    page.put_summary(run, readme)
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n<!-- speed -->\n{page.summary(run)}<!-- /speed -->\nafter\n"
    assert row_of(text, TARGETS[0].measure).endswith("| ≤ 1.50 | 1.25 | met |")
    assert "|" not in page.summary(document(answer("slope"), quick=True))
    readme.write_text("<!-- /speed --> <!-- speed -->", encoding="utf-8")
    with pytest.raises(BenchError, match="there is no <!-- speed -->"):
        page.put_summary(run, readme)
    assert readme.read_text(encoding="utf-8") == "<!-- /speed --> <!-- speed -->"


def test_a_document_comes_back(tmp_path: Path) -> None:
    """One answer a line, nothing beside it, and equal to what was saved."""
    file = tmp_path / "new" / "samples.json"
    saved = document(answer("slope", x=1.5), answer("start"))
    record.save(saved, file)
    assert record.read(file) == saved
    assert [path.name for path in file.parent.iterdir()] == ["samples.json"]
    lines = file.read_text(encoding="utf-8").splitlines()
    assert sum('"name": "start"' in line for line in lines) == 1
    assert page.answers_of(saved)[0].document() == answer("slope", x=1.5).document()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 0}'])
def test_what_is_no_document(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match="file"):
        record.read(tmp_path / "file")


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="directory"):
        record.save(document(), tmp_path)


# Going on.


def ask(
    monkeypatch: pytest.MonkeyPatch,
    scratch: Path,
    questions: dict[str, Callable[[Setting], Answer]],
    *arguments: str,
) -> None:
    """Ask them as the command does, here."""
    monkeypatch.setattr(command, "QUESTIONS", questions)
    options = command.parse([*arguments, "--quick"])
    command._ask(options, scratch, options.json or options.resume)


def fails(setting: Setting) -> Answer:
    """No answer."""
    raise BenchError("there is no such thing")


def never(setting: Setting) -> Answer:
    """Not to be asked."""
    raise AssertionError("asked again")


def test_an_answer_is_kept_when_another_question_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And --resume asks only what has no answer; --only whatever it names."""
    file = str(tmp_path / "samples.json")

    def fine(setting: Setting) -> Answer:
        return answer("b", x=setting.rounds)

    with pytest.raises(BenchError, match="no answer to a"):
        ask(monkeypatch, tmp_path, {"a": fails, "b": fine}, "--json", file)
    assert "a: there is no such thing" in capsys.readouterr().err
    assert [one["name"] for one in record.read(Path(file))["answers"]] == ["b"]

    questions = {"a": lambda _: answer("a"), "b": never}
    ask(monkeypatch, tmp_path, questions, "--resume", file)
    found = record.read(Path(file))["answers"]
    assert [(one["name"], one["figures"]) for one in found] == [("a", {}), ("b", {"x": 5})]
    assert all(len(one["load"]) == 2 for one in found)

    questions = {"a": never, "b": lambda _: answer("b", x=7)}
    ask(monkeypatch, tmp_path, questions, "--resume", file, "--only", "b")
    assert record.read(Path(file))["answers"][1]["figures"] == {"x": 7}


def test_other_sources_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document is about one package on one machine."""
    file = tmp_path / "samples.json"
    ask(monkeypatch, tmp_path, {"a": lambda _: answer("a")}, "--json", str(file))
    saved = record.read(file)
    saved["machine"]["sources"] = "of yesterday"
    record.save(saved, file)
    with pytest.raises(BenchError, match="sources was of yesterday"):
        ask(monkeypatch, tmp_path, {"a": never}, "--resume", str(file))


# The profile.


def event(kind: str, at: float) -> dict[str, object]:
    """As in a file of events."""
    return {"event": kind, "at": at}


def test_phases_follow_one_another() -> None:
    """They add up to the whole: each ends with its last event; what overlaps is the earlier's."""
    events = [
        event("run", 1.0),
        event("entered", 3.0),
        event("planned", 6.0),
        event("ghost_created", 7.0),
        event("entered", 7.5),
        event("mount_writable", 8.0),
        event("ghost_created", 10.0),
        event("file_opened", 9.0),
        event("file_opened", 15.0),
        event("task_arrived", 21.0),
        event("reverted", 28.0),
        event("cleaned", 36.0),
        event("end", 45.0),
    ]
    seconds = split(0.0, events, 55.0)
    assert dict(zip((phase.name for phase in PHASES), seconds, strict=True)) == {
        "start": 1.0,
        "enter": 2.0,
        "plan": 3.0,
        "create": 4.0,
        "open": 5.0,
        "barrier": 6.0,
        "revert": 7.0,
        "clean": 8.0,
        "verify": 9.0,
        "report": 10.0,
    }


def test_a_phase_without_events_takes_no_time() -> None:
    """The detached strategy reverts nothing."""
    times = {"run": 1.0, "entered": 2.0, "planned": 3.0, "cleaned": 4.0, "end": 5.0}
    seconds = split(0.0, [event(kind, at) for kind, at in times.items()], 6.0)
    named = dict(zip((phase.name for phase in PHASES), seconds, strict=True))
    assert named["revert"] == named["create"] == named["barrier"] == 0.0
    assert sum(seconds) == 6.0


@pytest.mark.parametrize(
    "events", [[], [event("run", 1.0), event("planned", 2.0)], [{"event": "run"}]]
)
def test_a_restore_that_did_not_end_has_no_profile(events: list[dict[str, object]]) -> None:
    with pytest.raises(BenchError):
        split(0.0, events, 3.0)


# Sweeps.


def test_flat_and_not() -> None:
    """A unit of the last step, against one of all steps below it."""
    straight = swept(sweeps.GHOSTS, 210, 300, 1_200, 10_200)
    assert straight.figures[sweeps.FIGURE] == pytest.approx(1.0)
    assert straight.notes[0].endswith("1.00 times as much, flat.")
    assert straight.rows[-1][0] == "100,000"
    assert straight.rows[-1][-1] == "100.0"

    bent = swept(sweeps.GHOSTS, 210, 300, 1_200, 15_200)
    assert bent.figures[sweeps.FIGURE] > sweeps.FLAT
    assert "**not flat**" in bent.notes[0]


def test_noise_is_no_slope() -> None:
    """What is within the width of the samples is not judged."""
    samples = {1: [0.2, 0.3, 0.4, 0.5], 10: [0.35] * 4, 100: [0.4] * 4, 1_000: [5.0] * 4}
    lost = sweeps.answer(sweeps.TASKS, samples)
    assert lost.figures == {}
    assert "lost in the noise, no verdict" in lost.notes[0]


def test_more_jobs_than_help() -> None:
    """Jobs are compared with the best number of them."""
    fine = swept(sweeps.JOBS, 1_000, 600, 620, 640, 660)
    assert fine.notes == ["16 jobs take 1.10 times as long as 2: flat."]
    assert [row[-1] for row in fine.rows] == ["1.67", "1.00", "1.03", "1.07", "1.10"]
    assert "**not flat**" in swept(sweeps.JOBS, 1_000, 600, 620, 640, 900).notes[0]


@pytest.mark.parametrize("sweep", sweeps.SWEEPS, ids=lambda one: one.name)
def test_sizes_are_possible(sweep: sweeps.Sweep) -> None:
    """Every size has its images, with something to restore for everybody."""
    for sizes in (sweep.sizes, sweep.quick):
        assert list(sizes) == sorted(set(sizes))
        for size in sizes:
            shape = sweep.shape(size)
            assert shape.ghosts >= shape.namespaces * shape.mounts or sweep is sweeps.GHOSTS
            assert shape.further_mounts >= 0


# Pictures: drawn by another process, since matplotlib keeps the files of its fonts open.


def write_page(samples: Path, written: Path) -> str:
    """Make the page as a user does; its text."""
    arguments = ["--page", str(samples), "--write", str(written)]
    subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=CHECKOUT, check=True)
    return written.read_text(encoding="utf-8")


@pytest.mark.long  # for matplotlib, which is not installed for every interpreter
def test_a_page_is_written_with_all_that_it_shows(tmp_path: Path) -> None:
    """And made again from the samples beside it: pictures hold text, no time, nothing random."""
    slope = answer("slope", **{"1 job over C": 1.8})
    slope.samples = {
        f"{rival}: {count} ghosts": [each * count * 1e-6]
        for rival, each in (("C", 20), ("ghostpool, 1 job", 30), ("shell", 9_000))
        for count in (500, 10_000)
    }
    writable = answer("writable")
    writable.samples = {"10 mounts": [0.001, 0.002, 0.0025], "100 mounts": [0.01]}
    many = [swept(sweep, *(200.0 + size for size in sweep.sizes)) for sweep in sweeps.SWEEPS]
    answers = [slope, writable, profiled(), *many]
    record.save(document(*answers), tmp_path / "run.json")
    first = write_page(tmp_path / "run.json", tmp_path / "a" / "performance.md")
    beside = tmp_path / "a" / "performance"
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in beside.glob("*.svg")}
    assert drawn.keys() == plots.names(answers).keys()
    assert len(drawn) == 9
    assert not any("<dc:date>" in text for text in drawn.values())
    assert "not shown: shell (9,000)" in drawn["slope"]
    assert "1.20" in drawn[plots.TARGETS]
    assert all(phase.name in drawn["profile"] for phase in PHASES)

    assert write_page(beside / "samples.json", tmp_path / "b" / "performance.md") == first
    for path in beside.iterdir():
        again = tmp_path / "b" / "performance" / path.name
        assert again.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_a_page_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--page", "/no/such/file"]) == 1
    assert "bench: /no/such/file: " in capsys.readouterr().err

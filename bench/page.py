"""docs/performance.md: the words of bench/performance.md, with a run's facts, tables and verdicts.

Made from the document that `--json` writes and from nothing else, so it can be made again, and
whoever doubts a sentence finds its numbers. What is said of a missed target is said by its data:
by how much, and in which phases of the profile the time is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plots, profile, record, sweeps, targets
from bench.measure import Answer
from bench.scene import BenchError
from bench.targets import Verdict

_WORDS = Path(__file__).with_name("performance.md")
_QUICK = (
    "**Small sizes (`--quick`): they show that everything runs. The targets are about larger "
    "ones, and what is beside them here is not what they ask for.**\n"
)
_BEGIN, _END = "<!-- speed -->", "<!-- /speed -->"
_SUMMARY = ("slope", "many", "start")
_MOST = 3
"""Phases to name, at most, and only while they are worth naming:"""
_WORTH = 0.1
"""of the time that they are a part of."""


def write(document: dict[str, Any], page: Path) -> None:
    """The page, with its pictures and the document itself in a directory beside it."""
    beside = page.with_suffix("")
    plots.draw(answers_of(document), beside)
    record.save(document, beside / "samples.json")
    page.write_text(text(document, beside.name), encoding="utf-8")


def put_summary(document: dict[str, Any], readme: Path) -> None:
    """Put the first of the targets between the marks of a page. BenchError: it has none."""
    words = readme.read_text(encoding="utf-8")
    before, begin, rest = words.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise BenchError(f"{readme}: there is no {_BEGIN} with {_END} after it")
    new = f"{before}{begin}\n{summary(document)}{end}{after}"
    readme.write_text(new, encoding="utf-8")


def summary(document: dict[str, Any]) -> str:
    """A table of the targets that say most; nothing for sizes that are not theirs."""
    if document["quick"]:
        return "They have not been measured in full yet.\n"
    judged = targets.judge(answers_of(document))
    return table([one for one in judged if one.target.answer in _SUMMARY], detached=False)


def answers_of(document: dict[str, Any]) -> list[Answer]:
    """The answers of a document."""
    return [Answer.of_document(one) for one in document["answers"]]


def text(document: dict[str, Any], beside: str) -> str:
    """The page; `beside` is the directory of its pictures."""
    answers = answers_of(document)
    judged = targets.judge(answers)
    pictures = plots.names(answers)

    def picture(name: str) -> str:
        return f"![{pictures[name]}]({beside}/{name}.svg)\n" if name in pictures else ""

    def section(answer: Answer) -> str:
        return "\n".join(filter(None, (answer.markdown(), picture(answer.name))))

    sections = {answer.name: section(answer) for answer in answers}
    parts = {
        "machine": describe(document["machine"]),
        "targets": "\n".join(
            filter(None, (document["quick"] and _QUICK, table(judged), picture(plots.TARGETS)))
        ),
        "missed": missed(judged, answers),
        "profile": sections.pop("profile", "Not measured."),
        "sweeps": "\n".join(sections.pop(name) for name in [*sections] if _is_sweep(name)),
        "answers": "\n".join(sections.values()),
        "flat": str(sweeps.FLAT),
    }
    page = _WORDS.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace("{" + name + "}", part.strip() or "Not measured.")
    return page


def _is_sweep(name: str) -> bool:
    return name.startswith("sweep-")


def describe(facts: dict[str, Any]) -> str:
    """The facts as a Markdown list."""
    return "".join(f"- {key.replace('_', ' ')}: {_plain(value)}\n" for key, value in facts.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


# Targets.


def table(judged: Sequence[Verdict], *, detached: bool = True) -> str:
    """Targets with what was measured, on request with the other strategy beside it."""
    rows = [["measure", "limit", "measured", ""] + ["the same, detached"] * detached]
    rows.append(["---"] * len(rows[0]))
    for one in judged:
        values = [
            "–" if value is None else one.target.shown(value) for value in (one.value, one.detached)
        ]
        limit = "none" if not one.target.limit else f"≤ {one.target.shown(one.target.limit)}"
        rows.append([one.target.measure, limit, values[0], one.word] + values[1:] * detached)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def missed(judged: Sequence[Verdict], answers: Sequence[Answer]) -> str:
    """Which targets were missed, by how much, and what the profile shows."""
    figures = next((answer.figures for answer in answers if answer.name == "profile"), {})
    unknown = sum(one.met is None for one in judged)
    counts = [f"Met: {sum(one.met is True for one in judged)} of {len(judged)}."]
    if unknown:
        counts.append(f"Not measured in this run: {unknown}.")
    lines = [" ".join(counts), ""]
    for one in judged:
        if one.value is None or one.met:
            continue
        words = f"- **{one.target.measure}**: {one.target.shown(one.value)}"
        if one.target.limit:
            words += f", where {one.target.shown(one.target.limit)} is the limit"
        shows = what_the_profile_shows(one, figures)
        lines.append(f"{words}; {one.over}." + (shows and f" {shows}"))
    return "\n".join(lines) + "\n"


def what_the_profile_shows(verdict: Verdict, figures: dict[str, float]) -> str:
    """The phases where the time of a target is, or "" if the profile does not say."""
    run = _run_of(verdict.target.run, figures)
    if not run:
        return ""
    # The first phase is over before anybody knows how many ghosts there are: it does not grow.
    phases = profile.PHASES[1:] if verdict.target.further else profile.PHASES
    suffix = ", µs per further ghost" if verdict.target.further else ""
    values = {
        phase.name: max(0.0, figures.get(f"{run}: {phase.name}{suffix}", 0.0)) for phase in phases
    }
    whole = sum(values.values())
    largest = sorted(values, key=values.__getitem__, reverse=True)[:_MOST]
    named = [name for name in largest if whole and values[name] / whole >= _WORTH]
    if not named:
        return ""
    if verdict.target.further:
        parts = [f"*{name}* {values[name]:.1f}" for name in named]
        return f"Of {whole:.1f} µs per further ghost ({run}) the profile shows {_list(parts)}."
    parts = [f"*{name}* {values[name]:.0%}" for name in named]
    return f"Of the whole command ({run}) the profile shows {_list(parts)}."


def _list(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _run_of(wanted: str, figures: dict[str, float]) -> str:
    """The run of the profile that a target is explained by, as its figures name it."""
    runs = dict.fromkeys(name.rpartition(": ")[0] for name in figures)
    for run in runs:
        ghosts, strategy, jobs = run.rsplit(", ", 2)
        few = ghosts == "1 ghost"
        if strategy == "remount" and (few if wanted == "1 ghost" else not few and jobs == wanted):
            return run
    return ""

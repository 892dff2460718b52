"""The report in sentences: words.j2 has them, and this module what they are filled with."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import stats
from benchmarks.environment import mixed
from benchmarks.optimizers import described
from benchmarks.questions import DECAYED, LENGTHS, REGULARIZED, STAYS
from benchmarks.report import data, text
from benchmarks.report.tables import state
from benchmarks.results import Answer, Comparison, Results, Row, TaskResults, measure, validation_score
from benchmarks.stats import Interval
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, LRSchedule

ENGINE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENGINE.globals |= {
    name: getattr(text, name) for name in ("counted", "listed", "of", "p_value", "percent", "share", "signed", "unit")
}
ENGINE.globals |= {"NBSP": text.NBSP, "inf": float("inf"), "state": state, "stats": stats, "described": described}
ENGINE.globals |= {"mixed": mixed}
ENGINE.globals |= {"STAYS": STAYS, "LENGTHS": LENGTHS, "REGULARIZED": REGULARIZED}

MANY = 8  # pairs: the answers to more are counted, not told one by one
ALLOWED = 0.01  # of the validation score: what a sparse network may lose and still be chosen


@dataclass(frozen=True)
class Finding:
    """A question and its answer, of one task or of all."""

    title: str
    text: str
    task: str | None = None


def findings(results: Results) -> list[Finding]:
    """The answers in the order in which they are read; the first sentence counts what is significant."""
    found = [] if results.whole else [Finding("Not finished", _said("unfinished", results))]
    references = {results.study.against(arm.name) for arm in results.study.arms}
    edges = _where([row for row in results.rows if row.at_edge and row.name in references])
    found.append(Finding("Answer", _said("headline", results, leaders=_leaders(results), edges=edges)))
    for answer in results.answers:
        sparse = _sparsity(results, answer) if answer.question.title == DECAYED else ([], [])
        pairs = [(pair, answer.between(pair.arm, pair.control)) for pair in answer.question.pairs]
        words = _said("answer", results, answer=answer, pairs=pairs, many=MANY, sparse=sparse)
        found.append(Finding(answer.question.title, words))
    edges = _where([row for row in results.rows if row.at_edge])
    lost = _where([row for row in results.rows if row.diverged or row.failed])
    widths = _widths(results.study.arms)
    found.append(Finding("How far to trust this", _said("trust", results, edges=edges, lost=lost, widths=widths)))
    return found + [
        Finding(f"Task {task.name}", _said("task", results, task=task), task.name) for task in results.tasks.values()
    ]


def settings(results: Results) -> list[str]:
    """How the study was made, a point each."""
    schedules: dict[LRSchedule, list[str]] = {}
    for arm in results.study.arms:
        schedules.setdefault(arm.lr_schedule, []).append(arm.name)
    lines = _rendered("settings", results, schedules=[*schedules.items()]).split("\n")
    return [point for line in lines if (point := _flat(line))]


def command(results: Results) -> str | None:
    """The command that makes this study; None for one that has no name of its own."""
    study = results.study
    return f"python -m benchmarks run {study.name}" if PRESETS.get(study.name) == study else None


def _said(macro: str, results: Results, **more: Any) -> str:
    return _flat(_rendered(macro, results, **more))


def _rendered(macro: str, results: Results, **more: Any) -> str:
    return str(getattr(ENGINE.get_template("words.j2").module, macro)(results, **more))


def _flat(said: str) -> str:
    """One line, its no-break spaces kept; a space before a stop is the template's."""
    return re.sub(r" +([.,;:)])", r"\1", re.sub(r"[ \n]+", " ", said).replace("( ", "(")).strip()


def _leaders(results: Results) -> list[tuple[str, str, Interval]]:
    """The arms whose probability of improvement over their reference has an interval without ½."""
    held = [(arm.name, other) for arm in results.study.arms if (other := results.study.against(arm.name))]
    found = [(*pair, results.improvements[pair]) for pair in held if pair in results.improvements]
    return [case for case in found if not case[2].low <= 0.5 <= case[2].high]


def _where(rows: Sequence[Row]) -> list[str]:
    """Arms, with the tasks of these rows."""
    arms = dict.fromkeys(row.name for row in rows)
    return [f"{arm} on {text.listed([row.task for row in rows if row.name == arm])}" for arm in arms]


def _widths(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """The decades that arms search for their learning rates, and the arms of each."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        if lr := arm.search.get("lr"):
            found.setdefault(f"{math.log10(lr.high / lr.low):.2g}" if lr.low > 0 else "linear", []).append(arm.name)
    return sorted(found.items())


Sparse = tuple[TaskResults, Interval, Comparison]


def _sparsity(results: Results, answer: Answer) -> tuple[list[Sparse], list[str]]:
    """On each task the sparsest arm that validation data let pass, so that no test result chose it; tasks without."""
    kept, lost = [], []
    for task in results.tasks.values():
        mine = [c for c in answer.comparisons if c.row.task == task.name]
        made = [(share, c) for c in mine if (share := data.mean_of(c.row, measure("zeros")))]
        fit = [case for case in made if _allowed(task, case[1])]
        if not any(share.mean > data.SPARSE for share, _ in made):
            continue
        if fit:
            kept.append((task, *max(fit, key=lambda case: case[0].mean)))
        else:
            lost.append(task.name)
    return kept, lost


def _allowed(task: TaskResults, c: Comparison) -> bool:
    score, base = data.mean_of(c.row, validation_score), data.mean_of(c.against, validation_score)
    return score is not None and base is not None and task.sign * (score.mean - base.mean) >= -ALLOWED

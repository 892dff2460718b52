"""The summary in plain words. Every sentence is made from the results; none is true by being typed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import data
from benchmarks.report.claims import claims
from benchmarks.report.finding import Finding
from benchmarks.report.tables import state
from benchmarks.report.text import NBSP, counted, listed, of, p_value, share, signed, unit
from benchmarks.results import Comparison, Results, Row, TaskResults, test_score

AT = f"at the 5{NBSP}% level"


@dataclass(frozen=True)
class _Sorted:
    better: list[Comparison]
    worse: list[Comparison]
    neither: list[Comparison]


def findings(results: Results) -> list[Finding]:
    """The summary, in the order in which it is read, of what the study has."""
    told = [] if results.whole else [Finding("Not finished", _unfinished(results))]
    if results.standings:
        told.append(Finding("Over all tasks", _overall(results)))
    told += [*claims(results), Finding("How far to trust this", _trust(results))]
    return told + [Finding(f"Task {task.name}", _task(results, task), task.name) for task in results.tasks.values()]


def _unfinished(results: Results) -> str:
    open_tasks = [task.name for task in results.tasks.values() if not task.whole]
    return (
        f"{of(results.done, results.wanted)} runs are there; runs are missing on {listed(open_tasks)}. What follows is "
        "what there is so far, and may change."
    )


def _overall(results: Results) -> str:
    by_area = sorted(results.standings, key=lambda s: (-s.profile.area, s.rank))
    by_score = sorted(results.standings, key=lambda s: (-s.score, s.rank))
    baseline = next(s for s in results.standings if s.arm == results.study.baseline)
    whole = [task for task in results.tasks.values() if task.whole]
    winners = [best for task in whole if (best := _best(task)) is not None]
    tasks = f"Over {counted(len(whole), 'task')},"
    if by_area[0].profile.area:
        text = [
            f"{tasks} {by_area[0].arm} comes nearest to the fastest arm's steps to the target (area under the "
            f"performance profile {by_area[0].profile.area:.2f}; {baseline.arm} has {baseline.profile.area:.2f})."
        ]
    else:
        text = [f"{tasks} no arm reaches a target."]
    text.append(
        f"The highest mean normalised test score is {signed(by_score[0].score)}, of {by_score[0].arm}; {baseline.arm} "
        f"has {signed(baseline.score)}."
    )
    first = {name: sum(row.name == name for row in winners) for name in dict.fromkeys(row.name for row in winners)}
    if len(first) == 1:
        text.append(f"{winners[0].name} has the best mean on every task.")
    elif first:
        text.append(
            f"No arm has the best mean on every task: {counted(len(first), 'arm')} are best on at least one "
            f"({listed([f'{name} on {n}' for name, n in sorted(first.items(), key=lambda item: -item[1])])})."
        )
    return " ".join(text)


def _best(task: TaskResults, last: bool = False) -> Row | None:
    """The sound row with the best mean test score, or the worst."""
    rows = [(mean.mean, row) for row in task.rows if (mean := data.mean_of(row, test_score))]
    if not rows:
        return None
    choose = max if task.task.higher_is_better != last else min
    return choose(rows, key=lambda pair: pair[0])[1]


def _task(results: Results, task: TaskResults) -> str:
    best, last = _best(task), _best(task, last=True)
    if best is None or last is None:
        return f"No arm has a mean yet: {'; '.join(f'{row.name}, {state(row)}' for row in task.rows)}."
    it = unit(task.task)
    text = [f"The best mean test {it.title} is {_score(task, best)}, by {best.name}"]
    text[0] += "." if best is last else f"; the worst is {_score(task, last)}, by {last.name}."
    baseline = task.row(results.study.baseline)
    if baseline.sound and baseline not in (best, last):
        text.append(f"{baseline.name} has {_score(task, baseline)}.")
    text += _verdicts(task)
    lost = [f"{row.name} ({state(row)})" for row in task.rows if row.diverged or row.failed]
    if lost:
        text.append(f"Without a mean, and in no comparison: {listed(lost)}.")
    return " ".join(text)


def _verdicts(task: TaskResults) -> list[str]:
    groups: dict[str, list[Comparison]] = {}
    for c in task.comparisons:
        groups.setdefault(c.against.name, []).append(c)
    return [_verdict(task, against, sort(family)) for against, family in groups.items()]


def sort(family: Sequence[Comparison]) -> _Sorted:
    """Comparisons by what they say at the 5 % level after Holm's correction."""
    sure = [c for c in family if c.adjusted < data.ALPHA]
    return _Sorted(
        better=[c for c in sure if c.gain > 0],
        worse=[c for c in sure if c.gain < 0],
        neither=[c for c in family if c not in sure],
    )


def _verdict(task: TaskResults, against: str, found: _Sorted) -> str:
    parts = []
    for cases, word in ((found.better, "better"), (found.worse, "worse")):
        if cases:
            parts.append(f"{word} {AT} {'is' if len(cases) == 1 else 'are'} {listed(_cases(task, cases))}")
    n = len(found.neither)
    if n:
        who = listed([c.row.name for c in found.neither]) if n <= 3 else counted(n, "arm")
        ups = sum(c.gain > 0 for c in found.neither)
        parts.append(f"not told apart from it {'is' if n == 1 else 'are'} {who} ({of(ups, n)} means better)")
    return f"Against {against}: {'; '.join(parts)}."


def _cases(task: TaskResults, cases: Sequence[Comparison]) -> list[str]:
    """One or two with all their numbers, more with their means alone: the others are in the table."""
    it = unit(task.task)
    if len(cases) > 2:
        return [f"{c.row.name} ({it.mean_difference(c.difference.interval)})" for c in cases]
    return [f"{c.row.name} by {it.difference(c.difference.interval, p_value(c.adjusted))}" for c in cases]


def _where(rows: Sequence[Row]) -> list[str]:
    """Arms, with the tasks of these rows."""
    arms = dict.fromkeys(row.name for row in rows)
    return [f"{arm} on {listed([row.task for row in rows if row.name == arm])}" for arm in arms]


def _score(task: TaskResults, row: Row) -> str:
    mean = data.mean_of(row, test_score)
    assert mean is not None
    return unit(task.task).score(mean)


def _trust(results: Results) -> str:
    study = results.study
    tuning = study.tuning
    text = [
        f"Settings were chosen by validation loss from {counted(tuning.trials, 'trial')} for each arm and task, "
        f"{counted(len(tuning.seeds), 'run')} each, and the intervals are over "
        f"{counted(len(study.seeds), 'fresh seed')}: they hold for other initial weights and batches, not for another "
        "test set or task, and not for another outcome of the tuning. Small differences may not be found with so few "
        "seeds. P-values are those of paired t tests over the seeds, Holm-corrected over the comparisons of a task; "
        "what annealing, AGR and decay do are families of their own. Intervals are not corrected."
    ]
    edges = _where([row for row in results.rows if row.at_edge])
    searched = [row for row in results.rows if row.arm.search and row.choice]
    if edges:
        text.append(
            f"The best setting lies at an end of its range, and a better one may lie beyond, for {listed(edges)}."
        )
    elif searched:
        text.append("Every chosen setting lies inside its range.")
    tried = [trial for row in results.rows for trial in row.trials]
    broken = sum(math.isinf(trial.loss) for trial in tried)
    if tried:
        text.append(
            f"{of(broken, len(tried))} trials diverged or failed ({share(round(broken / len(tried), 3))})."
            if broken
            else "No trial diverged."
        )
    lost = _where([row for row in results.rows if row.diverged or row.failed])
    text.append(f"Final runs were lost by {listed(lost)}." if lost else "No final run diverged.")
    if results.failures:
        errors = dict.fromkeys(failure.error for failure in results.failures.values())
        text.append(
            f"{counted(len(results.failures), 'run')} raised an error, which counts as a loss of ∞: "
            f"{'; '.join(errors)}."
        )
    return " ".join(text)

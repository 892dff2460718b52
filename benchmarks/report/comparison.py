"""Two or more studies side by side: the same arms on the same tasks, made by other settings, code or machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.grid import Grid
from benchmarks.report import data
from benchmarks.report.forest import Forest, on_task
from benchmarks.report.tables import state
from benchmarks.report.text import counted, listed, of, p_value, unit
from benchmarks.report.words import ENGINE
from benchmarks.results import Comparison, Results, Row, TaskResults, family, test_score
from benchmarks.store import UnfitStore


@dataclass(frozen=True)
class Case:
    """One arm on one task; ``held`` compares it with that of the first study, None for that one and if impossible."""

    study: str
    row: Row
    held: Comparison | None


def compare(studies: Sequence[Results], folder: Path) -> Path:
    """Write compare.html, its twin compare.md, and compare.csv into the folder; where the page is.

    Raises:
        UnfitStore: fewer than two studies, or none of their arms and tasks are the same.
    """
    if len(studies) < 2:
        raise UnfitStore(f"a comparison needs at least two studies, but was given {len(studies)}")
    named = _named(studies)
    (opening, first), *rest = named.items()
    others = [name for name, _ in rest]
    tasks = [task for task in first.tasks if all(task in other.tasks for _, other in rest)]
    arms = [a.name for a in first.study.arms if all(a.name in [b.name for b in o.study.arms] for _, o in rest)]
    if not (tasks and arms):
        raise UnfitStore(f"{listed(list(named))} have no task and arm in common: there is nothing to compare")
    cases = _cases(named, tasks, arms)
    view = {
        "title": f"normopt: {listed(list(named))} compared",
        "counts": [_count(name, opening, cases) for name in others],
        "changes": [(name, _changes(named, opening, name)) for name in others],
        "tasks": [(task, *_shown(first.tasks[task], [*named], cases)) for task in tasks],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.csv").write_text(data.csv_text([*map(_numbers, cases)]), encoding="utf-8")
    (folder / "compare.md").write_text(ENGINE.get_template("compare.md.j2").render(**view), encoding="utf-8")
    path = folder / "compare.html"
    path.write_text(ENGINE.get_template("compare.html.j2").render(**view), encoding="utf-8")
    return path


def _named(studies: Sequence[Results]) -> dict[str, Results]:
    """Studies by the names of their folders, numbered where these are the same."""
    named: dict[str, Results] = {}
    for results in studies:
        name = results.folder.resolve().name
        same = sum(other.folder.resolve().name == name for other in named.values())
        named[f"{name} ({same + 1})" if same else name] = results
    return named


def _cases(named: Mapping[str, Results], tasks: Sequence[str], arms: Sequence[str]) -> list[Case]:
    """Every arm of every study against the first study's, seed by seed: one family, corrected once."""
    first = next(iter(named))
    rows: list[tuple[str, Row]] = []
    pairs = {}
    for task, arm, (name, results) in product(tasks, arms, named.items()):
        there = named[first].tasks[task]
        row, base = results.tasks[task].row(arm), there.row(arm)
        shared = {run.spec.seed for run in row.runs} & {run.spec.seed for run in base.runs}
        if name != first and len(shared) > 1 and not (row.failed or base.failed):
            pairs[len(rows)] = there, row, base, there.score
        rows.append((name, row))
    held = dict(zip(pairs, family(pairs.values()), strict=True))
    return [Case(*found, held.get(i)) for i, found in enumerate(rows)]


def _count(name: str, first: str, cases: Sequence[Case]) -> str:
    mine = [case.held for case in cases if case.study == name and case.held]
    sure = [c for c in mine if c.verdict]
    better = sum(c.verdict > 0 for c in sure)
    same = sum(c.difference.interval.low == c.difference.interval.high == 0 for c in mine)
    text = (
        f"{name} against {first}: of {counted(len(mine), 'comparison')}, {len(sure)} are significant ({better} better, "
        f"{len(sure) - better} worse) and {len(mine) - len(sure)} are ties, Holm-corrected over all of this page."
    )
    return text + (f" {of(same, len(mine))} are equal to the last bit on every seed." if same else "")


def _changes(named: Mapping[str, Results], first: str, name: str) -> str:
    a, b = named[first], named[name]
    said = []
    for field in ("name", "tasks", "baseline", "tuning", "seeds", "budget", "batch_size", "amp"):
        old, new = getattr(a.study, field), getattr(b.study, field)
        if old != new:
            said.append(f"{field} {_short(new)} instead of {_short(old)}")
    old_arms, new_arms = ({arm.name: arm for arm in r.study.arms} for r in (a, b))
    for word, names in (("added", new_arms.keys() - old_arms.keys()), ("left out", old_arms.keys() - new_arms.keys())):
        if names:
            said.append(f"arms {word}: {', '.join(sorted(names))}")
    for arm, old_arm in old_arms.items():
        new_arm = new_arms.get(arm, old_arm)
        fields = [field for field in type(old_arm).model_fields if getattr(old_arm, field) != getattr(new_arm, field)]
        if fields:
            said.append(f"another {listed(fields)} of {arm}")
    said += _moved(a.environments, b.environments)
    return f"{'; '.join(said)}." if said else "nothing in their settings or environments."


def _moved(old: Sequence[Environment], new: Sequence[Environment]) -> list[str]:
    """What differs between where two studies were made: versions, machines, data that both have."""
    said = []
    for field in Environment.model_fields:
        before, after = ({str(getattr(e, field)) for e in places} for places in (old, new))
        if field != "data" and before and after and before != after:
            said.append(f"{field} {listed(sorted(after))} instead of {listed(sorted(before))}")
    had, has = ({task: sha for e in places for task, sha in e.data.items()} for places in (old, new))
    return said + [f"other data of {task}" for task in had.keys() & has.keys() if had[task] != has[task]]


def _short(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple) else str(value)


def _shown(task: TaskResults, names: Sequence[str], cases: Sequence[Case]) -> tuple[Forest, Grid]:
    """The differences on a task as a plot, and beside the scores as a table."""
    first, *others = names
    it = unit(task.task)
    drawn: dict[str, Comparison] = {}
    rows = []
    for arm, of_arm in groupby((case for case in cases if case.row.task == task.name), lambda case: case.row.name):
        mine = [*of_arm]
        means = [data.mean_of(case.row, test_score) for case in mine]
        scores = [it.score(mean) if mean else state(case.row) for mean, case in zip(means, mine, strict=True)]
        held = [case.held for case in mine[1:]]
        differences = [it.difference(c.difference.interval) if c else "" for c in held]
        p_values = [p_value(c.adjusted, name=False) if c else "" for c in held]
        rows.append([arm, *scores, *differences, *p_values])
        drawn |= {f"{arm}, {name}": c for name, c in zip(others, held, strict=True) if c}
    titles = ["arm", *names, *(f"{name} − {first}" for name in others), *(f"P-value, {name}" for name in others)]
    found = [*drawn.values()]
    return on_task(task, task.name, found, found, [*drawn]), Grid(titles, rows)


def _numbers(case: Case) -> dict[str, Any]:
    row, c = case.row, case.held
    i = c.difference.interval if c else None
    return {
        "task": row.task,
        "arm": row.name,
        "study": case.study,
        "seeds": len(row.runs),
        "diverged": row.diverged,
        **data.ends("test_score", data.mean_of(row, test_score)),
        "difference_to_first": i.mean if i else None,
        "difference_low": i.low if i else None,
        "difference_high": i.high if i else None,
        "p_value_holm": c.adjusted if c else None,
        "verdict": c.verdict if c else None,
    }

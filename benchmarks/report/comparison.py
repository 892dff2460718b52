"""Two or more studies side by side: the same arms on the same tasks, made by other settings, code or machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.report import data, page
from benchmarks.report.data import Rows
from benchmarks.report.figures import COLOURS, Figure, by_arm, interval_at
from benchmarks.report.finding import Finding
from benchmarks.report.tables import Grid, state
from benchmarks.report.text import counted, listed, of, p_value, share, unit
from benchmarks.results import Results, Row, TaskResults, test_score
from benchmarks.stats import LEVEL, Difference, holm, paired
from benchmarks.store import UnfitStore

CAPTION = (
    f"Test scores, means and {share(LEVEL)} intervals over the seeds, of the arms and tasks that the studies share."
)


def compare(studies: Sequence[Results], folder: Path) -> Path:
    """Write compare.html, its twin compare.md, and compare.csv into the folder; where the page is.

    Raises:
        UnfitStore: fewer than two studies, or none of their arms and tasks are the same.
    """
    if len(studies) < 2:
        raise UnfitStore(f"a comparison needs at least two studies, but was given {len(studies)}")
    named = _named(studies)
    first, *others = named.values()
    tasks = [task for task in first.tasks if all(task in other.tasks for other in others)]
    arms = [a.name for a in first.study.arms if all(a.name in [b.name for b in o.study.arms] for o in others)]
    if not (tasks and arms):
        raise UnfitStore(f"{listed(list(named))} have no task and arm in common: there is nothing to compare")
    grids = {task: _grid(named, task, arms) for task in tasks}
    summary, rows = _findings(named, tasks, arms), _rows(named, tasks, arms)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.csv").write_text(data.csv_text(rows), encoding="utf-8")
    (folder / "compare.md").write_text(_markdown(named, summary, grids), encoding="utf-8")
    path = folder / "compare.html"
    path.write_text(_html(named, summary, grids, rows), encoding="utf-8")
    return path


def _named(studies: Sequence[Results]) -> dict[str, Results]:
    """Studies by the names of their folders, numbered where these are the same."""
    named: dict[str, Results] = {}
    for results in studies:
        name = results.folder.resolve().name
        same = sum(other.folder.resolve().name == name for other in named.values())
        named[f"{name} ({same + 1})" if same else name] = results
    return named


def _held(row: Row, first: Row) -> Difference | None:
    """A row against the first study's, seed by seed; None if one of them is not sound or they share no two seeds."""
    if not (row.sound and first.sound):
        return None
    a, b = ({run.spec.seed: run.test_score for run in r.runs} for r in (row, first))
    both = [(x, y) for seed in a if (x := a[seed]) is not None and (y := b.get(seed)) is not None]
    return paired([x for x, _ in both], [y for _, y in both]) if len(both) > 1 else None


def _cases(named: Mapping[str, Results], task: str, arms: Sequence[str]) -> list[tuple[str, str, Difference, float]]:
    """(arm, study, difference to the first study, Holm's P-value), one family a task."""
    first, *others = named
    found = []
    for arm in arms:
        base = named[first].tasks[task].row(arm)
        for name in others:
            difference = _held(named[name].tasks[task].row(arm), base)
            if difference:
                found.append((arm, name, difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    return [(*case, p) for case, p in zip(found, adjusted, strict=True)]


def _findings(named: Mapping[str, Results], tasks: Sequence[str], arms: Sequence[str]) -> list[Finding]:
    first, *others = named
    found = [
        Finding("What differs", " ".join(f"{name} from {first}: {_changes(named, first, name)}" for name in others))
    ]
    every = [case for task in tasks for case in _cases(named, task, arms)]
    for name in others:
        mine = [case for case in every if case[1] == name]
        sure = [case for case in mine if case[3] < data.ALPHA]
        text = (
            f"Of {counted(len(arms), 'arm')} on {counted(len(tasks), 'task')} that the studies share, {len(mine)} can "
            f"be compared seed by seed, and {of(len(sure), len(mine))} differ at the 5\u00a0% level, Holm-corrected "
            "within each task."
        )
        same = sum(difference.interval.low == difference.interval.high == 0 for _, _, difference, _ in mine)
        if same:
            text += f" {of(same, len(mine))} are equal to the last bit on every seed."
        found.append(Finding(f"{name} against {first}", text))
    return found


def _changes(named: Mapping[str, Results], first: str, name: str) -> str:
    a, b = named[first], named[name]
    said = []
    for field in ("name", "tasks", "baseline", "tuning", "seeds", "budget"):
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


def _grid(named: Mapping[str, Results], task: str, arms: Sequence[str]) -> Grid:
    first, *others = named
    it = unit(named[first].tasks[task].task)
    cases = {(arm, name): (difference, p) for arm, name, difference, p in _cases(named, task, arms)}
    titles = ["arm", *named, *(f"{name} − {first}" for name in others), *(f"P-value, {name}" for name in others)]
    rows = []
    for arm in arms:
        scores = [_score(results.tasks[task], arm) for results in named.values()]
        told = [cases.get((arm, name)) for name in others]
        rows.append(
            [
                arm,
                *scores,
                *(it.difference(case[0].interval) if case else "" for case in told),
                *(p_value(case[1], name=False) if case else "" for case in told),
            ]
        )
    return Grid(titles, [True] + [False] * (len(titles) - 1), rows)


def _score(task: TaskResults, arm: str) -> str:
    row = task.row(arm)
    mean = data.mean_of(row, test_score)
    return unit(task.task).score(mean) if mean else state(row)


def _rows(named: Mapping[str, Results], tasks: Sequence[str], arms: Sequence[str]) -> Rows:
    found: Rows = []
    for task in tasks:
        cases = {(arm, name): (difference, p) for arm, name, difference, p in _cases(named, task, arms)}
        for arm in arms:
            for name, results in named.items():
                row = results.tasks[task].row(arm)
                mean = data.mean_of(row, test_score)
                difference, p = cases.get((arm, name), (None, None))
                found.append(
                    {
                        "task": task,
                        "arm": arm,
                        "study": name,
                        "seeds": len(row.runs),
                        "diverged": row.diverged,
                        "test_score": mean.mean if mean else None,
                        "test_score_low": mean.low if mean else None,
                        "test_score_high": mean.high if mean else None,
                        "difference_to_first": difference.interval.mean if difference else None,
                        "difference_low": difference.interval.low if difference else None,
                        "difference_high": difference.interval.high if difference else None,
                        "p_value_holm": p,
                    }
                )
    return found


def _figure(named: Mapping[str, Results], rows: Rows) -> Figure:
    panels = {}
    first = next(iter(named.values()))
    for name in dict.fromkeys(row["task"] for row in rows):
        it = unit(first.tasks[name].task)
        mine = [row for row in rows if row["task"] == name and row["test_score"] is not None]
        lines = [f"{row['arm']} · {row['study']}" for row in mine]
        plot = by_arm(f"test {it.title}", lines, it.sign)
        for line, row in zip(lines, mine, strict=True):
            colour = COLOURS[list(named).index(row["study"]) % len(COLOURS)]
            interval_at(plot, line, row, "test_score", it.factor, {"color": colour, "size": 9}, it.sign)
        if mine:
            panels[name] = plot
    return Figure("compare", "Final scores", CAPTION, panels)


def _html(named: Mapping[str, Results], summary: Sequence[Finding], grids: Mapping[str, Grid], rows: Rows) -> str:
    title = f"normopt: {listed(list(named))} compared"
    figure = _figure(named, rows)
    tables = (f'<section data-task="{escape(task)}">{page.table(grid)}</section>' for task, grid in grids.items())
    body = [
        f"<header><h1>{escape(title)}</h1></header>\n<main>",
        f"<h2>In words</h2>\n{page.said(summary)}",
        "<h2>Task by task</h2>",
        page.chooser(list(grids)),
        *tables,
        f"<h2>Figure</h2>\n{page.figure_html(figure, {'compare': page.link('compare', rows)})}\n</main>",
    ]
    return page.document(title, body, [figure])


def _markdown(named: Mapping[str, Results], summary: Sequence[Finding], grids: Mapping[str, Grid]) -> str:
    parts = [f"# {listed(list(named))} compared", "\n".join(f"- **{f.title}.** {f.text}" for f in summary)]
    parts += [f"## {task}\n\n{grid.markdown}" for task, grid in grids.items()]
    return "\n\n".join(parts) + "\n"

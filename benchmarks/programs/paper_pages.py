"""The pages of the presets that run papers' recipes: the paper's numbers beside ours, and a verdict by a declared rule.

Every number and every verdict is computed from stored runs; the claim, the rule and the differences from the paper are
those of the protocol that was declared before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

from scipy import stats

from benchmarks.grid import Grid
from benchmarks.report.text import filled, number, p_value, percent, signed, unit
from benchmarks.results import Comparison, Results, Row, TaskResults, collect, measure, test_score
from benchmarks.stats import ALPHA, Interval, holm, interval, paired
from benchmarks.store import Store
from benchmarks.study import papers
from benchmarks.study.papers import Protocol
from benchmarks.study.record import RunRecord
from benchmarks.tasks import TASKS
from benchmarks.tasks.fashion import DEEP, FashionDeep

MARGIN = 0.005  # of accuracy: equal is above −0.5 points
MANY_ZEROS = 0.8
NOT_YET = "No runs are stored yet: the page shows what was declared."


def page(protocol: Protocol, results: Results | None) -> str:
    """Return the page as Markdown; without results, what is declared."""
    name = protocol.study.name
    link = f"[arXiv:{protocol.paper}](https://arxiv.org/abs/{protocol.paper})"
    parts = [f"# {TITLES[name]}", f"**The claim** of {link}: {protocol.claim}."]
    if results is None:
        parts.append(NOT_YET)
    else:
        done = "" if results.whole else f" So far {results.done} of {results.wanted} runs are made: this can change."
        lost = (
            sorted({row.name for row in results.rows if row.diverged or row.failed}) if len(results.tasks) == 1 else []
        )
        if lost:
            verdict = f"no verdict, as final runs of {', '.join(lost)} were lost."
        elif not all(len(row.runs) > 1 or row.diverged for row in results.rows):
            verdict = "too few runs are made for a verdict."
        else:
            verdict = VERDICTS[name](results)
        parts += [f"**Here:** {verdict}{done}", *_beside(protocol, results), *TABLES[name](results)]
    parts += [
        "## How it was done",
        f"`python -m benchmarks run {name}` makes this study. {_filled_in(protocol, results)}",
        f"**Declared rule.** {protocol.decision}",
        "**What differs from the paper.**",
        *(f"- {line}." for line in protocol.differs),
        f"**Chosen before.** {protocol.chosen_by}.".replace("..", "."),
        f"The declaration is [{name}.protocol.json](../data/{name}.protocol.json), sha256 `{papers.digest(name)}`, "
        "which the stored runs carry. Every number on this page is computed from "
        + (f"[the stored runs](../data/{name}.parquet)." if results else "them."),
    ]
    return "\n\n".join(map(filled, parts)).replace(".\n\n- ", ".\n- ") + "\n"


def read(name: str) -> Results | None:
    """Return the results that are kept in the repository, None if there are none."""
    path = papers.PROTOCOLS / f"{name}.parquet"
    return collect(Store.from_parquet(path)) if path.is_file() else None


def _filled_in(protocol: Protocol, results: Results | None) -> str:
    study = protocol.study
    tuned = sum(bool(arm.search) for arm in study.arms)
    trials = f", {tuned} of them tuned by {study.tuning.trials} trials each on the validation data" if tuned else ""
    ends = (
        " Intervals hold with 95 % (Student's t over the seeds, not corrected); P-values are of paired t tests, "
        "corrected by Holm's method over the comparisons of the page."
        if results
        else ""
    )
    return f"{len(study.arms)} arms{trials}, and {len(study.seeds)} final seeds, the same for all.{ends}"


def _beside(protocol: Protocol, results: Results) -> list[str]:
    """Return the paper's numbers beside ours."""
    if not protocol.reported:
        return ["The paper's numbers are not available, so nothing is shown beside ours."]
    ours = OURS[protocol.study.name](results)
    rows = [(what, value, ours.get(what, "–")) for what, value in protocol.reported.items()]
    return [Grid(("", "the paper", "here"), rows).markdown]


# Every page's own words.


def _pwd(results: Results) -> str:
    (task,) = results.tasks.values()
    many = [row for row in _family(task, "ℓ0.8") if _mean(row, "zeros") >= MANY_ZEROS]
    cases = {c.row.name: c for c in task.comparisons}
    if not many:
        most = max(_family(task, "ℓ0.8"), key=lambda row: _mean(row, "zeros"))
        return f"no arm has 80 % zeros; {most.name} has {_share(most)}."
    equal = [row for row in many if row.name in cases and cases[row.name].difference.interval.low > -MARGIN]
    held = cases[(equal or many)[0].name]
    pruned = [c for c in task.comparisons if c.row.name.startswith("pruned")]
    return (
        f"the claim {'holds' if equal else 'does not hold'}: {held.row.name} makes {_share(held.row)} of the weights "
        f"exactly zero, and its test accuracy differs from {held.against.name}'s by {_difference(held)}. "
        + " ".join(f"{c.row.name}, held against {c.against.name}: {_difference(c)}, {_word(c)}." for c in pruned)
    )


def _lpsgdm(results: Results) -> str:
    (task,) = results.tasks.values()
    others = [c for c in task.comparisons if c.row.name.removesuffix(" tuned") in ("SGD", "AdamW", "Lion")]
    beaten = [c for c in others if c.verdict < 0]
    cases = {c.row.name: c for c in task.comparisons}
    length, constant = cases["SGD at LPSGDM's length"], cases["p = 6 tuned"]
    lost = [c for c in others if c.verdict > 0]
    rest = len(others) - len(beaten) - len(lost)
    return (
        f"the claim {'holds' if len(beaten) == len(others) else 'does not hold'}: of {len(others)} comparisons with "
        f"SGD, AdamW and Lion, at the paper's settings and tuned, LPSGDM is significantly better in {len(beaten)}, "
        f"significantly worse in {len(lost)}, with no significant difference in {rest}. "
        f"SGD at LPSGDM's length differs from LPSGDM tuned by {_difference(length)}, {_word(length)}: "
        f"{_of(length, 'the direction helps')}. A constant p = 6 differs by {_difference(constant)}, "
        f"{_word(constant)}: {_of(constant, 'annealing p helps')}."
    )


def _of(c: Comparison, claim: str) -> str:
    """Return the claim if the arm held against LPSGDM is significantly worse, else that it is not shown."""
    return {-1: claim, 1: claim.replace("helps", "hurts"), 0: f"that {claim} is not shown"}[c.verdict]


def _agr(results: Results) -> str:
    (task,) = results.tasks.values()
    cases = {c.row.name: c for c in task.comparisons}
    twins = [cases["AdamW + AGR"], cases["Adan + AGR"]]
    hooks = cases["torch's AdamW + AGR on hooks"]
    better = [c.against.name for c in twins if c.verdict > 0]
    holds = f"holds for {better[0]} alone, and was declared for both" if len(better) == 1 else "holds"
    within = max(-hooks.difference.interval.low, hooks.difference.interval.high) < MARGIN
    return (
        f"the claim {holds if better else 'does not hold'}: "
        + "; ".join(f"{c.row.name} minus {c.against.name} is {_difference(c)}, {_word(c)}" for c in twins)
        + f". On hooks AGR is {'the same as' if within else 'not shown to be the same as'} in the optimizer: "
        f"{_difference(hooks)}."
    )


_AIDS: tuple[tuple[str, Callable[[FashionDeep], bool]], ...] = (
    ("batch normalisation", lambda task: task.batch_norm),
    ("skips", lambda task: task.skip),
    ("ReLU", lambda task: task.activation == "relu"),
)
_MEASURES: dict[str, tuple[Callable[[RunRecord], float | None], int]] = {
    "median cosine": (measure("median cosine"), 1),
    "final training loss": (lambda run: run.curve[-1].train_loss, -1),
}


class _Effect:
    """Return the change of one measure by one aid under one optimizer: paired by seed, over the other two aids."""

    def __init__(self, arm: str, aid: str, name: str, on: list[Row], off: list[Row]) -> None:
        self.arm, self.aid, self.name = arm, aid, name
        of, self.sign = _MEASURES[name]
        values = [[_by_seed(row, of) for row in side] for side in (on, off)]
        seeds = set.intersection(*(set(found) for side in values for found in side))
        sides = [[mean(found[seed] for found in side) for seed in sorted(seeds)] for side in values]
        self.seeds = len(seeds)
        self.difference = paired(*sides) if self.seeds > 1 else None
        self.adjusted = math.nan

    @property
    def better(self) -> bool:
        return self.difference is not None and self.adjusted < ALPHA and self.sign * self.difference.interval.mean > 0


def effects(results: Results) -> list[_Effect]:
    """Return the effects of batch normalisation, skips and ReLU, Holm-corrected together."""
    found = []
    for arm in (arm.name for arm in results.study.arms):
        for aid, has in _AIDS:
            sides: tuple[list[Row], list[Row]] = [], []
            for task in DEEP:
                if task.name in results.tasks:
                    sides[not has(task)].append(results.tasks[task.name].row(arm))
            found += [_Effect(arm, aid, name, *sides) for name in _MEASURES]
    tested = [effect for effect in found if effect.difference is not None]
    for effect, p in zip(tested, holm([e.difference.p_value for e in tested if e.difference]), strict=True):
        effect.adjusted = p
    return found


def _trajectory(results: Results) -> str:
    found = effects(results)
    both = [
        f"{aid} under {arm}"
        for arm in (arm.name for arm in results.study.arms)
        for aid, _ in _AIDS
        if all(effect.better for effect in found if (effect.arm, effect.aid) == (arm, aid))
    ]
    of = f"of {len(_AIDS) * len(results.study.arms)} cases, three aids under {len(results.study.arms)} optimizers"
    lost = sum(row.diverged for row in results.rows)
    said = f"{len(both) or 'none'} {of}{': ' if both else ''}{', '.join(both)}"
    diverged = f" {lost} final runs diverged and are left out." if lost else ""
    return f"the claim holds for {said}. The table has each difference with its interval and P-value.{diverged}"


# Tables.


def _arms(results: Results) -> list[str]:
    (task,) = results.tasks.values()
    zeros = any(_mean(row, "zeros") > 0 for row in task.rows if row.values(measure("zeros")))
    rows: list[tuple[str, ...]] = []
    for row in task.rows:
        edge = "†" if row.at_edge else ""
        rate = f"{row.lr:.3g}{edge}" if row.lr else "–"
        how = "tuned" if row.arm.search else f"of {row.arm.tuned_as}" if row.arm.tuned_as else "set"
        score = _percent(row.values(test_score)) if row.values(test_score) else f"{row.diverged} diverged"
        shown = [row.name, rate, how, score]
        rows.append((*shown, _share(row)) if zeros else tuple(shown))
    heads = ("arm", "learning rate", "which is", "test accuracy", *(["exact zeros"] if zeros else []))
    notes = ["† At an end of the range: a better one may lie beyond."] if any("†" in row[1] for row in rows) else []
    return ["## Arms", Grid(heads, rows).markdown, *notes, "## Differences", _differences(task)]


def _differences(task: TaskResults) -> str:
    rows = [
        (c.row.name, c.against.name, _ends(c.difference.interval), p_value(c.adjusted, name=False), _word(c))
        for c in task.comparisons
    ]
    return Grid(("arm", "minus", "points of test accuracy", "P-value (Holm)", "it is"), rows).markdown


def _networks(results: Results) -> list[str]:
    """Return the tables of effects and of networks, and the rank correlation over the networks."""
    rows = [
        (
            e.arm,
            e.aid,
            e.name,
            _ends(e.difference.interval, 1, 3),
            p_value(e.adjusted, name=False),
            "yes" if e.better else "no",
        )
        for e in effects(results)
        if e.difference is not None
    ]
    heads = ("optimizer", "with − without", "measure", "difference", "P-value (Holm)", "significantly better")
    parts = ["## What the aids change", Grid(heads, rows).markdown, "## Does regularity go with success?"]
    for arm in (arm.name for arm in results.study.arms):
        of = [task.row(arm) for task in results.tasks.values()]
        rhos = []
        for seed in results.study.seeds:
            pairs = [
                (cosine, run.curve[-1].train_loss)
                for row in of
                for run in row.runs
                if run.spec.seed == seed and not run.diverged and (cosine := run.measures.get("median cosine"))
            ]
            if len(pairs) > 3:
                rhos.append(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
        if len(rhos) > 1:
            parts.append(
                f"{arm}: the rank correlation over {len(of)} networks between the median cosine and the final training "
                f"loss is {_ends(interval(rhos), 1)}, the mean over {len(rhos)} seeds; negative is what the paper says."
            )
    networks: list[tuple[str, ...]] = []
    for task in results.tasks.values():
        for row in task.rows:
            cells = [_plain(row.values(of)) for of, _ in _MEASURES.values()]
            more = [_plain(row.values(measure(name))) for name in ("straightness", "negative γ")]
            score = _percent(row.values(test_score)) if row.values(test_score) else f"{row.diverged} diverged"
            rate = f"{row.lr:.3g}{'†' if row.at_edge else ''}" if row.lr else "–"
            networks.append((task.name.removeprefix("fashion-deep-"), row.name, rate, *cells, *more, score))
    columns = ("network", "optimizer", "learning rate", *_MEASURES, "straightness", "steps with γ < 0", "test accuracy")
    return [*parts, "## Networks", Grid(columns, networks).markdown]


# How numbers are written.


def _family(task: TaskResults, start: str) -> list[Row]:
    tuned = [row for row in task.rows if row.name.startswith(start) and row.arm.tuned_as]
    return [row for row in tuned if row.values(measure("zeros"))]


def _by_seed(row: Row, of: Callable[[RunRecord], float | None]) -> dict[int, float]:
    pairs = ((run.spec.seed, of(run)) for run in row.runs if not run.diverged)
    return {seed: value for seed, value in pairs if value is not None}


def _mean(row: Row, name: str) -> float:
    return mean(row.values(measure(name)))


def _word(c: Comparison) -> str:
    return {0: "no significant difference", 1: "significantly better", -1: "significantly worse"}[c.verdict]


def _difference(c: Comparison) -> str:
    return unit(TASKS[c.row.task]).difference(c.difference.interval, p_value(c.adjusted))


def _ends(i: Interval, factor: float = 100, digits: int = 2) -> str:
    low, high = (signed(factor * x, digits) for x in (i.low, i.high))
    return f"{signed(factor * i.mean, digits)} ({low} to {high})"


def _percent(values: Sequence[float]) -> str:
    return percent(interval(values), 2) if values else "–"


def _plain(values: Sequence[float]) -> str:
    return number(interval(values)) if values else "–"


def _share(row: Row) -> str:
    return _percent(row.values(measure("zeros")))


def _ours_of_pwd(results: Results) -> dict[str, str]:
    (task,) = results.tasks.values()
    rows = _family(task, "ℓ0.8")
    cases = {c.row.name: c for c in task.comparisons}
    if not rows or any(row.name not in cases for row in rows):
        return {}
    return {
        "exact zeros": "; ".join(f"{_share(row)} ({row.name})" for row in rows),
        "accuracy": "; ".join(f"{_difference(cases[row.name])} ({row.name})" for row in rows),
    }


def _ours_of_lpsgdm(results: Results) -> dict[str, str]:
    (task,) = results.tasks.values()
    return {row.name: f"{_percent(row.values(test_score))}" for row in task.rows if row.values(test_score)}


TITLES = {
    "paper-pwd": "ℓp decay makes zeros",
    "paper-lpsgdm": "LPSGDM against SGD, AdamW and Lion",
    "paper-agr": "Adaptive gradient regularization",
    "paper-trajectory": "The regularity of trajectories",
}
VERDICTS: dict[str, Callable[[Results], str]] = {
    "paper-pwd": _pwd,
    "paper-lpsgdm": _lpsgdm,
    "paper-agr": _agr,
    "paper-trajectory": _trajectory,
}
TABLES: dict[str, Callable[[Results], list[str]]] = {
    "paper-pwd": _arms,
    "paper-lpsgdm": _arms,
    "paper-agr": _arms,
    "paper-trajectory": _networks,
}
OURS: dict[str, Callable[[Results], dict[str, str]]] = {
    "paper-pwd": _ours_of_pwd,
    "paper-lpsgdm": _ours_of_lpsgdm,
}

"""The pages of the presets that run papers' recipes: the paper's numbers beside ours, and a verdict by a declared rule.

Every number and every verdict is computed from stored runs; the claim, the rule and the differences from the paper are
those of the protocol that was declared before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from statistics import mean
from typing import NamedTuple

from scipy import stats

from benchmarks.grid import Grid
from benchmarks.report.data import mean_of
from benchmarks.report.text import filled, number, p_value, percent, signed, unit
from benchmarks.results import Comparison, Results, Row, TaskResults, collect, measure, test_score
from benchmarks.stats import ALPHA, Difference, Interval, holm, interval, paired
from benchmarks.store import Store
from benchmarks.study import papers
from benchmarks.study.papers import Protocol
from benchmarks.study.record import RunRecord
from benchmarks.tasks import TASKS
from benchmarks.tasks.fashion import DEEP, FashionDeep

MARGIN = 0.005  # of accuracy: equal is above −0.5 points
MANY_ZEROS = 0.8
NOT_YET = "No runs are stored yet: the page shows the declaration only."


def page(protocol: Protocol, results: Results | None) -> str:
    """Return the page as Markdown; without results, what is declared."""
    name = protocol.study.name
    link = f"[arXiv:{protocol.paper}](https://arxiv.org/abs/{protocol.paper})"
    parts = [f"# {PAGES[name].title}", f"**The claim** of {link}: {protocol.claim}."]
    if results is None:
        parts.append(NOT_YET)
    else:
        done = "" if results.whole else f" Only {results.done} of {results.wanted} runs are done: this can change."
        lost = sorted({row.name for row in results.rows if row.diverged or row.failed})
        if lost and len(results.tasks) == 1:
            verdict = f"no verdict, as final runs of {', '.join(lost)} were lost."
        elif not all(len(row.runs) > 1 or row.diverged for row in results.rows):
            verdict = "too few runs are done for a verdict."
        else:
            verdict = PAGES[name].verdict(results)
        parts += [f"**Here:** {verdict}{done}", *_beside(protocol, results), *PAGES[name].tables(results)]
    parts += [
        "## How it was done",
        f"`python -m benchmarks run {name}` makes this study. {_filled_in(protocol, results)}",
        f"**Declared rule.** {protocol.decision}",
        "**What differs from the paper.**",
        *(f"- {line}." for line in protocol.differs),
        f"**Chosen before.** {protocol.chosen_by[0].upper()}{protocol.chosen_by[1:]}.".replace("..", "."),
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
        " Intervals are 95 % (Student's t over the seeds, not corrected for their number); P-values are of paired t "
        "tests, Holm-corrected over the comparisons of the page."
        if results
        else ""
    )
    return f"{len(study.arms)} arms{trials}, and {len(study.seeds)} final seeds, the same for all.{ends}"


def _beside(protocol: Protocol, results: Results) -> list[str]:
    """Return the paper's numbers beside ours."""
    if not protocol.reported:
        return ["We do not have the paper's numbers, so the tables show only ours."]
    ours = PAGES[protocol.study.name].ours(results)
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
        + f"Magnitude pruning beside it: {'; '.join(f'{_pair(c)} is {_difference(c)}, {_word(c)}' for c in pruned)}."
    )


def _lpsgdm(results: Results) -> str:
    (task,) = results.tasks.values()
    others = [c for c in task.comparisons if c.row.name.removesuffix(" tuned") in ("SGD", "AdamW", "Lion")]
    verdicts = [c.verdict for c in others]
    better, worse, ties = map(verdicts.count, (-1, 1, 0))  # of LPSGDM: the verdicts are the others'
    cases = {c.row.name: c for c in task.comparisons}
    length, constant = cases["SGD at LPSGDM's length"], cases["p = 6 tuned"]
    return (
        f"the claim {'holds' if better == len(others) else 'does not hold'}: of {len(others)} comparisons with "
        f"SGD, AdamW and Lion, at the paper's settings and tuned, LPSGDM is significantly better in {better}, "
        f"significantly worse in {worse}, with no significant difference in {ties}. "
        f"The controls: {_pair(length)} is {_difference(length)}, {_word(length)}: "
        f"{_of(length, 'the direction helps')}; {_pair(constant)} is {_difference(constant)}, {_word(constant)}: "
        f"{_of(constant, 'annealing p helps')}."
    )


def _of(c: Comparison, claim: str) -> str:
    """Return the claim if the arm is significantly worse than LPSGDM, else that it is not shown."""
    return {-1: claim, 1: claim.replace("helps", "hurts"), 0: f"that {claim} is not shown"}[c.verdict]


def _agr(results: Results) -> str:
    (task,) = results.tasks.values()
    cases = {c.row.name: c for c in task.comparisons}
    twins = [cases["AdamW + AGR"], cases["Adan + AGR"]]
    hooks = cases["torch's AdamW + AGR on hooks"]
    better = [c.against.name for c in twins if c.verdict > 0]
    holds = f"holds for {better[0]} alone, but was declared for both" if len(better) == 1 else "holds"
    within = max(-hooks.difference.interval.low, hooks.difference.interval.high) < MARGIN
    return (
        f"the claim {holds if better else 'does not hold'}: "
        + "; ".join(f"{c.row.name} minus {c.against.name} is {_difference(c)}, {_word(c)}" for c in twins)
        + f". AGR on hooks is {'equivalent' if within else 'not shown to be equivalent'} to AGR in the optimizer: "
        f"{_difference(hooks)}."
    )


_AIDS: tuple[tuple[str, Callable[[FashionDeep], bool]], ...] = (
    ("batch normalisation", lambda task: task.batch_norm),
    ("skips", lambda task: task.skip),
    ("ReLU", lambda task: task.activation == "relu"),
)
_AIDS_IN_WORDS = "batch normalisation, skips or ReLU"
_MEASURES: dict[str, tuple[Callable[[RunRecord], float | None], int]] = {
    "median cosine": (measure("median cosine"), 1),
    "final training loss": (lambda run: run.curve[-1].train_loss, -1),
}


class Effect(NamedTuple):
    """The change of one measure by one aid under one optimizer: paired by seed, over the other two aids."""

    arm: str
    aid: str
    measure: str
    difference: Difference
    adjusted: float

    @property
    def better(self) -> bool:
        _, sign = _MEASURES[self.measure]
        return self.adjusted < ALPHA and sign * self.difference.interval.mean > 0


def effects(results: Results) -> list[Effect]:
    """Return the effects of batch normalisation, skips and ReLU that can be tested, Holm-corrected together."""
    found = []
    for arm, (aid, has), name in product(results.study.arms, _AIDS, _MEASURES):
        sides: tuple[list[dict[int, float]], ...] = [], []
        for task in DEEP:
            if task.name in results.tasks:
                row = results.tasks[task.name].row(arm.name)
                sides[not has(task)].append(_by_seed(row, _MEASURES[name][0]))
        seeds = sorted(set.intersection(*(set(values) for side in sides for values in side)))
        if len(seeds) > 1:
            on, off = ([mean(values[seed] for values in side) for seed in seeds] for side in sides)
            found.append((arm.name, aid, name, paired(on, off)))
    adjusted = holm([difference.p_value for *_, difference in found])
    return [Effect(*case, p) for case, p in zip(found, adjusted, strict=True)]


def _trajectory(results: Results) -> str:
    better = Counter((effect.arm, effect.aid) for effect in effects(results) if effect.better)
    cases = product((arm.name for arm in results.study.arms), (aid for aid, _ in _AIDS))
    both = [f"{aid} under {arm}" for arm, aid in cases if better[arm, aid] == len(_MEASURES)]
    arms = " or ".join(arm.name for arm in results.study.arms)
    of = f"of {len(_AIDS) * len(results.study.arms)} cases ({_AIDS_IN_WORDS}, under {arms})"
    lost = sum(row.diverged for row in results.rows)
    said = f"{len(both) or 'none'} {of}{': ' if both else ''}{', '.join(both)}"
    diverged = f" {lost} final runs diverged and are left out." if lost else ""
    return f"the claim holds in {said}. The table has each difference with its interval and P-value.{diverged}"


# Tables.


def _arms(results: Results) -> list[str]:
    (task,) = results.tasks.values()
    zeros = any(_mean(row, "zeros") > 0 for row in task.rows if row.values(measure("zeros")))
    rows = []
    for row in task.rows:
        how = "tuned" if row.arm.search else f"as {row.arm.tuned_as}" if row.arm.tuned_as else "fixed"
        rows.append([row.name, _rate(row), how, _score(row), *([_share(row)] if zeros else [])])
    heads = ("arm", "learning rate", "chosen", "test accuracy", *(["exact zeros"] if zeros else []))
    edge = any(row.at_edge for row in task.rows)
    notes = ["† At an end of the range: a better one may lie beyond."] if edge else []
    held = [
        (c.row.name, c.against.name, _ends(c.difference.interval), p_value(c.adjusted, name=False), _word(c))
        for c in task.comparisons
    ]
    differences = Grid(("arm", "minus", "points of test accuracy", "P-value (Holm)", "verdict"), held)
    return ["## Arms", Grid(heads, rows).markdown, *notes, "## Differences", differences.markdown]


def _networks(results: Results) -> list[str]:
    """Return the tables of effects and of networks, and the rank correlation over the networks."""
    rows = []
    for e in effects(results):
        difference, p = _ends(e.difference.interval, 1, 3), p_value(e.adjusted, name=False)
        rows.append([e.arm, e.aid, e.measure, difference, p, "yes" if e.better else "no"])
    heads = ("optimizer", "with − without", "measure", "difference", "P-value (Holm)", "significantly better")
    effect = f"## Effect of {_AIDS_IN_WORDS.replace(' or ', ' and ')} on the cosine and the loss"
    parts = [effect, Grid(heads, rows).markdown, "## Does regularity go with success?"]
    for arm in (arm.name for arm in results.study.arms):
        of = [task.row(arm) for task in results.tasks.values()]
        columns = [[_by_seed(row, measured) for measured, _ in _MEASURES.values()] for row in of]
        rhos = []
        for seed in results.study.seeds:
            pairs = [(cosine[seed], loss[seed]) for cosine, loss in columns if seed in cosine]
            if len(pairs) > 3:
                rhos.append(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
        if len(rhos) > 1:
            parts.append(
                f"{arm}: the rank correlation over {len(of)} networks between the median cosine and the final training "
                f"loss is {_ends(interval(rhos), 1)}, the mean over {len(rhos)} seeds; the paper expects it below 0."
            )
    shown = [*(of for of, _ in _MEASURES.values()), measure("straightness"), measure("negative γ")]
    networks = []
    for row in results.rows:
        cells = [number(it) if (it := mean_of(row, of)) else "–" for of in shown]
        networks.append([row.task.removeprefix("fashion-deep-"), row.name, _rate(row), *cells, _score(row)])
    titles = ("network", "optimizer", "learning rate", *_MEASURES, "straightness", "steps with γ < 0", "test accuracy")
    return [*parts, "## Networks", Grid(titles, networks).markdown]


# How numbers are written.


def _family(task: TaskResults, start: str) -> list[Row]:
    rows = [row for row in task.rows if row.name.startswith(start) and row.arm.tuned_as]
    return [row for row in rows if row.values(measure("zeros"))]


def _by_seed(row: Row, of: Callable[[RunRecord], float | None]) -> dict[int, float]:
    pairs = ((run.spec.seed, of(run)) for run in row.runs if not run.diverged)
    return {seed: value for seed, value in pairs if value is not None}


def _mean(row: Row, name: str) -> float:
    return mean(row.values(measure(name)))


def _pair(c: Comparison) -> str:
    return f"“{c.row.name}” minus “{c.against.name}”"


def _word(c: Comparison) -> str:
    return {0: "no significant difference", 1: "significantly better", -1: "significantly worse"}[c.verdict]


def _difference(c: Comparison) -> str:
    return unit(TASKS[c.row.task]).difference(c.difference.interval, p_value(c.adjusted))


def _ends(i: Interval, factor: float = 100, digits: int = 2) -> str:
    low, high = (signed(factor * x, digits) for x in (i.low, i.high))
    return f"{signed(factor * i.mean, digits)} ({low} to {high})"


def _rate(row: Row) -> str:
    return f"{row.lr:.3g}{'†' if row.at_edge else ''}" if row.lr else "–"


def _score(row: Row) -> str:
    score = mean_of(row, test_score)
    return percent(score, 2) if score else f"{row.diverged} diverged"


def _share(row: Row) -> str:
    zeros = mean_of(row, measure("zeros"))
    return percent(zeros, 2) if zeros else "–"


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
    return {row.name: _score(row) for row in task.rows if row.values(test_score)}


class Page(NamedTuple):
    """The parts that differ between pages: title, verdict, tables, and our numbers under the paper's names."""

    title: str
    verdict: Callable[[Results], str]
    tables: Callable[[Results], list[str]] = _arms
    ours: Callable[[Results], dict[str, str]] = lambda results: {}


PAGES = {
    "paper-pwd": Page("ℓp decay makes zeros", _pwd, ours=_ours_of_pwd),
    "paper-lpsgdm": Page("LPSGDM against SGD, AdamW and Lion", _lpsgdm, ours=_ours_of_lpsgdm),
    "paper-agr": Page("Adaptive gradient regularization", _agr),
    "paper-trajectory": Page("The regularity of trajectories", _trajectory, _networks),
}

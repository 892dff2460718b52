"""What the methods of normopt's own papers do: annealing p, AGR and ℓp decay, each against its own control.

An arm's control is found by its settings, not by its name: the same optimizer with everything else equal. Each
question is a family of tests of its own, Holm-corrected on every task.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.report import data
from benchmarks.report.finding import Finding
from benchmarks.report.text import counted, listed, of, p_value, percent, unit
from benchmarks.results import Comparison, Results, Row, TaskResults, measure, test_score, validation_score
from benchmarks.stats import Interval
from benchmarks.study.spec import Arm, Study

AGR = frozenset({"agr"})
DECAY = frozenset({"decay", "decay_p", "weight_decay", "decay_step"})
STAYS, LENGTHS = "whose p stays", "SGD's direction at its step lengths"
MANY = 8  # pairs: more than that are not told one by one
ALLOWED = 0.01  # of the validation score: what a sparse network may lose and still be chosen

ANNEALING = (
    "In LPSGDM p falls from a high value to 2 (arXiv 2606.02078, which reports gains on CIFAR and ImageNet). Under its "
    "power map a smaller p also means shorter steps, so that annealing p is a schedule of the learning rate too, and "
    "controls have to tell the two apart."
)
GRADIENTS = "Adaptive gradient regularization (arXiv 2407.16944) is reported to improve the optimizers that wear it."
SPARSITY = (
    "ℓp weight decay (arXiv 2404.10824) is reported to make 83.6\u00a0% of a Fashion-MNIST network's weights exactly "
    "zero at equal accuracy."
)


@dataclass(frozen=True)
class Pair:
    """An arm, its control, and what the two differ in."""

    arm: str
    control: str
    what: str


@dataclass(frozen=True)
class Case:
    """What a pair came to on a task."""

    pair: Pair
    task: TaskResults
    found: Comparison

    @property
    def verdict(self) -> int:
        """1 if the arm is better at the 5 % level, −1 if it is worse, else 0."""
        return 0 if self.found.adjusted >= data.ALPHA else 1 if self.found.gain > 0 else -1


def claims(results: Results) -> list[Finding]:
    """The questions that the study has arms for, and the answers."""
    study = results.study
    found = []
    if pairs := annealing(study):
        cases = _cases(results, pairs)
        said = [ANNEALING, *_answers(results, pairs, cases), *_reported(cases, STAYS), *_lengths(cases)]
        found.append(Finding("What annealing p does", " ".join(said)))
    if pairs := twins(study, AGR):
        cases = _cases(results, pairs)
        found.append(
            Finding("What AGR does", " ".join([GRADIENTS, *_answers(results, pairs, cases), *_reported(cases)]))
        )
    if pairs := twins(study, DECAY):
        cases = _cases(results, pairs)
        said = [SPARSITY, *_answers(results, pairs, cases), *_sparsity(results, pairs)]
        found.append(Finding("What ℓp decay does", " ".join(said)))
    return found


def _reported(cases: Sequence[Case], what: str | None = None) -> list[str]:
    """How the cases stand to the report of a gain."""
    mine = [case.verdict for case in cases if what in (None, case.pair.what)]
    if not mine:
        return []
    better, worse = mine.count(1), mine.count(-1)
    text = (
        f"Of {counted(len(mine), 'comparison')}{f' with the arm {what}' if what else ''}, {better} are better, {worse} "
        f"worse and {mine.count(0)} neither:"
    )
    if not better and not worse:
        return [f"{text} the gain that is reported does not show here."]
    if worse > better:
        return [f"{text} {'more often ' if better else ''}against what is reported."]
    if worse == better:
        return [f"{text} as often in line with what is reported as against it."]
    if mine.count(0) > better:
        return [f"{text} mostly, the gain that is reported does not show here."]
    return [f"{text} {'more often ' if worse else ''}in line with what is reported."]


def _lengths(cases: Sequence[Case]) -> list[str]:
    """Whether annealing p is more than a schedule of the learning rate."""
    mine = [case for case in cases if case.pair.what == LENGTHS]
    if not mine:
        return []
    better = [case.task.name for case in mine if case.verdict > 0]
    if better:
        return [f"On {listed(better)} its direction is worth something: step lengths alone do not reach it."]
    return [
        "On no task can it be shown to be better than SGD's direction at its step lengths, which are a schedule of the "
        "learning rate."
    ]


def annealing(study: Study) -> list[Pair]:
    """An arm whose p anneals, without regularizers, and its controls; of several, the one that has most.

    Controls are the arm whose p stays, those with other schedules, those whose steps are as long as SGD's, and SGD with
    the same momentum, by itself and at the arm's step lengths.
    """
    plain = [arm for arm in study.arms if not (AGR | DECAY) & arm.settings.keys()]
    moving = [arm for arm in plain if arm.p_schedule and arm.settings.get("scale") != "matched"]
    # The paper's schedule first: of arms with as many controls it is the one.
    moving.sort(key=lambda arm: arm.p_schedule is not None and arm.p_schedule.kind != "cosine")
    return max((_controls(arm, plain) for arm in moving), key=len, default=[])


def _controls(this: Arm, others: Sequence[Arm]) -> list[Pair]:
    pairs = []
    for arm in others:
        same = arm.optimizer == this.optimizer and _without(arm, {"scale"}) == _without(this, {"scale"})
        if arm is this:
            continue
        if same and arm.settings.get("scale") == "matched":
            what = "whose steps are as long as SGD's" + ("" if arm.p_schedule else " and whose p stays")
        elif same and arm.settings == this.settings:
            what = f"whose p falls by another schedule, {arm.p_schedule.kind}" if arm.p_schedule else STAYS
        elif arm.optimizer == f"{this.optimizer}-lr-matched":
            what = LENGTHS
        elif arm.optimizer == "sgd-ema":
            what = "SGD with the same momentum"
        else:
            continue
        pairs.append(Pair(this.name, arm.name, what))
    return pairs


def twins(study: Study, keys: frozenset[str]) -> list[Pair]:
    """Every arm that wears the regularizer with these settings, and the arm that is the same without.

    Where there is no such arm, for the arm wears both regularizers, it is the one without either.
    """
    pairs = []
    for arm in study.arms:
        if not _wears(arm, keys):
            continue
        bare = _without(arm, AGR | DECAY)
        others = [o for o in study.arms if not _wears(o, keys) and (o.optimizer, o.p_schedule) == _stem(arm)]
        exact = next((o for o in others if _without(o, keys) == _without(arm, keys)), None)
        neither = next((o for o in others if o.settings == bare), None)
        if exact:
            pairs.append(Pair(arm.name, exact.name, "the same without"))
        elif neither:
            pairs.append(Pair(arm.name, neither.name, "the same without AGR and without decay"))
    return pairs


def _wears(arm: Arm, keys: frozenset[str]) -> bool:
    """Torch's own weight decay is no ℓp decay."""
    return bool(arm.settings.get("agr")) if keys == AGR else arm.settings.get("decay") == "lp"


def _stem(arm: Arm) -> object:
    return arm.optimizer, arm.p_schedule


def _without(arm: Arm, keys: Collection[str]) -> dict[str, object]:
    return {key: value for key, value in arm.settings.items() if key not in keys}


def _cases(results: Results, pairs: Sequence[Pair]) -> list[Case]:
    by_names = {(pair.arm, pair.control): pair for pair in pairs}
    return [
        Case(by_names[c.row.name, c.against.name], task, c)
        for task in results.tasks.values()
        for c in task.compare(by_names, test_score)
    ]


def _answers(results: Results, pairs: Sequence[Pair], cases: Sequence[Case]) -> list[str]:
    """A sentence for each pair, over the tasks; of many pairs, as a sweep has, only how they come out."""
    if len(pairs) > MANY:
        better, worse, neither = ([case.verdict for case in cases].count(verdict) for verdict in (1, -1, 0))
        return [
            f"Of {counted(len(cases), 'comparison')} of {len(pairs)} arms with the same without, on "
            f"{counted(len(results.tasks), 'task')}, {better} are better, {worse} worse and {neither} neither."
        ]
    return [_answer(pair, [case for case in cases if case.pair == pair], len(results.tasks)) for pair in pairs]


def _answer(pair: Pair, cases: Sequence[Case], tasks: int) -> str:
    who = f"{pair.arm} against {pair.control} ({pair.what})"
    if not cases:
        return f"{who}: not compared, for a run is missing or diverged."
    # A task alone has room for its numbers; those of more are in claims.csv.
    numbers = _numbers if tasks == 1 else _mean
    parts = []
    for verdict, word in ((1, "better"), (-1, "worse")):
        mine = [case for case in cases if case.verdict == verdict]
        if mine:
            parts.append(f"{word} on {listed([numbers(case) for case in mine])}")
    rest = [case for case in cases if not case.verdict]
    if rest and tasks == 1:
        parts.append(f"not told apart on {_numbers(rest[0])}")
    elif rest:
        where = "any task" if len(rest) == tasks else listed([case.task.name for case in rest])
        ups = sum(case.found.gain > 0 for case in rest)
        parts.append(f"not told apart on {where} ({of(ups, len(rest))} means better)")
    if len(cases) < tasks:
        parts.append(f"not compared on {counted(tasks - len(cases), 'task')}, for a run is missing or diverged")
    return f"{who}: {'; '.join(parts)}."


def _mean(case: Case) -> str:
    return f"{case.task.name} ({unit(case.task.task).mean_difference(case.found.difference.interval)})"


def _numbers(case: Case) -> str:
    it = unit(case.task.task)
    return f"{case.task.name}, {it.difference(case.found.difference.interval, p_value(case.found.adjusted))}"


def rows(results: Results) -> data.Rows:
    """Every comparison that the answers are made of."""
    study = results.study
    asked = (("annealing", annealing(study)), ("AGR", twins(study, AGR)), ("ℓp decay", twins(study, DECAY)))
    return [
        {"question": question, "control": case.pair.what} | data.difference(case.task, case.found)
        for question, pairs in asked
        for case in _cases(results, pairs)
    ]


def _sparsity(results: Results, pairs: Sequence[Pair]) -> list[str]:
    """For each task: the sparsest arm that validation data let pass, so that its test result is no selection's."""
    kept, lost = [], []
    for task in results.tasks.values():
        made = [
            (row, twin, share) for row, twin in _rows(task, pairs) if (share := data.mean_of(row, measure("zeros")))
        ]
        if not any(share.mean > data.SPARSE for _, _, share in made):
            continue
        fit = [case for case in made if _allowed(task, case[0], case[1])]
        if fit:
            kept.append(_sparsest(task, *max(fit, key=lambda case: case[2].mean)))
        else:
            lost.append(task.name)
    allowed = f"more than {counted(round(100 * ALLOWED), 'point')} of accuracy, or {ALLOWED:g} of another score,"
    said = [f"The sparsest arms that do not lose {allowed} on the validation data: {'; '.join(kept)}."] if kept else []
    return [*said, f"On {listed(lost)} every arm with it loses {allowed} there."] if lost else said


def _allowed(task: TaskResults, row: Row, twin: Row) -> bool:
    score, base = data.mean_of(row, validation_score), data.mean_of(twin, validation_score)
    sign = 1 if task.task.higher_is_better else -1
    return score is not None and base is not None and sign * (score.mean - base.mean) >= -ALLOWED


def _sparsest(task: TaskResults, row: Row, twin: Row, share: Interval) -> str:
    text = f"on {task.name}, {row.name} with {percent(share)} exact zeros"
    for c in task.compare([(row.name, twin.name)], test_score):
        text += (
            f" and a test {task.task.score_name} {unit(task.task).difference(c.difference.interval)} from {twin.name}'s"
        )
    return text


def _rows(task: TaskResults, pairs: Sequence[Pair]) -> list[tuple[Row, Row]]:
    return [(task.row(pair.arm), task.row(pair.control)) for pair in pairs]

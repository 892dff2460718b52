"""The summary in plain words. Every sentence is made from the results; none is true by being typed here."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.arms import ARMS
from benchmarks.report.text import (
    LABELS,
    NBSP,
    compared,
    counted,
    listed,
    name,
    number,
    p_value,
    percent,
    points,
    share,
    weight,
)
from benchmarks.results import Comparison, Results, Row, SparsityPoint, test_accuracies
from benchmarks.spec import Pair, SparsityPlan
from benchmarks.stats import t_interval

ALPHA = 0.05
CONTROLS = ("LPSGDM-constant", "LPSGDM-matched")
TWINS = ("SGD-EMA", "Signum")  # p = 2 and p = ∞ throughout


@dataclass(frozen=True)
class Finding:
    """A question and what the results say to it."""

    title: str
    text: str


def findings(results: Results) -> list[Finding]:
    """The summary, in the order in which it is read, of what the study has."""
    study = results.study
    others = f"Other optimizers against {study.baseline}" + (", without regularizers" if study.regularized else "")
    told = [Finding("The best", _best(results)), Finding(others, _arms(results))]
    if study.regularized:
        told.append(Finding("Regularizers against the same optimizer without", _regularizers(results)))
    if {"LPSGDM", *CONTROLS} <= {arm.name for arm in study.arms}:
        told.append(Finding("What annealing p does", _annealing(results)))
    if adaptive := adaptive_family(results):
        told.append(Finding("What a p by the gradient does", _adaptive(adaptive)))
    if study.sparsity:
        told.append(Finding("Sparsity", sparsity_words(results, study.sparsity)))
    return [*told, Finding("How far to trust this", _trust(results))]


def arm_family(results: Results) -> list[Comparison]:
    """Every other arm against the baseline, all without regularizers."""
    baseline = results.study.baseline
    arms = [arm.name for arm in results.study.arms if arm.name != baseline]
    return results.compare([((arm, "none"), (baseline, "none")) for arm in arms])


def regularizer_family(results: Results) -> list[Comparison]:
    """Every regularizer against none, arm by arm."""
    worn = [pair for pair in results.study.pairs if pair[1] != "none"]
    return results.compare([(pair, (pair[0], "none")) for pair in worn])


def annealing_family(results: Results) -> list[Comparison]:
    """LPSGDM against its two controls: p that stays, and steps as long as SGD's."""
    this: Pair = ("LPSGDM", "none")
    return results.compare([(this, (control, "none")) for control in CONTROLS])


def adaptive_family(results: Results) -> list[Comparison]:
    """Every arm whose p is adaptive against the same with another schedule or none, and against the ends of p."""
    pairs: list[tuple[Pair, Pair]] = []
    for plan in results.study.arms:
        if ARMS[plan.name].schedule == "adaptive":
            same = plan.name.removesuffix("-adaptive")
            pairs += [
                ((plan.name, "none"), (other, "none")) for other in (same, f"{same}-linear", f"{same}-constant", *TWINS)
            ]
    return results.compare(pairs)


def _best(results: Results) -> str:
    sound = [row for row in results.rows if not row.diverged]
    if not sound:
        return f"Each of {compared(results)} had a final run that diverged."

    def accuracy(row: Row) -> float:
        return t_interval(test_accuracies(row.runs)).mean

    best, worst = max(sound, key=accuracy), min(sound, key=accuracy)
    text = (
        f"The highest mean test accuracy of {compared(results)} is "
        f"{_accuracy(best)}, by {name(best)}; the lowest is {_accuracy(worst)}, by {name(worst)}."
    )
    baseline = results.row((results.study.baseline, "none"))
    if baseline and not baseline.diverged and baseline is not best:
        above = sum(accuracy(row) > accuracy(baseline) for row in sound)
        alone = " alone" if results.study.regularized else ""
        text += f" {name(baseline)}{alone} reaches {_accuracy(baseline)}; {above} of the other means lie above it."
    return text


def _arms(results: Results) -> str:
    return _verdict(arm_family(results), results.study.baseline)


def _regularizers(results: Results) -> str:
    return _verdict(regularizer_family(results), "the same optimizer without")


def _annealing(results: Results) -> str:
    family = annealing_family(results)
    if not family:
        return "LPSGDM or its controls had a final run that diverged."
    parts = []
    for c in family:
        told = "a difference that stands" if c.adjusted < ALPHA else "which is not significant"
        parts.append(
            f"{name(c.row)} minus {name(c.against)}: {points(c.difference.interval)}, {told} ({p_value(c.adjusted)})"
        )
    return f"In test accuracy, each arm at its own learning rate. {'; '.join(parts)}. P-values are Holm-corrected."


def _adaptive(family: list[Comparison]) -> str:
    told = [
        f"{name(c.row)} minus {name(c.against)}: {points(c.difference.interval)}, {p_value(c.adjusted)}" for c in family
    ]
    standing = sum(c.adjusted < ALPHA for c in family)
    return (
        f"In test accuracy, each arm at its own learning rate. {'; '.join(told)}. P-values are Holm-corrected: "
        f"{standing} of {counted(len(family), 'difference')} {'stands' if standing == 1 else 'stand'} at the "
        f"{share(ALPHA)} level."
    )


def _verdict(family: list[Comparison], against: str) -> str:
    if not family:
        return "There is nothing to compare."
    better = [c for c in family if c.adjusted < ALPHA and c.difference.interval.mean > 0]
    worse = [c for c in family if c.adjusted < ALPHA and c.difference.interval.mean < 0]
    n = len(family[0].row.runs)
    text = [f"Test accuracy, paired over {counted(n, 'seed')}; P-values Holm-corrected over {len(family)} comparisons."]
    for found, word in ((better, "Better"), (worse, "Worse")):
        if found:
            text.append(f"{word} at the {share(ALPHA)} level: {listed([_case(c) for c in found])}.")
    rest = len(family) - len(better) - len(worse)
    if rest:
        ups = sum(c.difference.interval.mean > 0 for c in family if c not in better and c not in worse)
        who = f"The other {rest} of {len(family)}" if better or worse else f"None of the {len(family)}"
        verb = "cannot be told apart" if better or worse else "can be told apart"
        text.append(f"{who} {verb} from {against} ({ups} of {rest} means are higher).")
    if not better and not worse:
        extreme = max(family, key=lambda c: abs(c.difference.interval.mean))
        text.append(f"The largest difference is {_case(extreme)}.")
    return " ".join(text)


def _case(c: Comparison) -> str:
    return f"{name(c.row)}, {points(c.difference.interval)}, {p_value(c.adjusted)}"


def _accuracy(row: Row) -> str:
    return percent(t_interval(test_accuracies(row.runs)))


def met(plan: SparsityPlan, point: SparsityPoint) -> bool:
    """This λ gives the zeros that the study wants at no more than the loss of accuracy that it allows."""
    difference = point.test_difference
    return (
        difference is not None
        and point.zeros.mean >= plan.zeros_wanted
        and difference.interval.mean >= -plan.loss_allowed
    )


def chosen(results: Results, plan: SparsityPlan) -> SparsityPoint | None:
    """The sparsest λ within the allowed loss on VALIDATION data, so that its test result is no selection's."""
    allowed = -plan.loss_allowed
    fit = [
        point
        for point in results.sparsity
        if point.validation_difference is not None and point.validation_difference.interval.mean >= allowed
    ]
    return max(fit, key=lambda point: point.zeros.mean, default=None)


def sparsity_words(results: Results, plan: SparsityPlan) -> str:
    """Whether the sparsity that the study asks for came out."""
    wanted, allowed = share(plan.zeros_wanted), f"{100 * plan.loss_allowed:g}{NBSP}point"
    passing = [point for point in results.sparsity if met(plan, point)]
    text = (
        f"Asked: with {LABELS['agr+lp']} (p{NBSP}={NBSP}{results.study.decay_p:g}), {plan.arm} should reach {wanted} "
        f"exact zeros at a mean loss of at most {allowed} of test accuracy to its twin without either, over "
        f"{len(plan.seeds)} seeds. "
    )
    if passing:
        text += f"It does at {listed([weight(point.weight_decay) for point in passing])}. "
    else:
        text += "It does not at any λ tried. "
    pick = chosen(results, plan)
    if pick is None:
        return text + f"At no λ does the validation accuracy stay within {allowed} of the twin's."
    assert pick.test_difference is not None
    inside = pick.test_difference.interval.low >= -plan.loss_allowed
    text += (
        f"Choosing by validation data alone the sparsest network within {allowed} gives "
        f"{weight(pick.weight_decay)}: {percent(pick.zeros)} exact zeros, test accuracy {percent(pick.accuracy)}, "
        f"{points(pick.test_difference.interval)} to the twin"
    )
    text += (
        f"; the whole interval lies within the allowed {allowed}."
        if inside
        else f"; the interval does not rule out a loss of more than {allowed}."
    )
    if results.sparsity_diverged:
        text += f" Diverged at {listed([weight(decay) for decay in results.sparsity_diverged])}."
    return text


def _trust(results: Results) -> str:
    study = results.study
    text = [
        f"Learning rates were chosen on one seed by validation loss, and the intervals are over "
        f"{counted(len(study.final_seeds), 'seed')}: they hold for other initial weights and batches, not for another "
        "test set or task. Small differences may not be found with so few seeds."
    ]
    edges = [row for row in results.rows if row.choice.at_edge]
    if edges:
        told = listed([f"{name(row)} ({row.choice.lr:g})" for row in edges])
        text.append(
            f"The best learning rate lies at the edge of the grid, and a better one may lie beyond, for {told}."
        )
    else:
        text.append("Every best learning rate lies inside its grid.")
    tried = sum(loss == float("inf") for row in results.rows for loss in row.choice.losses.values())
    broken = [f"{name(row)} ({row.diverged} of {len(row.runs)})" for row in results.rows if row.diverged]
    tuned = f"{counted(tried, 'tuning run')} diverged" if tried else "No tuning run diverged"
    if broken:
        text.append(f"{tuned}; final runs that did: {listed(broken)}.")
    elif tried or results.sparsity_diverged:
        text.append(f"{tuned}, and no final run.")
    else:
        text.append("No run diverged.")
    return " ".join(text)


__all__ = ["Finding", "chosen", "findings", "met", "number", "sparsity_words"]

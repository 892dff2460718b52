"""What a finished study found, as numbers: rows, comparisons, the sparsity curve. No words, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import phases
from benchmarks.phases import Choice
from benchmarks.spec import Pair, Regularizer, Study
from benchmarks.stats import Difference, Interval, holm, paired, t_interval
from benchmarks.store import Environment, Store, UnfitStore
from benchmarks.training import RunRecord


@dataclass(frozen=True)
class Row:
    """One arm with one regularizer: how it was tuned and its final runs, in the order of the seeds."""

    arm: str
    regularizer: Regularizer
    choice: Choice
    runs: list[RunRecord]

    @property
    def diverged(self) -> int:
        return sum(run.diverged for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """The paired difference in test accuracy of two rows; adjusted is Holm's p-value within its family."""

    row: Row
    against: Row
    difference: Difference
    adjusted: float


@dataclass(frozen=True)
class SparsityPoint:
    """All seeds at one λ; the differences are to the twin with the same seeds, None for the twin itself."""

    weight_decay: float
    zeros: Interval
    accuracy: Interval
    test_difference: Difference | None
    validation_difference: Difference | None


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of; a study without a sweep over λ has no ``sparsity_lr``."""

    study: Study
    environments: list[Environment]
    rows: list[Row]
    sparsity_lr: float | None
    sparsity: list[SparsityPoint]
    sparsity_diverged: list[float]
    seconds: float

    def row(self, pair: Pair) -> Row | None:
        return next((row for row in self.rows if (row.arm, row.regularizer) == pair), None)

    def compare(self, pairs: Sequence[tuple[Pair, Pair]]) -> list[Comparison]:
        """One family of paired tests on test accuracy; pairs with a diverged run, or that are not here, drop out."""
        family = []
        for this, that in pairs:
            row, against = self.row(this), self.row(that)
            if row and against and not row.diverged and not against.diverged:
                family.append((row, against, paired(test_accuracies(row.runs), test_accuracies(against.runs))))
        adjusted = holm([difference.p_value for *_, difference in family])
        return [Comparison(*case, p) for case, p in zip(family, adjusted, strict=True)]


def collect(store: Store) -> Results:
    """Gather a store's results.

    Raises:
        UnfitStore: the store holds no study, or one that is not finished.
    """
    study = store.study
    if study is None:
        raise UnfitStore(f"{store.path} holds no study: make one with `python -m benchmarks ablate`")
    try:
        choices = phases.choose(study, store.runs)
        final = {pair: [store.runs[s.run_id] for s in specs] for pair, specs in phases.final(study, choices).items()}
        swept = {wd: [store.runs[s.run_id] for s in specs] for wd, specs in phases.sparsity(study, choices).items()}
    except KeyError:
        raise UnfitStore(
            f"{store.path} holds {len(store.runs)} of {phases.count(study)} runs: finish the study with "
            f"`python -m benchmarks ablate --preset {study.preset} --out {store.path.parent}`"
        ) from None
    whole = {wd: runs for wd, runs in swept.items() if not any(run.diverged for run in runs)}
    return Results(
        study=study,
        environments=store.environments,
        rows=[Row(*pair, choices[pair], runs) for pair, runs in final.items()],
        sparsity_lr=choices[study.sparsity.arm, "none"].lr if study.sparsity else None,
        sparsity=[_point(wd, runs, whole.get(0.0)) for wd, runs in whole.items()],
        sparsity_diverged=[wd for wd in swept if wd not in whole],
        seconds=sum(run.seconds for run in store.runs.values()),
    )


def _point(weight_decay: float, runs: list[RunRecord], twin: list[RunRecord] | None) -> SparsityPoint:
    held = twin if weight_decay else None
    return SparsityPoint(
        weight_decay=weight_decay,
        zeros=t_interval([_measured(run.zero_fraction) for run in runs]),
        accuracy=t_interval(test_accuracies(runs)),
        test_difference=paired(test_accuracies(runs), test_accuracies(held)) if held else None,
        validation_difference=paired(validation_accuracies(runs), validation_accuracies(held)) if held else None,
    )


def test_accuracies(runs: Sequence[RunRecord]) -> list[float]:
    """Test accuracies of runs that did not diverge."""
    return [_measured(run.test_accuracy) for run in runs]


def validation_accuracies(runs: Sequence[RunRecord]) -> list[float]:
    """Validation accuracies after the last epoch."""
    return [run.epochs[-1].validation_accuracy for run in runs]


def _measured(value: float | None) -> float:
    assert value is not None, "only a diverged run lacks its test results, and those were set apart"
    return value

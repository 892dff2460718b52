"""What was done, in sentences: settings, grids, seeds, and the command that makes the report again."""

from __future__ import annotations

from benchmarks.arms import ARMS
from benchmarks.report.text import LABELS, NBSP, counted, share
from benchmarks.results import Results
from benchmarks.stats import LEVEL
from benchmarks.tasks import TASKS


def command(results: Results) -> str:
    """The command that makes this study."""
    return f"python -m benchmarks ablate --preset {results.study.preset}"


def regularizers(results: Results) -> str:
    """What the names of the regularizers mean, in a line."""
    return (
        f"{LABELS['agr']} is adaptive gradient regularization; {LABELS['lp']} is ℓp weight decay with "
        f"p{NBSP}={NBSP}{results.study.decay_p:g}, which makes weights exactly zero."
    )


def settings(results: Results) -> list[str]:
    """The study's settings, one sentence or two each."""
    study = results.study
    grids = "; ".join(f"{arm.name} {', '.join(f'{lr:g}' for lr in arm.lrs)}" for arm in study.arms)
    where = "; ".join(
        f"Python {e.python}, torch {e.torch}, normopt {e.normopt}, scikit-learn {e.sklearn}, {e.system}, "
        f"{counted(e.cpus, 'CPU')}" + (f", data of sha256 {e.data}" if e.data else "")
        for e in results.environments
    )
    return [
        f"Task: {TASKS[study.task].description}.",
        f"Training: {counted(study.epochs, 'epoch')}, batches of {study.batch_size}, the learning rate of every arm "
        "annealed to 0 along half a cosine over the steps. A seed fixes the initial weights and the batches, the same "
        "for every arm.",
        *_regularizers(results),
        f"Tuning: learning rates {grids}; seed {study.tuning_seed}; chosen by the lowest validation loss after the "
        "last epoch, a tie going to the smaller rate.",
        f"Final runs: seeds {', '.join(map(str, study.final_seeds))}, the same for all. ± is half a {share(LEVEL)} t "
        "interval over the seeds. Comparisons are paired t tests on test accuracy, Holm-corrected within each "
        "question.",
        *_sparsity(results),
        "Steps to the target are counted at the first evaluation, one an epoch, whose validation accuracy is at least "
        f"{share(study.target)}: the median over the seeds, “>N” if it was not reached in N steps.",
        "ms/step is processor time of a whole training step (forward, backward, optimizer) on one thread, with other "
        "runs beside it; all optimizers run their multi-tensor (foreach) path. "
        "State is what the optimizer keeps between steps.",
        f"Optimizers: {'; '.join(f'{arm.name}: {ARMS[arm.name].rule}' for arm in study.arms)}.",
        f"Made with {where}. The runs took {results.seconds:.0f} seconds of worker time.",
    ]


def _regularizers(results: Results) -> list[str]:
    if not results.study.regularized:
        return []
    return [
        f"Regularizers: {regularizers(results)} The decay acts on tensors of two or more dimensions, with "
        f"λ{NBSP}={NBSP}{results.study.decay_step:g}/η, so that the product ηλ at the peak of "
        "the learning rate η, and with it the pull to zero, is the same for every arm and learning rate."
    ]


def _sparsity(results: Results) -> list[str]:
    plan = results.study.sparsity
    if plan is None:
        return []
    return [
        f"Sparsity: {plan.arm} at the learning rate tuned for it without regularizers ({results.sparsity_lr:g}), "
        f"{counted(plan.epochs, 'epoch')}, λ{NBSP}={NBSP}{', '.join(f'{wd:g}' for wd in plan.weight_decays)} with "
        f"{LABELS['agr+lp']}, and the twin without either; seeds {plan.seeds[0]} to {plan.seeds[-1]}. Zeros are "
        "weights with |w| < 1e-13 in tensors of two or more dimensions; nothing is pruned."
    ]

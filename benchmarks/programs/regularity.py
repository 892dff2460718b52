"""Is the trajectory of a training that succeeds more regular? Deep networks on the digits, with and without their aids.

arXiv:2011.06702 finds that what makes networks train well (batch norm, skip connections, the activation, the optimizer)
makes their trajectories regular: steps point to where the training ends. Here each is left out in turn and all
together: results are one JSON file, which the documentation draws.
"""

from __future__ import annotations

import math
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import joblib
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy import stats
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import normopt
from benchmarks.progress import Advance
from benchmarks.study.spec import Frozen
from benchmarks.tasks import TASKS
from benchmarks.tasks.common import Deep
from benchmarks.training import evaluate
from normopt.diagnostics import Trajectory, TrajectoryMonitor

Activation = Literal["relu", "tanh", "sigmoid"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
# Of each optimizer, five learning rates a factor of 4 apart, from this one up.
LOWEST = {"SGD": 0.01, "SGD, momentum 0.9": 0.0025, "AdamW": 5e-4, "SignSGD": 1.25e-4, "LPSGDM": 5e-4}
RATES = 5
P_START = 8.0

TRAPS = (
    "γ blows up as the loss nears its infimum, which is 0 here: steps whose loss is below a thousandth of the first "
    "one's are left out, and the minimum over the others is still no more than one step's number.",
    "γ is proportional to 1/η: compare it within an optimizer only, and even there the tuned rates differ from network "
    "to network. The cosine and the straightness know no learning rate.",
    "Where the learning rate falls to 0, as here, γ falls with it: the last step's is ‖U‖²/(2η(ℓ − inf ℓ)), of the "
    "order of η and never negative. A small positive minimum is that of the end; what tells trainings apart is its "
    "sign.",
    "The final weights are where the training stopped, whether or not it had converged: every trajectory ends at its "
    "end, and its last cosine is 1.",
)


MEASURES = {
    "min_gamma": "min γ",
    "negative_gamma": "the share of steps with γ < 0",
    "median_cosine": "the median cosine",
    "straightness": "straightness",
}


class Cell(Frozen):
    """One network under one optimizer."""

    optimizer: str
    batch_norm: bool
    skip: bool
    activation: Activation


class Setting(Frozen):
    """What all runs have in common."""

    width: int = 48
    depth: int = 8
    steps: int = 200
    batch: int = 64
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)


SETTING = Setting()


class Run(BaseModel):
    """One seed at the tuned rate; None where it diverged. Losses and accuracies are those of evaluation at the end."""

    model_config = ConfigDict(extra="forbid")

    seed: int
    min_gamma: float | None
    min_gamma_step: int | None
    negative_gamma: float | None  # the share of valid steps with γ < 0
    median_cosine: float | None
    straightness: float | None
    train_loss: float | None
    test_accuracy: float | None


class Point(BaseModel):
    """A cell's tuned rate, whether it lies at the grid's edge, and its runs."""

    model_config = ConfigDict(extra="forbid")

    cell: Cell
    lr: float
    edge: bool
    runs: list[Run]


class Correlation(BaseModel):
    """Spearman's, of a measure of regularity with the final training loss, over the networks of one optimizer."""

    model_config = ConfigDict(extra="forbid")

    optimizer: str
    measure: str
    rho: float
    p_value: float
    networks: int


class Regularity(BaseModel):
    """The whole measurement, and what to beware of in reading it."""

    model_config = ConfigDict(extra="forbid")

    torch: str
    seconds: float
    setting: Setting
    traps: tuple[str, ...]
    correlations: list[Correlation]
    points: list[Point]


def build(cell: Cell, width: int, depth: int) -> nn.Module:
    """The network of a cell."""
    kind = dict(batch_norm=cell.batch_norm, skip=cell.skip)
    return Deep(64, width, depth, **kind, activation=ACTIVATIONS[cell.activation])


def optimize(name: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer by its name here."""
    params = model.parameters()
    if name == "AdamW":
        return torch.optim.AdamW(params, lr)
    if name == "LPSGDM":
        return normopt.LPSGDM(params, lr=lr, p=P_START)
    if name == "SignSGD":
        return normopt.SignSGD(params, lr=lr)
    return torch.optim.SGD(params, lr, momentum=0.9 if "momentum" in name else 0.0)


def train(cell: Cell, setting: Setting, lr: float, seed: int, watch: bool) -> tuple[float, Run]:
    """The validation loss after so many steps, the rate falling to 0 along half a cosine, and the run, if watched."""
    torch.set_num_threads(1)
    task = TASKS["digits"]
    splits = task.load()
    torch.manual_seed(seed)
    model = build(cell, setting.width, setting.depth)
    optimizer = optimize(cell.optimizer, model, lr)
    schedules: list[Any] = [CosineAnnealingLR(optimizer, setting.steps)]
    if cell.optimizer == "LPSGDM":
        schedules.append(normopt.schedules.CosineP(optimizer, setting.steps))
    batches = torch.Generator().manual_seed(seed)
    x, y = splits.train
    with tempfile.TemporaryDirectory() as folder:
        monitor = TrajectoryMonitor(optimizer, directory=Path(folder) / "run") if watch else None
        for _ in range(setting.steps):
            chosen = torch.randint(len(x), (setting.batch,), generator=batches)
            optimizer.zero_grad()
            loss = task.loss(model(x[chosen]), y[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if monitor is not None:
                monitor.record(loss)
            for schedule in schedules:
                schedule.step()
        trajectory = monitor.result() if monitor is not None else None
    model.eval()
    validation, _ = evaluate(model, task, splits, splits.validation)
    train_loss, _ = evaluate(model, task, splits, splits.train)
    _, accuracy = evaluate(model, task, splits, splits.test)
    validation = validation if math.isfinite(validation) else math.inf
    return validation, _run(seed, trajectory, train_loss, accuracy)


def _run(seed: int, trajectory: Trajectory | None, train_loss: float, accuracy: float) -> Run:
    if trajectory is None or not (math.isfinite(train_loss) and math.isfinite(trajectory.straightness)):
        return Run(seed=seed, **dict.fromkeys(field for field in Run.model_fields if field != "seed"))
    gamma = trajectory.gamma[trajectory.valid]
    return Run(
        seed=seed,
        min_gamma=trajectory.min_gamma,
        min_gamma_step=int(np.nanargmin(trajectory.gamma)),
        negative_gamma=float(np.mean(gamma < 0)),
        median_cosine=float(np.nanmedian(trajectory.cosine)),
        straightness=trajectory.straightness,
        train_loss=train_loss,
        test_accuracy=accuracy,
    )


def plan() -> list[Cell]:
    """Every optimizer with every network: batch norm or none, skips or none, and each activation."""
    return [
        Cell(optimizer=optimizer, batch_norm=norm, skip=skip, activation=activation)
        for optimizer, norm, skip, activation in product(LOWEST, (True, False), (True, False), ACTIVATIONS)
    ]


def count() -> int:
    """How many runs that is."""
    return len(plan()) * (RATES + len(SETTING.seeds))


def measure(workers: int, advance: Advance) -> Regularity:
    """Tune every cell's rate, train it with the other seeds, and correlate; ``advance`` is told of each run."""
    began = time.perf_counter()
    cells, setting = plan(), SETTING
    parallel = joblib.Parallel(n_jobs=workers, batch_size=1, return_as="generator")
    grid = {cell: [LOWEST[cell.optimizer] * 4**i for i in range(RATES)] for cell in cells}
    trials = [(cell, lr) for cell in cells for lr in grid[cell]]
    losses: dict[tuple[Cell, float], float] = {}
    for trial, (validation, _) in zip(
        trials,
        parallel(joblib.delayed(train)(cell, setting, lr, setting.tuning_seed, False) for cell, lr in trials),
        strict=True,
    ):
        losses[trial] = validation
        advance("tuning", 1)
    best = {cell: min(grid[cell], key=lambda lr: losses[cell, lr]) for cell in cells}
    points = [Point(cell=c, lr=best[c], edge=best[c] in (grid[c][0], grid[c][-1]), runs=[]) for c in cells]
    runs = [(point, seed) for point in points for seed in setting.seeds]
    for (point, _), (_, run) in zip(
        runs,
        parallel(joblib.delayed(train)(point.cell, setting, point.lr, seed, True) for point, seed in runs),
        strict=True,
    ):
        point.runs.append(run)
        advance("measuring", 1)
    return Regularity(
        torch=torch.__version__,
        seconds=time.perf_counter() - began,
        setting=setting,
        traps=TRAPS,
        correlations=correlate(points),
        points=points,
    )


def correlate(points: list[Point]) -> list[Correlation]:
    """For each optimizer, rank correlations over its networks: of the median over the seeds, without diverged runs."""
    found = []
    for optimizer in dict.fromkeys(point.cell.optimizer for point in points):
        for measure_ in MEASURES:
            pairs = []
            for point in points:
                done = [run for run in point.runs if run.train_loss is not None and getattr(run, measure_) is not None]
                if point.cell.optimizer == optimizer and done:
                    pairs.append((median(getattr(r, measure_) for r in done), median(r.train_loss or 0 for r in done)))
            if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
                continue  # there is nothing to rank
            rho, p_value = stats.spearmanr(*zip(*pairs, strict=True))
            found.append(
                Correlation(
                    optimizer=optimizer,
                    measure=measure_,
                    rho=float(rho),
                    p_value=float(p_value),
                    networks=len(pairs),
                )
            )
    return found


def words(result: Regularity) -> list[str]:
    """What came out, and what to beware of: a line each."""
    lines = [
        f"{c.optimizer}: rank correlation of {MEASURES[c.measure]} with the final training loss "
        f"{c.rho:+.2f} over {c.networks} networks (p = {c.p_value:.2g})"
        for c in result.correlations
    ]
    return [*lines, *result.traps]

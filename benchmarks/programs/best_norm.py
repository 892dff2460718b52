"""Which norm fits at which time of a training: the decrease of the loss along the steepest direction of each norm.

At checkpoints of a training, from the same weights and the same gradient c, every norm gives a direction. The loss is
computed along it at a grid of Euclidean lengths. Kept are the largest decrease and its length, on the data of the
gradient and on held-out data, and the decrease at the length of the reference optimizer's own step::

    ℓp            u = D(c), of all tensors as one vector: LPSGD's direction
    spectral      u = D(c) of each matrix (Muon's), c/‖c‖₂ of other tensors
    rows          u = D(c) of each matrix: every row to length 1, c/‖c‖₂ of other tensors
    adaptive      u = P^(−½) D(P^(−½) c) with P = diag(√v̂ + ε) of the AdamW that trains
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import joblib
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import normopt
from benchmarks.progress import Advance
from benchmarks.stats import holm, interval
from benchmarks.tasks import TASKS, Task
from normopt.diagnostics import hessian_spectrum

PS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, math.inf)
NORMS = (*(f"ℓ{p:g}".replace("inf", "∞") for p in PS), "spectral", "rows")
LR = 1e-3  # AdamW's, which trains; it falls to 0 along half a cosine
EPS = 1e-8
# Euclidean lengths relative to that of the weights: first all of these, then between the neighbours of the best.
GRID = tuple(2.0**e for e in range(-16, 3))
FINER = tuple(2.0**e for e in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75))
Loss = Callable[[], float]
Kind = Literal["batch", "large"]


class Setting(BaseModel):
    """What all trainings have in common.

    Attributes:
        tasks: names in `benchmarks.tasks.TASKS`.
        seeds: of weights and batches.
        times: the checkpoints, as parts of the training.
        batches: mini-batch gradients at each.
        large: examples of the large-batch gradient and of the held-out data, at most.
        probes, lanczos: of the Hessian's spectrum, on the large batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...] = ("digits", "mnist1d", "fashion-cnn", "bytes")
    seeds: tuple[int, ...] = tuple(range(1, 9))
    times: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0)
    batches: int = 4
    large: int = 2048
    probes: int = 2
    lanczos: int = 40


class Decrease(BaseModel):
    """What one direction gave at one checkpoint, the mean over the gradients of its kind; losses are in nats.

    Attributes:
        best, length: the largest decrease on the data of the gradient, and the length that gave it, relative to ‖w‖₂.
        held, held_length: likewise on held-out data.
        equal, equal_held: the decreases at the length of AdamW's own step.
    """

    model_config = ConfigDict(extra="forbid")

    gradient: Kind
    norm: str
    adaptive: bool
    best: float
    length: float
    held: float
    held_length: float
    equal: float
    equal_held: float


class Checkpoint(BaseModel):
    """One moment of one training.

    Attributes:
        loss: on the large batch.
        density: ‖g‖₁²/(n‖g‖₂²) of the large-batch gradient.
        largest, smallest: the Hessian's extreme eigenvalues.
        anisotropy: λmax over the median |λ|.
        rank: tr H/λmax.
        step: the Euclidean length of AdamW's step relative to ‖w‖₂.
    """

    model_config = ConfigDict(extra="forbid")

    task: str
    seed: int
    time: float
    steps: int
    loss: float
    density: float
    largest: float
    smallest: float
    anisotropy: float
    rank: float
    step: float
    found: list[Decrease]


class BestNorm(BaseModel):
    """The whole measurement."""

    model_config = ConfigDict(extra="forbid")

    torch: str
    seconds: float
    setting: Setting
    checkpoints: list[Checkpoint]


def directions(c: Sequence[Tensor], roots: Sequence[Tensor]) -> Iterator[tuple[str, bool, Tensor]]:
    """Yield every norm's direction as one vector of length 1, or nothing where c is 0.

    Args:
        c: the gradient of each tensor.
        roots: √d of each tensor, with d = √v̂ + ε.
    """
    flat = parameters_to_vector(c)
    for adaptive in (False, True):
        parts = [x / r for x, r in zip(c, roots, strict=True)] if adaptive else list(c)
        whole = parameters_to_vector(parts)
        maps: dict[str, Callable[[], Tensor]] = {
            name: partial(normopt.norms.Lp(p).dual_map, whole) for name, p in zip(NORMS, PS, strict=False)
        }
        maps["spectral"] = lambda parts=parts: parameters_to_vector([_spectral(x) for x in parts])
        maps["rows"] = lambda parts=parts: parameters_to_vector([_rows(x) for x in parts])
        back = parameters_to_vector(roots) if adaptive else torch.ones_like(flat)
        for name, made in maps.items():
            u = made() / back
            if (length := u.norm()) > 0:
                yield name, adaptive, u / length


def _spectral(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return _unit(x)
    u, _, vt = torch.linalg.svd(x.flatten(1).double(), full_matrices=False)
    found: Tensor = (u @ vt).to(x.dtype).view_as(x)
    return found


def _rows(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return _unit(x)
    rows = x.flatten(1)
    found: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return found.view_as(x)


def _unit(x: Tensor) -> Tensor:
    found: Tensor = x / x.norm().clamp(min=1e-30)
    return found


class Line:
    """The losses along a direction from some weights, which are put back at the end."""

    def __init__(self, model: nn.Module, losses: Sequence[Loss]) -> None:
        self.params = list(model.parameters())
        self.start = parameters_to_vector(self.params).clone()
        self.losses = losses
        self.scale = float(self.start.norm())
        self.now = [loss() for loss in losses]

    def decreases(self, u: Tensor, length: float) -> list[float]:
        """Return by how much each loss decreases after a step of this length against u; −∞ where it is not finite."""
        vector_to_parameters(self.start - length * self.scale * u, self.params)
        found = [now - loss() for now, loss in zip(self.now, self.losses, strict=True)]
        vector_to_parameters(self.start, self.params)
        return [x if math.isfinite(x) else -math.inf for x in found]

    def search(self, u: Tensor) -> list[tuple[float, float]]:
        """Return of each loss the largest decrease and its length: 0 and 0 where no length decreases it."""
        tried = {length: self.decreases(u, length) for length in GRID}
        for i in range(len(self.losses)):
            best = max(GRID, key=lambda length: tried[length][i])
            tried |= {best * f: self.decreases(u, best * f) for f in FINER if best * f not in tried}
        each = [max(((d[i], length) for length, d in tried.items()), default=(0.0, 0.0)) for i in range(len(self.now))]
        return [(d, length) if d > 0 else (0.0, 0.0) for d, length in each]


def watch(task_name: str, seed: int, setting: Setting) -> list[Checkpoint]:
    """Train one network by AdamW, and measure every norm at each checkpoint."""
    torch.set_num_threads(1)
    task, splits = TASKS[task_name], TASKS[task_name].load()
    torch.manual_seed(seed)
    model = task.build()
    x, y = splits.train
    draws = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil((splits.per_epoch or len(x)) / task.batch_size)
    total = task.epochs * per_epoch
    optimizer = normopt.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(x), generator=draws)[:size]
        return splits.fetch(x[chosen], None), y[chosen]

    def held_out() -> tuple[Tensor, Tensor]:
        inputs, targets = splits.validation
        return splits.fetch(inputs[: setting.large], None), targets[: setting.large]

    held, large = held_out(), batch(setting.large)
    found, at = [], {min(total - 1, round(t * total)): t for t in setting.times}
    for step in range(total):
        old = parameters_to_vector(model.parameters()).detach().clone()
        _backward(task, model, batch(task.batch_size))
        optimizer.step()
        schedule.step()
        if step in at:
            new = parameters_to_vector(model.parameters()).detach().clone()
            vector_to_parameters(old, model.parameters())
            length = float((new - old).norm() / old.norm())
            roots = _roots(optimizer)
            model.eval()
            gradients: list[tuple[Kind, tuple[Tensor, Tensor]]] = [("large", large)]
            gradients += [("batch", batch(task.batch_size)) for _ in range(setting.batches)]
            each = [row for kind, data in gradients for row in _try(task, model, kind, data, held, roots, length)]
            found.append(
                Checkpoint(
                    task=task.name,
                    seed=seed,
                    time=at[step],
                    steps=step,
                    step=length,
                    found=_means(each),
                    **_landscape(task, model, large, seed, setting),
                )
            )
            model.train()
            vector_to_parameters(new, model.parameters())
    return found


def _backward(task: Task, model: nn.Module, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    task.loss(model(data[0]), data[1]).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def _roots(optimizer: normopt.AdamW) -> list[Tensor]:
    (group,) = optimizer.param_groups
    states = [optimizer.state[p] for p in group["params"]]
    corrected = (s["exp_avg_sq"] / (1 - group["metric_beta"] ** float(s["step"])) for s in states)
    return [(v.sqrt() + EPS).sqrt() for v in corrected]


def _try(
    task: Task,
    model: nn.Module,
    kind: Kind,
    data: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    roots: Sequence[Tensor],
    length: float,
) -> Iterator[Decrease]:
    """Try every norm's direction for one gradient."""
    c = [g.clone() for g in _backward(task, model, data)]

    @torch.no_grad()
    def loss(inputs: Tensor, targets: Tensor) -> float:
        return float(task.loss(model(inputs), targets))

    with torch.no_grad():
        line = Line(model, [partial(loss, *data), partial(loss, *held)])
        for norm, adaptive, u in directions(c, roots):
            (best, best_length), (there, there_length) = line.search(u)
            equal = line.decreases(u, length)
            yield Decrease(
                gradient=kind,
                norm=norm,
                adaptive=adaptive,
                best=best,
                length=best_length,
                held=there,
                held_length=there_length,
                equal=equal[0],
                equal_held=equal[1],
            )


def _means(rows: Sequence[Decrease]) -> list[Decrease]:
    """Return the mean over the gradients of one kind, of lengths the geometric one of those that are not 0."""
    kinds: dict[tuple[str, str, bool], list[Decrease]] = {}
    for row in rows:
        kinds.setdefault((row.gradient, row.norm, row.adaptive), []).append(row)
    lengths = {"length", "held_length"}
    found = []
    for these in kinds.values():
        numbers = {}
        for name in ("best", "length", "held", "held_length", "equal", "equal_held"):
            values = [getattr(row, name) for row in these]
            positive = [math.log(v) for v in values if v > 0]
            if name in lengths:
                numbers[name] = math.exp(sum(positive) / len(positive)) if positive else 0.0
            else:
                numbers[name] = sum(values) / len(values)
        found.append(these[0].model_copy(update={name: float(f"{x:.6g}") for name, x in numbers.items()}))
    return found


def _landscape(
    task: Task, model: nn.Module, data: tuple[Tensor, Tensor], seed: int, setting: Setting
) -> dict[str, float]:
    """Return the loss, the gradient's density and the Hessian's spectrum on the large batch."""
    g = parameters_to_vector(_backward(task, model, data))
    loss = float(task.loss(model(data[0]), data[1]).detach())
    spectrum = hessian_spectrum(model, task.loss, [data], steps=setting.lanczos, probes=setting.probes, seed=seed)
    model.zero_grad()
    return {
        "loss": loss,
        "density": float(g.abs().sum() ** 2 / (len(g) * g.square().sum())),
        "largest": spectrum.largest,
        "smallest": spectrum.smallest,
        "anisotropy": spectrum.anisotropy,
        "rank": spectrum.trace / spectrum.largest,
    }


def measure(folder: Path, workers: int, setting: Setting, advance: Advance) -> BestNorm:
    """Measure every task and seed. What is in the folder is read, so that a measurement that was stopped goes on."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    def one(task: str, seed: int) -> None:
        path = folder / f"{task}-{seed}.json"
        if not path.exists():
            checkpoints = watch(task, seed, setting)
            result = BestNorm(torch=torch.__version__, seconds=0.0, setting=setting, checkpoints=checkpoints)
            unfinished = path.with_suffix(".part")
            unfinished.write_text(result.model_dump_json(), encoding="utf-8")
            unfinished.replace(path)

    cells = [(task, seed) for seed in setting.seeds for task in setting.tasks]
    for _ in joblib.Parallel(workers, return_as="generator_unordered")(joblib.delayed(one)(*cell) for cell in cells):
        advance("best-norm", 1)
    parts = [
        BestNorm.model_validate_json((folder / f"{task}-{seed}.json").read_text(encoding="utf-8"))
        for task, seed in cells
    ]
    if any(part.setting != setting or part.torch != torch.__version__ for part in parts):
        raise ValueError(f"{folder} holds results of other settings or another torch: choose another folder")
    checkpoints = [checkpoint for part in parts for checkpoint in part.checkpoints]
    seconds = round(time.perf_counter() - began, 1)
    return BestNorm(torch=torch.__version__, seconds=seconds, setting=setting, checkpoints=checkpoints)


def _of(checkpoint: Checkpoint, gradient: str, adaptive: bool, by: str) -> dict[str, float]:
    these = (row for row in checkpoint.found if (row.gradient, row.adaptive) == (gradient, adaptive))
    return {row.norm: getattr(row, by) for row in these}


def best_inverse(checkpoint: Checkpoint, gradient: str, adaptive: bool, by: str = "best") -> float:
    """Return 1/p of the ℓp norm with the largest decrease, 0 for ℓ∞."""
    rows = {
        row.norm: getattr(row, by) for row in checkpoint.found if (row.gradient, row.adaptive) == (gradient, adaptive)
    }
    decreases = [rows.get(name, 0.0) for name in NORMS[: len(PS)]]
    return 1 / PS[max(range(len(PS)), key=lambda i: decreases[i])]


def ratio(checkpoint: Checkpoint, norm: str, gradient: str, adaptive: bool, by: str = "best") -> float:
    """Return the log₂ of a norm's decrease relative to ℓ2's in the same coordinates; NaN where one of them is 0."""
    rows = {
        row.norm: getattr(row, by) for row in checkpoint.found if (row.gradient, row.adaptive) == (gradient, adaptive)
    }
    mine, two = rows.get(norm, 0.0), rows.get("ℓ2", 0.0)
    return math.log2(mine / two) if mine > 0 and two > 0 else math.nan


class Change(BaseModel):
    """How the best 1/p changes from the first checkpoint to the last of a training, over seeds, with 95 % intervals.

    Attributes:
        first, last: 1/p of the best ℓp norm: mean, low, high.
        p_value: of the paired sign-flip test of a change, Holm-corrected over all that are listed together.
        correlation: Spearman's, of the best 1/p with the log of the anisotropy over the checkpoints of a training;
            the mean over seeds, low, high. The claim that anisotropy calls for a large p is a negative one.
    """

    model_config = ConfigDict(extra="forbid")

    task: str
    gradient: str
    adaptive: bool
    first: tuple[float, float, float]
    last: tuple[float, float, float]
    p_value: float
    correlation: tuple[float, float, float]


def changes(result: BestNorm) -> list[Change]:
    """Return the changes of every task, gradient and coordinates."""
    by_seed: dict[tuple[str, int], list[Checkpoint]] = {}
    for checkpoint in result.checkpoints:
        by_seed.setdefault((checkpoint.task, checkpoint.seed), []).append(checkpoint)
    found, p_values = [], []
    for task, gradient, adaptive in product(result.setting.tasks, ("batch", "large"), (False, True)):
        trainings = [sorted(cs, key=lambda c: c.time) for (name, _), cs in by_seed.items() if name == task]
        best = [[best_inverse(c, gradient, adaptive) for c in cs] for cs in trainings]
        rho = [
            float(stats.spearmanr(row, [math.log(c.anisotropy) for c in cs]).statistic) if len(set(row)) > 1 else 0.0
            for row, cs in zip(best, trainings, strict=True)
        ]
        first, last = [row[0] for row in best], [row[-1] for row in best]
        p_values.append(_sign_flips([b - a for a, b in zip(first, last, strict=True)]))
        means = {"first": first, "last": last, "correlation": rho}
        intervals = {name: _three(values) for name, values in means.items()}
        found.append(Change(task=task, gradient=gradient, adaptive=adaptive, p_value=1.0, **intervals))
    adjusted = holm(p_values)
    return [change.model_copy(update={"p_value": p}) for change, p in zip(found, adjusted, strict=True)]


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x = interval(values)
    return x.mean, x.low, x.high


def _sign_flips(differences: Sequence[float]) -> float:
    """Return the P-value of the exact two-sided sign-flip test that the mean is 0."""
    d = np.asarray(differences)
    if not d.any():
        return 1.0
    signs = np.array(list(product((-1, 1), repeat=len(d))))
    return float((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())


def lines(result: BestNorm) -> list[str]:
    """Return a line for each task, gradient and coordinates."""

    def told(x: tuple[float, float, float]) -> str:
        return f"{x[0]:.2f} ({x[1]:.2f} to {x[2]:.2f})"

    return [
        f"{c.task}, {c.gradient} gradient{', adaptive' if c.adaptive else ''}: best 1/p {told(c.first)} at first, "
        f"{told(c.last)} at last, p = {c.p_value:.2g}; rank correlation with the anisotropy {told(c.correlation)}"
        for c in changes(result)
    ]

"""Which norm fits at which time of a training: the decrease of the loss along the steepest direction of each norm.

At checkpoints of a training by AdamW, from the same weights and the same gradient c, every norm gives a direction u,
scaled to Euclidean length 1::

    ℓp            u = D(c), of all tensors as one vector: LPSGD's direction
    spectral      u = D(c) of each matrix, which is Muon's; c/‖c‖₂ of other tensors
    rows          u = D(c) of each matrix: every row to length 1; c/‖c‖₂ of other tensors
    adaptive      u = P^(−½) D(P^(−½) c) with P = diag(√v̂ + ε) of the AdamW that trains

Three line searches along −u: for the loss on the data of the gradient, for the loss on held-out data, and none: the
decreases at the length of AdamW's step. Gradients are of mini-batches, and of one large batch.

Reduced to an hour on one core: the large batch and the held-out data are a part of the data, fashion-cnn trains for 3
epochs of its 10 and mnist1d for 20 of its 50, and the larger networks have few mini-batches a checkpoint (`PLANS`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.progress import Advance
from benchmarks.stats import holm, interval, paired, pairs_needed
from benchmarks.study.clusters import each
from benchmarks.study.spec import Frozen
from benchmarks.tasks import TASKS, Task
from normopt.diagnostics import hessian_spectrum
from normopt.norms import Lp, Mixed, Norm, Schatten

PS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, math.inf)
P_MAX = 6.0  # the paper's, in most of its experiments
NORMS = (*(f"ℓ{p:g}".replace("inf", "∞") for p in PS), "spectral", "rows")
BY = ("best", "held")
SEEDS = tuple(range(1, 9))
EARLY, LATE = 0.1, 0.6  # parts of the training: up to the first, from the second on
# Lengths of steps are relative to that of the weights. Searches move by these ratios, between these lengths.
RATIOS = (4.0, 2.0, 2**0.5)
SHORTEST, LONGEST = 2.0**-24, 4.0
Data = tuple[Tensor, Tensor]


class Plan(Frozen):
    """A task's epochs, mini-batch gradients at each checkpoint, and examples of the large batch and held-out data."""

    epochs: int
    batches: int
    large: int


PLANS = {
    "digits": Plan(epochs=12, batches=4, large=360),
    "mnist1d": Plan(epochs=20, batches=2, large=256),
    "fashion-cnn": Plan(epochs=3, batches=1, large=256),
    "bytes": Plan(epochs=10, batches=1, large=32),
}


class Setting(Frozen):
    """The settings shared by all trainings.

    Attributes:
        plans: of the tasks, by their names in `benchmarks.tasks.TASKS`.
        lr: AdamW's, which falls to 0 along half a cosine.
        times: of the checkpoints, as parts of the training.
        lanczos, probes: of the Hessian's spectrum, on the large batch.
    """

    plans: dict[str, Plan] = PLANS
    lr: float = 3e-3
    times: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
    lanczos: int = 24
    probes: int = 1


class Decreases(Frozen):
    """Decreases in nats, means over the gradients; for each of NORMS, and then for each in adaptive coordinates.

    Attributes:
        best, length: the largest on the data of the gradient; its length, the geometric mean of those above 0.
        held: the largest on held-out data, with a line search of its own.
        equal, equal_held: at the length of AdamW's step.
    """

    best: list[float]
    length: list[float]
    held: list[float]
    equal: list[float]
    equal_held: list[float]

    def of(self, by: str, adaptive: bool) -> list[float]:
        """Return the values of NORMS in one kind of coordinates."""
        values: list[float] = getattr(self, by)
        return values[len(NORMS) :] if adaptive else values[: len(NORMS)]


class Checkpoint(Frozen):
    """One moment of one training.

    Attributes:
        loss, density: of the large batch: the loss, and ‖g‖₁²/(n‖g‖₂²).
        largest, smallest, trace, anisotropy: of the Hessian, as `normopt.diagnostics.Spectrum` has them.
        step: the length of AdamW's step with its initial learning rate, without decay.
        batch, large: by the mini-batch gradients and by the large one.
    """

    task: str
    seed: int
    time: float
    loss: float
    density: float
    largest: float
    smallest: float
    trace: float
    anisotropy: float
    step: float
    batch: Decreases
    large: Decreases


def directions(c: Sequence[Tensor], roots: Sequence[Tensor]) -> Tensor:
    """Return the directions of NORMS, then those in adaptive coordinates [2·len(NORMS), n]; each has length 1, or 0.

    Args:
        c: the gradient of each tensor.
        roots: √d of each tensor, with d = √v̂ + ε.
    """

    def each(norm: Norm, x: list[Tensor]) -> Tensor:
        return parameters_to_vector([(norm if t.dim() > 1 else Lp(2.0)).dual_map(t) for t in x])

    rows = []
    for root in ([torch.ones_like(x) for x in c], roots):
        x, back = [t / r for t, r in zip(c, root, strict=True)], parameters_to_vector(root)
        whole = parameters_to_vector(x)
        maps = [Lp(p).dual_map(whole) for p in PS]
        maps += [each(norm, x) for norm in (Schatten(math.inf), Mixed(2.0, math.inf))]
        rows += [u / back for u in maps]
    found = torch.stack(rows)
    unit: Tensor = found / found.norm(dim=1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    return unit


def search(decrease: Callable[[float], float], start: float) -> tuple[float, float]:
    """Return the largest decrease and its length, or 0 and 0 if no length from SHORTEST to LONGEST decreases the loss.

    From ``start`` it moves by ever smaller ratios to a length whose neighbours are no better, then to the vertex of
    the parabola through the three. Exact for a quadratic; else it finds the local maximum near the start.
    """
    known = {0.0: 0.0}

    def at(t: float) -> float:
        if t not in known:
            known[t] = decrease(t)
        return known[t]

    t = start
    for ratio in RATIOS:
        while t < LONGEST and at(t * ratio) > at(t):
            t *= ratio
        while t > SHORTEST and (at(t) <= 0 or at(t / ratio) > at(t)):
            t /= ratio
    a, c = t / RATIOS[-1], t * RATIOS[-1]
    below, above = (at(t) - at(a)) / (t - a), (at(t) - at(c)) / (c - t)
    if 0 < below + above < math.inf:
        at((a + t) / 2 + (c - a) / 2 * below / (below + above))
    best = max(known, key=known.__getitem__)
    return known[best], best


def watch(name: str, seed: int, setting: Setting) -> list[Checkpoint]:
    """Train one network by AdamW, and measure every norm at each checkpoint."""
    torch.set_num_threads(1)
    task, plan = TASKS[name], setting.plans[name]
    splits = task.load()
    torch.manual_seed(seed)
    model = task.build()
    x, y = splits.train
    draws = torch.Generator().manual_seed(seed)
    total = plan.epochs * math.ceil((splits.per_epoch or len(x)) / task.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    def batch(size: int) -> Data:
        chosen = torch.randperm(len(x), generator=draws)[:size]
        return splits.fetch(x[chosen], None), y[chosen]

    inputs, targets = splits.validation
    held: Data = splits.fetch(inputs[: plan.large], None), targets[: plan.large]
    large, found = batch(plan.large), []
    at = {round(t * (total - 1)): t for t in setting.times}
    for step in range(total):
        old = parameters_to_vector(model.parameters()).detach().clone()
        gradient(task, model, batch(task.batch_size))
        optimizer.step()
        schedule.step()
        if step in at:
            new = parameters_to_vector(model.parameters()).detach().clone()
            roots, direction = adam(optimizer)
            length = setting.lr * float(direction.norm() / old.norm())
            vector_to_parameters(old, model.parameters())
            model.eval()
            batches = [batch(task.batch_size) for _ in range(plan.batches)]
            kinds = {"batch": batches, "large": [large]}
            tried = {kind: decreases(task, model, data, held, roots, length) for kind, data in kinds.items()}
            g = parameters_to_vector(gradient(task, model, large))
            spectrum = hessian_spectrum(
                model, task.loss, [large], steps=setting.lanczos, probes=setting.probes, seed=seed
            )
            numbers = {
                "loss": float(task.loss(model(large[0]), large[1]).detach()),
                "density": float(g.abs().sum() ** 2 / (len(g) * g.square().sum())),
                "step": length,
                **{key: getattr(spectrum, key) for key in ("largest", "smallest", "trace", "anisotropy")},
            }
            names = {"task": name, "seed": seed, "time": at[step]}
            rounded = {key: digits(value) for key, value in numbers.items()}
            found.append(Checkpoint.model_validate(names | rounded | tried))
            model.train()
            vector_to_parameters(new, model.parameters())
    return found


def gradient(task: Task, model: nn.Module, data: Data) -> list[Tensor]:
    """Return the gradient of every parameter, which is also left in ``grad``."""
    model.zero_grad()
    task.loss(model(data[0]), data[1]).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def adam(optimizer: torch.optim.AdamW) -> tuple[list[Tensor], Tensor]:
    """Return √d of every parameter, d = √v̂ + ε, and the direction m̂/d of all of them as one vector."""
    (group,) = optimizer.param_groups
    beta1, beta2 = group["betas"]
    roots, directions = [], []
    for state in (optimizer.state[p] for p in group["params"]):
        t = float(state["step"])
        d = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        roots.append(d.sqrt())
        directions.append(state["exp_avg"] / (1 - beta1**t) / d)
    return roots, parameters_to_vector(directions)


def decreases(
    task: Task, model: nn.Module, batches: Sequence[Data], held: Data, roots: Sequence[Tensor], step: float
) -> Decreases:
    """Try every norm's direction of each batch's gradient from the model's weights, which are the same at the end."""
    params = list(model.parameters())
    start = parameters_to_vector(params).detach().clone()
    scale = float(start.norm())

    @torch.no_grad()
    def loss(data: Data, u: Tensor, length: float) -> float:
        vector_to_parameters(start - length * scale * u, params)
        return float(task.loss(model(data[0]), data[1]))

    def decrease(data: Data, before: float, u: Tensor, length: float) -> float:
        found = before - loss(data, u, length)
        return found if math.isfinite(found) else -math.inf

    def tried(data: Data) -> Iterator[tuple[float, ...]]:
        vector_to_parameters(start, params)
        along = [partial(decrease, part, loss(part, start, 0.0)) for part in (data, held)]
        begins = [step, step]  # the length that was best for the norm before is near that of the next
        for u in directions([g.clone() for g in gradient(task, model, data)], roots):
            (best, t), (there, s) = (search(partial(f, u), begin) for f, begin in zip(along, begins, strict=True))
            begins = [t or begins[0], s or begins[1]]
            yield best, t, there, *(f(u, step) for f in along)

    found = torch.tensor([list(tried(data)) for data in batches], dtype=torch.float64)  # [batches, directions, 5]
    vector_to_parameters(start, params)
    means = found.mean(0).T
    lengths = found[..., 1].where(found[..., 1] > 0, math.nan).log().nanmean(0).exp().nan_to_num(0.0)
    columns = dict(zip(Decreases.model_fields, (means[0], lengths, *means[2:]), strict=True))
    return Decreases(
        **{key: [digits(v, 3 if key == "length" else 4) for v in x.tolist()] for key, x in columns.items()}
    )


def digits(x: float, n: int = 4) -> float:
    """Round to so many significant digits; −∞, which JSON does not know, to −1e9."""
    return float(f"{max(x, -1e9):.{n}g}")


def count() -> int:
    """How many trainings there are."""
    return len(PLANS) * len(SEEDS)


def measure(workers: int, advance: Advance, folder: Path) -> dict[str, Any]:
    """Measure every task and seed; ``advance`` is told of each training, and the folder keeps it.

    Beside the checkpoints there are their `changes`; ``norms`` are the columns of `Decreases`.
    """
    began, setting = time.perf_counter(), Setting()
    cells = [(task, seed, setting) for seed in SEEDS for task in setting.plans]
    found: dict[str, list[Checkpoint]] = {task: [] for task in setting.plans}
    for (task, *_), checkpoints in zip(cells, each(workers, watch, cells, folder), strict=True):
        found[task] += checkpoints
        advance("best-norm", 1)
    every = [c for of_task in found.values() for c in of_task]
    return {
        "torch": torch.__version__,
        "setting": setting,
        "seconds": round(time.perf_counter() - began, 1),
        "norms": NORMS,
        "early": EARLY,
        "late": LATE,
        "checkpoints": every,
        "changes": changes(every),
    }


def inverse(found: Decreases, by: str, adaptive: bool) -> float:
    """Return 1/p of the ℓp norm with the largest decrease, 0 for ℓ∞; NaN if none of them decreases the loss."""
    values = found.of(by, adaptive)[: len(PS)]
    return 1 / PS[values.index(max(values))] if max(values) > 0 else math.nan


def ratio(found: Decreases, by: str, adaptive: bool) -> float:
    """Return log₂ of the decrease under ℓ6 over that under ℓ2, from −3 to 3; 0 if neither decreases the loss."""
    values = found.of(by, adaptive)
    this, that = (max(values[PS.index(p)], 0.0) for p in (P_MAX, 2.0))
    return max(-3.0, min(3.0, math.log2(this / that))) if this and that else 3.0 * ((this > 0) - (that > 0))


def quantity(what: str, gradient: str, adaptive: bool, by: str, at: Checkpoint) -> float:
    """Return the value at a checkpoint of what `changes` compares."""
    if what == "anisotropy":
        return math.log2(at.anisotropy)
    return (inverse if what == "1/p" else ratio)(getattr(at, gradient), by, adaptive)


def changes(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return how every quantity changes from the checkpoints up to EARLY to those from LATE on, on every task.

    - what: "1/p" of the best ℓp norm; "ℓ6/ℓ2", log₂ of the ratio of decreases; or "anisotropy", its log₂. By the
      ``gradient`` and the decrease (``by``) that are named, in ``adaptive`` coordinates or not. NaN is left out.
    - early, late, difference: over the seeds, each training's own mean: mean, and the ends of the 95 % interval.
    - correlation: Spearman's with the anisotropy over the checkpoints of a training, over the seeds.
    - p_value: of the difference, Holm-corrected over the tasks: by the exact sign-flip test if there are seeds enough
      for it to reject, else by the paired t test.
    """
    runs: dict[str, dict[int, list[Checkpoint]]] = {}
    for c in checkpoints:
        runs.setdefault(c.task, {}).setdefault(c.seed, []).append(c)
    found: list[dict[str, Any]] = []
    kinds = product(("1/p", "ℓ6/ℓ2"), ("batch", "large"), (False, True), BY)
    for kind in (("anisotropy", "large", False, "best"), *kinds):
        p_values = []
        for task, seeds in runs.items():
            rows = []
            for run in seeds.values():
                known = [(c, x) for c in run if not math.isnan(x := quantity(*kind, c))]
                early, late = [x for c, x in known if c.time <= EARLY], [x for c, x in known if c.time >= LATE]
                if early and late:
                    rank = _rank([x for _, x in known], [c.anisotropy for c, _ in known])
                    rows.append((fmean(early), fmean(late), rank))
            before, after, ranks = zip(*rows, strict=True)
            test = paired(after, before)
            exact = test.exact if len(rows) >= pairs_needed(len(runs)) else None
            p_values.append(test.p_value if exact is None else exact)
            intervals = {"early": interval(before), "late": interval(after), "difference": test.interval}
            intervals["correlation"] = interval(ranks)
            names = dict(zip(("what", "gradient", "adaptive", "by"), kind, strict=True)) | {"task": task}
            found.append(names | {key: [digits(x) for x in (i.mean, i.low, i.high)] for key, i in intervals.items()})
        for change, p in zip(found[-len(runs) :], holm(p_values), strict=True):
            change["p_value"] = digits(p)
    return found


def _rank(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of them does not vary."""
    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0

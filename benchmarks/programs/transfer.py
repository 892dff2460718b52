"""Does one learning rate serve every size? Each optimizer at every rate of a grid, on models of many sizes.

The modular norm (arXiv:2405.14813) is made so that it should; the standard parametrization, PyTorch's own initial
weights under AdamW, is what it is held against. Results are one JSON file, which the documentation draws.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import normopt
from benchmarks.progress import Advance
from benchmarks.study.clusters import each
from benchmarks.study.spec import Frozen
from benchmarks.tasks import TASKS
from benchmarks.tasks.bytes import GPT

GRID = tuple(range(-5, 5))  # powers of two around each optimizer's own rate
MIDDLE = {"Modular": 0.25, "AdamW": 2**-8}


class Size(Frozen):
    """A model's size, and the axis of the question that it is on."""

    model: str
    axis: str
    width: int
    depth: int


# Width by 8 at one depth, depth by 4 at one width.
SIZES = (
    *(Size(model="MLP", axis="width", width=w, depth=2) for w in (32, 64, 128, 256)),
    *(Size(model="MLP", axis="depth", width=64, depth=d) for d in (2, 4, 8)),
    *(Size(model="GPT", axis="width", width=w, depth=2) for w in (16, 32, 64, 128)),
    *(Size(model="GPT", axis="depth", width=32, depth=d) for d in (1, 2, 4)),
)
SETTINGS = {
    "MLP": {"seeds": 3, "steps": 200, "batch": 64},
    "GPT": {"seeds": 2, "steps": 150, "batch": 16},
}


def build(size: Size) -> nn.Module:
    """The model: an MLP on the digits with so many hidden layers, or a byte-level GPT of so many blocks."""
    if size.model == "GPT":
        return GPT(size.width, size.depth)
    widths = [64, *[size.width] * size.depth]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(size.width, 10))


def optimize(name: str, model: nn.Module, size: Size, lr: float) -> Optimizer:
    """The optimizer. A GPT adds up two branches a block, and its last norm layer divides by their sum."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr)
    depth = 2 * size.depth if size.model == "GPT" else None
    groups = normopt.param_groups(model, "modular", residual_depth=depth)
    iteration: dict[str, Any] = {"norm_method": "polar-express", "norm_steps": 8}
    return normopt.SteepestDescent(groups, lr, norm="spectral", momentum=0.9, momentum_rule="ema", **iteration)


def train(size: Size, name: str, lr: float, seed: int) -> float | None:
    """Validation loss after a fixed number of steps, the rate falling to 0 along half a cosine; None if it diverged."""
    torch.set_num_threads(1)
    task, plan = TASKS["bytes" if size.model == "GPT" else "digits"], SETTINGS[size.model]
    splits = task.load()
    torch.manual_seed(seed)
    model = build(size)
    optimizer = optimize(name, model, size, lr)
    schedule = CosineAnnealingLR(optimizer, plan["steps"])
    batches = torch.Generator().manual_seed(seed)
    x, y = splits.train
    for _ in range(plan["steps"]):
        chosen = torch.randint(len(x), (plan["batch"],), generator=batches)
        optimizer.zero_grad()
        loss = task.loss(model(x[chosen]), y[chosen])
        if not math.isfinite(loss.item()):
            return None
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        inputs, targets = splits.validation
        final = float(task.loss(model(inputs), targets))
    return final if math.isfinite(final) else None


def plan() -> list[tuple[Size, str, float]]:
    """Every size, optimizer and rate."""
    return [(size, name, rate * 2.0**k) for size in SIZES for name, rate in MIDDLE.items() for k in GRID]


def count() -> int:
    """How many runs that is."""
    return sum(SETTINGS[size.model]["seeds"] for size, _, _ in plan())


def measure(workers: int, advance: Advance, folder: Path) -> dict[str, Any]:
    """Train everything; ``advance`` is told of each run, and the folder keeps it.

    A point is one size under one optimizer at one rate: validation losses at the end, a seed each; None where it
    diverged.
    """
    began = time.perf_counter()
    points: list[dict[str, Any]] = [{"size": s, "optimizer": name, "lr": lr, "losses": []} for s, name, lr in plan()]
    runs = [(p, seed) for p in points for seed in range(SETTINGS[p["size"].model]["seeds"])]
    # The largest models first, so that no worker is left with one at the end.
    runs.sort(key=lambda run: -run[0]["size"].width * run[0]["size"].depth)
    made = each(workers, train, [(p["size"], p["optimizer"], p["lr"], seed) for p, seed in runs], folder)
    for (point, _), loss in zip(runs, made, strict=True):
        point["losses"].append(loss)
        advance("transfer", 1)
    return {
        "torch": torch.__version__,
        "seconds": time.perf_counter() - began,
        "settings": SETTINGS,
        "points": points,
    }

"""What sparsity is worth: accuracy against the size that is left when dead units are taken out, and the speed of that.

AdamW without decay, with its own, and with ℓp decay of entries or of rows, on two tasks. Results are one JSON file,
which the documentation draws.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.progress import Advance
from benchmarks.study.clusters import each
from benchmarks.study.spec import Frozen, RunSpec
from benchmarks.tasks.base import Task
from benchmarks.tasks.digits import Digits
from benchmarks.tasks.digits_cnn import DigitsCNN
from benchmarks.training import Training
from normopt import sparsity
from normopt.addons import LpDecay

TASKS: dict[str, Task] = {task.name: task for task in (Digits(), DigitsCNN())}
# The learning rate is what serves AdamW without decay on the clean task, and on the noisy one a slower pace.
SETTINGS: dict[str, dict[str, float]] = {
    "digits": {"lr": 3e-3, "epochs": 30},
    "digits-cnn": {"lr": 1e-3, "epochs": 40},
}
SEEDS = (1, 2, 3)
BATCH = 64
LOSS_ALLOWED = 0.01  # of validation accuracy, for a smaller network
BATCHES = (1, 256)
ROUNDS = 101


class Arm(Frozen):
    """A way to decay weights, and the λ that are tried; p is None where it has none."""

    over: Literal["no decay", "AdamW's own", "entries", "rows"]
    p: float | None
    weight_decays: tuple[float, ...]

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.over if self.p is None else f"ℓ{self.p:g} of {self.over}"


ARMS = (
    Arm(over="no decay", p=None, weight_decays=(0.0,)),
    Arm(over="AdamW's own", p=None, weight_decays=(1.0, 3.0, 10.0)),
    *(Arm(over="entries", p=p, weight_decays=(0.05, 0.1, 0.2, 0.4)) for p in (0.5, 0.8, 1.0)),
    *(Arm(over="rows", p=p, weight_decays=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0)) for p in (0.5, 1.0)),
)
# Square layers of so many units, of which so large a share of weights is zero.
LAYERS = tuple((n, zeros) for n in (128, 512, 2048) for zeros in (0.8, 0.95, 0.99))


class Run(Frozen):
    """One network: accuracies, the share of weights that is zero, units, and parameters before and after shrinking.

    ``error`` is the largest difference between outputs of the two on the test inputs, relative to the largest output.
    """

    task: str
    arm: str
    weight_decay: float
    seed: int
    validation: float
    test: float
    zeros: float
    dead_rows: int
    rows: int
    parameters: int
    shrunk: int
    error: float


class Chosen(Frozen):
    """The λ of an arm that leaves the smallest networks of those that keep the accuracy, by validation alone.

    ``keeps`` is whether any does; else it is the λ of the best accuracy.
    """

    task: str
    arm: str
    weight_decay: float
    keeps: bool


def train(task: str, arm: Arm, weight_decay: float, seed: int) -> tuple[Run, nn.Module, nn.Module]:
    """A network trained with so much decay, measured in eval mode, and the one that it shrinks to.

    The learning rate falls to 0 along half a cosine, and decay with it. Equal seeds give equal initial weights and
    batches, whatever the arm.
    """
    torch.set_num_threads(1)
    own = weight_decay if arm.over == "AdamW's own" else 0.0
    spec = RunSpec(
        task=task,
        optimizer="adamw",
        settings={"lr": SETTINGS[task]["lr"], "weight_decay": own},
        seed=seed,
        epochs=int(SETTINGS[task]["epochs"]),
        batch_size=BATCH,
    )
    training = Training(spec, TASKS[task])
    model, splits = training.model, training.splits
    if arm.over in ("entries", "rows"):
        over: Any = arm.over
        LpDecay(training.optimizer, p=arm.p or 1.0, weight_decay=weight_decay, over=over)
    training.go_on()
    model.eval()
    shrunk = sparsity.shrink(model, splits.test[0])
    total = sparsity.report(model).total
    run = Run(
        task=task,
        arm=arm.name,
        weight_decay=weight_decay,
        seed=seed,
        validation=training.evaluate(splits.validation)[1],
        test=training.evaluate(splits.test)[1],
        zeros=total.zeros / total.entries,
        dead_rows=total.dead_rows,
        rows=total.rows,
        parameters=shrunk.parameters_before,
        shrunk=shrunk.parameters_after,
        error=shrunk.error,
    )
    return run, model, shrunk.model


def cells() -> list[tuple[str, Arm, float, int]]:
    """Every task, arm, λ and seed; the slower task first, so that no worker is left with it at the end."""
    tasks = sorted(TASKS, reverse=True)
    return [(task, arm, decay, seed) for task in tasks for arm in ARMS for decay in arm.weight_decays for seed in SEEDS]


def count() -> int:
    """How many steps of progress there are: a run each, then a timing of each chosen network and of each layer."""
    return len(cells()) + len(TASKS) * len(ARMS) * len(SEEDS) + len(LAYERS)


def choose(runs: list[Run]) -> list[Chosen]:
    """For each task and arm the λ that leaves the smallest networks within LOSS_ALLOWED of no decay's accuracy."""
    found = []
    for task in TASKS:
        of_task = [r for r in runs if r.task == task]
        base = mean(r.validation for r in of_task if r.arm == "no decay")
        for arm in ARMS:
            of_arm = {
                decay: [r for r in of_task if r.arm == arm.name and r.weight_decay == decay]
                for decay in arm.weight_decays
            }
            accuracy = {decay: mean(r.validation for r in of) for decay, of in of_arm.items()}
            # A rounding of a mean is no loss.
            keeping = [decay for decay, a in accuracy.items() if a >= base - LOSS_ALLOWED - 1e-9]
            if keeping:
                # Of equal sizes the one with the best accuracy.
                best = min(keeping, key=lambda d: (mean(r.shrunk for r in of_arm[d]), -accuracy[d]))
            else:
                best = max(accuracy, key=lambda d: accuracy[d])
            found.append(Chosen(task=task, arm=arm.name, weight_decay=best, keeps=bool(keeping)))
    return found


def measure(workers: int, advance: Advance, folder: Path) -> dict[str, Any]:
    """Train everything, then time what was chosen; ``advance`` is told of each, and the folder keeps the runs.

    Timings are of the shrunk ``networks`` against the full ones, and of the linear ``layers`` in CSR against dense.
    """
    from benchmarks.speed.records import machine

    began = time.perf_counter()
    runs: list[Run] = []
    nets: dict[tuple[str, str, float, int], tuple[nn.Module, nn.Module]] = {}
    for run, full, shrunk in each(workers, train, cells(), folder):
        runs.append(run)
        nets[run.task, run.arm, run.weight_decay, run.seed] = full, shrunk
        advance("training", 1)
    chosen, networks, layers = choose(runs), [], []
    for choice, seed in product(chosen, SEEDS):
        inputs = TASKS[choice.task].load().train[0]
        network = choice.model_dump(exclude={"keeps"}) | {"seed": seed}
        networks += [versus(*nets[tuple(network.values())], inputs[:batch]) | network for batch in BATCHES]
        advance("timing", 1)
    for units, zeros in LAYERS:
        layers += [timing | {"units": units, "zeros": zeros} for timing in sparse_layer(units, zeros)]
        advance("timing", 1)
    return {
        "torch": torch.__version__,
        "cpu": machine(torch.device("cpu"), (), None).cpu,
        "seconds": time.perf_counter() - began,
        "settings": SETTINGS,
        "descriptions": {name: task.description for name, task in TASKS.items()},
        "runs": runs,
        "chosen": chosen,
        "networks": networks,
        "layers": layers,
    }


def versus(full: nn.Module, small: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """How many times as fast the small network is, which takes turns with the full one on one thread.

    It is the median of paired ratios, with its 95 % interval, None of too few rounds, beside the batch size and the
    milliseconds that the full one takes. Both are in inference mode, and each round begins with the other one.
    """
    from benchmarks.speed.measure import TURN, Entrant, on_cpu, take_turns, threads_set
    from benchmarks.speed.records import Entry, ratio

    entrants = [
        Entrant(Entry(optimizer=name, backend="", streams=0, first=0), partial(net.eval(), inputs))
        for name, net in (("full", full), ("small", small))
    ]
    with threads_set(1), torch.inference_mode():
        for entrant in entrants:
            entrant.times = max(1, round(TURN / 2 / min(on_cpu(entrant.step) for _ in range(5))))
        take_turns(entrants, ROUNDS, on_cpu)
    times, others = (entrant.entry for entrant in entrants)
    faster = ratio(times, others)
    ends = faster.interval
    return {
        "batch": len(inputs),
        "milliseconds": round(1000 * sorted(times.seconds)[ROUNDS // 2], 5),
        "speedup": round(faster.median, 3),
        "interval": ends and (round(ends[0], 3), round(ends[1], 3)),
    }


@torch.no_grad()
def sparse_layer(units: int, zeros: float) -> list[dict[str, Any]]:
    """A square linear layer with so many zeros at random places, in CSR against dense, for each batch size."""
    drawn = torch.Generator().manual_seed(0)
    dense = nn.Linear(units, units)
    dense.weight.copy_(
        torch.randn(units, units, generator=drawn) * (torch.rand(units, units, generator=drawn) >= zeros)
    )
    inputs = torch.randn(max(BATCHES), units, generator=drawn)
    return [versus(dense, sparsity.to_sparse(dense), inputs[:batch]) for batch in BATCHES]

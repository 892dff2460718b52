"""Which radius, and which ratio of learning rates, have the layers that are no hidden matrices in Muon's presets?

The presets "muon" and "muon-adamw" at a grid of ratios and learning rates, on three tasks, in a short and a long run
each, on seeds for tuning. The ratio of each preset is then chosen by a rule, and the presets at Muon's own learning
rate are held against AdamW at its best rate, by test data, on fresh seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from benchmarks.environment import Environment
from benchmarks.grid import Grid
from benchmarks.report.text import p_value
from benchmarks.results import Results, Row, validation_loss
from benchmarks.stats import Interval, holm, paired
from benchmarks.study.spec import Arm, Study, Tuning, Value
from benchmarks.tasks import TASKS

PRESETS = ("muon", "muon-adamw")
RATIOS = (0.015, 0.05, 0.1, 0.2, 0.4)
LR = 0.02  # Muon's default
ADAMW = (1e-3, 3e-3, 1e-2)
BEYOND = 0.8, 3e-2  # a ratio, and a rate of AdamW's
SEEDS = tuple(range(1, 9))
DECAY = 0.01  # of all arms, torch.optim.AdamW's default
# Epochs; an epoch has 40, 17 and 422 steps. About 80 minutes of one core; the whole grid on long runs and two seeds
# for each would take twice as long, so that long runs are tuned on one seed, at Muon's learning rate alone. (Cut to
# that rate while the first short runs were made, which took longer than estimated, and before any long one.)
EPOCHS = {
    "short": {"bytes": 10, "digits-mix": 12, "fashion-cnn": 1},
    "long": {"bytes": 40, "digits-mix": 48, "fashion-cnn": 4},
}
RATES = {"short": (0.01, LR, 0.05), "long": (LR,)}
TUNED_ON = {"short": (1001, 1002), "long": (1001,)}
CELLS = tuple((length, task) for length, tasks in EPOCHS.items() for task in tasks)

# Beside the finals on bytes, held against "muon-adamw": what the blocks of a fused projection are, the queries, keys
# and values being three unless an arm says otherwise, and one learning rate for both rules at the same update RMS.
BYTES: dict[str, Value] = {"qkv_blocks": 3}
MATCHED: dict[str, Value] = {"aspect": "match_rms_adamw", "ratio": 1.0}
EXTRAS: dict[str, dict[str, Value]] = {
    "qkv as one matrix": {"lr": LR, "qkv_blocks": 1},
    "qkv by heads": {"lr": LR, "qkv_blocks": 12},
    "match_rms_adamw, lr 0.001": {"lr": 1e-3, **MATCHED},
    "match_rms_adamw, lr 0.003": {"lr": 3e-3, **MATCHED},
}


def _arm(name: str, optimizer: str, settings: Mapping[str, Value], against: str | None = None) -> Arm:
    return Arm(name=name, optimizer=optimizer, settings={**settings, "weight_decay": DECAY}, against=against)


def _muon(name: str, task: str, preset: str, settings: Mapping[str, Value], against: str | None = None) -> Arm:
    return _arm(name, "muon", {"preset": preset, **(BYTES if task == "bytes" else {}), **settings}, against)


def _adamw(lr: float) -> Arm:
    return _arm(f"AdamW {lr:g}", "adamw", {"lr": lr})


def _study(name: str, purpose: str, length: str, task: str, arms: Iterable[Arm], seeds: Sequence[int]) -> Study:
    arms = tuple(arms)
    return Study(
        name=f"radii-{name}-{length}-{task}",
        purpose=purpose,
        tasks=(task,),
        arms=arms,
        baseline=next(arm.name for arm in arms if arm.optimizer == "adamw"),
        tuning=Tuning(trials=1, startup=1),  # nothing is searched
        seeds=tuple(seeds),
        budget=EPOCHS[length][task] / TASKS[task].epochs,
    )


def grid(length: str, task: str) -> Study:
    """Return the study of every ratio and learning rate, on seeds for tuning."""
    arms = [
        _muon(f"{preset} {ratio:g} {lr:g}", task, preset, {"ratio": ratio, "lr": lr})
        for preset in PRESETS
        for ratio in RATIOS
        for lr in RATES[length]
    ]
    purpose = "Which ratio is good at which learning rate?"
    return _study("grid", purpose, length, task, [*arms, *map(_adamw, ADAMW)], TUNED_ON[length])


def edge(length: str, task: str) -> Study:
    """Return the study of a ratio and a rate of AdamW's beyond the grid.

    Added when the grid was known, whose best ratio of "muon-adamw", and best rate of AdamW, were the highest. It has no
    part in the choice, nor in what the presets are held against.
    """
    ratio, rate = BEYOND
    arm = _muon(f"{PRESETS[1]} {ratio:g}", task, PRESETS[1], {"ratio": ratio, "lr": LR})
    purpose = "Is a ratio or a rate beyond the grid better?"
    return _study("edge", purpose, length, task, [arm, _adamw(rate)], TUNED_ON[length])


def final(length: str, task: str, ratios: Mapping[str, float], rates: Sequence[float]) -> Study:
    """Return the study of the chosen ratios at Muon's learning rate against AdamW, on fresh seeds."""
    arms = [_muon(preset, task, preset, {"ratio": ratios[preset], "lr": LR}) for preset in PRESETS]
    if (length, task) == CELLS[0]:
        base = PRESETS[1]
        arms += [_muon(name, task, base, {"ratio": ratios[base], **own}, base) for name, own in EXTRAS.items()]
    purpose = "Is Muon with its defaults better than AdamW at its best rate?"
    return _study("final", purpose, length, task, [*arms, *map(_adamw, rates)], SEEDS)


class Tried(BaseModel):
    """A cell of the grid: validation losses after the last epoch, one a seed; None where it diverged."""

    model_config = ConfigDict(extra="forbid")

    length: str
    task: str
    preset: str
    ratio: float | None
    lr: float
    losses: list[float | None]

    @property
    def loss(self) -> float:
        """The mean, ∞ if one diverged."""
        return sum(math.inf if loss is None else loss for loss in self.losses) / len(self.losses)


class Found(BaseModel):
    """An arm on fresh seeds: its scores and losses on test data in their order; the loss of one that diverged is ∞."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    length: str
    task: str
    arm: str
    settings: dict[str, Value]
    score: list[float]
    loss: list[float]


class Radii(BaseModel):
    """The whole result."""

    model_config = ConfigDict(extra="forbid")

    environments: list[Environment]
    epochs: dict[str, dict[str, int]]
    tuned_on: dict[str, tuple[int, ...]]
    seeds: tuple[int, ...]
    seconds: float
    tried: list[Tried]
    found: list[Found]


def tried(length: str, results: Results) -> list[Tried]:
    """Return the cells of a grid that has been run."""
    return [
        Tried(
            length=length,
            task=row.task,
            preset=str(row.arm.settings.get("preset", "AdamW")),
            ratio=None if row.arm.optimizer == "adamw" else float(row.arm.settings["ratio"] or 0),
            lr=row.lr or 0.0,
            losses=[None if (loss := validation_loss(run)) is None else round(loss, 5) for run in row.runs],
        )
        for row in results.rows
    ]


def by_ratio(cells: Iterable[Tried], length: str, task: str, preset: str) -> dict[float, float]:
    """Return the mean loss of each ratio at Muon's rate."""
    wanted = (length, task, preset, LR)
    return {
        cell.ratio: cell.loss
        for cell in cells
        if cell.ratio and (cell.length, cell.task, cell.preset, cell.lr) == wanted
    }


def worst(cells: Sequence[Tried], preset: str) -> list[float]:
    """Return, for each ratio of the grid, its loss over the lowest of any, at Muon's rate: the highest of all runs."""
    runs = {(cell.length, cell.task) for cell in cells}
    losses = [[by_ratio(cells, *run, preset)[ratio] for ratio in RATIOS] for run in runs]
    return [round(max(of[i] / min(of) for of in losses), 4) for i in range(len(RATIOS))]


def choose(cells: Sequence[Tried]) -> dict[str, float]:
    """Return the ratio of each preset that is good on all tasks: whose worst loss relative to the best is lowest."""
    found = {preset: worst(cells, preset) for preset in PRESETS}
    return {preset: RATIOS[of.index(min(of))] for preset, of in found.items()}


def rates(cells: Sequence[Tried], length: str, task: str) -> tuple[float, ...]:
    """Return AdamW's rates for fresh seeds: all of them on short runs, the best by tuning on long ones."""
    if length == "short":
        return ADAMW
    of_adamw = [cell for cell in cells if (cell.length, cell.task) == (length, task) and cell.preset == "AdamW"]
    of_adamw = [cell for cell in of_adamw if cell.lr in ADAMW]
    return (min(of_adamw, key=lambda cell: cell.loss).lr,)


def measure(made: Callable[[Study], Results]) -> Radii:
    """Have every study made, the grids first, by which the others are chosen; keep what the documentation needs."""
    grids = [(length, made(grid(length, task))) for length, task in CELLS]
    cells = [cell for length, results in grids for cell in tried(length, results)]
    ratios = choose(cells)
    finals = [(length, made(final(length, task, ratios, rates(cells, length, task)))) for length, task in CELLS]
    edges = [(length, made(edge(length, task))) for length, task in CELLS]
    every = [results for _, results in (*grids, *edges, *finals)]
    return Radii(
        environments=list({repr(e): e for results in every for e in results.environments}.values()),
        epochs=EPOCHS,
        tuned_on=TUNED_ON,
        seeds=SEEDS,
        seconds=round(sum(results.seconds for results in every), 1),
        tried=[*cells, *(cell for length, results in edges for cell in tried(length, results))],
        found=[_found(length, row) for length, results in finals for row in results.rows],
    )


def _found(length: str, row: Row) -> Found:
    return Found(
        length=length,
        task=row.task,
        arm=row.name,
        settings=dict(row.arm.settings),
        score=[round(score, 6) for run in row.runs if (score := run.test_score) is not None],
        loss=[math.inf if run.test_loss is None else round(run.test_loss, 6) for run in row.runs],
    )


class Held(NamedTuple):
    """An arm's mean test loss, and its paired difference from another's with Holm's P-value."""

    arm: str
    loss: float
    against: str
    difference: Interval
    p_value: float

    @property
    def cells(self) -> tuple[str, str]:
        """The loss and the difference, as tables show them."""
        d = self.difference
        return f"{self.loss:.3f}", f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"


def held(kept: Radii, length: str, task: str) -> dict[str, Held]:
    """Hold the presets against AdamW, and the extras against "muon-adamw": a question is a family of tests.

    It is AdamW at its best rate by the very seeds that are compared, which favours AdamW.
    """
    losses = {a.arm: a.loss for a in kept.found if (a.length, a.task) == (length, task)}
    best = min((name for name in losses if name.startswith("AdamW")), key=lambda name: fmean(losses[name]))
    extras = ([name for name in losses if name in EXTRAS and name.startswith(word)] for word in ("qkv", "match"))
    found = {}
    for names, against in ((PRESETS, best), *((names, PRESETS[1]) for names in extras)):
        differences = [paired(losses[name], losses[against]) for name in names]
        for name, d, p in zip(names, differences, holm([d.p_value for d in differences]), strict=True):
            found[name] = Held(name, fmean(losses[name]), against, d.interval, p)
    return found


def tables(kept: Radii) -> tuple[str, ...]:
    """Return the Markdown tables of the documentation: what was tried at Muon's rate, the finals, and the extras."""
    ratios = (*RATIOS, BEYOND[0])
    grid, finals, extras = [], [], []
    for length, task in CELLS:
        for preset in PRESETS:
            losses = by_ratio(kept.tried, length, task, preset)
            best = min(losses[ratio] for ratio in RATIOS)
            said = [f"**{x:.3f}**" if x == best else f"{x:.3f}" if x else "" for x in map(losses.get, ratios)]
            grid.append([_run(kept, length, task), preset, *said])
        cases = held(kept, length, task)
        (rival,) = {cases[preset].against for preset in PRESETS}
        loss = fmean(next(a.loss for a in kept.found if (a.length, a.task, a.arm) == (length, task, rival)))
        final = f"{loss:.3f} at {rival.removeprefix('AdamW ')}"
        finals.append([_run(kept, length, task), final, *(cell for preset in PRESETS for cell in cases[preset].cells)])
        extras += [[c.arm, *c.cells, p_value(c.p_value, name=False)] for c in cases.values() if c.arm in EXTRAS]
    grid += [["worst over best", p, *(f"{ratio:.2f}" for ratio in worst(kept.tried, p)), ""] for p in PRESETS]
    found = (
        Grid(["run", "preset", *(f"{ratio:g}" for ratio in ratios)], grid, left=2),
        Grid(["run", "AdamW", *(title for preset in PRESETS for title in (preset, "minus AdamW"))], finals),
        Grid(["on bytes, 10 epochs", "test loss", "minus muon-adamw", "P"], extras),
    )
    return tuple(table.markdown.replace("-0.", "−0.").replace("\u00a0", " ") for table in found)


def _run(kept: Radii, length: str, task: str) -> str:
    n = kept.epochs[length][task]
    return f"{task}, {n} epoch{'s' if n > 1 else ''}"

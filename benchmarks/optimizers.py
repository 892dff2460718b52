"""The optimizers of the ablation: a name and settings → an optimizer and its schedule of p."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

import normopt
from benchmarks.control import LengthOfLPSGDM
from benchmarks.study.spec import RunSpec
from benchmarks.tasks import Task
from normopt._checks import near
from normopt.diagnostics import hessian_spectrum
from normopt.groups.presets import PRESETS as LAYER_PRESETS
from normopt.groups.presets import PresetName
from normopt.schedules import AdaptiveP, CosineP, LinearP, PSchedule
from normopt.schedules.base import interpolate_exponent

# What every optimizer takes: those that have them not, from normopt's add-ons.
REGULARIZERS = ("agr", "decay", "decay_p", "weight_decay", "decay_step", "prune")
_OF_PRESETS = ("ratio", "qkv_blocks")


@dataclass(frozen=True)
class Entry:
    """One optimizer by its name.

    Attributes:
        cls: its class.
        rule: what it does, a line for the report.
        defaults: what it is made with unless the settings say otherwise; the class's own defaults come after them.
        fixed: what makes it what it is, and cannot be set.
        preset: the preset of `normopt.param_groups` that gives each layer its norm; without one, all have the same.
    """

    cls: type[Optimizer]
    rule: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None

    @property
    def ours(self) -> bool:
        """It is normopt's: regularizers and norms are settings of it."""
        return issubclass(self.cls, normopt.SteepestDescent)

    @property
    def settings(self) -> frozenset[str]:
        """The names of what can be set."""
        named = inspect.signature(self.cls.__init__).parameters.values()
        own = {p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self", "params"}
        if "betas" in own:  # a setting is one number
            own = own - {"betas"} | {"beta1", "beta2"}
        if self.ours:
            own |= {"preset", *_OF_PRESETS}
        return frozenset((own | set(REGULARIZERS)) - set(self.fixed))


# Of the stored runs, which were made before normopt's defaults were the paper's.
_POWER: dict[str, Any] = {"p": 8.0, "eps": 0.0}
_ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("ℓ2, heavy-ball momentum 0.9", {"momentum": 0.9}),
    "normalizedsgd": ("the gradient's momentum 0.9 at ℓ2 length 1 in every tensor", {"momentum": 0.9}),
    "signsgd": ("the sign of the gradient, no momentum", {}),
    "signum": ("the sign of the averaged momentum 0.9", {}),
    "lion": ("the sign of a momentum that is read at 0.9 and stored at 0.99", {}),
    "powerstep": ("the power 0.1 of the summed momentum 0.9: the power map at p = 11", {}),
    "lpsgd": ("the power map of the gradient, p = 8 unless a schedule moves it", _POWER),
    "lpsgdm": ("the power map of the averaged momentum 0.9, p = 8 unless a schedule moves it", _POWER),
    "spectralsgd": ("the momentum 0.9 with all singular values their sum, in every matrix", {"momentum": 0.9}),
    "nucgd": ("the leading singular pair of the momentum", {}),
    "freon": ("the momentum with its singular values raised to a power", {}),
    "rownormsgd": ("the momentum 0.9, every row at ℓ2 length 1", {}),
    "stacey": ("the smoothed power map of Lion's momentum at p = 3, coupled to a second iterate", {}),
    "adam": ("normopt's AdamW with its decay in the gradient, 0 by default", {}),
    "adagrad": ("the gradient over the root of the sum of all squared gradients", {}),
    "rmsprop": ("the gradient over the root of their average square, at 0.99", {}),
    "adan": ("AdamW's rule with averaged differences of the gradients, no decay by default", {}),
    "lars": ("the momentum 0.9 as long as the tensor's weights", {}),
    "lamb": ("Adam's direction and its decay 0.01 as long as the tensor's weights", {}),
}
_PRESETS = {"normuon": "normuon-adamw"}  # where it has another name than the optimizer
_LAYERED = {
    "muon": "the averaged momentum 0.95, Nesterov's, with all singular values 1; signs in output, vectors, embeddings",
    "normuon": "muon's step in hidden matrices, its rows divided by an average of their size; AdamW's elsewhere",
    "scion": "unit steps of the averaged momentum 0.9 inside each layer's norm ball, its own weight decay 1 included",
    "scale": "the gradient of every output unit at RMS 1, momentum in the last layer alone",
}

OPTIMIZERS: dict[str, Entry] = {
    **{name: Entry(normopt.get_optimizer(name), rule, defaults) for name, (rule, defaults) in _ZOO.items()},
    **{n: Entry(normopt.get_optimizer(n), r, preset=_PRESETS.get(n, n)) for n, r in _LAYERED.items()},
    "steepestdescent": Entry(normopt.SteepestDescent, "steepest descent under the norm that is set"),
    "sgd-ema": Entry(
        normopt.SteepestDescent,
        "ℓ2, averaged momentum 0.9: a heavy-ball step with a tenth of the learning rate",
        {"momentum": 0.9},
        {"norm": "l2", "scale": "dual", "momentum_rule": "ema"},
    ),
    "adamw-lp": Entry(
        normopt.SteepestDescent,
        "the ℓp direction, p = 4 unless set, in the adaptive coordinates of AdamW, at its step length",
        {"momentum": 0.9, "weight_decay": 0.01, "p": 4.0, "scale": "matched"},
        {"norm": "lp", "momentum_rule": "ema", "bias_correction": True, "metric": "diagonal"},
    ),
    "modular": Entry(
        normopt.SteepestDescent,
        "unit steps of the averaged momentum 0.9 under the modular norm of the whole network",
        {"momentum": 0.9},
        {"scale": "unit", "momentum_rule": "ema"},
        preset="modular",
    ),
    "lpsgdm-lr-matched": Entry(
        LengthOfLPSGDM, "SGD's direction, averaged momentum 0.9, at the step length that LPSGDM has in every tensor"
    ),
    "sgd-torch": Entry(torch.optim.SGD, "torch.optim.SGD, momentum 0.9", {"momentum": 0.9}),
    # Of its name there are results, and they are torch's.
    "adamw": Entry(torch.optim.AdamW, "torch.optim.AdamW at its defaults, its own weight decay 0.01 included"),
    "adamw-normopt": Entry(normopt.AdamW, "normopt.AdamW at its defaults, which are torch's"),
}


def find(name: str) -> Entry:
    """The optimizer of a name; ``module:Class`` is one of your own, imported.

    Raises:
        ValueError: there is none; the message lists the near ones.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" not in name:
        raise ValueError(
            f"unknown optimizer {name!r}{near(name, OPTIMIZERS)} (known: {', '.join(OPTIMIZERS)}; one of your own is "
            "module:Class)"
        )
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the optimizer {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ValueError(f"{name} is no torch.optim.Optimizer, but {cls!r}")
    return Entry(cls, f"{attribute} of {module}")


def described(name: str) -> Entry:
    """What `find` finds; of an optimizer that cannot be imported here, as where others' results are read, its name."""
    try:
        return find(name)
    except ValueError:
        return Entry(Optimizer, f"{name}, which is not to be found here")


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the optimizer has not.

    Raises:
        ValueError: an unknown optimizer, or one that has no setting of that name.
    """
    entry = find(name)
    for key in settings:
        if key in entry.settings or (entry.ours and key.startswith("norm_")):
            continue
        if key in entry.fixed:
            raise ValueError(f"{key} is what makes {name} what it is, {entry.fixed[key]!r}: use another optimizer")
        allowed = ", ".join(sorted(entry.settings))
        raise ValueError(f"{name} has no setting {key!r}{near(key, entry.settings)} (it has {allowed})")


def make_optimizer(spec: RunSpec, model: nn.Module, task: Task) -> tuple[Optimizer, PSchedule | None]:
    """The optimizer of a run and its schedule of p, to be stepped after every epoch, an adaptive one after every step.

    Beside what the optimizer's class takes there are some settings that need a word:

    - ``preset`` gives every layer its norm, as of `normopt.param_groups`; "none" takes the optimizer's own away.
    - ``ratio`` replaces the lr_ratio or the radius that the preset gives layers, and ``qkv_blocks`` is the number of
      blocks of a fused projection named qkv.
    - ``decay_step`` is ηλ, the decay of one step at the peak of the learning rate: λ = decay_step/η. Learning rates
      differ by factors of a thousand between optimizers, so that one λ for all would erase one's weights and leave
      another's alone.
    - ``prune`` is the share of the weights that gradual magnitude pruning sets to zero; it belongs to training
      (`prune`), not to the optimizer.
    - ``beta1`` and ``beta2`` are the ``betas`` of Adam and its kin.

    AGR and ℓp decay are normopt's add-ons where the optimizer is not normopt's own; ``weight_decay`` then is the
    ℓp decay's if ``decay`` is "lp", and else the optimizer's own.

    Raises:
        ValueError: an unknown optimizer or setting, or settings that contradict each other.
    """
    check(spec.optimizer, spec.settings)
    entry = find(spec.optimizer)
    given = {k: math.inf if v == "inf" else v for k, v in spec.settings.items() if k != "prune"}
    settings = {**entry.defaults, **given}
    if "eps" not in given and (settings.get("scale", "power") != "power" or settings.get("p") == 2):
        settings.pop("eps", None)  # there it does nothing, and is refused
    if "decay_step" in settings:
        if "weight_decay" in spec.settings:
            raise ValueError("decay_step is weight_decay times lr: set one of the two")
        settings["weight_decay"] = settings.pop("decay_step") / settings["lr"]
    optimizer = _ours(entry, settings, model, task) if entry.ours else _theirs(entry, settings, model)
    return optimizer, _schedule(spec, optimizer, model, task)


class Pruning:
    """A hook after each step that keeps a rising share of the weights, those of the smallest |w|, at exactly zero.

    The share rises as 1 − (1 − t)³ (arXiv:1710.01878) over the first three quarters of the steps; it is over all
    tensors of two dims or more together, and what is pruned stays so.
    """

    EVERY = 20  # steps

    def __init__(self, model: nn.Module, share: float, steps: int) -> None:
        self.model, self.share = model, share
        self.step, self.ramp = 0, max(1, round(0.75 * steps))
        self.weights = [p for p in model.parameters() if p.dim() >= 2]
        self.kept: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.kept = state["step"], state["kept"]

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        self.step += 1
        if self.kept:
            for weight, kept in zip(self.weights, self.kept, strict=True):
                weight.mul_(kept)
        if self.step <= self.ramp and (self.step % self.EVERY == 0 or self.step == self.ramp):
            normopt.sparsity.prune_(self.model, fraction=self.share * (1 - (1 - self.step / self.ramp) ** 3))
            self.kept = [weight != 0 for weight in self.weights]


def prune(spec: RunSpec, optimizer: Optimizer, model: nn.Module, steps: int) -> Pruning | None:
    """Attach gradual magnitude pruning to an optimizer if the run's settings have a share to ``prune``."""
    if "prune" not in spec.settings:
        return None
    pruning = Pruning(model, float(spec.settings["prune"] or 0), steps)
    optimizer.register_step_post_hook(pruning)
    return pruning


def _ours(entry: Entry, settings: dict[str, Any], model: nn.Module, task: Task) -> Optimizer:
    # On models this small the calls cost more than the arithmetic, and multi-tensor ones are fewer.
    if not settings.get("fused"):
        settings = {"foreach": True} | settings
    preset, settings = settings.pop("preset", entry.preset), _with_betas(entry.cls, settings)
    of_preset = {key: settings.pop(key) for key in _OF_PRESETS if key in settings}
    with warnings.catch_warnings():
        # Without a preset all layers step alike, as meant.
        warnings.filterwarnings("ignore", r"\w+ steps matrices, but some parameters are vectors")
        return entry.cls(_params(preset, model, task, **of_preset), **settings, **entry.fixed)


def _params(
    preset: str | None, model: nn.Module, task: Task, ratio: float | None = None, qkv_blocks: int | None = None
) -> Any:
    if preset in (None, "none"):
        return model.parameters()
    if preset not in LAYER_PRESETS:
        raise ValueError(f"preset must be one of {', '.join(LAYER_PRESETS)} or none, but is {preset!r}")
    fused = [name for name, _ in model.named_parameters() if qkv_blocks and name.endswith("qkv.weight")]
    overrides: dict[str | type[nn.Module], dict[str, Any]] = {name: {"norm_blocks": qkv_blocks} for name in fused}
    depth = task.residual_depth if preset == "modular" else None
    groups = normopt.param_groups(model, cast(PresetName, preset), overrides=overrides, residual_depth=depth)
    if ratio is not None:
        for group in groups:
            group |= {key: ratio for key in ("lr_ratio", "radius") if key in group}
    return list(groups)  # which every optimizer takes: an ablation may give any of them a preset's norms


def _theirs(entry: Entry, settings: dict[str, Any], model: nn.Module) -> Optimizer:
    agr, decay, decay_p = settings.pop("agr", False), settings.pop("decay", None), settings.pop("decay_p", None)
    names = inspect.signature(entry.cls.__init__).parameters
    if decay not in (None, "lp") or (decay is None and decay_p is not None):
        raise ValueError(
            f'{entry.cls.__name__} has a weight decay of its own: decay can only be "lp", which decay_p belongs to, '
            f"but decay = {decay!r}, decay_p = {decay_p!r}"
        )
    strength = settings.pop("weight_decay", 0.0) if decay == "lp" else None
    if strength is not None and "weight_decay" in names:
        settings["weight_decay"] = 0.0
    settings = _with_betas(entry.cls, settings)
    if "foreach" in names:
        settings.setdefault("foreach", True)
    optimizer = entry.cls(model.parameters(), **settings)
    if agr:
        normopt.AGR(optimizer)
    if strength:
        normopt.LpDecay(optimizer, weight_decay=strength, p=1.0 if decay_p is None else decay_p)
    return optimizer


def _with_betas(cls: type[Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which beta1, beta2 are the ``betas`` of a class that takes them so."""
    betas = inspect.signature(cls.__init__).parameters.get("betas")
    given = {f"beta{i}": usual for i, usual in enumerate(betas.default, 1)} if betas else {}
    if not given.keys() & settings.keys():
        return settings
    others = {k: v for k, v in settings.items() if k not in given}
    return others | {"betas": tuple(settings.get(k, usual) for k, usual in given.items())}


class CurvatureP(PSchedule):
    """p by the anisotropy a of the Hessian of n weights, on the first 256 training examples, at every step::

        1/(p−1) = 1/(p_end−1) + (1/(p_start−1) − 1/(p_end−1))·log(a)/log(n)

    a = max|λ|/mean|λ| is 1 where all curvatures are equal, and p is p_end; it is n where there is but one, and p is
    p_start. Where the curvature overflows, p is p_end.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, task: Task, p_end: float) -> None:
        splits = task.load()
        x, y = splits.train
        self.batch = splits.fetch(x[:256], None).to(splits.device), y[:256].to(splits.device)
        self.model, self.loss, self.p_end = model, task.loss, p_end
        super().__init__(optimizer)

    def p_at(self, start: float, s: int) -> float:
        """Measure p of a group that started at ``start``."""
        try:
            found = hessian_spectrum(self.model, self.loss, [self.batch], steps=24, probes=1)
        except ValueError:
            return self.p_end
        return interpolate_exponent(start, self.p_end, min(math.log(found.anisotropy) / math.log(found.size), 1.0))


def _schedule(spec: RunSpec, optimizer: Optimizer, model: nn.Module, task: Task) -> PSchedule | None:
    plan = spec.p_schedule
    if plan is None:
        return None
    if plan.kind == "curvature":
        return CurvatureP(optimizer, model, task, plan.p_end)
    if plan.kind == "adaptive":
        return AdaptiveP(optimizer, p_end=plan.p_end)  # it moves 1/(p−1), whatever the space
    annealed = CosineP if plan.kind == "cosine" else LinearP
    return annealed(optimizer, total_steps=spec.epochs, p_end=plan.p_end, space=plan.space)

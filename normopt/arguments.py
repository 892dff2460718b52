"""Checks of the names of arguments and settings, and warnings about settings that have no effect."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normopt import settings
from normopt._checks import check_bool, check_number, equals, near, warn
from normopt.norms import registry
from normopt.norms.base import Norm
from normopt.norms.matrices import MatrixNorm
from normopt.stages import Decay, Momentum
from normopt.stages.base import default_settings, owners

SYNONYMS = {
    "adjust_lr_fn": "it is aspect, in a group norm_aspect",
    "alpha": "α of RMSprop is metric_beta",
    "amsgrad": 'amsgrad=True is metric_rule="max"',
    "beta": "the β of an average of gradients is momentum",
    "betas": "give β₁ as momentum, and β₂ as metric_beta or, under Lion's rule, as beta2",
    "beta1": "β₁ is momentum",
    "capturable": "it is not needed, because no step waits for the device",
    "cautious": 'cautious decay is decay="cautious"',
    "lambda_p": 'λ of ℓp decay is weight_decay, with decay="lp"',
    "learning_rate": "the learning rate is lr",
    "ns_steps": "the number of Newton–Schulz steps is steps, in a group norm_steps",
    "p_max": "the p that a schedule starts from is p",
    "p_start": "the p that a schedule starts from is p",
    "wd": "the strength of the decay is weight_decay",
}
# Settings of torch's adaptive optimizers, and what they are here.
ADAN = ("momentum", "difference_beta", "metric_beta")
TORCHS: dict[str, Sequence[str]] = {
    "alpha": ("metric_beta",),
    "amsgrad": ("metric_rule",),
    "betas": ("momentum", "metric_beta"),
    "eps": ("metric_eps",),
}


def check_unused(
    given: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], usual: Mapping[str, Any], no_momentum: bool
) -> None:
    """Raise if a constructor argument has no effect in any param group.

    Warn instead if a schedule of the momentum or of p could give it an effect.

    Args:
        given: the constructor's arguments.
        groups: the param groups made from them.
        usual: norm fields that the constructor sets by default.
        no_momentum: whether the momentum is fixed at 0.

    Raises:
        ValueError: an argument has no effect, and no schedule can change that.

    Warns:
        UserWarning: an argument has no effect until a schedule changes p or the momentum.
    """
    norms = [registry.build(group) for group in groups]
    fields = registry.lookup(given["norm"]).fields
    defaults = default_settings() | {registry.setting_key(f): default for f, default in fields.items()} | dict(usual)
    unread = [getattr(norm, "unread", ()) for norm in norms]
    runs = [group["momentum"] != 0 for group in groups]
    metrics = [group["metric"] != "none" for group in groups]
    averages = [group["metric"] != "none" and group["metric_rule"] != "sum" for group in groups]
    differences = [group["difference_beta"] != 0 for group in groups]
    corrected = [any(x) for x in zip(runs, averages, differences, strict=True)]
    decays = [not Decay.of(given).reads_p or not equals(group["weight_decay"], 0) for group in groups]
    # (argument, which groups use it, where it has no effect, whether no schedule changes that)
    cases = [
        ("decay_p", [Decay.of(group).reads_p for group in groups], 'without decay="lp" or "cautious-lp"', True),
        ("decay", decays, "at weight_decay = 0 (unless that is a tensor, for a schedule)", True),
        (
            "beta2",
            [Momentum.of(group).reads("beta2") for group in groups],
            'without momentum_rule="lion" (the β₂ of adaptive coordinates is metric_beta)',
            True,
        ),
        ("bias_correction", corrected, "without an average: a momentum, a metric or differences", no_momentum),
        ("metric_beta", averages, 'without metric="diagonal", and under metric_rule="sum"', True),
        ("metric_eps", metrics, 'without metric="diagonal"', True),
        ("metric_rule", metrics, 'without metric="diagonal"', True),
        ("agr_scope", [group["agr"] for group in groups], "without agr", True),
        ("coupling_rate", [group["coupling"] != 0 for group in groups], "at coupling = 0", True),
        ("dampening", runs, "at momentum = 0", no_momentum),
        ("state_dtype", runs, "at momentum = 0", no_momentum),
        (
            "eps",
            [group["scale"] == "power" for group in groups],
            'without scale="power" (the ε of adaptive coordinates is metric_eps)',
            True,
        ),
        ("eps", [not norm.is_identity("power") for norm in norms], "at p = 2", all(g["p"] is None for g in groups)),
    ]
    for field in fields:
        if any(field in names for names in unread):
            used = [hasattr(norm, field) and field not in names for norm, names in zip(norms, unread, strict=True)]
            cases.append((registry.setting_key(field), used, "under this norm_method", True))
    for name, used, where, for_good in cases:
        if given[name] != defaults[name] and not any(used):
            message = f"{name} = {given[name]!r} does nothing {where}: leave it out, "
            if for_good:
                raise ValueError(message + "or set what it needs as well")
            warn(message + "unless a schedule is going to change that")


def check_preset(cls: type, params: object) -> None:
    """Raise a ValueError if ``params`` are the groups of a preset that is for another optimizer of normopt.

    SteepestDescent takes all, and so do classes that are derived from it outside normopt.
    """
    wanted = getattr(params, "optimizer", None)
    bases = [base.__name__ for base in cls.__mro__ if base.__module__.startswith("normopt.")]
    if isinstance(wanted, str) and bases[0] != "SteepestDescent" and wanted not in bases:
        preset: str = params.preset  # type: ignore[attr-defined]
        raise ValueError(
            f"these groups are of preset {preset!r}, for normopt.{wanted}, but were given to {cls.__name__}: use "
            f"normopt.{wanted}, or another preset"
        )


def fixed_kwargs(name: str, given: Mapping[str, Any], **fixed: Any) -> dict[str, Any]:
    """Merge the settings that define a named optimizer with the user's; raise a TypeError if both set one."""
    for key in fixed.keys() & given.keys():
        own = "use an argument of its own, or" if key.startswith("norm_") else "to set it, use"
        raise TypeError(f"{name} fixes {key} = {fixed[key]!r}: {own} normopt.SteepestDescent")
    return {**fixed, **given}


def from_torch(given: Mapping[str, Any], betas: Sequence[str] = TORCHS["betas"]) -> dict[str, Any]:
    """Translate settings that have the names of torch's adaptive optimizers: alpha, amsgrad, betas and eps.

    Args:
        given: settings.
        betas: what the betas are here. Default: Adam's two.

    Raises:
        ValueError: betas are not as many numbers from 0 to 1, or a setting is given under both names.
        TypeError: amsgrad is not True or False.
    """
    ours = {key: value for key, value in given.items() if key not in TORCHS}
    for name, keys in (TORCHS | {"betas": betas}).items():
        if name not in given:
            continue
        values: Any = [given[name]]
        if name == "betas":
            values = given[name]
            if not isinstance(values, (tuple, list)) or len(values) != len(keys):
                raise ValueError(f"betas must be {len(keys)} numbers, but is {values!r}")
            for i, value in enumerate(values):
                check_number(f"betas[{i}]", value, low=0, high=1, open_high=True)
        elif name == "eps":
            check_number(name, given[name], low=torch.finfo(torch.float32).tiny, open_high=True)
        elif name == "amsgrad":
            check_bool(name, given[name])
            values = ["max" if given[name] else "average"]
        for key, value in zip(keys, values, strict=True):
            if key in given or key in ours:
                raise ValueError(
                    f"{key} = {ours.get(key)!r} is given a second time: {name} sets it. Leave out one of them"
                )
            ours[key] = value
    return ours


def check_unknown_arguments(cls: type, norm: object, arguments: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise a TypeError for an argument that is neither a setting of the optimizer ``cls`` nor a norm field."""
    fields = {registry.setting_key(f) for f in registry.entry_of(norm).fields} - {"p"}
    for key in arguments.keys() - fields - known.keys():
        takes = f"; the norm {norm!r} takes {', '.join(sorted(fields))}" if key.startswith("norm_") and fields else ""
        # A class passes its own arguments on as settings, so all of them are given: they are suggested nevertheless.
        own = inspect.signature(cls).parameters.keys() - {"params", "settings"}
        hint = hint_for(key, ({*fields, *known} - arguments.keys()) | own)
        raise TypeError(f"{cls.__name__} got an unexpected argument {key!r}{hint}{takes}")


def hint_for(key: str, known: Iterable[str]) -> str:
    """Return what an unknown setting may mean, as a clause to append to a message, or an empty string."""
    return f"; {SYNONYMS[key]}" if key in SYNONYMS else near(key, known)


def check_unknown_keys(group: Mapping[str, Any], defaults: Mapping[str, Any], cls: type) -> None:
    """Raise if a param group key looks like a misspelt setting, or is an argument of one of normopt's classes only.

    Other unknown keys are allowed, as in torch.
    """
    norm = group.get("norm", defaults["norm"])
    fields = registry.entry_of(norm).fields
    known = {*defaults, *(registry.setting_key(f) for f in fields)}
    for key in group.keys() - known - {"params", "param_names"}:
        if key in fields:
            raise ValueError(f"a param group has {key!r}: as a setting it is called {registry.setting_key(key)!r}")
        if cls.__module__.startswith("normopt.") and key in inspect.signature(cls).parameters:
            raise ValueError(
                f"a param group has {key!r}, which is an argument of {cls.__name__}, not a setting of groups: print an "
                "optimizer that was made with it, and set in the group what it sets"
            )
        meant = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if meant or key in SYNONYMS:
            hint = f"did you mean {meant[0]!r}?" if meant else SYNONYMS[key]
            raise ValueError(f"a param group has {key!r}, which is not a setting: {hint}")


def warn_vectors(name: str, norm: Norm, params: Sequence[Tensor]) -> None:
    """Warn if vectors get a matrix norm by default, as when a whole model's parameters are passed as one group.

    The Frobenius norm is exempt: it treats every tensor as one vector.
    """
    vectors = [p for p in params if p.dim() <= 1 and p.requires_grad]
    if vectors and isinstance(norm, MatrixNorm) and getattr(norm, "p", None) != 2:
        warn(
            f"{name} steps matrices, but some parameters are vectors or scalars, such as biases and the gains of norm "
            f"layers: each is treated as a matrix of one column under {norm!r}. Embeddings and output layers, if any, "
            "are treated as hidden layers, because their shapes look the same. Use normopt.param_groups(model) to give "
            "each kind of layer its own norm, or name a norm in the param group to silence this"
        )


def show_settings(function: Any) -> None:
    """Give a constructor that takes ``**settings`` a signature with every setting that its type hint names.

    The hint is one of the TypedDicts of `normopt.settings`.
    """
    signature = inspect.signature(function)
    *named, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD or hasattr(function, "__signature__"):
        return
    name = str(last.annotation).removesuffix("]").rpartition("[")[2].rpartition(".")[2]
    kind = name if name in ("Common", "Coordinates", "Settings") else "Arguments"
    shown = getattr(settings, kind).__annotations__
    for name, owner in owners().items():
        if name in shown and name not in signature.parameters:
            s = owner.settings[name]
            named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=s.default, annotation=s.type))
    # Of the hint, too, which jsonargparse would unpack beside the signature.
    function.__annotations__[last.name] = Any
    function.__signature__ = signature.replace(parameters=[*named, last.replace(annotation=Any)])

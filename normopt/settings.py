"""Names, types and validation of param group settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from normopt._checks import check_bool, check_choice, check_number, equals, near, warn
from normopt.norms import registry
from normopt.norms.base import Norm
from normopt.norms.matrices import MatrixNorm

Scope = Literal["tensor", "group"]
MomentumRule = Literal["heavy", "ema", "lion"]
Decay = Literal["coupled", "decoupled", "lp"]
Rounding = Literal["nearest", "stochastic", "kahan"]

CHOICES = {
    "scale": ("power", "dual", "unit", "matched"),
    "scope": ("tensor", "group"),
    "momentum_rule": ("heavy", "ema", "lion"),
    "decay": ("coupled", "decoupled", "lp"),
    "rounding": ("nearest", "stochastic", "kahan"),
}
DEFAULT_DECAY_P = 1.0
DEFAULT_BETA2 = 0.99
STATE_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Common(TypedDict, total=False):
    """Settings that every optimizer accepts as ``**settings``; see `SteepestDescent`.

    Attributes:
        agr: adaptive gradient regularization. Default False.
        decay_p: p > 0 of the ℓp decay; only for decay="lp". Default 1.
        state_dtype: the momentum's dtype; None (the default) is the parameter's own.
        rounding: how updates of 16-bit weights are rounded: "nearest" (the default), "stochastic" or "kahan".
        maximize: maximize the objective. Default False.
        foreach: use multi-tensor operations; None (the default) lets the optimizer choose.
        fused: use fused kernels; None (the default) uses them on CUDA where supported.
        differentiable: let autograd differentiate through the step. Default False.
    """

    agr: bool
    decay_p: float
    state_dtype: str | torch.dtype | None
    rounding: Rounding
    maximize: bool
    foreach: bool | None
    fused: bool | None
    differentiable: bool


class Settings(Common, total=False):
    """`Common` plus weight decay, for optimizers without explicit weight-decay arguments.

    Attributes:
        weight_decay: λ ≥ 0, a float or a one-element tensor. Default 0.
        decay: "coupled", "decoupled" (the default) or "lp".
    """

    weight_decay: float | Tensor
    decay: Decay


SYNONYMS = {
    "betas": "give β₁ as momentum and, under Lion's rule, β₂ as beta2",
    "beta1": "β₁ is momentum",
    "learning_rate": "the learning rate is lr",
    "wd": "the strength of the decay is weight_decay",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the type and range of each setting on its own."""
    s = settings
    check_number("lr", s["lr"], low=0, open_high=True, tensor=True)
    check_number("radius", s["radius"], low=0, open_low=True, open_high=True)
    check_number("eps", s["eps"], low=0, open_high=True)
    if 0 < s["eps"] < torch.finfo(torch.float32).tiny:
        raise ValueError(f"eps must be 0 or at least {torch.finfo(torch.float32).tiny:g}, but is {s['eps']!r}")
    check_number("momentum", s["momentum"], low=0, high=1, open_high=s["momentum_rule"] != "heavy")
    check_number("beta2", s["beta2"], low=0, high=1, open_high=True)
    check_number("dampening", s["dampening"], open_low=True, open_high=True)
    check_number("weight_decay", s["weight_decay"], low=0, open_high=True, tensor=True)
    check_number("decay_p", s["decay_p"], low=0, open_low=True, open_high=True)
    for name, choices in CHOICES.items():
        check_choice(name, s[name], choices)
    if s["state_dtype"] is not None:
        check_choice("state_dtype", s["state_dtype"], STATE_DTYPES)
    for name in ("nesterov", "agr", "maximize", "differentiable"):
        check_bool(name, s[name])
    for name in ("foreach", "fused"):
        if s[name] is not None:
            check_bool(name, s[name])


def check_combinations(s: Mapping[str, Any], norm: Norm) -> None:
    """Check that the settings fit each other and the norm."""
    if s["scale"] == "power" and norm.power_exponent is None:
        raise ValueError(
            f'scale="power" is not defined for {norm}: its exponent 1/(p−1) diverges or does not exist; '
            'use "dual", "unit" or "matched"'
        )
    if s["eps"] != 0 and s["scale"] != "power":
        raise ValueError(f'eps = {s["eps"]} belongs to scale="power", but the scale is {s["scale"]!r}: set eps=0')
    if s["eps"] != 0 and not norm.power_takes_eps:
        raise ValueError(f"eps = {s['eps']} has no meaning for {norm!r}: set eps=0")
    if s["scope"] == "group" and not norm.spans_groups:
        raise ValueError(f'{norm!r} does not support scope="group": use scope="tensor"')
    if s["differentiable"] and not norm.differentiable:
        raise ValueError(f"{norm!r} is not differentiable (it has no derivative): set differentiable=False")
    if s["differentiable"] and s["rounding"] == "stochastic":
        raise ValueError('rounding="stochastic" has no derivative: use "nearest" or "kahan" with differentiable=True')
    if s["scope"] == "group" and s["scale"] in ("power", "matched"):
        raise ValueError(
            f'scope="group" needs scale="dual" or "unit", not "{s["scale"]}", which uses no norm over the group: '
            'use scope="tensor"'
        )
    if s["nesterov"] and s["momentum_rule"] == "lion":
        raise ValueError('nesterov=True has no meaning under momentum_rule="lion": use "heavy" or "ema"')
    if s["nesterov"] and (s["momentum"] == 0 or s["dampening"] != 0):
        raise ValueError(
            "nesterov=True needs momentum > 0 and dampening = 0, but "
            f"momentum = {s['momentum']}, dampening = {s['dampening']}"
        )
    if s["dampening"] != 0 and s["momentum_rule"] != "heavy":
        raise ValueError(f'dampening belongs to momentum_rule="heavy", not {s["momentum_rule"]!r}: set dampening=0')


def check_unused(
    settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], usual: Mapping[str, Any], no_momentum: bool
) -> None:
    """Raise if a constructor argument has no effect in any param group.

    Warn instead if a schedule of the momentum or of p could give it an effect.

    Args:
        settings: the constructor's arguments.
        groups: the param groups made from them.
        usual: norm fields that the constructor sets by default.
        no_momentum: whether the momentum is fixed at 0.

    Raises:
        ValueError: an argument has no effect, and no schedule can change that.

    Warns:
        UserWarning: an argument has no effect until a schedule changes p or the momentum.
    """
    s, norms = settings, [registry.build(group) for group in groups]
    unread = [getattr(norm, "unread", ()) for norm in norms]
    runs = [group["momentum"] != 0 for group in groups]
    decays = [not equals(group["weight_decay"], 0) for group in groups]
    p_is_fixed = all(group["p"] is None for group in groups)
    # (argument, whether it was given, which groups use it, where it has no effect, whether no schedule changes that)
    cases = [
        ("decay_p", s["decay_p"] != DEFAULT_DECAY_P, [g["decay"] == "lp" for g in groups], 'without decay="lp"', True),
        ("decay", s["decay"] == "lp", decays, "at weight_decay = 0 (unless that is a tensor, for a schedule)", True),
        (
            "beta2",
            s["beta2"] != DEFAULT_BETA2,
            [g["momentum_rule"] == "lion" for g in groups],
            'without momentum_rule="lion"',
            True,
        ),
        ("dampening", s["dampening"] != 0, runs, "at momentum = 0", no_momentum),
        ("state_dtype", s["state_dtype"] is not None, runs, "at momentum = 0", no_momentum),
        ("eps", s["eps"] != 0, [not n.is_identity("power") for n in norms], "at p = 2", p_is_fixed),
    ]
    for field, default in registry.lookup(s["norm"]).fields.items():
        if any(field in fields for fields in unread):
            key = registry.setting_key(field)
            used = [hasattr(n, field) and field not in fields for n, fields in zip(norms, unread, strict=True)]
            cases.append((key, s[key] != usual.get(key, default), used, "under this norm_method", True))
    for name, given, used, where, for_good in cases:
        if given and not any(used):
            message = f"{name} = {s[name]!r} does nothing {where}: leave it out, "
            if for_good:
                raise ValueError(message + "or set what it needs as well")
            warn(message + "unless a schedule is going to change that")


def check_unknown_arguments(
    name: str, norm: str | Norm, arguments: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise a TypeError for an argument that is neither a setting of the optimizer ``name`` nor a norm field."""
    fields = {registry.setting_key(f) for f in registry.entry_of(norm).fields} - {"p"}
    for key in arguments.keys() - fields:
        takes = f"; the norm {norm!r} takes {', '.join(sorted(fields))}" if key.startswith("norm_") and fields else ""
        hint = f"; {SYNONYMS[key]}" if key in SYNONYMS else near(key, {*fields, *settings} - arguments.keys())
        raise TypeError(f"{name} got an unexpected argument {key!r}{hint}{takes}")


def check_unknown_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise if a param group key looks like a misspelt setting; other unknown keys are allowed, as in torch."""
    norm = group.get("norm", defaults["norm"])
    fields = registry.entry_of(norm).fields
    known = {*defaults, *(registry.setting_key(f) for f in fields)}
    for key in group.keys() - known - {"params", "param_names"}:
        if key in fields:
            raise ValueError(f"a param group has {key!r}: as a setting it is called {registry.setting_key(key)!r}")
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

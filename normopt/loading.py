"""Validate a checkpoint before it is loaded, so that a bad one changes nothing; take torch's, and give them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import equals, plain, warn
from normopt.arguments import SYNONYMS, from_torch
from normopt.norms import registry
from normopt.stages.base import default_settings, stages_in_order

Groups = list[dict[str, Any]]
# What makes it another optimizer.
RULE = ("norm", "scale", "momentum_rule", "metric", "metric_rule", "bias_correction", "constraint")
# Numbers of which 0 is another optimizer than the rest.
SWITCHES = ("row_beta", "difference_beta", "coupling")

ADAM = {"metric": "diagonal", "bias_correction": True, "momentum_rule": "ema", "difference_beta": 0.0}
# How torch runs a step, which is not how a step is run here.
RUN = {"capturable", "differentiable", "foreach", "fused"}
# Settings that torch's classes have, or that do nothing under their rules.
OF_TORCH = {
    "lr",
    "maximize",
    "momentum",
    "weight_decay",
    "decay",
    "decay_p",
    "beta2",
    "norm",
    "p",
    "scale",
    "scope",
    *RUN,
}


SCHEDULES: WeakSet[Any] = WeakSet()  # the schedules of p that are alive


def match_params(param_groups: Groups, state_dict: dict[str, Any]) -> list[tuple[dict[str, Any], Any, Tensor]]:
    """Return (own group, saved id, own parameter) per parameter; torch reports a mismatch in number."""
    groups = zip(param_groups, state_dict["param_groups"], strict=False)
    return [(ours, i, p) for ours, saved in groups for i, p in zip(saved["params"], ours["params"], strict=False)]


def prepare_state_dict(
    name: str,
    param_groups: Groups,
    state_dict: dict[str, Any],
    check: Callable[[Mapping[str, Any], list[Tensor]], object],
) -> dict[str, Any]:
    """Validate a checkpoint, and fill in the settings that it lacks from the optimizer's current groups.

    Args:
        name: the loading optimizer's name, for messages.
        param_groups: the optimizer's groups.
        state_dict: the checkpoint.
        check: checks a group's settings against its parameters.

    Raises:
        ValueError: state of the wrong shape or of another parameter, invalid settings, or state or settings of another
            optimizer.

    Warns:
        UserWarning: a normopt checkpoint has extra state keys.
    """
    state_dict = _from_adam(state_dict, param_groups)
    groups = state_dict["param_groups"]
    if any("ns_steps" in group for group in groups):
        raise ValueError(
            "checkpoints of torch.optim.Muon do not load, because its settings have other names here: put each "
            "parameter's momentum_buffer into a state_dict() of this optimizer after one of its steps"
        )
    _check_names(param_groups, groups)
    kept = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in param_groups]
    kept += [{}] * (len(groups) - len(kept))  # torch reports a mismatch in number
    groups = [{k: plain(v) if k.startswith("norm_") else v for k, v in group.items()} for group in groups]
    complete = [{**own, **group} for own, group in zip(kept, groups, strict=False)]
    stages = [[cls.of(group) for cls in stages_in_order()] for group in complete]
    keep = [stage for of_group in stages for stage in of_group if stage.state and (stage.slots() or stage.runs())]
    read = {name for stage in keep for name in stage.state}
    shapes = {  # which depend on the view of a group's matrices
        id(ours): {slot.name: slot.shape for stage in of_group for slot in stage.slots()}
        for ours, of_group in zip(param_groups, stages, strict=False)
    }
    for ours, i, p in match_params(param_groups, state_dict):
        for key, value in state_dict["state"].get(i, {}).items():
            shape = shapes[id(ours)].get(key)
            expected = p.shape if shape is None else shape(p.shape)
            if key in read and isinstance(value, Tensor) and value.shape != expected:
                raise ValueError(
                    f"the checkpoint's {key} of parameter {i} has the shape {tuple(value.shape)}, not "
                    f"{tuple(expected)}: load it into an optimizer of the same parameters in the same order"
                )
            if shape and not expected and not 0 <= float(value) < math.inf:
                raise ValueError(f"the checkpoint's {key} of parameter {i} must be at least 0, but is {float(value):g}")
    foreign = {key for state in state_dict["state"].values() for key in state} - read
    of_normopt = all("norm" in group for group in groups)
    if not of_normopt:
        foreign |= {key for group in groups for key in group} & (SYNONYMS.keys() - RUN)
    if foreign:
        found = f"the checkpoint has {', '.join(sorted(foreign))}, which {name} does not read"
        if not of_normopt:
            raise ValueError(f"{found}: it was saved by another optimizer. Remove these keys to load the rest")
        warn(f"{found}; they are kept")
    for ours, saved in zip(param_groups, complete, strict=False):
        check(saved, ours["params"])
        switched = [k for k in SWITCHES if (saved[k] == 0) != (ours[k] == 0)]
        if other := {k: saved[k] for k in RULE if saved[k] != ours[k]} | {k: saved[k] for k in switched}:
            torchs = ' (torch\'s amsgrad is metric_rule="max")' if "metric_rule" in other else ""
            raise ValueError(
                f"the checkpoint would make {name} another optimizer: {other} instead of "
                f"{ {k: ours[k] for k in other} }{torchs}. Load it into an optimizer made with these settings, or "
                "remove them from the checkpoint's param_groups (with norm, also p and norm_…) to keep the current ones"
            )
    return {**state_dict, "param_groups": complete}


def _check_names(param_groups: Groups, saved_groups: Groups) -> None:
    """Raise a ValueError if the place of a parameter has the name of another one of the optimizer's in the checkpoint.

    Names that are not of the optimizer's parameters are passed over: a model may be wrapped, or renamed.
    """
    known = {name for group in param_groups for name in group.get("param_names", ())}
    for ours, saved in zip(param_groups, saved_groups, strict=False):
        for name, theirs in zip(ours.get("param_names", ()), saved.get("param_names", ()), strict=False):
            if theirs != name and theirs in known:
                raise ValueError(
                    f"the checkpoint has {theirs!r} in the place of {name!r}, so that each would get another's "
                    "state: make the groups in the checkpoint's order and with its frozen parameters, or remove "
                    "param_names from the checkpoint's param_groups to load by position"
                )


def _from_adam(state_dict: dict[str, Any], param_groups: Groups) -> dict[str, Any]:
    """Give a checkpoint of torch.optim.Adam or AdamW our names, if all of ``param_groups`` are an Adam's."""
    groups = state_dict["param_groups"]
    theirs = all({"betas", "eps", "amsgrad"} <= group.keys() and "norm" not in group for group in groups)
    if not theirs or not all(ADAM.items() <= group.items() and is_linear(group) for group in param_groups):
        return state_dict
    translated = []
    for group, own in zip(groups, [*param_groups, *groups], strict=False):  # torch reports a mismatch in number
        kept = from_torch({key: value for key, value in group.items() if key not in RUN})
        decoupled = kept.pop("decoupled_weight_decay", None)  # since torch 2.7
        if decoupled is not None and own.get("decay") in ("coupled", "decoupled"):  # a decay that torch lacks stays
            kept["decay"] = "decoupled" if decoupled else "coupled"
        translated.append(kept)
    names = {"exp_avg": "momentum_buffer"}
    state = {i: {names.get(key, key): x for key, x in s.items()} for i, s in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": translated}


def to_torch_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state as torch.optim.AdamW or Adam, or SGD, loads it and continues from it.

    Args:
        optimizer: one of normopt, whose groups all have Adam's rule (`AdamW`, `Adam`) or all SGD's.

    Returns:
        A state dict for ``load_state_dict`` of torch's class, with the optimizer's tensors, not copies, and your own
        keys of its groups. How torch runs the step (foreach, fused) is left to its defaults.

    Raises:
        ValueError: a group has a setting that torch's class does not have, such as agr, ℓp decay, a radius, or another
            norm; or some groups are Adam's and others SGD's.
        TypeError: the optimizer is not one of normopt's.

    Example:
        >>> opt = normopt.AdamW(model.parameters(), lr=1e-3)
        >>> theirs = torch.optim.AdamW(model.parameters())
        >>> theirs.load_state_dict(normopt.to_torch_state_dict(opt))
    """
    saved = optimizer.state_dict()
    if any("metric" not in group for group in saved["param_groups"]):
        raise TypeError(f"to_torch_state_dict takes an optimizer of normopt, but was given {type(optimizer).__name__}")
    for i, group in enumerate(saved["param_groups"]):
        if not is_linear(group):
            rule = f"norm = {group['norm']!r} and scale = {group['scale']!r}"
            raise ValueError(
                f"group {i} has {rule}: only the rules of torch.optim.Adam, AdamW and SGD go back to torch"
            )
    adam = saved["param_groups"][0]["metric"] != "none"
    cls = torch.optim.Adam if adam else torch.optim.SGD
    declared, groups = default_settings(), []
    for i, group in enumerate(saved["param_groups"]):
        if found := _beyond_torch(group, adam):
            raise ValueError(f"group {i} has {found}, which torch.optim.{cls.__name__} does not have")
        ours = declared.keys() | {"backend"}
        theirs = {k: v for k, v in group.items() if k not in ours and not k.startswith("norm_")}
        theirs |= {k: group[k] for k in ("lr", "maximize")} | {"weight_decay": float(group["weight_decay"])}
        if adam:
            theirs |= {"betas": (group["momentum"], group["metric_beta"]), "eps": group["metric_eps"]}
            theirs |= {"amsgrad": group["metric_rule"] == "max", "decoupled_weight_decay": group["decay"] != "coupled"}
        else:
            theirs |= {k: group[k] for k in ("momentum", "dampening", "nesterov")}
        groups.append(cls([torch.zeros(())]).defaults | theirs)
    return {"state": {i: _to_adam(s) if adam else s for i, s in saved["state"].items()}, "param_groups": groups}


def _beyond_torch(group: Mapping[str, Any], adam: bool) -> dict[str, Any]:
    """Return the settings of a group that torch.optim.Adam, or else SGD, does not have."""
    known = OF_TORCH | ({"metric_beta", "metric_eps", "metric_rule"} if adam else {"dampening", "nesterov"})
    usual = default_settings() | (ADAM if adam else {})
    found = [k for k, value in usual.items() if k not in known and group[k] != value]
    if group["momentum"] == 0:
        found = [k for k in found if k != "momentum_rule"]
    if not equals(group["weight_decay"], 0) and group["decay"] not in ("coupled", "decoupled" if adam else "coupled"):
        found.append("decay")
    if adam and group["metric_rule"] == "sum":
        found.append("metric_rule")
    return {k: group[k] for k in found if group[k] is not None}


def is_linear(group: Mapping[str, Any]) -> bool:
    """Return whether a group's direction is c, or c/P in adaptive coordinates, and of no other length."""
    return registry.build(group).is_identity(group["scale"]) and group["scale"] != "relative"


def _to_adam(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state under the names of torch.optim.Adam, which counts on the host."""
    if "exp_avg_sq" not in state:  # never stepped, but with state of the user's
        return {}
    squares = {key: x for key, x in state.items() if key not in ("step", "momentum_buffer")}
    m = state.get("momentum_buffer", torch.zeros_like(squares["exp_avg_sq"]))
    return {"step": state["step"].cpu(), "exp_avg": m, **squares}


def warn_if_unscheduled(optimizer: Optimizer) -> None:
    """Warn if a schedule moved a setting of the groups that were loaded, and this optimizer has no schedule of it."""
    here = [
        schedule.setting
        for schedule in SCHEDULES
        # A wrapper of the optimizer may have groups of its own.
        if schedule.optimizer.param_groups is optimizer.param_groups or not hasattr(schedule.optimizer, "backend")
    ]
    for group in optimizer.param_groups:
        for name in [key.removeprefix("last_epoch_of_") for key in group if key.startswith("last_epoch_of_")]:
            if name not in here:
                warn(
                    f"the checkpoint's {name} = {group.get(name)} was set by a schedule, of which "
                    f"{group[f'last_epoch_of_{name}']} steps are done, but this optimizer has no schedule of {name}: "
                    f"it stays constant. Make the schedule again to continue it; to keep {name} constant, delete "
                    f"initial_{name} and last_epoch_of_{name} from the param groups"
                )
                return

"""Validate a checkpoint before it is loaded, so that a bad one changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from normopt._checks import warn
from normopt.arguments import SYNONYMS
from normopt.stages.base import stages_in_order

Groups = list[dict[str, Any]]
# What makes it another optimizer.
RULE = ("norm", "scale", "momentum_rule", "metric", "metric_rule", "bias_correction", "constraint")


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
        ValueError: state of the wrong shape, invalid settings, or state or settings of another optimizer.

    Warns:
        UserWarning: a normopt checkpoint has extra state keys.
    """
    groups = state_dict["param_groups"]
    kept = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in param_groups]
    kept += [{}] * (len(groups) - len(kept))  # torch reports a mismatch in number
    complete = [{**own, **group} for own, group in zip(kept, groups, strict=False)]
    stages = [cls.of(group) for group in complete for cls in stages_in_order()]
    read = {name for stage in stages if stage.state and (stage.slots() or stage.runs()) for name in stage.state}
    shapes = {slot.name: slot.shape for stage in stages for slot in stage.slots()}
    for _, i, p in match_params(param_groups, state_dict):
        for key, value in state_dict["state"].get(i, {}).items():
            shape = shapes.get(key)
            expected = p.shape if shape is None else shape(p.shape)
            if key in read and isinstance(value, Tensor) and value.shape != expected:
                raise ValueError(
                    f"the checkpoint's {key} of parameter {i} has the shape {tuple(value.shape)}, not "
                    f"{tuple(expected)}: load it into an optimizer of the same parameters in the same order"
                )
            if expected.numel() == 1 and shape and not 0 <= float(value) < math.inf:
                raise ValueError(f"the checkpoint's {key} of parameter {i} must be at least 0, but is {float(value):g}")
    foreign = {key for state in state_dict["state"].values() for key in state} - read
    of_normopt = all("norm" in group for group in groups)
    if not of_normopt:
        foreign |= {key for group in groups for key in group} & SYNONYMS.keys()
    if foreign:
        found = f"the checkpoint has {', '.join(sorted(foreign))}, which {name} does not read"
        if not of_normopt:
            raise ValueError(f"{found}: it was saved by another optimizer. Remove these keys to load the rest")
        warn(f"{found}; they are kept")
    for ours, saved in zip(param_groups, complete, strict=False):
        check(saved, ours["params"])
        if other := {k: saved[k] for k in RULE if saved[k] != ours[k]}:
            raise ValueError(
                f"the checkpoint would make {name} another optimizer: {other} instead of "
                f"{ {k: ours[k] for k in other} }. Load it into an optimizer made with these settings, or remove them "
                "from the checkpoint's param_groups (with norm, also p and norm_…) to keep the current ones"
            )
    return {**state_dict, "param_groups": complete}

"""What a checkpoint must be to be loaded: checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import Tensor

from normopt.plan import make_plan

Groups = list[dict[str, Any]]


def pairs(param_groups: Groups, state_dict: dict[str, Any]) -> list[tuple[dict[str, Any], Any, Tensor]]:
    """(our group, saved id, our parameter) of each parameter; a mismatch in number is torch's to report."""
    groups = zip(param_groups, state_dict["param_groups"], strict=False)
    return [(ours, i, p) for ours, saved in groups for i, p in zip(saved["params"], ours["params"], strict=False)]


def completed(param_groups: Groups, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint, with the settings that it lacks taken from the groups that it is loaded into."""
    kept = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in param_groups]
    saved = state_dict["param_groups"]
    groups = [{**(kept[i] if i < len(kept) else {}), **group} for i, group in enumerate(saved)]
    return {**state_dict, "param_groups": groups}


def check_loaded(name: str, param_groups: Groups, state_dict: dict[str, Any], read: Collection[str]) -> None:
    """Refuse state of another shape and settings that are none; warn of state or settings that are another optimizer's.

    Args:
        name: the loading optimizer's name, for the messages.
        param_groups: its groups.
        state_dict: what is about to be loaded.
        read: the keys of state that the optimizer reads.
    """
    for _, i, p in pairs(param_groups, state_dict):
        for key, value in state_dict["state"].get(i, {}).items():
            if key in read and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"the checkpoint's {key} of parameter {i} has the shape {tuple(value.shape)}, but the parameter "
                    f"has {tuple(p.shape)}: load it into an optimizer of the same parameters in the same order"
                )
    foreign = sorted({key for state in state_dict["state"].values() for key in state} - set(read))
    if foreign:
        _warn(f"the checkpoint has {', '.join(foreign)}, which {name} does not read: is it another optimizer's?")
    for ours, saved in zip(param_groups, state_dict["param_groups"], strict=False):
        make_plan(saved, ours["params"])
        other = {k: saved[k] for k in ("norm", "scale", "momentum_rule") if saved.get(k, ours[k]) != ours[k]}
        if other:
            _warn(
                f"the checkpoint makes {name} another optimizer: {other} instead of { ({k: ours[k] for k in other}) }"
            )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)  # at the user's load_state_dict

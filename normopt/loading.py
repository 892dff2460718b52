"""What a checkpoint must be to be loaded: checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from normopt._checks import warn
from normopt.settings import SYNONYMS

Groups = list[dict[str, Any]]


def pairs(param_groups: Groups, state_dict: dict[str, Any]) -> list[tuple[dict[str, Any], Any, Tensor]]:
    """(our group, saved id, our parameter) of each parameter; a mismatch in number is torch's to report."""
    groups = zip(param_groups, state_dict["param_groups"], strict=False)
    return [(ours, i, p) for ours, saved in groups for i, p in zip(saved["params"], ours["params"], strict=False)]


def checked(
    name: str,
    param_groups: Groups,
    state_dict: dict[str, Any],
    read: Collection[str],
    plan: Callable[[Mapping[str, Any], list[Tensor]], object],
) -> dict[str, Any]:
    """Return a checkpoint with the settings that it lacks taken from the groups that it is loaded into.

    Args:
        name: the loading optimizer's name, for the messages.
        param_groups: its groups.
        state_dict: what is about to be loaded.
        read: the keys of state that the optimizer reads.
        plan: checks the settings of a group with its parameters.

    Raises:
        ValueError: state of another shape, settings that are none, or state or settings of another optimizer.

    Warns:
        UserWarning: a checkpoint of normopt's has state beside what is read.
    """
    for _, i, p in pairs(param_groups, state_dict):
        for key, value in state_dict["state"].get(i, {}).items():
            if key in read and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"the checkpoint's {key} of parameter {i} has the shape {tuple(value.shape)}, but the parameter "
                    f"has {tuple(p.shape)}: load it into an optimizer of the same parameters in the same order"
                )
    foreign = {key for state in state_dict["state"].values() for key in state} - set(read)
    groups = state_dict["param_groups"]
    of_normopt = all("norm" in group for group in groups)
    if not of_normopt:
        foreign |= {key for group in groups for key in group} & SYNONYMS.keys()
    if foreign:
        found = f"the checkpoint has {', '.join(sorted(foreign))}, which {name} does not read"
        if not of_normopt:
            raise ValueError(f"{found}: it is another optimizer's. To load the rest of it, remove these first")
        warn(f"{found}, but keeps")
    kept = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in param_groups]
    kept += [{}] * (len(groups) - len(kept))  # a mismatch in number is torch's to report
    complete = [{**own, **group} for own, group in zip(kept, groups, strict=False)]
    for ours, saved in zip(param_groups, complete, strict=False):
        plan(saved, ours["params"])
        if other := {k: saved[k] for k in ("norm", "scale", "momentum_rule") if saved[k] != ours[k]}:
            raise ValueError(
                f"the checkpoint would make {name} another optimizer: {other} instead of "
                f"{ {k: ours[k] for k in other} }. Load it into one that is made with these settings, or remove them "
                "from the checkpoint's param_groups (with norm: p and norm_… too) to keep this one's"
            )
    return {**state_dict, "param_groups": complete}

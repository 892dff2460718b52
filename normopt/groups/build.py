"""``param_groups`` builds param groups for any optimizer of normopt from a model and a preset."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normopt._checks import check_choice, check_integer, check_number, near
from normopt.groups.classify import KINDS, MATRICES, ParamInfo, classify_params
from normopt.groups.modular import budgets
from normopt.groups.presets import ADAMW, PRESETS
from normopt.norms import registry

Overrides = Mapping[str | type[nn.Module], Mapping[str, Any]]


def param_groups(
    model: nn.Module,
    preset: str = "muon",
    *,
    overrides: Overrides | None = None,
    output: str | None = "last",
    residual_depth: int | None = None,
    lr_ratio: float | None = None,
) -> ParamGroups:
    """Build param groups that assign each layer of a model its norm; ``print`` them to see the assignment.

    ::

        preset          hidden layers   embeddings          output          vectors   radii
        "muon-adamw"    spectral        AdamW               AdamW           AdamW     1; AdamW at 0.015 lr
        "normuon-adamw" the same, for NorMuon
        "adamw"         ℓ2, as the rest                                               1
        "muon"          spectral        sign                sign            sign      1, the rest 0.015
        "scion"         RMS → RMS       ℓ1 → RMS            sign/d_in       RMS       50, output 3000: a GPT's
        "scion-cnn"     the same                                                      8, output 128
        "scion-mlp"     the same                                                      1, output 1024
        "scale"         rows at RMS 1   the same, transp.   the same        sign      1; momentum at the output
        "modular"       RMS → RMS       ℓ1 → RMS            RMS → RMS       RMS       computed from the model

    Start with "muon-adamw" for a transformer. Hidden layers are linear layers, attention and convolutions. Their
    weights are read as out × rest. The three matrices of a fused in_proj and the groups of a grouped convolution are
    separate; transposed convolutions and embeddings are transposed. Vectors are biases and the gains of norm layers.
    All presets but the first three use unit steps throughout.

    The groups set a norm, a scale and a radius, and leave the rest to the optimizer. Pass them to the optimizer that
    the preset is named after (`Muon`, `NorMuon`, `AdamW`, `Scion` or `SCALE`), or "modular" to any with EMA momentum. A
    group with the optimizer's own norm also inherits the norm's fields from the optimizer, such as Muon's ``method``
    and ``steps``; in overrides and in groups these are called ``norm_method`` and ``norm_steps``. The sign is printed
    as "linf", the RMS as "frobenius" with the aspect "entries", ℓ1 → RMS as "column" with the aspect "rows".

    "muon-adamw" is one optimizer with two rules: torch.optim.Muon's for hidden matrices, and torch.optim.AdamW's, with
    its defaults, for the rest. AdamW's learning rate is lr_ratio times Muon's, in its step and in its decay: 3e-4 at
    Muon's default of 0.02. Its ``betas`` and ``eps`` are in its groups: change them there, or by an override. "adamw"
    leaves them to the optimizer.

    The radius 0.015 of "muon" gives steps of 3e-4 at Muon's default learning rate of 0.02. With another learning
    rate, give the groups whose norm is "linf" a matching radius or lr. A radius does not scale the decay.

    "modular" bounds how far a step can move the model's output. Every parameter has a mass m and a sensitivity s, the
    change of the model's output per change of its layer's output. Its radius is (m/Σm)/s. To first order, all steps
    together then move the output by at most lr in RMS, provided that every weight's norm (its group's) and the RMS of
    every layer's input are at most 1. This is not enforced: a weight of norm 2 doubles the effect of the steps in
    earlier layers. Decoupled decay with weight_decay equal to a group's radius keeps its norms at most 1.

    Hidden layers share a mass of 5; embeddings, output and vectors have 1 each. Sensitivities come from the model's
    graph (torch.fx): 1 along a chain of layers, summed where paths meet, and multiplied by the constant factors of
    branches. With ``residual_depth=L`` nothing is traced. The model is then assumed to be a stream of L residual
    branches that contribute 1/L each, because they are multiplied by 1/L or because a final norm layer divides by
    their sum. Where a transformer's graph does not tell, and its config does, L is twice the config's number of layers;
    a note says so.

    Frozen parameters (``requires_grad`` is False) are in no group, and "modular" gives them no mass. Parameters that
    are unfrozen later need new groups: call this again for a new optimizer.

    Args:
        model: any module; each parameter that is not frozen must belong to a known module type or match an override.
        preset: one of the above. Default "muon".
        overrides: a dict from a pattern or module type to a dict of settings; none by default. A shell pattern matches
            the parameter's or its module's name. The settings override the preset's, and later entries override
            earlier ones. "norm" replaces the preset's norm with its fields and radius, or all of AdamW. "kind" says
            what a parameter is ("embedding", "linear", "conv", "output", "norm" or "bias"); "mass" is for "modular".
        output: the name of the output layer. "last" is the last linear layer or convolution in the order of
            definition, frozen or not; None means no output layer. A weight tied to the embedding counts as output.
        residual_depth: L, for "modular"; None traces the model, or takes it from ``model.config``.
        lr_ratio: AdamW's learning rate relative to Muon's, for "muon-adamw" and "normuon-adamw"; None means 0.015.

    Returns:
        A list of dicts, one for each kind and setting, with ``params`` as (name, parameter) pairs and the key
        ``kind``; "modular" adds ``share`` (of the mass) and ``sensitivity``.

    Raises:
        ValueError: a parameter of unknown kind, or of a lazy module without a shape; an override that matches
            nothing; an unknown preset, kind, norm or output; a mass or residual_depth that is out of range or used
            without preset "modular"; an lr_ratio that is out of range or used with a preset of one rule; a model that
            "modular" cannot trace.
        TypeError: ``model`` is not a module, an override not a dict, its key neither pattern nor module type, its mass
            or lr_ratio not a number, or residual_depth not an integer.

    Source: Muon, Keller Jordan, 2024; Scion, arXiv:2502.07529; SCALE, arXiv:2506.16659; the modular norm, Large et
    al., arXiv:2405.14813, and modular duality, Bernstein and Newhouse, arXiv:2410.21265.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> groups = normopt.param_groups(model, preset="scion", overrides={"0.weight": {"radius": 8.0}})
        >>> opt = normopt.Scion(groups, lr=2**-12)
        >>> print(groups)
        preset 'scion': 46 parameters in 4 tensors
        kind    norm       radius  other settings  parameters  names
        linear  spectral        8  aspect rms              32  0.weight
        output  max          3000  aspect fan-in            8  2.weight
        bias    frobenius      50  aspect entries           6  *.bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a torch.nn.Module, but was given {type(model).__name__}")
    check_choice("preset", preset, PRESETS)
    if residual_depth is not None:
        check_integer("residual_depth", residual_depth)
        if preset != "modular":
            raise ValueError(f'residual_depth is only for preset="modular", but the preset is {preset!r}: leave it out')
    if lr_ratio is not None:
        check_number("lr_ratio", lr_ratio, low=0, open_low=True, open_high=True)
        if not any("lr_ratio" in settings for settings in PRESETS[preset].values()):
            raise ValueError(
                f'lr_ratio is for the presets with two rules, such as "muon-adamw", not {preset!r}: leave it out'
            )
    infos = classify_params(model, output)
    given = _overrides_by_param(infos, overrides or {})
    settings = {info.name: _settings(info, preset, given[info.name], lr_ratio) for info in infos}
    trained = [info for info in infos if info.param.requires_grad]
    if unknown := [info for info in trained if "norm" not in settings[info.name]]:
        raise ValueError(_ask_for_kinds(unknown))
    notes: list[str] = []
    if preset == "modular":
        masses = {info.name: settings[info.name].pop("mass") for info in trained if "mass" in settings[info.name]}
        found, notes = budgets(model, infos, masses, residual_depth)
        for name, (share, sensitivity) in found.items():
            radius = settings[name].get("radius", 1.0) * (share / sensitivity)
            settings[name] |= {"radius": radius, "share": share, "sensitivity": sensitivity}
    groups = _group_by_settings(trained, settings, preset)
    groups.notes = notes
    return groups


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer's ``params``; ``str`` gives a table of the assignment.

    A list of dicts, made by [`param_groups`][normopt.param_groups].

    Attributes:
        preset: the name of the preset.
        notes: what was decided for you, in sentences that are printed below the table.
    """

    preset: str
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        rows = [("kind", "norm", "radius", "other settings", "parameters", "names")]
        counts = [sum(p.numel() for _, p in group["params"]) for group in self]
        for group, count in zip(self, counts, strict=True):
            radius = f"{group.get('radius', 1.0):.4g}"
            names = _abbreviate([name for name, _ in group["params"]])
            rows.append((group["kind"], str(group["norm"]), radius, _other_settings(group), f"{count:,}", names))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        tensors = sum(len(group["params"]) for group in self)
        lines = [f"preset {self.preset!r}: {sum(counts):,} parameters in {tensors} tensors"]
        for row in rows:
            cells = [f"{cell:{align}{width}}" for cell, align, width in zip(row, "<<><><", widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _overrides_by_param(infos: list[ParamInfo], overrides: Overrides) -> dict[str, dict[str, Any]]:
    """Return the settings that the overrides give each parameter, by its name."""
    given: dict[str, dict[str, Any]] = {info.name: {} for info in infos}
    for key, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise TypeError(f"overrides[{key!r}] must be a dict of settings, but is {settings!r}")
        matched = [info for info in infos if _matches(info, key)]
        if not matched:
            names = [info.name for info in infos]
            hint = near(key, names) if isinstance(key, str) else ""
            shown = repr(key) if isinstance(key, str) else key.__name__
            raise ValueError(f"overrides[{shown}] matches no parameter{hint}; the first are {', '.join(names[:5])}")
        if "kind" in settings:
            check_choice("kind", settings["kind"], KINDS)
        if "mass" in settings:
            check_number("mass", settings["mass"], low=0, open_low=True, open_high=True)
        if computed := {"share", "sensitivity"} & settings.keys():
            raise ValueError(f"{', '.join(sorted(computed))} in overrides[{key!r}] is computed: set radius or mass")
        for info in matched:
            own = dict(settings)
            named = isinstance(key, str) and fnmatch.fnmatchcase(info.name, key)  # itself, not only its module
            if info.kind == "bias" and settings.get("kind") in MATRICES and not named:
                del own["kind"]  # a module's kind is that of its weight, not of its bias
            given[info.name] = _override(given[info.name], own)
    return given


def _matches(info: ParamInfo, key: str | type[nn.Module]) -> bool:
    if isinstance(key, str):
        return any(fnmatch.fnmatchcase(name, key) for name in (info.name, *info.modules))
    if isinstance(key, type) and issubclass(key, nn.Module):
        return isinstance(info.module, key)
    raise TypeError(f"a key of overrides must be a pattern or a module type, but is {key!r}")


def _settings(info: ParamInfo, preset: str, given: dict[str, Any], lr_ratio: float | None) -> dict[str, Any]:
    """Return one parameter's settings: the preset's for its kind, its matrix view, and the user's on top."""
    if "kind" in given and given["kind"] != info.kind:
        info.kind = given["kind"]
        info.matrix = {"matrix_view": "transposed"} if info.kind == "embedding" else {}
    base = PRESETS[preset][info.kind] if info.kind else {}
    if "lr_ratio" in base and lr_ratio is not None:
        base = {**base, "lr_ratio": lr_ratio}
    if base.get("metric") == "diagonal" and "norm" in given:
        base = {}  # AdamW's rule goes with its norm
    settings = _override(base, given) | {"kind": info.kind or "other"}
    if "mass" in settings and preset != "modular":
        raise ValueError(f'"mass" is only for preset="modular", but the preset is {preset!r}: leave it out')
    if isinstance(settings.get("norm"), str):
        fields = registry.lookup(settings["norm"]).fields
        for name, value in info.matrix.items():
            if name in fields:
                settings.setdefault(registry.setting_key(name), value)
    if "norm_blocks" in settings:
        info.matrix["blocks"] = settings["norm_blocks"]
    return settings


def _override(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with a user's own on top; a norm of the user's replaces the norm with its fields and radius."""
    if "norm" in own:
        settings = {k: v for k, v in settings.items() if k not in ("p", "radius") and not k.startswith("norm")}
    return {**settings, **own}


def _ask_for_kinds(unknown: list[ParamInfo]) -> str:
    """Return the message of an error about parameters of unknown kind."""
    names = "; ".join(f"{i.name} {tuple(i.param.shape)} of a {type(i.module).__name__}" for i in unknown[:8])
    more = f"; and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (
        f"no kind of layer is known for {names}{more}. Set its kind, overrides={{{unknown[0].name!r}: "
        f'{{"kind": …}}}} with one of {", ".join(KINDS)}, or a norm, such as {{"norm": "l2", "scale": "unit"}}'
    )


def _group_by_settings(infos: list[ParamInfo], settings: dict[str, dict[str, Any]], preset: str) -> ParamGroups:
    """Put parameters with equal settings into one group, and sort the groups by kind."""
    gathered: dict[str, dict[str, Any]] = {}
    for info in infos:
        own = settings[info.name]
        # Compare other objects by identity: the repr of an array or tensor omits entries and digits.
        plain = {k: v if isinstance(v, int | float | str | None) else id(v) for k, v in own.items()}
        group = gathered.setdefault(repr(sorted(plain.items())), {"params": [], **own})
        group["params"].append((info.name, info.param))
    groups = ParamGroups(sorted(gathered.values(), key=lambda group: [*KINDS, "other"].index(group["kind"])))
    groups.preset = preset
    return groups


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a numeric component of a dotted name
_COLUMNS = ("params", "kind", "norm", "radius")


def _other_settings(group: Mapping[str, Any]) -> str:
    adamw = group.get("metric") == "diagonal"
    usual = ADAMW if adamw else {"scale": "unit", "metric": "none", "bias_correction": False}
    others = {k: v for k, v in group.items() if k not in _COLUMNS and (k not in usual or usual[k] != v)}
    shown = {k.removeprefix("norm_"): f"{v:.3g}" if isinstance(v, float) else v for k, v in others.items()}
    return ", ".join(["AdamW"] * adamw + [f"{k} {v}" for k, v in shown.items()])


def _abbreviate(names: list[str]) -> str:
    """Merge names that differ only in a number, which becomes a star, and show at most three of them."""
    numbers: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        numbers.setdefault(_NUMBER.sub("*", name), []).append(tuple(_NUMBER.findall(name)))
    shown = []
    for pattern, found in numbers.items():
        places = iter([column[0] if len(set(column)) == 1 else "*" for column in zip(*found, strict=True)])
        shown.append(re.sub(r"\*", lambda _, places=places: next(places), pattern))  # type: ignore[misc]
    return ", ".join(shown[:3]) + (f", … ({len(shown)} in all)" if len(shown) > 3 else "")

"""``param_groups``: a model and a preset → groups for any optimizer of normopt, and the table of who got what."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from normopt._checks import check_choice, check_number, near
from normopt.groups.classify import KINDS, MATRICES, ParamInfo, classify_params
from normopt.groups.modular import budgets
from normopt.groups.presets import PRESETS
from normopt.norms import registry
from normopt.norms.matrices import check_integer

Overrides = Mapping[str | type[nn.Module], Mapping[str, Any]]


def param_groups(
    model: nn.Module,
    preset: str = "muon",
    *,
    overrides: Overrides | None = None,
    output: str | None = "last",
    residual_depth: int | None = None,
) -> ParamGroups:
    """Param groups that give each layer of a model its norm; ``print`` them to see who got what.

    ::

        preset        hidden layers       embeddings       output           vectors     radii
        "muon"        spectral            sign             sign             sign        1, the rest 0.015
        "scion"       RMS → RMS           ℓ1 → RMS         sign/d_in        RMS         50, output 3000: a GPT's
        "scion-cnn"   the same                                                          8, output 128
        "scion-mlp"   the same                                                          1, output 1024
        "scale"       rows at RMS 1       the same, turned the same         sign        1; momentum at the output
        "modular"     RMS → RMS           ℓ1 → RMS         RMS → RMS        RMS         computed from the model

    Hidden layers are linear ones, attention and convolutions, whose matrices are read as their modules mean them:
    out × rest, the three of a fused in_proj one by one, a grouped convolution's groups likewise, transposed
    convolutions and embeddings turned. Vectors are biases and the gains of norm layers. All steps are unit ones.

    The groups hold a norm, a scale and a radius, and leave the rest to the optimizer: give them to the one that the
    preset is named after, `Muon`, `Scion` or `SCALE`, and "modular" to any with averaged momentum. A group that
    names the optimizer's own norm takes the optimizer's fields of it too, such as Muon's ``method`` and ``steps``;
    in overrides and in groups these are called ``norm_method`` and ``norm_steps``. The sign is printed as "linf", the
    RMS as "frobenius" with the aspect "entries", ℓ1 → RMS as "column" with the aspect "rows".

    The 0.015 of "muon" makes steps of 3e-4 at Muon's default learning rate of 0.02: at another one, give the
    groups whose norm is "linf" a radius, or an lr, to match.

    "modular" bounds how far a step can move the model's output: every parameter has a mass m and a sensitivity s,
    how far the output moves as its layer's does, and its radius is (m/Σm)/s. To first order all steps together then
    move the output by at most lr, in RMS, as long as every weight's norm, its group's, and the RMS of what every layer
    reads are at most 1. Nothing here keeps them so: a weight of norm 2 doubles what the steps before it do. A group's
    weight_decay that is its radius, under the decoupled decay, keeps norms of at most 1 there.

    Hidden layers have a mass of 5 together; embeddings, output and vectors 1 each together. Sensitivities come from the
    model's graph (torch.fx): 1 along a chain of layers, summed where paths meet, times the numbers that branches are
    multiplied by. With ``residual_depth=L`` nothing is traced: the model is taken for a stream of L residual branches
    that each make an L-th of it, because they are multiplied by 1/L or because a norm layer at the end divides by what
    they add up to.

    Frozen parameters (``requires_grad`` is False) are in no group, and "modular" gives them no mass. What is unfrozen
    later needs groups of its own: call this again for a new optimizer.

    Args:
        model: any module; every parameter that is not frozen must be of a module that is known here, or claimed by an
            override.
        preset: one of the above. Default "muon".
        overrides: settings for the parameters of modules, none by default: a pattern (as of a shell) of the
            parameter's or its module's name, or a module type, to a dict of settings, laid over the preset's; a later
            entry over an earlier one. A "norm" replaces the preset's with its fields and radius. "kind" says what a
            parameter is ("embedding", "linear", "conv", "output", "norm" or "bias"), and "mass" is for "modular".
        output: the name of the output layer; "last" is the last linear layer or convolution in the order of
            definition, frozen or not, None is none. A weight that is tied to the embedding is the output's.
        residual_depth: L, for "modular"; None traces the model.

    Returns:
        A list of dicts, one for each kind and setting, with ``params`` as (name, parameter) pairs and the key
        ``kind``; "modular" adds ``share`` (of the mass) and ``sensitivity``.

    Raises:
        ValueError: a parameter that nobody claims, or of a lazy module without a shape; an override that matches
            nothing; an unknown preset, kind, norm or output; a mass, or a residual_depth, out of range or of another
            preset than "modular"; a model that "modular" cannot trace.
        TypeError: ``model`` is no module, an override no dict, its key no pattern and no module type, its mass no
            number; residual_depth is no integer.

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
        check_integer("residual_depth", residual_depth, float("inf"))
        if preset != "modular":
            raise ValueError(f'residual_depth is of preset="modular", but the preset is {preset!r}: leave it out')
    everything = classify_params(model, output)
    given = _given(everything, overrides or {})
    every = [(info, _settings(info, preset, given[info.name])) for info in everything]
    claimed = [info for info, _ in every if info.param.requires_grad]
    settings = [own for info, own in every if info.param.requires_grad]
    _refuse_unclaimed([c for c, s in zip(claimed, settings, strict=True) if "norm" not in s])
    if preset == "modular":
        masses = {c.name: s.pop("mass") for c, s in zip(claimed, settings, strict=True) if "mass" in s}
        found = budgets(model, everything, masses, residual_depth)
        for info, own in zip(claimed, settings, strict=True):
            budget = found[info.name]
            own["radius"] = own.get("radius", 1.0) * budget.radius
            own |= {"share": budget.share, "sensitivity": budget.sensitivity}
    return _gather(claimed, settings, preset)


class ParamGroups(list[dict[str, Any]]):
    """Param groups, for ``params`` of an optimizer; as a string, the table of who got what.

    A list of dicts, which [`param_groups`][normopt.param_groups] makes.

    Attributes:
        preset: the name of the preset that they are of.
    """

    preset: str

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("kind", "norm", "radius", "other settings", "parameters", "names")]
        total = tensors = 0
        for group in self:
            count = sum(p.numel() for _, p in group["params"])
            total, tensors = total + count, tensors + len(group["params"])
            radius = f"{group.get('radius', 1.0):.4g}"
            names = _collapsed([name for name, _ in group["params"]])
            rows.append((group["kind"], str(group["norm"]), radius, _others(group), f"{count:,}", names))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"preset {self.preset!r}: {total:,} parameters in {tensors} tensors"]
        for row in rows:
            cells = [
                x.rjust(w) if i in (2, 4) else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _given(claimed: list[ParamInfo], overrides: Overrides) -> dict[str, dict[str, Any]]:
    """What the overrides say of every parameter."""
    given: dict[str, dict[str, Any]] = {info.name: {} for info in claimed}
    for key, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise TypeError(f"overrides[{key!r}] must be a dict of settings, but is {settings!r}")
        matched = [info for info in claimed if _matches(info, key)]
        if not matched:
            names = [info.name for info in claimed]
            hint = near(key, names) if isinstance(key, str) else ""
            shown = repr(key) if isinstance(key, str) else key.__name__
            raise ValueError(f"overrides[{shown}] matches no parameter{hint}; the first are {', '.join(names[:5])}")
        if "kind" in settings:
            check_choice("kind", settings["kind"], KINDS)
        if "mass" in settings:
            check_number("mass", settings["mass"], low=0, open_low=True, open_high=True)
        if computed := {"share", "sensitivity"} & settings.keys():
            raise ValueError(
                f"{', '.join(sorted(computed))} in overrides[{key!r}] is computed: give a radius or a mass"
            )
        for info in matched:
            before = given[info.name]
            laid = dict(settings)
            if info.kind == "bias" and settings.get("kind") in MATRICES and not _is_named(info, key):
                del laid["kind"]  # a module's bias is no matrix because its weight is one
            given[info.name] = (_without_norm(before) if "norm" in laid else before) | laid
    return given


def _matches(info: ParamInfo, key: str | type[nn.Module]) -> bool:
    if isinstance(key, str):
        return any(fnmatch.fnmatchcase(name, key) for name in (info.name, *info.places))
    if isinstance(key, type) and issubclass(key, nn.Module):
        return isinstance(info.module, key)
    raise TypeError(f"a key of overrides must be a pattern or a module type, but is {key!r}")


def _is_named(info: ParamInfo, key: str | type[nn.Module]) -> bool:
    """By a name of its own, not by its module's."""
    return isinstance(key, str) and fnmatch.fnmatchcase(info.name, key)


def _settings(info: ParamInfo, preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of one parameter: the preset's for its kind, as its module means it, under the user's."""
    if "kind" in given and given["kind"] != info.kind:
        info.kind = given["kind"]
        info.matrix = {"matrix_view": "transposed"} if info.kind == "embedding" else {}
    base = dict(PRESETS[preset][info.kind]) if info.kind else {}
    settings = (_without_norm(base) if "norm" in given else base) | given | {"kind": info.kind or "other"}
    if "mass" in settings and preset != "modular":
        raise ValueError(f'"mass" is of preset="modular", but the preset is {preset!r}: leave it out')
    if isinstance(settings.get("norm"), str):
        fields = registry.lookup(settings["norm"]).fields
        for name, value in info.matrix.items():
            if name in fields:
                settings.setdefault(registry.setting_key(name), value)
    if "norm_blocks" in settings:
        info.matrix["blocks"] = settings["norm_blocks"]
    return settings


def _without_norm(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in ("p", "radius") and not k.startswith("norm")}


def _refuse_unclaimed(unclaimed: list[ParamInfo]) -> None:
    if not unclaimed:
        return
    told = "; ".join(f"{c.name} {tuple(c.param.shape)} of a {type(c.module).__name__}" for c in unclaimed[:8])
    more = f"; and {len(unclaimed) - 8} more" if len(unclaimed) > 8 else ""
    raise ValueError(
        f"no kind of layer is known for {told}{more}. Say what it is, overrides={{{unclaimed[0].name!r}: "
        f'{{"kind": …}}}} with one of {", ".join(KINDS)}, or give it a norm of its own, '
        '{"norm": "l2", "scale": "unit"}'
    )


def _gather(claimed: list[ParamInfo], settings: list[dict[str, Any]], preset: str) -> ParamGroups:
    """One group for all parameters with the same settings; groups in the order of the kinds."""
    gathered: dict[str, dict[str, Any]] = {}
    for info, own in zip(claimed, settings, strict=True):
        # A repr of an array or a tensor leaves entries or digits out.
        plain = {k: v if isinstance(v, int | float | str | None) else id(v) for k, v in own.items()}
        key = repr(sorted(plain.items(), key=lambda item: item[0]))
        gathered.setdefault(key, {"params": [], **own})["params"].append((info.name, info.param))
    groups = ParamGroups(
        sorted(gathered.values(), key=lambda g: KINDS.index(g["kind"]) if g["kind"] in KINDS else len(KINDS))
    )
    groups.preset = preset
    return groups


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_COLUMNS = ("params", "kind", "norm", "radius")


def _others(group: Mapping[str, Any]) -> str:
    told = {k: v for k, v in group.items() if k not in _COLUMNS and not (k == "scale" and v == "unit")}
    shown = {k.removeprefix("norm_"): f"{v:.3g}" if isinstance(v, float) else v for k, v in told.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def _collapsed(names: list[str]) -> str:
    """Names that differ only in a number as one with a star in its place, and no more of them than fit a line."""
    numbers: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        numbers.setdefault(_NUMBER.sub("*", name), []).append(tuple(_NUMBER.findall(name)))
    told = []
    for pattern, found in numbers.items():
        places = iter([column[0] if len(set(column)) == 1 else "*" for column in zip(*found, strict=True)])
        told.append(re.sub(r"\*", lambda _, places=places: next(places), pattern))  # type: ignore[misc]
    return ", ".join(told[:3]) + (f", … ({len(told)} in all)" if len(told) > 3 else "")

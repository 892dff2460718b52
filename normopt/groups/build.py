"""``param_groups`` builds param groups for any optimizer of normopt from a model and a preset."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normopt._checks import check_choice, check_integer, check_number, near, plain
from normopt.arguments import ADAN, TORCHS, check_unknown_keys, from_torch, hint_for
from normopt.groups.classify import EMBEDDINGS, KINDS, MATRICES, UNDECAYED, Kind, ParamInfo, blocks_of, classify_params
from normopt.groups.modular import budgets
from normopt.groups.presets import ADAMW, CONSTRAINED, OPTIMIZERS, PRESETS, PresetName
from normopt.norms import registry
from normopt.recipe import check_settings
from normopt.stages.base import default_settings

Overrides = Mapping[str | type[nn.Module], Mapping[str, Any]]


def param_groups(
    model: nn.Module,
    preset: PresetName = "muon-adamw",
    *,
    overrides: Overrides | None = None,
    output: str | Sequence[str] | None = "auto",
    residual_depth: int | None = None,
    lr_ratio: float | None = None,
) -> ParamGroups:
    """Build param groups that assign each layer of a model its norm; ``print`` them to see the assignment.

    ::

        preset          hidden layers   embeddings          output          vectors   radii
        "muon-adamw"    spectral        AdamW               AdamW           AdamW     1; AdamW at 0.4 lr
        "normuon-adamw" the same, for NorMuon
        "adamw"         ℓ2, as the rest                                               1
        "muon"          spectral        sign                sign            sign      1, the rest 0.1
        "scion"         RMS → RMS       ℓ1 → RMS            sign/d_in       RMS       50, output 3000: a GPT's
        "scion-cnn"     the same                                                      8, output 128
        "scion-mlp"     the same                                                      1, output 1024
        "scale"         rows at RMS 1   the same, transp.   the same        sign      1; momentum at the output
        "modular"       RMS → RMS       ℓ1 → RMS            RMS → RMS       RMS       computed from the model

    Start with "muon-adamw". Each parameter has a kind, by the first line that fits::

        output      the layers of get_output_embeddings() or get_classifier(), else of ``output``, else of known
                    names; tables that an embedding and a linear layer share
        norm, bias, vector   gains of norm layers, biases of any shape, other tensors with one dim larger than 1
        embedding   nn.Embedding, nn.EmbeddingBag: read as features × vocabulary
        table       bare parameters of positions, tokens, queries: read as features × entries
        state       state-space parameters (A_log, D, dt, time_…, …)
        depthwise   convolutions with a group for each channel
        input_conv  the first convolution if it has at most 4 input channels; patch convolutions (stride = kernel) are
                    "conv", and have the aspect of the linear layer of a patch
        gate        matrices with fewer than 4 rows or columns
        conv        out × (in · taps), groups are blocks
        qkv         fused queries, keys and values: a block for each head, else 3 if they are equal, else 1, with a note
        gate_up     a gate and what it multiplies: 2 blocks
        experts     (experts, out, in) is a stack, (experts, in, out) one of transposed matrices
        router, recurrent (gates are blocks), linear

    Hidden matrices are "linear", "qkv", "gate_up", "experts", "router", "recurrent" and "conv". "depthwise",
    "input_conv" and "gate" are as embeddings in the Muon presets, and as hidden matrices in the others. Parametrized
    weights and LoRA factors are as the layer that they are of. What is read from a name alone is printed with "?".
    Where no output layer is found, a note says so. All presets but the first three use unit steps throughout.

    Vectors, tables and state-space parameters do not decay (weight_decay 0), nor do parametrized weights and what
    timm's ``no_weight_decay()`` names, except under Scion's presets, whose decay is the method's constraint.

    The groups set a norm, a scale and a radius, and leave the rest to the optimizer. Pass them to the optimizer that
    the preset is named after (`Muon`, `NorMuon`, `AdamW`, `Scion` or `SCALE`; others of normopt refuse them), or
    "modular" to any with EMA momentum. A group with the optimizer's own norm also inherits the norm's fields from the
    optimizer, such as Muon's ``method`` and ``steps``; in overrides and in groups these are called ``norm_method`` and
    ``norm_steps``. The sign is printed as "linf", the RMS as "frobenius" with the aspect "entries", ℓ1 → RMS as
    "column" with the aspect "rows".

    "muon-adamw" is one optimizer with two rules: torch.optim.Muon's for hidden matrices, and torch.optim.AdamW's, with
    its defaults, for the rest. AdamW's learning rate is lr_ratio times Muon's, in its step and in its decay. Its
    ``betas`` and ``eps`` are in its groups: change them there, or by an override. "adamw" leaves them to the optimizer.

    The radius 0.1 of "muon" and the lr_ratio 0.4 of "muon-adamw" are measured (``python -m benchmarks radii``): of five
    values from 0.015 to 0.4, at Muon's learning rate of 0.02, they have the lowest worst loss relative to the best
    value's, over a byte-level GPT, two CNNs, and short and long runs. 0.015 is Keller Jordan's 3e-4 to 0.02; a large
    model that AdamW trains at a lower learning rate needs a lower ratio. With the aspect "match_rms_adamw" both rules
    have one learning rate: lr_ratio = 1. A script that overwrites every group's lr keeps the ratio.

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

    Frozen parameters (``requires_grad`` is False) are in no group, and "modular" gives them no mass. Call this
    again for what is unfrozen later, and give its groups to ``add_param_group``, or under "modular" to a new optimizer.

    Args:
        model: any module; each parameter that is not frozen must belong to a known module type or match an override.
        preset: one of the above. Default "muon-adamw".
        overrides: a dict from a pattern or module type to a dict of settings; none by default. A shell pattern matches
            one of the parameter's or its modules' names, and "kind:router" the parameters that are of a kind after the
            entries before. The settings override the preset's, and later entries override earlier ones. "norm" replaces
            the preset's norm with its fields and radius, or all of AdamW. "kind" says what a parameter is, one of the
            above; "mass" is for "modular".
        output: the name of the output layer, or a list of names. "auto", the default, asks the model's methods and
            looks for known names; "last" is the last linear layer or convolution in the order of definition, frozen or
            not; None means none. A weight tied to an embedding counts as output anyway.
        residual_depth: L, for "modular"; None traces the model, or takes it from ``model.config``.
        lr_ratio: AdamW's learning rate relative to Muon's, for "muon-adamw" and "normuon-adamw"; None means 0.4.

    Returns:
        A list of dicts, one for each kind and setting, with ``params`` as (name, parameter) pairs and the key
        ``kind``; "modular" adds ``share`` (of the mass) and ``sensitivity``.

    Raises:
        ValueError: a parameter of unknown kind, or of a lazy module without a shape; an override that matches nothing,
            or whose setting is unknown or out of range; blocks that do not add up to a matrix's rows; an unknown
            preset, kind, norm or output; a mass or residual_depth that is out of range or used without preset
            "modular"; an lr_ratio that is out of range or used with a preset of one rule; a model that "modular" cannot
            trace.
        TypeError: ``model`` is not a module, an override not a dict, its key neither pattern nor module type, a setting
            of the wrong type, ``output`` neither names nor None, or residual_depth not an integer.

    Source: Muon, Keller Jordan, 2024; Scion, arXiv:2502.07529; SCALE, arXiv:2506.16659; the modular norm, Large et
    al., arXiv:2405.14813, and modular duality, Bernstein and Newhouse, arXiv:2410.21265.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> groups = normopt.param_groups(model, preset="scion", overrides={"0.weight": {"radius": 8.0}})
        >>> opt = normopt.Scion(groups, lr=2**-12)
        >>> print(groups)
        preset 'scion': 46 parameters in 4 tensors
        kind    optimizer  norm          step  decay  other settings  parameters  names
        linear  Scion      spectral      8 lr      λ  aspect rms              32  0.weight
        output  Scion      max        3000 lr      λ  aspect fan-in            8  2.weight
        bias    Scion      frobenius    50 lr      λ  aspect entries           6  *.bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups takes a torch.nn.Module, but was given {type(model).__name__}: give the model, and settings "
            'of some of its parameters by overrides={"…": {"weight_decay": 0.0}}'
        )
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
    if output is not None and not (isinstance(output, Sequence) and all(isinstance(name, str) for name in output)):
        raise TypeError(
            f'output must be the name of a module, a list of names, "auto", "last" or None, but is {output!r}'
        )
    infos, notes = classify_params(model, output)
    given = _overrides_by_param(infos, overrides or {})
    settings = {info.name: _settings(info, preset, given[info.name], lr_ratio) for info in infos}
    trained = [info for info in infos if info.param.requires_grad]
    if unknown := [info for info in trained if "norm" not in settings[info.name]]:
        raise ValueError(_ask_for_kinds(unknown, infos, preset))
    whole = [info.name for info in trained if info.kind == "qkv" and settings[info.name].get("norm_blocks") is None]
    if whole and "norm_blocks" in {
        registry.setting_key(f) for f in registry.lookup(PRESETS[preset]["qkv"]["norm"]).fields
    }:
        notes.append(
            f"{_abbreviate(whole)}: queries, keys and values are taken as one matrix, because no number of heads is "
            "known and they are not 3 equal parts: give norm_blocks, (rows of q, rows of k, rows of v)"
        )
    if preset == "modular":
        masses = {info.name: settings[info.name].pop("mass") for info in trained if "mass" in settings[info.name]}
        found, more = budgets(model, infos, masses, residual_depth)
        notes += more
        for name, (share, sensitivity) in found.items():
            radius = settings[name].get("radius", 1.0) * (share / sensitivity)
            settings[name] |= {"radius": radius, "share": share, "sensitivity": sensitivity}
    groups = _group_by_settings(trained, settings, preset)
    for group in groups:
        with _naming(_abbreviate([name for name, _ in group["params"]])):
            _check_group(group)
    if infos and not trained:
        notes.append("all parameters are frozen (requires_grad is False), so that there is no group")
    groups.notes = notes
    groups.frozen = [(info.name, info.param) for info in infos if not info.param.requires_grad]
    groups.tied = {info.name: info.names for info in trained if len(info.names) > 1}
    groups.guessed = {info.name for info in trained if info.guessed}
    return groups


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer's ``params``; ``str`` gives a table of the assignment.

    A list of dicts, made by [`param_groups`][normopt.param_groups].

    Attributes:
        preset: the name of the preset.
        optimizer: the name of the optimizer that it is for, or None for any; another of normopt refuses the groups.
        notes: what was decided for you, in sentences that are printed below the table.
        frozen: the parameters in no group because they do not require gradients, as (name, parameter).
        tied: all names of each parameter that several modules share, by its first name.
        guessed: the names of parameters whose kind follows from a name alone; their lines are marked "?".
    """

    preset: str = ""
    optimizer: str | None = None
    notes: Sequence[str] = ()
    frozen: Sequence[tuple[str, nn.Parameter]] = ()
    tied: Mapping[str, Sequence[str]] = MappingProxyType({})
    guessed: frozenset[str] | set[str] = frozenset()

    def __repr__(self) -> str:
        head: tuple[str, ...] = (
            "kind",
            "optimizer",
            "norm",
            "view",
            "blocks",
            "step",
            "decay",
            "other settings",
            "parameters",
            "names",
        )
        rows = [head]
        named = [_named(group["params"]) for group in self]
        frozen = [name for name, _ in self.frozen]
        every = [self._label(name) for params in named for name, _ in params] + frozen
        counts = [sum(p.numel() for _, p in params) for params in named]
        for group, params, count in zip(self, named, counts, strict=True):
            names = [name for name, _ in params]
            labels = _abbreviate([self._label(name) for name in names], every)
            mark = "?" if self.guessed.intersection(names) else ""
            rows.append((f"{group.get('kind', '')}{mark}", *_row(group, self.optimizer), f"{count:,}", labels))
        if self.frozen:
            count = sum(p.numel() for _, p in self.frozen)
            rows.append(("frozen", *[""] * 7, f"({count:,})", _abbreviate(frozen, every)))
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        right = [column[0] in ("step", "decay", "parameters", "blocks") for column in columns]
        tensors = sum(len(group["params"]) for group in self)
        lines = [f"preset {self.preset!r}: {sum(counts):,} parameters in {tensors} tensors"]
        for row in zip(*columns, strict=True):
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
            lines.append("  ".join(cells).rstrip())
        if self.guessed:
            lines.append("?: read from a name alone; an override can change it")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _label(self, name: str) -> str:
        return _label(self.tied.get(name, [name]))


def _overrides_by_param(infos: list[ParamInfo], overrides: Overrides) -> dict[str, dict[str, Any]]:
    """Return the settings that the overrides give each parameter, by its name."""
    if not isinstance(overrides, Mapping):
        raise TypeError(f'overrides must be a dict such as {{"head.*": {{"lr": 0.001}}}}, but is {overrides!r}')
    given: dict[str, dict[str, Any]] = {info.name: {} for info in infos}
    for key, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise TypeError(f"overrides[{key!r}] must be a dict of settings, but is {settings!r}")
        # The kinds that earlier entries give count.
        kinds = {info.name: given[info.name].get("kind", info.kind) for info in infos}
        matched = [info for info in infos if _matches(info, kinds[info.name], key)]
        if not matched:
            raise ValueError(_matches_nothing(key, infos, kinds))
        with _naming(f"overrides[{_shown(key)}]"):
            _check_override(settings)
        for info in matched:
            own = dict(settings)
            named = isinstance(key, str) and _fits(info.names, key)
            if info.kind == "bias" and settings.get("kind") in MATRICES and not named:
                del own["kind"]  # a module's kind is that of its weight, not of its bias
            given[info.name] = _override(given[info.name], own)
    return given


def _check_override(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError or TypeError for a setting of an override that is unknown, or out of its type or range."""
    if "kind" in settings:
        check_choice("kind", settings["kind"], KINDS)
    if "mass" in settings:
        check_number("mass", settings["mass"], low=0, open_low=True, open_high=True)
    if computed := {"share", "sensitivity"} & settings.keys():
        raise ValueError(f"{', '.join(sorted(computed))} is computed: set radius or mass")
    if given := {"params", "param_names"} & settings.keys():
        raise ValueError(f"{', '.join(sorted(given))} is of a group: give settings only")
    fields = {field for name in registry.list_norms() for field in registry.lookup(name).fields} - {"p"}
    if named := sorted(fields & settings.keys()):
        raise ValueError(f"{named[0]!r}: as a setting it is called {registry.setting_key(named[0])!r}")
    betas = settings.get("betas")
    theirs = {key: value for key, value in settings.items() if key not in ("eps", "norm")}
    ours = from_torch(theirs, ADAN if isinstance(betas, tuple | list) and len(betas) == 3 else TORCHS["betas"])
    check_settings({key: plain(value) for key, value in ours.items()})
    known = {*default_settings(), *map(registry.setting_key, fields), "kind", "mass"}
    for key in ours.keys() - known:
        hint = hint_for(key, known)
        if key == "optimizer":
            hint = (
                '; a parameter\'s kind decides whose rule it follows: under "muon-adamw", {"kind": "gate"} is AdamW\'s'
            )
        elif key.startswith("lr"):
            hint = "; lr_ratio multiplies the learning rate"
        raise ValueError(f"{key!r} is not a setting{hint}")


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise a ValueError or TypeError for a misspelt key, or if the norm refuses its fields or the parameters."""
    check_unknown_keys({key: v for key, v in group.items() if key not in TORCHS}, default_settings(), object)
    settings = {**group, **registry.flatten(group["norm"], group)}
    if not registry.missing_of(settings):  # else the optimizer may have them
        registry.build(settings).check(group.get("scale", "dual"), [p for _, p in group["params"]])


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say in an error's message what it is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from None


def _shown(key: str | type[nn.Module]) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def _matches(info: ParamInfo, kind: str | None, key: str | type[nn.Module]) -> bool:
    if isinstance(key, str) and key.startswith("kind:"):
        return kind == key.removeprefix("kind:")
    if isinstance(key, str):
        return _fits([*info.names, *info.modules], key)
    if isinstance(key, type) and issubclass(key, nn.Module):
        return any(isinstance(module, key) for module in info.holders)
    raise TypeError(f"a key of overrides must be a pattern or a module type, but is {key!r}")


def _fits(names: Sequence[str], pattern: str) -> bool:
    """Return whether a pattern matches one of the names, or is one."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def _matches_nothing(key: str | type[nn.Module], infos: list[ParamInfo], kinds: Mapping[str, str | None]) -> str:
    """Return the message of an error about an override that matches no parameter."""
    if isinstance(key, str) and key.startswith("kind:"):
        kind = key.removeprefix("kind:")
        if kind == "frozen":
            return "overrides['kind:frozen']: frozen parameters are in no group, so that no override changes them"
        check_choice("kind", kind, KINDS)
        present = ", ".join(kind for kind in KINDS if kind in kinds.values())
        tied = [i for i in infos if kind == "embedding" and any(isinstance(module, EMBEDDINGS) for module in i.holders)]
        ties = "".join(f"; {_label(i.names)} is of the kind {kinds[i.name]!r}" for i in tied[:1] if len(i.names) > 1)
        return f"overrides[{key!r}]: no parameter is of the kind {kind!r}, only of {present}{ties}"
    names = [info.name for info in infos]
    if isinstance(key, str):
        alike = [name for name in names if key.strip("*.") in name]
        hint = f"; did you mean 'kind:{key}'?" if key in KINDS else near(key, names)
        hint = f"; did you mean {' or '.join(map(repr, alike[:3]))}, or a pattern with *?" if alike else hint
    else:
        hint = ": no module of this type has parameters of its own, and those of its parts need a pattern ('encoder.*')"
    return f"overrides[{_shown(key)}] matches no parameter{hint}; the first are {', '.join(names[:5])}"


def _settings(info: ParamInfo, preset: str, given: dict[str, Any], lr_ratio: float | None) -> dict[str, Any]:
    """Return one parameter's settings: the preset's for its kind, its matrix view, and the user's on top."""
    if "kind" in given and given["kind"] != info.kind:
        # How a module stores its matrices holds for any kind; a table of rows is one by its kind.
        view = None if info.kind in VIEWS else info.matrix.get("matrix_view")
        info.kind, info.guessed = given["kind"], False
        if not isinstance(info.module, _ConvNd):
            if info.param.dim() == 2:
                view = view or VIEWS.get(info.kind)
            elif info.param.dim() > 2:
                view = view or {"table": "batch-transposed", "experts": "batch"}.get(info.kind)
            info.matrix = {"matrix_view": view} if view else {}
            if info.param.dim() == 2 and (blocks := blocks_of(info.kind, info)) > 1:
                info.matrix["blocks"] = blocks
    base = PRESETS[preset][info.kind] if info.kind else {}
    if "lr_ratio" in base and lr_ratio is not None:
        base = {**base, "lr_ratio": lr_ratio}
    if base.get("metric") == "diagonal" and "norm" in given:
        base = {}  # AdamW's rule goes with its norm
    if base and (info.kind in UNDECAYED or not info.decays) and preset not in CONSTRAINED:
        base = {**base, "weight_decay": 0.0}
    settings = _override(base, given) | {"kind": info.kind or "other"}
    if "mass" in settings and preset != "modular":
        raise ValueError(f'"mass" is only for preset="modular", but the preset is {preset!r}: leave it out')
    if isinstance(settings.get("norm"), str):
        fields = registry.lookup(settings["norm"]).fields
        for name in ("matrix_view", "blocks"):  # of a pattern that fits a bias, or what AdamW steps, too
            if info.param.dim() < 2 or name not in fields:
                settings.pop(registry.setting_key(name), None)
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


def _ask_for_kinds(unknown: list[ParamInfo], infos: list[ParamInfo], preset: str) -> str:
    """Return the message of an error about parameters of unknown kind: what each may be, and an override for all."""
    asked = {info.name for info in unknown}
    known = [name for info in infos if info.name not in asked for name in info.names]
    alike: dict[tuple[str, str, int], list[ParamInfo]] = {}
    for info in unknown:
        key = type(info.module).__name__, _NUMBER.sub("*", info.attribute), info.param.dim()
        alike.setdefault(key, []).append(info)
    types: dict[str, list[str]] = {}
    choices: dict[int, str] = {}  # by number of dims
    overrides: dict[str, str] = {}
    for (module, _, dims), members in alike.items():
        shape = tuple(members[0].param.shape)
        count = f", {len(members)} of them" if len(members) > 1 else ""
        types.setdefault(module, []).append(f"{_abbreviate([info.name for info in members])} {shape}{count}")
        own = '{"kind": "experts"}' if dims == 3 and shape[1] == shape[2] else '{"kind": "vector"}'
        patterns = dict.fromkeys(_NUMBER.sub("*", glob.escape(info.name)) for info in members)
        for pattern in patterns:
            exact = any(fnmatch.fnmatchcase(name, pattern) for name in known)
            names = (
                [glob.escape(i.name) for i in members if fnmatch.fnmatchcase(i.name, pattern)] if exact else [pattern]
            )
            overrides |= dict.fromkeys(names, own)
            choices.setdefault(dims, _choices(names[0], shape, preset))
    shown = ", ".join(f"{json.dumps(name)}: {own}" for name, own in overrides.items())
    listed = "; ".join(f"{module}: {', '.join(names)}" for module, names in types.items())
    return (
        f"param_groups cannot tell what these parameters are, by module: {listed}.\nSay which, by overrides. An entry "
        f"is one of these:\n{''.join(choices.values())}All of them as vectors, and square stacks as experts: "
        f"overrides={{{shown}}}\nThe kinds are {', '.join(KINDS)}; or give a norm, such as "
        '{"norm": "l2", "scale": "unit"}'
    )


def _choices(name: str, shape: tuple[int, ...], preset: str) -> str:
    """Return what a tensor of unknown kind may be, as entries of overrides with the preset's rule; a line each."""
    n, rows, columns = math.prod(shape[:-2]), *shape[-2:]
    wide = f"one matrix of {shape[0]} × {math.prod(shape[1:])}"
    view = '"norm_matrix_view": "{}"'.format
    matrices: list[tuple[Kind, str, str]] = [("vector", "", ""), ("table", "", "as a table of positions or tokens")]
    if len(shape) == 2:
        matrices += [("linear", "", f"{wide} (out × in)")]
        matrices += [("linear", view("transposed"), "the same, stored as in × out")]
    else:
        matrices += [("experts", "", f"{n} matrices of {rows} × {columns} (out × in)")]
        matrices += [("experts", view("batch-transposed"), "the same, stored as in × out")]
        matrices += [("linear", "", wide)]
    lines = []
    for kind, more, what in matrices:
        settings = PRESETS[preset][kind]
        rule = "AdamW" if settings.get("metric") == "diagonal" else settings["norm"]
        decay = "no decay" if kind in UNDECAYED and preset not in CONSTRAINED else ""
        entry = f'{json.dumps(name)}: {{"kind": "{kind}"{more and ", "}{more}}}'
        lines.append((entry, ", ".join(filter(None, (rule, decay, what)))))
    width = max(len(entry) for entry, _ in lines)
    return "".join(f"  {entry:{width}}  {words}\n" for entry, words in lines)


def _group_by_settings(infos: list[ParamInfo], settings: dict[str, dict[str, Any]], preset: str) -> ParamGroups:
    """Put parameters with equal settings into one group, and sort the groups by kind."""
    gathered: dict[str, dict[str, Any]] = {}
    for info in infos:
        own = settings[info.name]
        # Compare other objects by identity: the repr of an array or tensor omits entries and digits.
        plain = {k: v if isinstance(v, int | float | str | tuple | None) else id(v) for k, v in own.items()}
        group = gathered.setdefault(repr(sorted(plain.items())), {"params": [], **own})
        group["params"].append((info.name, info.param))
    groups = ParamGroups(sorted(gathered.values(), key=lambda group: [*KINDS, "other"].index(group["kind"])))
    groups.preset, groups.optimizer = preset, OPTIMIZERS[preset]
    return groups


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a numeric component of a dotted name
_COLUMNS = ("params", "kind", "norm", "radius", "weight_decay", "norm_matrix_view", "norm_blocks", "lr_ratio")
# The view of a kind's matrices of two dims, where it is not out × in.
VIEWS = {"embedding": "transposed", "table": "transposed"}


def _row(group: Mapping[str, Any], optimizer: str | None) -> tuple[str, ...]:
    """Return the cells of a group from the optimizer to the other settings; empty where nothing is set."""
    adamw = group.get("metric") == "diagonal"
    factor = group.get("radius", 1.0) * group.get("lr_ratio", 1.0)
    usual = ADAMW if adamw else {"scale": "unit", "metric": "none", "bias_correction": False}
    others = {k: v for k, v in group.items() if k not in _COLUMNS and (k not in usual or usual[k] != v)}
    shown = {k.removeprefix("norm_"): _short(v) for k, v in others.items()}
    return (
        "AdamW" if adamw else optimizer or "",
        str(group.get("norm", "")),
        group.get("norm_matrix_view", ""),
        str(group.get("norm_blocks", "")),
        "lr" if factor == 1 else f"{factor:.4g} lr",
        _short(group.get("weight_decay", "λ")),
        ", ".join(f"{k} {v}" for k, v in shown.items()),
    )


def _named(params: Any) -> list[tuple[str, Tensor]]:
    """Return a group's parameters with their names; those of a group of the user's own may have none."""
    each = [params] if isinstance(params, Tensor) else list(params)
    return [p if isinstance(p, tuple) else ("(no name)", p) for p in each]


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _label(names: Sequence[str]) -> str:
    """Return a parameter's name, with another one that it has."""
    return names[0] + (f" (= {names[1]}{', …' if len(names) > 2 else ''})" if len(names) > 1 else "")


def _abbreviate(names: list[str], every: list[str] | None = None) -> str:
    """Merge names that differ only in numbers, and show at most three of them.

    Numbers become a star if they are all that the names ``every`` have there (None: ``names``), or else {2,5-7}.
    """
    numbers, all_numbers = _numbers(names), _numbers(every or names)
    shown = []
    for pattern, found in numbers.items():
        places = iter(
            next(iter(own)) if len(own) == 1 else "*" if own == of_all else _ranges(own)
            for own, of_all in zip(found, all_numbers[pattern], strict=True)
        )
        shown.append(re.sub("\0", lambda _, places=places: next(places), pattern))  # type: ignore[misc]
    return ", ".join(shown[:3]) + (f", … ({len(shown)} in all)" if len(shown) > 3 else "")


def _numbers(names: list[str]) -> dict[str, list[set[str]]]:
    """Return the numbers at each numeric place of the names, by what is around them."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        found.setdefault(_NUMBER.sub("\0", name), []).append(tuple(_NUMBER.findall(name)))
    return {pattern: [set(place) for place in zip(*tuples, strict=True)] for pattern, tuples in found.items()}


def _ranges(numbers: set[str]) -> str:
    """Return numbers in braces, successive ones as a range."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) + "}"

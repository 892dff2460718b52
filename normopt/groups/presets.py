"""The presets: the norm, radius and settings of each kind of layer, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from normopt.groups.classify import KINDS, Kind

PresetName = Literal[
    "muon-adamw", "normuon-adamw", "adamw", "muon", "scion", "scion-cnn", "scion-mlp", "scale", "modular"
]
Settings = Mapping[str, Any]
Preset = Mapping[Kind, Settings]

# Unit steps, except AdamW's; layers differ in norm and radius.
_SIGN = {"norm": "linf", "scale": "unit"}
_SPECTRAL = {"norm": "spectral", "scale": "unit"}
_RMS_TO_RMS = _SPECTRAL | {"norm_aspect": "rms"}
_ONE_HOT_TO_RMS = {"norm": "column", "scale": "unit", "norm_aspect": "rows"}
_RMS = {"norm": "frobenius", "scale": "unit", "norm_aspect": "entries"}
_ROWS = {"norm": "row", "scale": "unit", "norm_aspect": "columns"}
_LINEAR = {"norm": "l2", "scale": "dual"}
# torch.optim.AdamW's rule and defaults, whatever the momentum and the rows' average of the optimizer are.
_ADAMW = _LINEAR | {
    "metric": "diagonal",
    "bias_correction": True,
    "momentum_rule": "ema",
    "nesterov": False,
    "row_beta": 0.0,
}
ADAMW = _ADAMW | {"betas": (0.9, 0.999), "eps": 1e-8}
_MUON = _SPECTRAL | {"metric": "none", "bias_correction": False}  # also of an AdamW


def _layers(
    embedding: Settings, hidden: Settings, output: Settings, vectors: Settings, small: Settings | None = None
) -> Preset:
    """Return the settings by kind: hidden matrices, small ones (None: as hidden), embeddings, output, vectors."""
    columns = [hidden] * 7 + [hidden if small is None else small] * 3 + [embedding] * 2 + [output] + [vectors] * 4
    return dict(zip(KINDS, columns, strict=True))


def _muon() -> Preset:
    """Return Keller Jordan's split: orthogonalise hidden matrices, and use sign steps where he uses Adam.

    Sign steps are Adam's counterpart in the framework (arXiv:2409.20325). Their radius is measured: see `param_groups`.
    """
    rest = _SIGN | {"radius": 0.1}
    return _layers(rest, _SPECTRAL, rest, rest, small=rest)


def _muon_adamw() -> Preset:
    """Return Keller Jordan's split as he has it: Muon for hidden matrices, AdamW for the rest.

    The ratio of the learning rates is measured: see `param_groups`. It also scales the decay, as AdamW's own learning
    rate would.
    """
    rest = ADAMW | {"lr_ratio": 0.4}
    return _layers(rest, _MUON, rest, rest, small=rest)


def _scion(radius: float, output: float) -> Preset:
    """Return Scion's norms, arXiv:2502.07529: RMS → RMS inside, ℓ1 → ℓ∞ with 1/d_in at the output, RMS for vectors.

    The radii are those of its examples. Giving an untied embedding the hidden layers' radius is our choice.
    """
    inside = {"radius": radius}
    head = {"norm": "max", "scale": "unit", "norm_aspect": "fan-in", "radius": output}
    return _layers(_ONE_HOT_TO_RMS | inside, _RMS_TO_RMS | inside, head, _RMS | inside)


PRESETS: dict[str, Preset] = {
    "muon-adamw": _muon_adamw(),
    "normuon-adamw": _muon_adamw(),  # the optimizer sets row_beta
    "adamw": _layers(_ADAMW, _ADAMW, _ADAMW, _ADAMW),  # with the optimizer's betas and eps
    "muon": _muon(),
    "scion": _scion(50.0, 3000.0),
    "scion-cnn": _scion(8.0, 128.0),
    "scion-mlp": _scion(1.0, 1024.0),
    # arXiv:2506.16659: each output unit's update has RMS 1; only the output layer has momentum. Vectors take sign
    # steps, which are RMS 1 for rows of one entry; the authors use AdamW for them.
    "scale": _layers(_ROWS, _ROWS, _ROWS | {"momentum": 0.9}, _SIGN | {"weight_decay": 0.0}),
    # The modular norm's layers, arXiv:2405.14813 and 2410.21265; `modular` computes the radii.
    "modular": _layers(_ONE_HOT_TO_RMS, _RMS_TO_RMS, _RMS_TO_RMS, _RMS),
}

# Whose decay is the constraint to a ball (arXiv:2502.07529), of vectors too.
CONSTRAINED = ("scion", "scion-cnn", "scion-mlp")
# The optimizer that each preset is for; None: any.
OPTIMIZERS = {
    "muon-adamw": "Muon",
    "normuon-adamw": "NorMuon",
    "adamw": "AdamW",
    "muon": "Muon",
    "scale": "SCALE",
    **dict.fromkeys(CONSTRAINED, "Scion"),
    "modular": None,
}

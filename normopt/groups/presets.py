"""The presets: the norm, radius and settings of each kind of layer, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normopt.groups.classify import Kind

Preset = Mapping[Kind, Mapping[str, Any]]

# All are unit steps; layers differ in norm and radius.
_SIGN = {"norm": "linf", "scale": "unit"}
_SPECTRAL = {"norm": "spectral", "scale": "unit"}
_RMS_TO_RMS = _SPECTRAL | {"norm_aspect": "rms"}
_ONE_HOT_TO_RMS = {"norm": "column", "scale": "unit", "norm_aspect": "rows"}
_RMS = {"norm": "frobenius", "scale": "unit", "norm_aspect": "entries"}
_ROWS = {"norm": "row", "scale": "unit", "norm_aspect": "columns"}


def _muon() -> Preset:
    """Return Keller Jordan's split: orthogonalise hidden matrices, and use sign steps where he uses Adam.

    Sign steps are Adam's counterpart in the framework (arXiv:2409.20325). Their radius is the ratio of the authors'
    learning rates, 3e-4 to 0.02.
    """
    rest = _SIGN | {"radius": 0.015}
    return {
        "embedding": rest,
        "linear": _SPECTRAL,
        "conv": _SPECTRAL,
        "output": rest,
        "norm": rest,
        "bias": rest,
    }


def _scion(radius: float, output: float) -> Preset:
    """Return Scion's norms, arXiv:2502.07529: RMS → RMS inside, ℓ1 → ℓ∞ with 1/d_in at the output, RMS for vectors.

    The radii are those of its examples. Giving an untied embedding the hidden layers' radius is our choice.
    """
    inside = {"radius": radius}
    return {
        "embedding": _ONE_HOT_TO_RMS | inside,
        "linear": _RMS_TO_RMS | inside,
        "conv": _RMS_TO_RMS | inside,
        "output": {"norm": "max", "scale": "unit", "norm_aspect": "fan-in", "radius": output},
        "norm": _RMS | inside,
        "bias": _RMS | inside,
    }


def _scale() -> Preset:
    """Return SCALE's rule, arXiv:2506.16659: each output unit's update has RMS 1; only the output layer has momentum.

    Vectors take sign steps, which are RMS 1 for rows of one entry; the authors use AdamW for them.
    """
    vectors = _SIGN | {"weight_decay": 0.0}
    return {
        "embedding": _ROWS,
        "linear": _ROWS,
        "conv": _ROWS,
        "output": _ROWS | {"momentum": 0.9},
        "norm": vectors,
        "bias": vectors,
    }


def _modular() -> Preset:
    """Return the modular norm's layers, arXiv:2405.14813 and 2410.21265; `modular` computes the radii."""
    return {
        "embedding": _ONE_HOT_TO_RMS,
        "linear": _RMS_TO_RMS,
        "conv": _RMS_TO_RMS,
        "output": _RMS_TO_RMS,
        "norm": _RMS,
        "bias": _RMS,
    }


PRESETS: dict[str, Preset] = {
    "muon": _muon(),
    "scion": _scion(50.0, 3000.0),
    "scion-cnn": _scion(8.0, 128.0),
    "scion-mlp": _scion(1.0, 1024.0),
    "scale": _scale(),
    "modular": _modular(),
}

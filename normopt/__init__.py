"""normopt: an optimizer is a norm.

Every optimizer here is one engine, [`SteepestDescent`][normopt.SteepestDescent], under another norm.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from normopt import norms
from normopt.addons import AGR, LpDecay
from normopt.engine import SteepestDescent
from normopt.loading import to_torch_state_dict
from normopt.zoo import get_optimizer, list_optimizers
from normopt.zoo.adaptive import LAMB, LARS, Adagrad, Adam, AdamW, Adan, RMSprop
from normopt.zoo.lp import LPSGD, LPSGDM, SGD, Lion, NormalizedSGD, PowerStep, SignSGD, Signum, Stacey
from normopt.zoo.matrix import SCALE, Freon, Muon, NorMuon, NucGD, RowNormSGD, Scion, SpectralSGD

if TYPE_CHECKING:
    from normopt import diagnostics as diagnostics
    from normopt import groups as groups
    from normopt import integrations as integrations
    from normopt import schedules, sparsity
    from normopt.diagnostics import (
        CurvatureMonitor,
        GeometryMonitor,
        Spectrum,
        Trajectory,
        TrajectoryMonitor,
        hessian_spectrum,
    )
    from normopt.groups import ParamGroups, param_groups

__version__ = "0.1.0"

__all__ = ["SteepestDescent", "get_optimizer", "list_optimizers", "norms", "schedules", "sparsity"]
__all__ += ["LPSGD", "LPSGDM", "SGD", "Lion", "NormalizedSGD", "PowerStep", "SignSGD", "Signum", "Stacey"]
__all__ += ["LAMB", "LARS", "Adagrad", "Adam", "AdamW", "Adan", "RMSprop"]
__all__ += ["SCALE", "Freon", "Muon", "NorMuon", "NucGD", "RowNormSGD", "Scion", "SpectralSGD"]
__all__ += ["AGR", "GeometryMonitor", "LpDecay", "ParamGroups", "Trajectory", "TrajectoryMonitor", "param_groups"]
__all__ += ["CurvatureMonitor", "Spectrum", "hessian_spectrum", "to_torch_state_dict"]

# Imported at their first use, since no optimizer needs them; each with its names that are normopt's too.
_LAZY = {
    "diagnostics": (
        "CurvatureMonitor",
        "GeometryMonitor",
        "Spectrum",
        "Trajectory",
        "TrajectoryMonitor",
        "hessian_spectrum",
    ),
    "groups": ("ParamGroups", "param_groups"),
    "integrations": (),
    "schedules": (),
    "sparsity": (),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name == module or name in names:
            found = import_module(f"normopt.{module}")
            globals().update({module: found, **{each: getattr(found, each) for each in names}})
            return globals()[name]
    message = f"module 'normopt' has no attribute {name!r}"
    if not name.startswith("_"):
        modules = {module: import_module(f"normopt.{module}") for module in (*_LAZY, "norms")}
        homes = [module for module, found in modules.items() if name in getattr(found, "__all__", ())]
        lower = {known.lower(): known for known in __dir__()}
        close = [lower[key] for key in get_close_matches(name.lower(), lower, 1)]
        message += "".join(f"; did you mean normopt.{each}?" for each in [f"{m}.{name}" for m in homes] or close)
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY})

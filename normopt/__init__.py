"""normopt: an optimizer is a norm.

Every optimizer here is one engine, [`SteepestDescent`][normopt.SteepestDescent], walking downhill,
measured by a different norm.
"""

from normopt import norms, schedules, sparsity
from normopt.addons import AGR, LpDecay
from normopt.diagnostics import GeometryMonitor, Trajectory, TrajectoryMonitor
from normopt.engine import SteepestDescent
from normopt.groups import ParamGroups, param_groups
from normopt.zoo import (
    LPSGD,
    LPSGDM,
    SCALE,
    SGD,
    Freon,
    Lion,
    Muon,
    NormalizedSGD,
    NucGD,
    PowerStep,
    RowNormSGD,
    Scion,
    SignSGD,
    Signum,
    SpectralSGD,
    get_optimizer,
    list_optimizers,
)

__version__ = "0.1.0"

__all__ = [
    "AGR",
    "LPSGD",
    "LPSGDM",
    "SCALE",
    "SGD",
    "Freon",
    "GeometryMonitor",
    "Lion",
    "LpDecay",
    "Muon",
    "NormalizedSGD",
    "NucGD",
    "ParamGroups",
    "PowerStep",
    "RowNormSGD",
    "Scion",
    "SignSGD",
    "Signum",
    "SpectralSGD",
    "SteepestDescent",
    "Trajectory",
    "TrajectoryMonitor",
    "get_optimizer",
    "list_optimizers",
    "norms",
    "param_groups",
    "schedules",
    "sparsity",
]

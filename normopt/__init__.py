"""normopt: an optimizer is a norm.

Every optimizer here is one engine, [`SteepestDescent`][normopt.SteepestDescent], under another norm.
"""

from normopt import norms, schedules, sparsity
from normopt.addons import AGR, LpDecay
from normopt.diagnostics import GeometryMonitor, Trajectory, TrajectoryMonitor
from normopt.engine import SteepestDescent
from normopt.groups import ParamGroups, param_groups
from normopt.loading import to_torch_state_dict
from normopt.zoo import get_optimizer, list_optimizers
from normopt.zoo.adaptive import LAMB, LARS, Adagrad, Adam, AdamW, Adan, RMSprop
from normopt.zoo.lp import LPSGD, LPSGDM, SGD, Lion, NormalizedSGD, PowerStep, SignSGD, Signum, Stacey
from normopt.zoo.matrix import SCALE, Freon, Muon, NorMuon, NucGD, RowNormSGD, Scion, SpectralSGD

__version__ = "0.1.0"

__all__ = ["SteepestDescent", "get_optimizer", "list_optimizers", "norms", "schedules", "sparsity"]
__all__ += ["LPSGD", "LPSGDM", "SGD", "Lion", "NormalizedSGD", "PowerStep", "SignSGD", "Signum", "Stacey"]
__all__ += ["LAMB", "LARS", "Adagrad", "Adam", "AdamW", "Adan", "RMSprop"]
__all__ += ["SCALE", "Freon", "Muon", "NorMuon", "NucGD", "RowNormSGD", "Scion", "SpectralSGD"]
__all__ += ["AGR", "GeometryMonitor", "LpDecay", "ParamGroups", "Trajectory", "TrajectoryMonitor", "param_groups"]
__all__ += ["to_torch_state_dict"]

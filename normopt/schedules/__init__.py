"""Schedules of p, the norm's order, over training. The interface follows torch's LR schedulers."""

from normopt.schedules.adaptive import AdaptiveP
from normopt.schedules.base import PSchedule
from normopt.schedules.planned import AnnealedP as AnnealedP
from normopt.schedules.planned import ConstantP, CosineP, LinearP, PiecewiseP

__all__ = ["AdaptiveP", "ConstantP", "CosineP", "LinearP", "PSchedule", "PiecewiseP"]

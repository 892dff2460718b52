"""Schedules of p, the norm's order, or of another setting, over training, with the interface of torch's schedulers."""

from normopt.schedules.adaptive import AdaptiveP
from normopt.schedules.base import PSchedule
from normopt.schedules.planned import AnnealedP as AnnealedP
from normopt.schedules.planned import ConstantP, CosineP, LinearP, PiecewiseP

__all__ = ["AdaptiveP", "ConstantP", "CosineP", "LinearP", "PSchedule", "PiecewiseP"]

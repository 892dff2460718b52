"""Monitors of a training run: the regularity of its trajectory, the geometry of its steps, the loss's curvature."""

from __future__ import annotations

from normopt.diagnostics.curvature import Spectrum, hessian_spectrum
from normopt.diagnostics.curvature_monitor import CurvatureMonitor
from normopt.diagnostics.geometry import GeometryMonitor
from normopt.diagnostics.trajectory import Trajectory
from normopt.diagnostics.trajectory_monitor import TrajectoryMonitor

__all__ = ["CurvatureMonitor", "GeometryMonitor", "Spectrum", "Trajectory", "TrajectoryMonitor", "hessian_spectrum"]

"""Monitors of a training run: the regularity of its trajectory, the geometry of its steps."""

from __future__ import annotations

from normopt.diagnostics.geometry import GeometryMonitor
from normopt.diagnostics.trajectory import Trajectory
from normopt.diagnostics.trajectory_monitor import TrajectoryMonitor

__all__ = ["GeometryMonitor", "Trajectory", "TrajectoryMonitor"]

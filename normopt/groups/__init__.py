"""Param groups from a model: a preset assigns a norm to each kind of layer.

Imports go one way: build → presets, modular → classify; modular → sensitivity. Nothing here depends on an optimizer.
"""

from normopt.groups.build import ParamGroups, param_groups

__all__ = ["ParamGroups", "param_groups"]

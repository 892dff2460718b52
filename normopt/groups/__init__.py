"""Which norm for which layer: a model → param groups, each with the norm that a preset gives its kind of layer.

Imports run one way: build → presets, modular → classify; modular → sensitivity. Nothing here knows an optimizer.
"""

from normopt.groups.build import ParamGroups, param_groups

__all__ = ["ParamGroups", "param_groups"]

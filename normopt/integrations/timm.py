"""timm: the zoo under timm's optimizer names."""

from __future__ import annotations

import inspect

from normopt.engine import SteepestDescent
from normopt.zoo import get_optimizer, list_optimizers


def register() -> dict[str, type[SteepestDescent]]:
    """Make every zoo member available to ``timm.optim.create_optimizer_v2`` and to timm's training script.

    An optimizer keeps its own name (``"lpsgdm"``) unless timm has one of that name; then it is called
    ``"normopt"`` and its name (``"normoptsgd"``), and timm's stays as it is. Calling this again changes
    nothing.

    Returns:
        The names as timm now knows them, and their classes.

    Raises:
        ImportError: timm is not installed.

    Example:
        >>> normopt.integrations.timm.register()
        >>> opt = timm.optim.create_optimizer_v2(model, opt="lpsgdm", lr=0.01, weight_decay=0.05)
    """
    try:
        from timm.optim import OptimInfo, default_registry
        from timm.optim import list_optimizers as list_timm
    except ImportError as error:
        raise ImportError("normopt.integrations.timm needs timm 1.0.12 or newer: pip install timm") from error
    taken = {name for name in list_timm() if default_registry.get_optimizer_info(name).description != _DESCRIPTION}
    registered = {}
    for ours in list_optimizers():
        name = f"normopt{ours}" if ours in taken else ours  # no underscore: timm cuts names there
        cls = get_optimizer(ours)
        arguments = inspect.signature(cls).parameters
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=cls,
                description=_DESCRIPTION,
                has_eps="eps" in arguments,
                has_momentum="momentum" in arguments,
                has_betas=False,
            )
        )
        registered[name] = cls
    return registered


_DESCRIPTION = "normopt: steepest descent under a norm"

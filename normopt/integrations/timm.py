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
        >>> known = normopt.integrations.timm.register()
        >>> opt = timm.optim.create_optimizer_v2(model, opt="lpsgdm", lr=0.01, weight_decay=0.05)
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim import list_optimizers as list_timm
        from timm.optim._optim_factory import default_registry  # timm exports it nowhere else
    except ImportError as error:
        raise ImportError("normopt.integrations.timm needs timm 1.0.12 or newer: pip install timm") from error
    known = {name: default_registry.get_optimizer_info(name).opt_class for name in list_timm()}
    registered = {}
    for ours in list_optimizers():
        cls = get_optimizer(ours)
        name = ours if known.get(ours, cls) is cls else f"normopt{ours}"  # no underscore: timm cuts names there
        registered[name] = cls
        if name not in known:
            arguments = inspect.signature(cls).parameters
            info = OptimInfo(
                name=name,
                opt_class=cls,
                description="normopt: steepest descent under a norm",
                has_eps="eps" in arguments,
                has_momentum="momentum" in arguments,
            )
            default_registry.register(info)
    return registered

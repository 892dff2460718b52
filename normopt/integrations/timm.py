"""Register the zoo with timm."""

from __future__ import annotations

import inspect

from normopt.engine import SteepestDescent
from normopt.zoo import get_optimizer, list_optimizers


def register() -> dict[str, type[SteepestDescent]]:
    """Make every zoo member available to ``timm.optim.create_optimizer_v2`` and to timm's training script.

    An optimizer keeps its own name (``"lpsgdm"``) unless timm already has that name. It is then registered
    with the prefix ``"normopt"`` (``"normoptsgd"``), and timm's stays unchanged. Calling this again has no
    effect.

    Returns:
        The names registered with timm, and their classes.

    Raises:
        ImportError: timm is not installed.

    Example:
        >>> import timm
        >>> known = normopt.integrations.timm.register()
        >>> opt = timm.optim.create_optimizer_v2(model, opt="lpsgdm", lr=0.01, weight_decay=0.05)
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim import list_optimizers as list_timm
        from timm.optim._optim_factory import default_registry  # not exported elsewhere
    except ImportError as error:
        raise ImportError("normopt.integrations.timm needs timm 1.0.12 or newer: pip install timm") from error
    known = {name: default_registry.get_optimizer_info(name).opt_class for name in list_timm()}
    registered = {}
    for ours in list_optimizers():
        cls = get_optimizer(ours)
        name = ours if known.get(ours, cls) is cls else f"normopt{ours}"  # no underscore: timm splits names there
        registered[name] = cls
        if name not in known:
            takes = {f"has_{x}": x in inspect.signature(cls).parameters for x in ("betas", "eps", "momentum")}
            info = OptimInfo(name=name, opt_class=cls, description="normopt: steepest descent under a norm", **takes)
            default_registry.register(info)
    return registered

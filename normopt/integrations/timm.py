"""Register the zoo with timm."""

from __future__ import annotations

import inspect

from normopt.engine import SteepestDescent
from normopt.zoo import get_optimizer, list_optimizers


def register() -> dict[str, type[SteepestDescent]]:
    """Make every zoo member available to ``timm.optim.create_optimizer_v2`` and to timm's training script.

    Each gets its name with the prefix ``"normopt"`` (``"normoptsgd"``), which is the same under every version of timm,
    and its own name (``"lpsgdm"``) unless timm has an optimizer of that name, which stays unchanged. Calling this again
    has no effect.

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
        takes = {f"has_{x}": x in inspect.signature(cls).parameters for x in ("betas", "eps", "momentum")}
        about = "normopt: steepest descent under a norm"
        for name in (f"normopt{ours}", ours):  # no underscore: timm splits names there
            if known.get(name, cls) is cls:
                registered[name] = cls
                default_registry.register(OptimInfo(name=name, opt_class=cls, description=about, **takes))
    return registered

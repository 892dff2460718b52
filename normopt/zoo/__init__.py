"""The zoo of named optimizers. Each class is a signature, a documented rule, and settings of the engine."""

from __future__ import annotations

import fnmatch

from normopt._checks import near
from normopt.engine import SteepestDescent
from normopt.zoo.adaptive import LAMB, LARS, Adagrad, Adam, AdamW, Adan, RMSprop
from normopt.zoo.lp import LPSGD, LPSGDM, SGD, Lion, NormalizedSGD, PowerStep, SignSGD, Signum, Stacey
from normopt.zoo.matrix import SCALE, Freon, Muon, NorMuon, NucGD, RowNormSGD, Scion, SpectralSGD

MEMBERS = (
    *(SGD, NormalizedSGD, SignSGD, Signum, Lion, PowerStep, LPSGD, LPSGDM, Stacey),
    *(AdamW, Adam, Adagrad, RMSprop, Adan, LAMB, LARS),
    *(Muon, NorMuon, Scion, SCALE, SpectralSGD, NucGD, Freon, RowNormSGD),
)
ZOO: dict[str, type[SteepestDescent]] = {cls.__name__.lower(): cls for cls in MEMBERS}


def list_optimizers(pattern: str = "*") -> list[str]:
    """List the names of the optimizers that match a shell pattern.

    Args:
        pattern: a shell pattern, case-insensitive. Default "*", all of them.

    Returns:
        Sorted lower-case names, as `get_optimizer` accepts.

    Example:
        >>> normopt.list_optimizers("*sgd*")
        ['lpsgd', 'lpsgdm', 'normalizedsgd', 'rownormsgd', 'sgd', 'signsgd', 'spectralsgd']
    """
    return sorted(fnmatch.filter(ZOO, pattern.lower()))


def get_optimizer(name: str) -> type[SteepestDescent]:
    """Return the optimizer class with a name.

    Args:
        name: one of `list_optimizers()`, case-insensitive.

    Returns:
        The class, to be called with params.

    Raises:
        ValueError: no optimizer has that name; the message suggests similar ones.
        TypeError: the name is not a string.

    Example:
        >>> normopt.get_optimizer("lpsgdm")
        <class 'normopt.zoo.lp.LPSGDM'>
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, but is {name!r} ({type(name).__name__})")
    if name.lower() not in ZOO:
        from normopt.groups.presets import OPTIMIZERS, PRESETS  # loaded with param_groups, when it is asked for

        if name in PRESETS:
            raise ValueError(
                f"{name!r} is a preset of param_groups and no optimizer: give normopt.param_groups(model, {name!r}) to "
                f"normopt.{OPTIMIZERS[name] or 'Muon'}"
            )
        raise ValueError(f"unknown optimizer {name!r}{near(name, ZOO)} (known: {', '.join(list_optimizers())})")
    return ZOO[name.lower()]


__all__ = ["LPSGD", "LPSGDM", "SGD", "Lion", "NormalizedSGD", "PowerStep", "SignSGD", "Signum", "Stacey"]
__all__ += ["LAMB", "LARS", "Adagrad", "Adam", "AdamW", "Adan", "RMSprop"]
__all__ += ["SCALE", "Freon", "Muon", "NorMuon", "NucGD", "RowNormSGD", "Scion", "SpectralSGD"]
__all__ += ["get_optimizer", "list_optimizers"]

"""The zoo: every named optimizer, each a signature, its rule, and the engine's settings. Nothing runs here."""

from __future__ import annotations

import fnmatch

from normopt._checks import near
from normopt.engine import SteepestDescent
from normopt.zoo.lp import LPSGD, LPSGDM, SGD, Lion, NormalizedSGD, PowerStep, SignSGD, Signum
from normopt.zoo.matrix import SCALE, Freon, Muon, NucGD, RowNormSGD, Scion, SpectralSGD

MEMBERS = (
    *(SGD, NormalizedSGD, SignSGD, Signum, Lion, PowerStep, LPSGD, LPSGDM),
    *(Muon, Scion, SCALE, SpectralSGD, NucGD, Freon, RowNormSGD),
)
ZOO: dict[str, type[SteepestDescent]] = {cls.__name__.lower(): cls for cls in MEMBERS}


def list_optimizers(pattern: str = "*") -> list[str]:
    """The names of the optimizers that match a shell pattern.

    Args:
        pattern: as of a shell, without regard to case. Default "*", all of them.

    Returns:
        Names in lower case, sorted; each is one for `get_optimizer`.

    Example:
        >>> normopt.list_optimizers("*sgd*")
        ['lpsgd', 'lpsgdm', 'normalizedsgd', 'rownormsgd', 'sgd', 'signsgd', 'spectralsgd']
    """
    return sorted(fnmatch.filter(ZOO, pattern.lower()))


def get_optimizer(name: str) -> type[SteepestDescent]:
    """The optimizer class of a name.

    Args:
        name: one of `list_optimizers()`, without regard to case.

    Returns:
        The class, to be called with params.

    Raises:
        ValueError: no optimizer has that name; the message lists the near ones.
        TypeError: the name is no string.

    Example:
        >>> normopt.get_optimizer("lpsgdm")
        <class 'normopt.zoo.lp.LPSGDM'>
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, but is {name!r} ({type(name).__name__})")
    if name.lower() not in ZOO:
        raise ValueError(f"unknown optimizer {name!r}{near(name, ZOO)} (known: {', '.join(list_optimizers())})")
    return ZOO[name.lower()]


__all__ = [
    "LPSGD",
    "LPSGDM",
    "SCALE",
    "SGD",
    "Freon",
    "Lion",
    "Muon",
    "NormalizedSGD",
    "NucGD",
    "PowerStep",
    "RowNormSGD",
    "Scion",
    "SignSGD",
    "Signum",
    "SpectralSGD",
    "get_optimizer",
    "list_optimizers",
]

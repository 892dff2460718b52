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
    """The names of the optimizers that match a shell pattern, without regard to case, sorted.

    Example:
        >>> normopt.list_optimizers("*sgd*")
        ['lpsgd', 'lpsgdm', 'normalizedsgd', 'rownormsgd', 'sgd', 'signsgd', 'spectralsgd']
    """
    return sorted(fnmatch.filter(ZOO, pattern.lower()))


def get_optimizer(name: str) -> type[SteepestDescent]:
    """The optimizer class of a name, without regard to case.

    Raises:
        ValueError: no optimizer has that name; the message lists the near ones.

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

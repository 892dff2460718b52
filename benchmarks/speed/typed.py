"""What a user types today, beside normopt's default: families of like rules, of which normopt's own come first."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.speed.candidates import LR, OWN, Candidate

# The modules of other packages, with the names under which they are installed.
PACKAGES = {"pytorch_optimizer": "pytorch_optimizer", "optimi": "torch-optimi", "heavyball": "heavyball"}


@dataclass(frozen=True)
class Typed:
    """An optimizer as it is typed, without a word on its backend but for what torch.optim offers.

    Attributes:
        module, name, settings: what is called, with which arguments; the lr is left out.
        group: what a param group has to say besides.
        orders: the p that a schedule gives it in turn; none if it has no p.
    """

    module: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)
    orders: tuple[float, ...] = ()

    @property
    def code(self) -> str:
        """What is typed."""
        return f"{self.module}.{self.name}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def make(self, params: Sequence[Tensor]) -> Optimizer:
        """The optimizer, whose lr no weight notices."""
        made: Optimizer = getattr(importlib.import_module(self.module), self.name)(
            [{"params": params, **self.group}], lr=LR, **self.settings
        )
        return made

    def candidate(self) -> Candidate:
        return Candidate(self.code, OWN, self.make, streams=0, to_capture=None, orders=self.orders)


HEAVY = {"momentum": 0.9}
EVERYTHING = {"p": 2.7, "agr": True, "weight_decay": 0.001, "decay": "lp", "decay_p": 0.8}
SGD = "SGD with momentum, and ℓp"
SIGNS = "Lion and signs"
MUON = "Muon"
FAMILIES: dict[str, tuple[Typed, ...]] = {
    SGD: (
        Typed("normopt", "SGD", HEAVY),
        Typed("normopt", "LPSGDM", {"p": 3.0}, orders=(3.0,)),  # here a power is a square root: p stays
        Typed("normopt", "LPSGDM", EVERYTHING, orders=(2.7, 2.71, 2.72, 2.73, 2.74)),
        Typed("torch.optim", "SGD", HEAVY),
        Typed("torch.optim", "SGD", HEAVY | {"fused": True}),
        Typed("pytorch_optimizer", "SGDW", HEAVY),
        Typed("optimi", "SGD", HEAVY),
        Typed("heavyball", "SGD"),
    ),
    SIGNS: (
        Typed("normopt", "Lion"),
        Typed("pytorch_optimizer", "Lion"),
        Typed("pytorch_optimizer", "SignSGD"),
        Typed("optimi", "Lion"),
    ),
    "AdamW": (
        Typed("normopt", "AdamW"),
        Typed("torch.optim", "AdamW"),
        Typed("torch.optim", "AdamW", {"fused": True}),
        Typed("optimi", "AdamW"),
        Typed("heavyball", "AdamW"),
    ),
    MUON: (
        Typed("normopt", "Muon"),
        Typed("torch.optim", "Muon"),
        Typed("pytorch_optimizer", "Muon", group={"use_muon": True}),
        Typed("heavyball", "Muon"),
    ),
}
SWEPT = FAMILIES[SGD][1:5]  # whose cost is measured against size


def installed(family: str) -> Iterator[Candidate]:
    """Those of a family that can be made here."""
    return (typed.candidate() for typed in FAMILIES[family] if typed.installed)


def peers() -> list[Candidate]:
    """The elementwise steps that other packages have and that leave the gradients where they are."""
    return [c for c in installed(SIGNS) if not ours(c.optimizer)]


def absent() -> list[str]:
    """The packages that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def ours(code: str) -> bool:
    """Whether what is typed is normopt's."""
    return code.startswith("normopt.")

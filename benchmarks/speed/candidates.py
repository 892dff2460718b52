"""Who steps on which backend: normopt's optimizers on each, and torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

import normopt
from benchmarks.speed.models import MATRICES, Model
from benchmarks.speed.records import Entry

LR = 1e-8  # no run of the program moves a weight far, whatever the rule: the arithmetic stays the same
MOMENTUM: dict[str, Any] = {"lr": LR, "momentum": 0.9}
BACKENDS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
COMPILED = "compiled"
OWN = "default"  # the backend of a peer

PLAIN = ("normopt p = 2", "normopt p = 3", "normopt p = ∞")
GENERAL = "normopt p = 2.7"
DUAL = ("normopt dual p = 2.7", "normopt dual p = ∞")
DRESSED = "normopt p = 3, AGR, ℓp decay"
ADAMW = "normopt AdamW"
ADAMW_L1 = "normopt AdamW, AGR, ℓ1 decay"
ADAMW_LP = "normopt AdamW, AGR, ℓ0.8 decay"
TORCH_SGD = "torch SGD"
TORCH_ADAMW = "torch AdamW"
TORCH_MUON = "torch Muon"

RULES: dict[str, dict[str, Any]] = {
    "normopt p = 2": {"p": 2.0},
    "normopt p = 3": {"p": 3.0},
    "normopt p = ∞": {"p": math.inf},
    "normopt p = 2.7": {"p": 2.7},
    "normopt dual p = 2.7": {"p": 2.7, "scale": "dual"},
    "normopt dual p = ∞": {"p": math.inf, "scale": "dual"},
    DRESSED: {"p": 3.0, "agr": True, "weight_decay": 1e-3, "decay": "lp", "decay_p": 0.8},
}
ADAMS: dict[str, dict[str, Any]] = {
    ADAMW: {},
    ADAMW_L1: {"agr": True, "decay": "lp", "decay_p": 1.0},
    ADAMW_LP: {"agr": True, "decay": "lp", "decay_p": 0.8},
}
READ_TWICE = (*DUAL, DRESSED, ADAMW_L1, ADAMW_LP)  # a sum over a tensor has to be known before its first entry can move


@dataclass(frozen=True)
class Candidate:
    """An optimizer that is timed.

    Attributes:
        optimizer, backend: its name, in two parts.
        make: makes it of parameters and more settings.
        streams: as of an `Entry`.
        to_capture: the settings with which its step can become a CUDA graph, None if it cannot.
        orders: the p that it is given before its steps, in turn; None where neither lr nor p changes.
    """

    optimizer: str
    backend: str
    make: Callable[..., Optimizer]
    streams: float = 5
    to_capture: Mapping[str, Any] | None = field(default_factory=dict)
    orders: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.backend}"

    def entry(self, first: float) -> Entry:
        """Its entry in a case, without times but for that of the first step."""
        return Entry(optimizer=self.optimizer, backend=self.backend, streams=self.streams, first=first)


def candidates(model: Model, compiled: bool = False) -> list[Candidate]:
    """All that step a model; the first of the matrices' is their reference."""
    if model.name == MATRICES:
        return list(_matrices())
    return [*_ours(), *_torchs(compiled)]


def _ours() -> Iterator[Candidate]:
    for backend, how in BACKENDS.items():
        for name, rule in RULES.items():
            make = partial(normopt.LPSGDM, **MOMENTUM, **rule, **how)
            yield Candidate(name, backend, make, 6 if name in READ_TWICE else 5)
        yield Candidate("normopt SGD", backend, partial(normopt.SGD, **MOMENTUM, **how))
        for name, rule in ADAMS.items():
            adamw = partial(normopt.AdamW, lr=LR, **rule, **how)
            yield Candidate(name, backend, adamw, 8 if name in READ_TWICE else 7)


def _torchs(compiled: bool) -> Iterator[Candidate]:
    sgd, adamw = partial(torch.optim.SGD, **MOMENTUM), partial(torch.optim.AdamW, lr=LR)
    for backend, how in BACKENDS.items():
        yield Candidate(TORCH_SGD, backend, partial(sgd, **how))
        yield Candidate(TORCH_ADAMW, backend, partial(adamw, **how), 7, {"capturable": True})
    if compiled:
        yield Candidate(TORCH_SGD, COMPILED, partial(sgd, foreach=True), to_capture=None)
        yield Candidate(TORCH_ADAMW, COMPILED, partial(adamw, foreach=True), 7, None)


def _matrices() -> Iterator[Candidate]:
    if hasattr(torch.optim, "Muon"):  # since torch 2.9
        yield Candidate(TORCH_MUON, OWN, partial(torch.optim.Muon, lr=LR, weight_decay=0.0), 0)
    for dtype in ("bfloat16", "float32"):
        yield Candidate("normopt Muon", dtype, partial(normopt.Muon, lr=LR, dtype=dtype), 0)

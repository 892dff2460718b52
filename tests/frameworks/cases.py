"""What the trainers train: a small network, its data, and the optimizers of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR
from torch.optim.optimizer import ParamsT

import normopt

EPOCHS, PER_EPOCH, BATCH = 4, 6, 8
STEPS = EPOCHS * PER_EPOCH


class Net(torch.nn.Module):
    """Named layers, which `param_groups` reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.hidden, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.inner(x)))))


def data() -> torch.utils.data.TensorDataset:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * PER_EPOCH, 8, generator=rng)
    return torch.utils.data.TensorDataset(x, (x @ torch.randn(8, 3, generator=rng)).argmax(1))


def loader() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(data(), batch_size=BATCH)


@torch.no_grad()
def loss_of(net: torch.nn.Module) -> float:
    x, y = data().tensors
    return float(torch.nn.functional.cross_entropy(net(x), y))


@dataclass(frozen=True)
class Case:
    """An optimizer of a network; `schedules` makes its schedulers, of lr and, where it has a p, of p."""

    make: Callable[[torch.nn.Module], Optimizer]
    has_p: bool = False
    named: dict[str, Any] | None = None  # the same by a class and arguments, for trainers that are told names

    def schedules(self, optimizer: Optimizer, steps: int = STEPS) -> list[Any]:
        of_p = [normopt.schedules.CosineP(optimizer, steps)] if self.has_p else []
        return [CosineAnnealingLR(optimizer, steps), *of_p]

    def schedule(self, optimizer: Optimizer, steps: int = STEPS) -> Any:
        """As one, for trainers that take one."""
        return ChainedScheduler(self.schedules(optimizer, steps))


class AdamWWithAddOns(torch.optim.AdamW):
    """A class, for trainers that make the optimizer."""

    def __init__(self, params: ParamsT, lr: float = 0.02, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        normopt.AGR(self)
        normopt.LpDecay(self, p=0.8, weight_decay=0.1, warmup=STEPS // 3)


def lpsgdm(net: torch.nn.Module) -> Optimizer:
    return normopt.LPSGDM(net.parameters(), lr=0.02, p=6.0)


def muon_adamw(net: torch.nn.Module) -> Optimizer:
    return normopt.SteepestDescent(normopt.param_groups(net, "muon-adamw"), lr=0.05)


def scion(net: torch.nn.Module) -> Optimizer:
    return normopt.Scion(normopt.param_groups(net, "scion"), lr=0.001)


CASES = {
    "LPSGDM + CosineP": Case(lpsgdm, has_p=True, named={"cls": normopt.LPSGDM, "lr": 0.02, "p": 6.0, "p_steps": STEPS}),
    "muon-adamw groups": Case(muon_adamw),
    "Scion": Case(scion, named={"cls": normopt.Scion, "lr": 0.0005}),
    "AdamW + add-ons": Case(lambda net: AdamWWithAddOns(net.parameters()), named={"cls": AdamWWithAddOns, "lr": 0.02}),
}

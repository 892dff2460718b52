"""Real trainings under FSDP2, DDP and ZeRO-1, in every rank."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import normopt
from tests.sharding.cases import counted, mesh_of, whole

# Settings of trainings that are saved and resumed.
METHODS: dict[str, dict[str, Any]] = {
    "lpsgdm": dict(optimizer="lpsgdm", p=8.0, agr=True, weight_decay=0.01),
    "dual": dict(optimizer="lpsgdm", p=8.0, scale="dual"),
    "heavy": dict(optimizer="sgd", momentum=0.9, agr=True, weight_decay=0.01, decay="lp", decay_p=0.8),
    "muon": dict(optimizer="muon", method="svd"),
    "kahan": dict(optimizer="lpsgdm", p=8.0, rounding="kahan", state_dtype="float32", dtype="bfloat16"),
}


def network(dtype: str = "float32") -> nn.Sequential:
    """Its parts are uneven on 2 ranks, and some are empty on 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(
        getattr(torch, dtype)
    )


def batch(step: int, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """The same on every rank, so that the number of ranks changes no gradient."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x.to(getattr(torch, dtype)), (x[:, :3] * x[:, 3:]).argmax(1)


class Training:
    """A network, its optimizer and its schedule of p."""

    def __init__(self, method: str, sharded: bool = True) -> None:
        settings = dict(METHODS[method])
        self.dtype = settings.pop("dtype", "float32")
        self.model = network(self.dtype)
        if sharded:
            fully_shard(self.model, mesh=mesh_of(dist.get_world_size()))
        params: Any = self.model.parameters()
        name = settings.pop("optimizer")
        if name == "muon":
            params = [p for p in params if p.dim() == 2]
        self.opt = normopt.get_optimizer(name)(params, lr=0.05, **settings)
        self.schedule = normopt.schedules.CosineP(self.opt, 12) if "p" in settings else None

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            x, y = batch(step, self.dtype)
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.opt.step()
            if self.schedule is not None:
                self.schedule.step()

    def state(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.opt)
        return {"model": model, "optim": optim, "schedule": self.schedule.state_dict() if self.schedule else {}}

    def save(self, folder: str) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])

    def found(self) -> dict[str, Tensor]:
        """Weights and state, whole."""
        found = {name: whole(p.detach()).clone() for name, p in self.model.named_parameters()}
        for i, p in enumerate(self.opt.param_groups[0]["params"]):
            found |= {f"{key} {i}": whole(x).clone() for key, x in self.opt.state[p].items()}
        return found | {"p": torch.tensor(float(self.opt.param_groups[0]["p"] or 0))}


def trained(method: str, begin: int, end: int, load: str | None, save: str | None, sharded: bool = True) -> Any:
    training = Training(method, sharded)
    if load:
        training.load(load)
    training.steps(begin, end)
    if save:
        training.save(save)
    return training.found()


def data_parallel(optimizer: str, settings: dict[str, Any], bucket_views: bool, zero: bool) -> dict[str, Any]:
    """A training under DDP beside one of one process on all of the data; and the collectives of a step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    alone, model = network(), network()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    make = normopt.get_optimizer(optimizer)
    single = make([p for p in alone.parameters() if p.dim() == 2], lr=0.05, **settings)
    matrices = [p for p in ddp.parameters() if p.dim() == 2]
    if zero:
        # As a partial: it puts keywords into the param groups too, where "method" has another name.
        opt: Any = ZeroRedundancyOptimizer(matrices, optimizer_class=partial(make, **settings), lr=0.05)
    else:
        opt = make(matrices, lr=0.05, **settings)
    inside: dict[str, int] = {}
    for step in range(6):
        x, y = batch(step)
        for net, o, part in ((alone, single, slice(None)), (ddp, opt, slice(rank, None, ranks))):
            net.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            if net is ddp:
                inside = counted(o.step)
            else:
                o.step()
    held = opt.optim if zero else opt
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "alone": [p.detach().clone() for p in alone.parameters()],
        "collectives": inside,
        "states": sum(len(s) for s in held.state.values()),
    }


def killed(folder: str, victim: int, at: int, total: int) -> str:
    """Train and save at each step; one rank dies. What the others are told, and how soon."""
    training = Training("dual")
    begun = time.monotonic()
    for step in range(total):
        if step == at and dist.get_rank() == victim:
            os._exit(1)
        begun = time.monotonic()
        try:
            training.steps(step, step + 1)
            if step < at:
                training.save(str(Path(folder) / f"step-{step + 1}"))
        except RuntimeError as error:
            return f"{time.monotonic() - begun:.1f} {type(error).__name__}: {error}"
    return "nothing"


def dies_in_the_step(victim: int) -> str:
    """Likewise, without a backward that would notice."""
    from tests.sharding.cases import sharded

    opt = normopt.SteepestDescent(sharded([(8, 3), (5, 2)]), lr=0.1, norm="lp", p=3.0, agr=True)
    opt.step()
    if dist.get_rank() == victim:
        os._exit(1)
    begun = time.monotonic()
    try:
        opt.step()
    except RuntimeError as error:
        return f"{time.monotonic() - begun:.1f} {type(error).__name__}: {error}"
    return "nothing"

"""Add-ons, monitors and schedules on shards beside the same on whole tensors, in every rank."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import normopt
from normopt.sharding.layout import is_dtensor
from normopt.sparsity import dense_state_dict, prune_, report, shrink, sparse_state_dict, to_dense, to_sparse
from tests.sharding.cases import error, gradient, laid, mesh_of, whole
from tests.versions import shards_of

SHAPES = [(8, 3), (1, 6), (4, 5), (7,), (6, 2, 3), (3, 3)]


def both(dim: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Whole parameters, and the same as they are cut; the last one is not."""
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]
    mesh, cut = mesh_of(dist.get_world_size()), []
    for i, x in enumerate(plain):
        placement = Replicate() if i == len(SHAPES) - 1 or x.dim() <= dim else Shard(dim)
        cut.append(torch.nn.Parameter(shards_of(x.detach().clone(), mesh, [placement])))
    return plain, cut


def give_gradients(plain: list[torch.nn.Parameter], cut: list[torch.nn.Parameter], step: int) -> None:
    for i, (a, b) in enumerate(zip(plain, cut, strict=True)):
        a.grad = gradient(tuple(a.shape), step, i, a.dtype)
        b.grad = laid(a.grad, b)


def apart(plain: list[torch.nn.Parameter], cut: list[torch.nn.Parameter]) -> float:
    return max(error(b.detach(), a.detach()) for a, b in zip(plain, cut, strict=True))


def agr_on(optimizer: str, dim: int, scope: Any) -> float:
    """The weights' largest difference over steps of an optimizer of torch's that carries AGR."""
    plain, cut = both(dim)
    # torch's foreach steps do not take DTensors beside tensors.
    opts = [getattr(torch.optim, optimizer)(params, lr=0.01, foreach=False) for params in (plain, cut)]
    for opt in opts:
        normopt.AGR(opt, scope)
    found = 0.0
    for step in range(5):
        give_gradients(plain, cut, step)
        before = [whole(p.grad).clone() for p in cut if p.grad is not None]
        for opt in opts:
            opt.step()
        assert all(torch.equal(whole(p.grad), g) for p, g in zip(cut, before, strict=True) if p.grad is not None)
        found = max(found, apart(plain, cut))
        copy_over(plain, cut)
    return found


def copy_over(plain: list[torch.nn.Parameter], cut: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for a, b in zip(plain, cut, strict=True):
            b.copy_(laid(a.detach(), b))


def decay_over(over: str, dim: int, warmup: int = 0) -> float:
    """Likewise of one that carries ℓp decay."""
    plain, cut = both(dim)
    how: dict[str, Any] = dict(over=over, warmup=warmup, p=0.8, weight_decay=0.5)
    found = 0.0
    opts = []
    for params in (plain, cut):
        groups = [dict(params=[params[i] for i in (0, 2)]), dict(params=[params[i] for i in (1, 3, 4, 5)])]
        if over == "heads":
            groups[0]["lp_heads"] = 2
            groups[1]["lp_heads"] = 1
        opts.append(torch.optim.SGD(groups, lr=0.1, foreach=False))
        normopt.LpDecay(opts[-1], **how, **({"heads": 1} if over == "heads" else {}))
    for step in range(5):
        give_gradients(plain, cut, step)
        for opt in opts:
            opt.step()
        found = max(found, apart(plain, cut))
        copy_over(plain, cut)
    return found


def geometry(settings: dict[str, Any], dim: int) -> float:
    """The largest relative difference of what the monitors say."""
    plain, cut = both(dim)
    rows = []
    opts = [normopt.SteepestDescent(params, lr=0.1, **settings) for params in (plain, cut)]
    monitors = [normopt.GeometryMonitor(opt, every=2) for opt in opts]
    for step in range(6):
        give_gradients(plain, cut, step)
        for opt in opts:
            opt.step()
        copy_over(plain, cut)
    rows = [monitor.rows for monitor in monitors]
    assert len(rows[0]) == len(rows[1]) == 3
    found = 0.0
    for name in rows[0].dtype.names or ():
        a, b = (np.asarray(r[name], dtype=float) for r in rows)
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        fine = ~np.isnan(a)
        found = max([found, *(np.abs(a - b)[fine] / np.maximum(np.abs(a[fine]), 1e-30))])
    return found


def trajectory(exact: bool, dim: int) -> dict[str, float]:
    """The largest differences of lengths, distances and cosines."""
    plain, cut = both(dim)
    opts = [torch.optim.SGD(params, lr=0.01, foreach=False) for params in (plain, cut)]
    shared: list[Any] = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(shared)
    mine = tempfile.mkdtemp()
    folders: list[Any] = [mine, shared[0]] if exact else [None, None]
    monitors = [normopt.TrajectoryMonitor(o, directory=f) for o, f in zip(opts, folders, strict=True)]
    for step in range(12):
        give_gradients(plain, cut, step % 3)
        for opt, monitor in zip(opts, monitors, strict=True):
            opt.step()
            monitor.record(1.0 / (step + 1))
    a, b = (monitor.result() for monitor in monitors)
    found = {
        name: float(np.nanmax(np.abs(getattr(a, name) - getattr(b, name)) / (scale or np.abs(getattr(a, name)).max())))
        for name, scale in (("update_l2", None), ("distance", None), ("cosine", 1.0), ("consecutive_cosine", 1.0))
    }
    if exact:
        dist.barrier()
        read = normopt.Trajectory.load(shared[0])
        found["load"] = float(np.abs(read.distance - b.distance).max())
        assert sorted(p.name for p in Path(shared[0]).iterdir()) == [f"rank-{r}" for r in range(dist.get_world_size())]
    return found


def adaptive() -> float:
    """The difference of the two p."""
    plain, cut = both()
    opts = [normopt.LPSGD(params, lr=0.1, p=8.0) for params in (plain, cut)]
    schedules = [normopt.schedules.AdaptiveP(opt) for opt in opts]
    for step in range(3):
        give_gradients(plain, cut, step)
        for schedule in schedules:
            schedule.step()
    a, b = (float(opt.param_groups[0]["p"]) for opt in opts)
    assert a != 8.0
    return abs(a - b) / a


def creation_of_state(optimizer: str, dim: int) -> tuple[list[int], list[int]]:
    """How many steps are counted of one that creates state, and with one whose gradient one rank alone has."""
    cut = both(dim)[1]
    model = torch.nn.ParameterList(cut)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=torch.tensor(0.01), weight_decay=0, foreach=False)
    geometry, trajectory = normopt.GeometryMonitor(opt, every=1), normopt.TrajectoryMonitor(opt, sketch=64)
    normopt.LpDecay(opt, over="rows", warmup=5)
    before = [whole(p.detach()).clone() for p in cut]

    def counted() -> list[int]:
        return [geometry.steps, trajectory._stepped, opt.param_groups[0]["lp_step"]]

    get_optimizer_state_dict(model, opt)
    created = counted()
    assert all(torch.equal(whole(p.detach()), w) for p, w in zip(cut, before, strict=True))
    opt.state.clear()
    for p in cut:
        p.grad = torch.zeros_like(p)
    gradient = cut[0].grad
    assert gradient is not None
    if dist.get_rank() == 0:
        gradient.to_local()[0, 0] = 1.0  # type: ignore[attr-defined]
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure=None)
    return created, counted()


def sparse_network() -> nn.Sequential:
    """Every kind of weight, with zeros, dead rows and dead columns, other ones in each rank's shard."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Flatten(),
        nn.Linear(100, 9),
        nn.BatchNorm1d(9),
        nn.Linear(9, 3, bias=False),
        nn.Linear(3, 1),
    ).eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.dim() > 1):
            p.mul_(torch.rand(p.shape) < 0.7)
            p[-1 - i % 2 :] = 0
            p[:, i % p.shape[1]] = 0
            p.view(-1)[1] = 1e-20
    return model


def sharded_network(how: str) -> nn.Module:
    """The same over ranks: by FSDP2, also with the whole copies of a forward pass, or by tensor parallelism."""
    model = sparse_network()
    if how.startswith("FSDP2"):
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh_of(dist.get_world_size()))
        fully_shard(model, mesh=mesh_of(dist.get_world_size()))
        if how.endswith("forward"):
            for layer in model:
                if isinstance(layer, FSDPModule):
                    layer.set_reshard_after_forward(False)
            with torch.no_grad():
                model(torch.randn(2, 2, 6, 6))
            assert not any(is_dtensor(p) for p in model.parameters())
        return model
    mesh = mesh_of(2, 2) if how == "two dims" else mesh_of(dist.get_world_size())
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            last = Shard(p.dim() - 1)
            places = {"dim 0": [Shard(0)], "dim 1": [last], "copies": [Replicate()], "two dims": [Shard(0), last]}
            setattr(module, name, nn.Parameter(shards_of(p.detach(), mesh, places[how])))
    return model


def sparse_report(how: str) -> tuple[Any, Any]:
    return report(sharded_network(how), threshold=0.1), report(sparse_network(), threshold=0.1)


def pruned(how: str, settings: dict[str, Any]) -> None:
    """The same entries go as of whole weights, from what the optimizer steps and what the model computes with."""
    plain, model = sparse_network(), sharded_network(how)
    assert prune_(model, **settings) == prune_(plain, **settings)
    assert any(p.any() for p in plain.parameters() if p.dim() > 1)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert is_dtensor(b)
        assert torch.equal(whole(b.detach()), a.detach())
    if how.startswith("FSDP2"):
        x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def stored_sparsely(how: str, layout: Any) -> None:
    plain, got = sparse_network().state_dict(), sparse_state_dict(sharded_network(how), layout)
    back = dense_state_dict(got)
    assert got["3.weight"].layout == getattr(torch, f"sparse_{layout}")
    assert list(back) == list(plain)
    assert all(type(x) is torch.Tensor and torch.equal(x, plain[name]) for name, x in back.items())


def refused_sparsity(what: str, how: str) -> str:
    model = sharded_network(how)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    if what == "prune_":
        mesh = mesh_of(dist.get_world_size())
        model[5].weight = nn.Parameter(DTensor.from_local(torch.ones(3, 9), mesh, [Partial()]))
        before = before[:6]
    calls = dict(
        to_sparse=to_sparse,
        to_dense=to_dense,
        shrink=lambda m: shrink(m, torch.randn(2, 2, 6, 6)),
        prune_=lambda m: prune_(m, fraction=0.5),
    )
    try:
        calls[what](model)
    except ValueError as error:
        for p, old in zip(model.parameters(), before, strict=False):
            assert torch.equal(whole(p.detach()), old)
        return str(error)
    return ""

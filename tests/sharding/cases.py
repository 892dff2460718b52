"""A sharded optimizer beside an unsharded one, from the same states and with the same gradients, step by step."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import DEFAULT, patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import normopt
from normopt.norms import schatten
from normopt.norms.base import Norm, Scale
from normopt.sharding.layout import Layout, gradient_of, layout_of, to_local
from tests.directions import direction
from tests.versions import shards_of

# On 4 ranks: even, uneven, with empty parts, a stack, a vector, and three of one shape.
SHAPES = [(8, 3), (5, 4), (1, 6), (3, 5), (6, 2, 3), (7,), (2,), (4, 6), (4, 6), (4, 6), (9, 9)]
STEPS = int(os.environ.get("NORMOPT_STEPS", "20"))  # 5 and more have gradients of every size


@normopt.norms.register("of-a-tensor")
class OfATensor(normopt.norms.TensorNorm):
    """A user's: the longest row, by a dual norm and a dual map of whole tensors."""

    def dual_norm(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).norm(dim=1).sum()

    def dual_map(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1)
        return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).reshape(x.shape)


@normopt.norms.register("of-pieces")
class OfPieces(normopt.norms.Norm):
    """A user's: ℓ2 by partial sums, in the simplest way."""

    def norm(self, x: Tensor) -> Tensor:
        return x.norm()

    def measure(self, c: list[Tensor]) -> Tensor:
        return torch.stack([x.double().square().sum() for x in c])[:, None]

    def combine(self, partials: Tensor) -> Tensor:
        return partials.sum(-2).sqrt()

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        norms = scalars[:, 0].clamp(min=1e-30)
        return [(x * n ** (kappa - 1)).to(x.dtype) for x, n in zip(c, norms, strict=True)]


_meshes: dict[object, DeviceMesh] = {}


def mesh_of(*sizes: int) -> DeviceMesh:
    """Made once: every mesh makes process groups."""
    if sizes not in _meshes:
        names = ("replicate", "shard")[-len(sizes) :]
        _meshes[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return _meshes[sizes]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def laid(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` lies."""
    return shards_of(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x


def gradient(shape: tuple[int, ...], step: int, i: int, dtype: torch.dtype) -> Tensor:
    """One that no rank computes: large entries and small, and every seventh a zero."""
    g = torch.Generator().manual_seed(1000 * step + i)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    x = x.sign() * x.abs() ** 3 * 10.0 ** ((step + i) % 5 - 2)
    x.view(-1)[::7] = 0
    return x.to(dtype)


def error(ours: Tensor, theirs: Tensor, before: Tensor | None = None) -> float:
    """The largest difference, relative to the largest entry of the weights or of the step; of a DTensor, its shard's.

    Shards are compared where they are: to gather them would take as long as all else.
    """
    assert ours.shape == theirs.shape
    b = theirs.double()
    a, part = to_local(ours).double(), to_local(laid(b, ours))
    if not part.numel():
        return 0.0
    size = max(float(b.abs().amax()), 0.0 if before is None else float((b - before.double()).abs().amax()))
    return float((a - part).abs().amax()) / max(size, 1e-30)


def compare(
    optimizer: str,
    settings: dict[str, Any],
    dim: int = 0,
    shapes: list[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    mesh: tuple[int, ...] | None = None,
    steps: int = STEPS,
    replicated: tuple[int, ...] = (),
    reset: bool = True,
) -> dict[str, float]:
    """The largest errors of weights, state and norm pairs over the steps, and what they have in common bitwise.

    Args:
        optimizer: a name of the zoo.
        settings: its settings.
        dim: which is cut, of tensors that have it; the others are replicated.
        shapes: of the parameters.
        dtype: theirs.
        mesh: its shape; all ranks in one dim by default.
        steps: how many.
        replicated: which parameters are not cut.
        reset: whether the sharded one goes on from the unsharded one's state after each step.
    """
    mesh_ = mesh_of(*(mesh or (dist.get_world_size(),)))
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]
    cut = []
    for i, x in enumerate(plain):
        here = Shard(dim) if x.dim() > dim and i not in replicated else Replicate()
        placements = [Replicate()] * (mesh_.ndim - 1) + [here]
        cut.append(torch.nn.Parameter(shards_of(x.detach(), mesh_, placements)))
    make = normopt.SteepestDescent if optimizer == "steepestdescent" else normopt.get_optimizer(optimizer)
    with_groups = {k: v for k, v in settings.items() if k != "backend"}
    theirs, ours = make(plain, **with_groups), make(cut, **with_groups, **settings.get("backend", {}))
    found = {"weights": 0.0, "state": 0.0, "pairs": 0.0, "unequal": 0.0}
    for step in range(steps):
        before = [x.detach().clone() for x in plain]
        for i, (a, b) in enumerate(zip(plain, cut, strict=True)):
            a.grad = gradient(tuple(a.shape), step, i, dtype)
            b.grad = laid(a.grad, b)
        theirs.step()
        ours.step()
        for a, b, old in zip(plain, cut, before, strict=True):
            shard = laid(a.detach(), b)
            found["weights"] = max(found["weights"], error(b.detach(), a.detach(), old))
            found["unequal"] += float((to_local(b.detach()) != to_local(shard)).sum())
            for key, value in theirs.state[a].items():
                # What Kahan's rounding keeps is a small part of a weight.
                of = a.detach() if key == "kahan_compensation" else None
                found["state"] = max(found["state"], error(ours.state[b][key], value, of))
                if reset:
                    is_sharded = isinstance(ours.state[b][key], DTensor)
                    ours.state[b][key] = laid(value.clone(), b) if is_sharded else value.clone()
            assert theirs.state[a].keys() == ours.state[b].keys()
            if reset:
                with torch.no_grad():
                    b.copy_(shard)
        for x, y in zip(ours.norm_pairs(), theirs.norm_pairs(), strict=True):
            assert (x is None) == (y is None), (x, y)
            if x is not None and y is not None:
                found["pairs"] = max(found["pairs"], *(error(p[None], q[None]) for p, q in zip(x, y, strict=True)))
    return found


ROUNDINGS = {"float32": torch.float32, "kahan": torch.bfloat16, "nearest": torch.bfloat16}


def off_the_sphere(steps: int) -> dict[str, float]:
    """The largest relative error of ‖W‖_F under constraint="sphere" for each rounding, under Kahan's of both parts."""
    torch.manual_seed(0)
    first = {name: torch.randn(128, 64).to(dtype) for name, dtype in ROUNDINGS.items()}
    mesh = mesh_of(dist.get_world_size())
    params = {name: torch.nn.Parameter(shards_of(x, mesh, [Shard(0)])) for name, x in first.items()}
    groups = [dict(params=[p], rounding=name if name != "float32" else "nearest") for name, p in params.items()]
    opt = normopt.SteepestDescent(groups, lr=0.02, constraint="sphere", momentum=0.9)
    worst = dict.fromkeys(params, 0.0)
    for step in range(steps):
        torch.manual_seed(step)
        for p in params.values():
            p.grad = laid(torch.randn(128, 64).to(p.dtype), p)
        opt.step()
        for name, p in params.items() if step % 20 == 0 or step == steps - 1 else ():
            now = whole(p.detach()).double() + whole(opt.state[p].get("kahan_compensation", torch.zeros(()))).double()
            worst[name] = max(worst[name], abs(float(now.norm() / first[name].double().norm()) - 1))
    return worst


def compare_as(optimizer: str, settings: dict[str, Any], how: dict[str, Any]) -> dict[str, float]:
    """`compare`, with what it is told by name in a dict."""
    return compare(optimizer, settings, **how)


def sharded(shapes: list[tuple[int, ...]], seed: int = 0, dim: int = 0) -> list[torch.nn.Parameter]:
    """Parameters, cut along a dim, with gradients."""
    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(seed)
    drawn = [shards_of(torch.randn(s), mesh, [Shard(dim)]) for s in shapes]
    params = [torch.nn.Parameter(x) for x in drawn]
    for i, p in enumerate(params):
        p.grad = laid(gradient(tuple(p.shape), 0, i, torch.float32), p)
    return params


def counted(step: Callable[[], object]) -> dict[str, int]:
    """How many collectives a step makes, by their names in torch.distributed; and the bytes that others send here."""
    counts: Counter[str] = Counter()

    def noted(name: str) -> Callable[..., Any]:
        def note(*given: Any, **__: Any) -> Any:  # as broadcast is called by torch, all is named
            counts[name.removesuffix("_single")] += 1
            if name == "all_gather":
                into, mine = given[:2]
                counts["bytes"] += (len(into) - 1) * mine.numel() * mine.element_size()
            elif name == "all_to_all_single":
                _, x, sizes = given[:3]
                counts["bytes"] += (sum(sizes) - sizes[dist.get_rank()]) * x.element_size()
            return DEFAULT  # go on with what is wrapped

        return note

    with ExitStack() as stack:
        for name in ("all_gather", "all_reduce", "all_to_all_single", "broadcast", "all_gather_into_tensor"):
            stack.enter_context(patch.object(dist, name, wraps=getattr(dist, name), side_effect=noted(name)))
        with CommDebugMode() as functional:  # those that DTensors make of themselves
            step()
    assert functional.get_total_counts() == sum(counts.values()) - counts["bytes"], functional.get_comm_counts()
    return {name: n for name, n in counts.items() if n}


def collectives(settings: dict[str, Any], shapes: list[tuple[int, ...]]) -> dict[str, int]:
    opt = normopt.SteepestDescent(sharded(shapes), lr=0.1, **settings)
    opt.step()
    return counted(opt.step)


def collectives_of_groups() -> dict[str, int]:
    params = sharded([(5, 4), (3, 3), (7,)])
    groups = [dict(params=[p], norm="lp", p=2.5 + i, agr=True) for i, p in enumerate(params)]
    opt = normopt.SteepestDescent(groups, lr=0.1)
    opt.step()
    return counted(opt.step)


def mapped_here(shapes: list[tuple[int, ...]]) -> int:
    """How many matrices this rank orthogonalises."""
    opt = normopt.SteepestDescent(sharded(shapes), lr=0.1, norm="spectral", scale="unit")
    seen: list[int] = []
    real = schatten.singular
    with patch.object(schatten, "singular", lambda y: (seen.append(len(y)), real(y))[1]):
        opt.step()
    return sum(seen)


def refused(case: str) -> str:
    """The message of the error."""
    mesh = mesh_of(2, 2)
    x = torch.randn(4, 4)
    settings: dict[str, Any] = {}
    if case == "two cuts":
        params = [shards_of(x, mesh, [Shard(0), Shard(1)])]
    elif case == "partial":
        params = [DTensor.from_local(x, mesh_of(4), [Partial()])]
    elif case == "unlike chunk":
        params = [
            DTensor.from_local(
                torch.randn(1 + dist.get_rank(), 2), mesh_of(4), [Shard(0)], shape=(10, 2), stride=(2, 1)
            )
        ]
    elif case == "matrices over a group":
        params, settings = [laid(x, sharded([(4, 4)])[0])], dict(norm="spectral", scope="group")
    elif case == "p = 1 over a group, cut along dim 1":
        params, settings = [laid(x, sharded([(4, 4)], dim=1)[0])], dict(norm="l1", scope="group")
    elif case == "differentiable":
        params, settings = [laid(x, sharded([(4, 4)])[0])], dict(differentiable=True)
    else:
        params = [shards_of(x, m, [Shard(0)]) for m in (mesh_of(4), mesh["shard"])]
        settings = dict(scope="group", norm="lp", p=3.0)
    try:
        normopt.SteepestDescent([torch.nn.Parameter(p) for p in params], **settings)
    except ValueError as error:
        return str(error)
    return ""


def warned(case: str) -> list[str]:
    x = torch.zeros(4, 2)
    if case == "half zero":
        x[0] = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        normopt.SGD([torch.nn.Parameter(laid(x, sharded([(4, 2)])[0]))], lr=0.1, weight_decay=0.1, decay="lp")
    return [str(w.message) for w in caught]


def partial_gradients() -> bool:
    """The step of a parameter that every rank has whole, and of whose gradient every rank has a term."""
    mesh = mesh_of(dist.get_world_size())
    p = torch.nn.Parameter(shards_of(torch.ones(3), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((3,), 1.0 + dist.get_rank()), mesh, [Partial()])
    normopt.SGD([p], lr=1.0).step()
    return torch.equal(whole(p.detach()), torch.full((3,), 1.0 - sum(1.0 + r for r in range(dist.get_world_size()))))


def disagreed(case: str) -> list[str]:
    """What is said of a rank that steps otherwise, and that nothing was written."""
    params = sharded([(4, 4), (4, 4), (7, 2)])
    settings: dict[str, Any] = dict(norm="lp", p=3.0, lr=0.1)
    if dist.get_rank() == 1:
        if case == "gradients":
            params[0].grad = None
        elif case == "order":
            params = [params[2], params[0], params[1]]
        elif case == "p":
            settings["p"] = 4.0
        elif case == "lr":
            settings["lr"] = 0.2
        elif case == "AGR":
            settings["agr"] = True
    before = [to_local(p).clone() for p in params]
    opt = normopt.SteepestDescent(params, **settings)
    said = []
    for _ in range(2):  # again as long as it is so
        try:
            opt.step()
        except RuntimeError as error:
            said.append(str(error))
    assert all(torch.equal(a, to_local(b)) for a, b in zip(before, params, strict=True))
    return said


def shares_and_gathered(norm: Norm, scale: Scale, dim: int) -> bool:
    """Whether whole matrices on the rank that owns them, and all matrices on all ranks, give the same bits."""
    params = sharded([(5, 4), (3, 3), (5, 4), (1, 6), (9, 2)], dim=dim)
    layouts = [layout_of(p) for p in params]
    c = [gradient_of(p).clone() for p in params]
    u, pair = direction(norm, c, scale, False, 0.0, layouts)
    whole = [gathered_whole(x, lay) for x, lay in zip(c, layouts, strict=True) if lay is not None]
    expected, both = direction(norm, whole, scale, False, 0.0)
    parts = [part_of(x, lay) for x, lay in zip(expected, layouts, strict=True) if lay is not None]
    if scale == "matched":  # lengths are sums of all shards, and may be rounded otherwise
        same = all(error(a, b) <= 1e-6 for a, b in zip(u, parts, strict=True))
    else:
        same = all(torch.equal(a, b) for a, b in zip(u, parts, strict=True))
    return (
        same
        and (pair is None) == (both is None)
        and (pair is None or both is None or torch.equal(pair.dual, both.dual))
    )


def gathered_whole(part: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A whole tensor, on every rank, from its shards: one collective for each tensor."""
    sizes = [math.prod(shape) for shape in layout.shapes()]
    mine = torch.nn.functional.pad(part.reshape(-1), (0, max(sizes) - part.numel()))
    everyones = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyones, mine, group=layout.group)
    shards = [x[:n].view(shape) for x, n, shape in zip(everyones, sizes, layout.shapes(), strict=True)]
    return torch.cat(shards, layout.dim)


def part_of(whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The local shard of a whole tensor."""
    return torch.split(whole, layout.lengths(), layout.dim)[layout.rank].contiguous()

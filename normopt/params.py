"""Parameters, looked at before they are stepped: which have gradients, which go together, which can never move."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from normopt.plan import Plan
from normopt.sharding.direction import way_of
from normopt.sharding.exchange import nonzero
from normopt.sharding.layout import is_dtensor, layout_of


def check_admissible(params: list[Tensor]) -> None:
    """Raise a ValueError if a parameter cannot be stepped in place: one without a shape, or a lazy view."""
    for p in params:
        if is_lazy(p):
            raise ValueError("a parameter has no shape yet, because its module is lazy: run a batch through it first")
        if p.is_conj() or p.is_neg():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a lazy conjugate or negative of another tensor's memory: "
                "make it of x.resolve_conj().resolve_neg()"
            )


def with_gradients(params: list[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient; a RuntimeError if one of those is not dense."""
    ready = [p for p in params if p.grad is not None]
    for p in ready:
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(p.grad.shape)} has the layout {p.grad.layout}, and normopt takes dense "
                "ones only: use Embedding(sparse=False), or give these parameters to torch.optim.SparseAdam"
            )
    return ready


def batches(plan: Plan, params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The lists that are walked together: one tensor, one device and dtype, or the whole group."""
    if not params:
        return
    if plan.scope == "group" and plan.backend != "fused":
        yield params
    elif plan.backend == "for-loop":
        yield from ([p] for p in params)
    else:
        buckets: dict[object, list[Tensor]] = {}
        for p in params:  # a kernel has nothing to do for empty ones
            empty = plan.backend == "fused" and not p.numel()
            layout = layout_of(p)
            lies = layout and (layout.group, way_of(plan.norm, plan.scale, layout))
            buckets.setdefault((p.device, p.dtype, empty, is_dtensor(p), lies), []).append(p)
        yield from buckets.values()


def warn_if_stuck(
    params: list[Tensor],
    p: float,
    remedy: str = "weight_decay=0 in a param group of their own",
    stacklevel: int = 3,
) -> None:
    """Warn of tensors that ℓp decay will hold at zero, unless ``remedy`` is taken; frozen ones are never stepped."""
    decayed = [x for x in params if x.requires_grad and x.dim() >= 2 and x.numel() and not x.is_meta]
    stuck = [tuple(x.shape) for x, alive in zip(decayed, nonzero(decayed), strict=True) if not alive]
    if stuck:
        warnings.warn(
            f"ℓp decay with p = {p:g} < 2 holds a zero weight at zero, and these tensors are all zero: {stuck}. "
            f"Initialise them away from zero, or give them {remedy}.",
            UserWarning,
            stacklevel=stacklevel,
        )

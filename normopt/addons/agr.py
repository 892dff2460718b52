"""AGR for any optimizer: replace the gradients by regularized ones for a step, then restore them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_bool, check_choice, names_arguments
from normopt.addons.attach import AddOn, check_dense_grads
from normopt.norms.base import as_real, num_reals, stack, to_compute_dtype
from normopt.sharding.exchange import of_each
from normopt.sharding.layout import resolved, to_local
from normopt.stages import agr

SCOPES = ("tensor", "group")


class SwappedGrad(NamedTuple):
    """Original gradient, its temporary replacement, and the replacement's version counter."""

    param: Tensor
    gradient: Tensor
    temporary: Tensor
    version: int


class AGR(AddOn):
    """Adaptive gradient regularization for any optimizer: shrink a gradient's entries, the dominant ones the most.

    ::

        step(g)  becomes  step(g·(1 − |g|/Σ|g|))       Σ over each tensor, or over its param group

    AGR acts before the moments, so that all of the optimizer's state is built from regularized gradients (including
    Adan's previous gradient, as in the paper). Weight decay is not regularized, unless the optimizer adds it to the
    gradient later. An all-zero tensor stays zero. A one-element tensor, which the formula would erase, is left alone;
    see `normopt.stages.agr`.

    After the step every ``.grad`` is the same tensor as before, with the same values. With a closure, the original
    gradients are restored before each call and regularized after it; gradients from before the closure are not
    regularized. If a step raises, the next step or ``detach()`` restores the gradients, unless you have replaced or
    written them since.

    AGR commutes with a positive factor, so it may act on gradients that a GradScaler has not unscaled yet, as in fused
    steps. ``detach()`` removes it. Under `torch.compile` it causes a graph break.

    Args:
        optimizer: any optimizer but torch.optim.LBFGS and normopt's own, which have the setting ``agr=True``.
        scope: what Σ is over: each "tensor", as in the paper, or the param "group" as one vector, as trainers of
            low-rank adapters have it. The more tensors a group has, the weaker is "group". Default "tensor".

    Settings of a param group: ``agr``, True by default, and ``agr_scope``.

    Memory: one number per parameter during the step. 16-bit gradients are computed in float32.

    Raises:
        TypeError: not an optimizer, or a wrapper around one that has no hooks.
        ValueError: a normopt optimizer, LBFGS, one that is ``differentiable``, or one that already has an AGR; an
            unknown scope.
        RuntimeError: in ``step()``, before anything is written, for a sparse gradient, or one that torch refuses to
            assign, such as when its parameter's shape or dtype has changed.

    Source: Adaptive Gradient Regularization, arXiv:2407.16944.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> agr = normopt.AGR(opt)
    """

    @names_arguments
    def __init__(self, optimizer: Optimizer, scope: Literal["tensor", "group"] = "tensor") -> None:
        check_choice("scope", scope, SCOPES)
        self._swapped: list[SwappedGrad] = []
        super().__init__(optimizer, {"agr": True, "agr_scope": scope})

    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        check_bool(f"agr of {where}", group["agr"])
        check_choice(f"agr_scope of {where}", group["agr_scope"], SCOPES)

    def _abort(self) -> None:
        # A replacement that was written since (by the user, or by the step that raised) is kept: its values may matter.
        self._swapped = [s for s in self._swapped if _version(s.temporary) == s.version]
        self._restore()

    @torch.no_grad()
    def _on_gradients(self) -> None:
        groups = [group for group in self.optimizer.param_groups if group["agr"]]
        members = [[p for p in group["params"] if p.grad is not None] for group in groups]
        params = [p for some in members for p in some]
        check_dense_grads(params, "AGR")
        gradients = [[p.grad for p in some] for some in members]
        whole = [group["agr_scope"] == "group" for group in groups]
        try:
            for p, new in zip(params, _regularize_all(gradients, whole), strict=True):
                self._swapped.append(SwappedGrad(p, p.grad, new, _version(new)))
                p.grad = new
        except Exception:  # torch refuses the assignment if the parameter's shape or dtype has changed
            self._restore()
            raise

    def _restore(self) -> None:
        for s in self._swapped:
            if s.param.grad is s.temporary:
                s.param.grad = s.gradient
        self._swapped = []


def _regularize_all(groups: list[list[Tensor]], whole: list[bool]) -> Iterator[Tensor]:
    """Yield regularized copies of all gradients with their memory layout, which some fused steps rely on.

    Args:
        groups: the gradients of each param group.
        whole: for each group, whether its gradients are regularized as one vector.
    """
    gradients = [g for gs in groups for g in gs]
    sums = of_each(gradients, lambda g: agr.measure([to_compute_dtype(as_real(resolved(g)))])[0], agr.combine)
    rest = iter(sums)
    for gs, together in zip(groups, whole, strict=True):
        found, sizes = list(islice(rest, len(gs))), [num_reals(g) for g in gs]
        if together and gs:
            scalars, sizes = agr.over_group(stack(found), sizes)
            found = list(scalars)
        for g, s, size in zip(gs, found, sizes, strict=True):
            new = torch.empty_like(g)
            here, shard = as_real(to_local(new)), to_compute_dtype(as_real(resolved(to_local(g))))
            if size <= 1:
                here.copy_(shard)
            elif here.dtype == shard.dtype:
                agr.regularized(shard, s.to(shard), out=here)
            else:
                here.copy_(agr.regularized(shard, s.to(shard)))
            yield new


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

"""AGR on any optimizer: what it reads as its gradients is regularized, and put back after the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_bool
from normopt.addons.attach import AddOn, Closure, refuse_sparse
from normopt.engine import SteepestDescent
from normopt.norms.base import as_real, num_reals, to_compute_dtype
from normopt.sharding.exchange import of_each
from normopt.sharding.layout import local, resolved
from normopt.stages import agr


class Stand(NamedTuple):
    """A gradient, what stands in for it during a step, and how often that had been written then."""

    param: Tensor
    gradient: Tensor
    stand_in: Tensor
    version: int


class AGR(AddOn):
    """Adaptive gradient regularization on any optimizer: the entries that dominate a gradient are held back the most.

    ::

        step(g)  becomes  step(g·(1 − |g|/Σ|g|))                  Σ over each tensor

    before the moments, so that all an optimizer keeps is made of it: Adan's previous gradient too, as in the paper.
    Its weight decay is not, unless it is one that is added to the gradient later. An all-zero tensor stays zero, and a
    tensor of one element is left alone, which the formula would erase; see `normopt.stages.agr`.

    After the step every ``.grad`` is the tensor that it was before, and holds what it held. With a closure, each
    call of it is followed by AGR and preceded by putting its own gradients back; gradients from before the closure
    are not regularized. If a step raises, the gradients are put back at the latest by the next step or ``detach()``,
    unless you have replaced or written them since.

    AGR commutes with a positive factor, so that it may act on gradients that a GradScaler has not unscaled yet, as
    under its fused steps. ``detach()`` takes it off. `torch.compile` of the step breaks its graph here, and goes on
    after it.

    Args:
        optimizer: any optimizer but normopt's own, which have the setting ``agr=True``, and torch.optim.LBFGS.

    Settings of a param group: ``agr``, True unless the group says otherwise.

    Memory: one number per parameter, while the step runs. 16-bit gradients are computed in float32.

    Raises:
        TypeError: not an optimizer, or one that wraps another and has no hooks.
        ValueError: a normopt optimizer, LBFGS, one that is ``differentiable``, or one that carries an AGR already.
        RuntimeError: in ``step()``, before anything is written, for a gradient that is sparse, or that torch refuses
            to be assigned, such as one whose parameter was given another shape or dtype since.

    Source: Adaptive Gradient Regularization, arXiv:2407.16944.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> agr = normopt.AGR(opt)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._stands: list[Stand] = []
        super().__init__(optimizer, {"agr": True})

    def _refuse(self, optimizer: object, settings: Mapping[str, Any]) -> None:
        if isinstance(optimizer, SteepestDescent):
            name = type(optimizer).__name__
            raise ValueError(f"AGR is a setting of normopt's own optimizers: use normopt.{name}(…, agr=True)")
        super()._refuse(optimizer, settings)

    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        check_bool(f"agr of {where}", group["agr"])

    def _before(self, closure: Closure | None) -> Closure | None:
        if closure is None:
            self._regularize()
            return None

        def regularized(*args: Any, **kwargs: Any) -> Any:
            self._put_back()
            loss = closure(*args, **kwargs)
            self._regularize()
            return loss

        return regularized

    def _after(self, closure: Closure | None) -> None:
        self._put_back()

    def _recover(self) -> None:
        # Written since by the user, such as zeroed in place, or by the step that raised: nobody can say.
        self._stands = [s for s in self._stands if _version(s.stand_in) == s.version]
        self._put_back()

    @torch.no_grad()
    def _regularize(self) -> None:
        groups = [group for group in self.optimizer.param_groups if group["agr"]]
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        refuse_sparse(params, "AGR")
        gradients = [p.grad for p in params]
        try:
            for p, new in zip(params, _regularized(gradients), strict=True):
                self._stands.append(Stand(p, p.grad, new, _version(new)))
                p.grad = new
        except Exception:  # torch refuses it where a parameter was given a shape or dtype that its gradient has not
            self._put_back()
            raise

    def _put_back(self) -> None:
        for s in self._stands:
            if s.param.grad is s.stand_in:
                s.param.grad = s.gradient
        self._stands = []


def _regularized(gradients: list[Tensor]) -> Iterator[Tensor]:
    """New tensors that lie in memory as the gradients do: some fused steps rely on it."""
    sums = of_each(gradients, lambda g: agr.measure([to_compute_dtype(as_real(resolved(g)))])[0], agr.combine)
    for g, scalars in zip(gradients, sums, strict=True):
        new = torch.empty_like(g)
        as_real(local(new)).copy_(
            agr.apply([to_compute_dtype(as_real(resolved(local(g))))], scalars[None], [num_reals(g)])[0]
        )
        yield new


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

"""``prune_``: exact zeros for what is small."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from normopt._checks import check_choice, check_number, near
from normopt.sparsity.counting import Report, report
from normopt.sparsity.layouts import SparseLinear
from normopt.sparsity.weights import Weight, weights

Over = Literal["entries", "rows", "columns"]


@torch.no_grad()
def prune_(
    model: nn.Module,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    over: Over = "entries",
    exclude: Iterable[str] = (),
) -> Report:
    """Set small weights, or whole rows or columns of small norm, to exactly zero, in place.

    Over rows, mind the output layer: its rows are the classes, and the score of a class whose row is pruned no longer
    depends on the input. Leave it out, as in ``exclude=["4.weight"]``.

    ::

        threshold        w ← 0  where  s(w) < threshold
        fraction         w ← 0  for the ⌊fraction · n⌋ of all n with the smallest s, over all tensors together

        s(w) = |w|  over "entries",    ‖W[o, :]‖₂  over "rows",    ‖W[:, i]‖₂  over "columns"

    Weight tensors, rows and columns are those of `report`; biases stay, so that a pruned row leaves a unit that puts
    out a constant, which `shrink` folds away. The norm of a row grows with its length: a fraction of rows over layers
    of different widths takes more from the narrow ones. What is zero already counts as the smallest. The weights
    go on training: what is to stay zero must be kept there, as ℓp decay does for p < 2.

    The weights may be DTensors, as under FSDP2 or tensor parallelism: thresholds, norms and fractions are those of the
    whole tensors, and every rank must call it.

    Args:
        model: any module with dense weights.
        threshold: > 0. After training with ℓp decay, any size between what it has left and what it has taken away.
        fraction: in [0, 1]. Exactly one of the two must be given.
        over: what is set to zero as one: "entries" (the default), "rows" or "columns".
        exclude: names, or patterns as of a shell, of weight tensors that are left alone, and not counted in n; such
            as that of the output layer, whose rows are the classes. None of them by default.

    Returns:
        The `Report` of the model afterwards, with the default threshold.

    Raises:
        TypeError: ``model`` is no module, or a setting of the wrong type.
        ValueError: both or none of ``threshold`` and ``fraction``, one out of range, an unknown ``over``, a name in
            ``exclude`` that fits no weight, a model with sparse layers, or a DTensor that holds partial sums. Nothing
            has been changed then.

    Memory: one number for each entry, row or column while it runs, on every rank.

    Source: ours.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> normopt.sparsity.prune_(model, threshold=1.0, over="rows").total.dead_rows
        1
        >>> model.weight.tolist()
        [[3.0, 4.0], [0.0, 0.0]]
    """
    if (threshold is None) == (fraction is None):
        given = f"threshold={threshold!r} and fraction={fraction!r}"
        raise ValueError(f"give either threshold or fraction, but the call has {given}")
    if threshold is not None:
        check_number("threshold", threshold, low=0, open_low=True)
    if fraction is not None:
        check_number("fraction", fraction, low=0, high=1)
    check_choice("over", over, ("entries", "rows", "columns"))
    chosen = _select_weights(model, exclude)
    sizes = [_magnitudes(w, over) for w in chosen]
    small = [s < threshold for s in sizes] if threshold is not None else _smallest_masks(sizes, fraction or 0.0)
    for weight, mask in zip(chosen, small, strict=True):
        weight.zero_(mask)
    return report(model)


def _select_weights(model: nn.Module, exclude: Iterable[str]) -> list[Weight]:
    """The weights to prune; refused before anything is written."""
    found = weights(model)
    if sparse := [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]:
        raise ValueError(f"{sparse[0] or 'the model'} is sparse: prune before to_sparse, or after to_dense")
    if partial := [w.name for w in found if any(p.is_partial() for p in getattr(w.tensor, "placements", ()))]:
        raise ValueError(
            f"{partial[0]} is a DTensor of partial sums, which has no entries to set to zero: redistribute it to "
            "Replicate or Shard"
        )
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be several names, but is {exclude!r}: write [{exclude!r}]")
    patterns = list(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold names, but holds {pattern!r} ({type(pattern).__name__})")
        names = [w.name for w in found]
        if not fnmatch.filter(names, pattern):
            hint = near(pattern, names) or f"; the first are {', '.join(names[:5])}"
            raise ValueError(f"exclude holds {pattern!r}, which fits no weight of the model{hint}")
    return [w for w in found if not any(fnmatch.fnmatchcase(w.name, pattern) for pattern in patterns)]


def _magnitudes(weight: Weight, over: Over) -> Tensor:
    """|w|, or the norms of rows or columns, in a shape that broadcasts to the weight's units."""
    sizes = weight.units().abs()
    if over == "entries" or not sizes.numel():
        return sizes
    dims = weight.rows if over == "rows" else weight.columns
    # Relative to the largest entry, so that no square is lost or overflows.
    top = sizes.amax(dims, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    return top * (sizes / top).square().sum(dims, keepdim=True).sqrt()


def _smallest_masks(sizes: list[Tensor], fraction: float) -> list[Tensor]:
    """Masks of the smallest ⌊fraction · n⌋ of all; of equal ones, those that come first."""
    if not sizes:
        return []
    flat = torch.cat([s.flatten().to(sizes[0].device) for s in sizes])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: math.floor(Fraction(repr(fraction)) * flat.numel())]] = True
    parts = torch.split(mask, [s.numel() for s in sizes])
    return [part.reshape(s.shape).to(s.device) for part, s in zip(parts, sizes, strict=True)]

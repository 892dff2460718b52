"""``prune_``: set small weights to exactly zero."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from normopt._checks import check_choice, check_number, near, plain
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

    With over="rows", exclude the output layer, as in ``exclude=["4.weight"]``: its rows are the classes, and the score
    of a class whose row is pruned no longer depends on the input.

    ::

        threshold        w ← 0  where  s(w) < threshold
        fraction         w ← 0  for the ⌊fraction · n⌋ of all n with the smallest s, jointly over all tensors

        s(w) = |w|  over "entries",    ‖W[o, :]‖₂  over "rows",    ‖W[:, i]‖₂  over "columns"

    Weight tensors, rows and columns are those of `report`. Biases stay, so a unit with a pruned row outputs a constant,
    which `shrink` folds away. Row norms grow with row length, so a fraction of rows over layers of different widths
    takes more rows from narrow layers. Entries that are already zero count as the smallest. Pruned weights still
    train: to keep them at zero, use for example ℓp decay with p < 2.

    The weights may be DTensors, as under FSDP2 or tensor parallelism: thresholds, norms and fractions are those of the
    full tensors, and every rank must call it.

    Args:
        model: any module with dense weights.
        threshold: > 0. After training with ℓp decay, any value between the zeroed and the remaining magnitudes.
        fraction: in [0, 1]. Exactly one of the two must be given.
        over: the unit of pruning: "entries" (the default), "rows" or "columns".
        exclude: names or shell-style patterns of weight tensors to leave unchanged and not count in n, such as the
            output layer's. Empty by default.

    Returns:
        The `Report` of the pruned model, with the default threshold.

    Raises:
        TypeError: ``model`` is not a module, or a setting has the wrong type.
        ValueError: both or neither of ``threshold`` and ``fraction``, one out of range, an unknown ``over``, a name in
            ``exclude`` that matches no weight, a model with sparse layers, or a DTensor of partial sums. The model is
            then unchanged.

    Memory: one number per entry, row or column while it runs, on every rank.

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
        raise ValueError(f"give either threshold or fraction, but the call has {threshold=} and {fraction=}")
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
    """Return the weights to prune, after all checks, so that an error changes nothing."""
    found = weights(model)
    if sparse := [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]:
        raise ValueError(f"{sparse[0] or 'the model'} is sparse: prune before to_sparse, or after to_dense")
    if partial := [w.name for w in found if any(p.is_partial() for p in getattr(w.tensor, "placements", ()))]:
        raise ValueError(f"{partial[0]} is a DTensor of partial sums: redistribute it to Replicate or Shard")
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of several names, but is {exclude!r}: write [{exclude!r}]")
    patterns, names = list(exclude), [w.name for w in found]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold names, but holds {pattern!r} ({type(pattern).__name__})")
        if not fnmatch.filter(names, pattern):
            hint = near(pattern, names) or f"; the first are {', '.join(names[:5])}"
            raise ValueError(f"exclude holds {pattern!r}, which matches no weight of the model{hint}")
    return [w for w in found if not any(fnmatch.fnmatchcase(w.name, pattern) for pattern in patterns)]


def _magnitudes(weight: Weight, over: Over) -> Tensor:
    """Return |w|, or row or column norms, in a shape that broadcasts to the weight's units."""
    sizes = weight.units().abs()
    if over == "entries" or not sizes.numel():
        return sizes
    dims = weight.dims(over)
    # Scale by the largest entry, so that no square underflows or overflows.
    top = sizes.amax(dims, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    return top * (sizes / top).square().sum(dims, keepdim=True).sqrt()


def _smallest_masks(sizes: list[Tensor], fraction: float) -> list[Tensor]:
    """Return masks of the ⌊fraction · n⌋ smallest of all; ties go to the first."""
    if not sizes:
        return []
    flat = torch.cat([s.flatten().to(sizes[0].device) for s in sizes])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: math.floor(Fraction(repr(plain(fraction))) * flat.numel())]] = True
    parts = torch.split(mask, [s.numel() for s in sizes])
    return [part.reshape(s.shape).to(s.device) for part, s in zip(parts, sizes, strict=True)]

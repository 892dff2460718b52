"""The ℓ2 lengths of rows, columns and heads, of whole tensors and of parts on many ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.norms.lp import relative_sum, size
from normopt.sharding.exchange import lockstep, pieces
from normopt.sharding.layout import Layout


def lengths(w: Tensor, layout: Layout | None, over: str, heads: int | None) -> Tensor:
    """``‖w_G‖₂`` of the group G that each row or column belongs to, in a shape that broadcasts to w's.

    Args:
        w: the part of a tensor that is here, of 2 or more dims.
        layout: how the tensor lies; None if it is here whole.
        over: "rows", "columns" or "heads".
        heads: how many equal blocks of rows.
    """
    line = 1 if over == "columns" else 0
    lines = w.movedim(line, 0).flatten(1)
    top, total = relative_sum(lines, 2.0) if lines.numel() else 2 * (lines.new_zeros(len(lines)),)
    sums = torch.stack([top, total], -1)  # of each line that is here
    first, count = 0, len(lines)
    if layout is not None and layout.dim == line:
        # Every line is whole on one rank.
        first, count = sum(layout.lengths()[: layout.rank]), layout.shape[line]
    if layout is None or (layout.dim == line and over != "heads"):
        found = sums[:, None]
    else:
        everywhere = sums.new_zeros(count, 2)
        everywhere[first : first + len(lines)] = sums
        found = torch.stack(lockstep([pieces(everywhere, [layout] * count)])[0]) if count else sums[:, None]
    if over == "heads" and heads is not None and len(found):
        found = found.reshape(heads, -1, 2)
    limits = torch.finfo(w.dtype)
    found = torch.stack([found[..., 0].clamp_min(limits.tiny), found[..., 1]], -1)
    each = size(found, 2.0) if found.numel() else found.new_zeros(len(found))
    if over == "heads":
        each = each.repeat_interleave(count // (heads or 1))[first : first + len(lines)]
    return each.reshape([-1 if d == line else 1 for d in range(w.dim())])

"""The ℓ2 lengths of rows, columns and heads, of whole tensors and of parts on many ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.norms.lp import norm_from_partials, relative_sum
from normopt.sharding.exchange import lockstep, pieces
from normopt.sharding.layout import Layout


def lengths(w: Tensor, layout: Layout | None, over: str, heads: int | None) -> Tensor:
    """``‖w_G‖₂`` of the group G that each row or column belongs to, in a shape that broadcasts to w's.

    Args:
        w: the part of a tensor that is here, of 2 or more dims.
        layout: how the tensor lies; None if it is here whole.
        over: "rows", "columns" or "heads".
        heads: how many equal blocks of rows; None but over "heads".
    """
    line = 1 if over == "columns" else 0
    lines = w.movedim(line, 0).flatten(1)
    # Where every line is whole on one rank, those before this one's, and all of them.
    apart = layout is not None and layout.dim == line
    first, count = (sum(layout.lengths()[: layout.rank]), layout.shape[line]) if apart and layout else (0, len(lines))
    here = slice(first, first + len(lines))
    sums = torch.stack([w.new_full((count,), torch.finfo(w.dtype).tiny), w.new_zeros(count)], 1)
    if lines.numel():
        sums[here] = torch.stack(relative_sum(lines, 2.0), 1)
    if layout is None or (apart and over != "heads"):
        found = sums[:, None]
    else:
        found = torch.stack(lockstep([pieces(sums, [layout] * count)])[0])
    if heads is None:
        each = norm_from_partials(found, 2.0)
    else:
        each = norm_from_partials(found.reshape(heads, -1, 2), 2.0).repeat_interleave(count // heads)
    return each[here].reshape([-1 if d == line else 1 for d in range(w.dim())])

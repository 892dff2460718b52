"""ℓ2 norms of rows, columns and heads, of local and of sharded tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from normopt.norms.lp import norm_from_partials, relative_sum
from normopt.sharding.exchange import gather_pieces
from normopt.sharding.layout import Layout


def block_norms(w: Tensor, layout: Layout | None, over: str, heads: int | None) -> Tensor:
    """Return ``‖w_G‖₂`` of the block G of each local row or column, in a shape that broadcasts to w's.

    Args:
        w: the local shard of a tensor of 2 or more dims.
        layout: its sharding; None for an unsharded tensor.
        over: "rows", "columns" or "heads".
        heads: the number of equal blocks of rows for "heads"; otherwise not read.
    """
    line = 1 if over == "columns" else 0
    lines = w.movedim(line, 0).flatten(1)
    # If sharded along this dim, each line is complete on one rank: find the local offset and the global count.
    cut = layout if layout is not None and layout.dim == line else None
    first = sum(cut.lengths()[: cut.rank]) if cut else 0
    count = cut.shape[line] if cut else len(lines)
    here = slice(first, first + len(lines))
    sums = torch.stack([w.new_full((count,), torch.finfo(w.dtype).tiny), w.new_zeros(count)], 1)
    if lines.numel():
        sums[here] = torch.stack(relative_sum(lines, 2.0), 1)
    if layout is None or (cut and over != "heads"):
        found = sums[:, None]
    else:
        found = torch.stack(gather_pieces([(sums, [layout] * count)])[0])
    if over == "heads" and heads:
        each = norm_from_partials(found.reshape(heads, -1, 2), 2.0).repeat_interleave(count // heads)
    else:
        each = norm_from_partials(found, 2.0)
    return each[here].reshape([-1 if d == line else 1 for d in range(w.dim())])

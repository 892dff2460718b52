"""Which matrix a tensor is: every matrix norm reads a tensor as a stack of matrices, and writes it back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MATRIX_VIEWS = ("flatten", "batch", "transposed")


def to_matrices(x: Tensor, view: str, blocks: int) -> Tensor:
    """A tensor as a stack of matrices, shape [stack, rows, columns].

    ::

        "flatten"      out × everything else: linear layers and convolutions
        "batch"        leading dims are a stack of matrices: experts
        "transposed"   dims 0 and 1 change places first: embeddings (vocabulary × features), transposed convolutions

    A vector is one column. ``blocks`` cuts the rows into that many equal matrices (fused q, k, v; heads).
    """
    if x.dim() <= 1:
        x = x.reshape(1, -1, 1)
    elif view == "batch":
        x = x.reshape(-1, *x.shape[-2:])
    else:
        x = (x.transpose(0, 1) if view == "transposed" else x).flatten(1)[None]
    stack, rows, columns = x.shape
    return x.reshape(stack * blocks, rows // blocks, columns)


def from_matrices(y: Tensor, like: Tensor, view: str) -> Tensor:
    """The inverse of ``to_matrices``: a stack of matrices in the shape of the tensor that it came from."""
    if view == "transposed" and like.dim() >= 2:
        return y.reshape(like.transpose(0, 1).shape).transpose(0, 1)
    return y.reshape(like.shape)


def check_matrix(shape: torch.Size, view: str, blocks: int) -> None:
    """Raise a ValueError where a tensor of this shape cannot be cut into ``blocks``."""
    rows = math.prod(shape) if len(shape) <= 1 else shape[{"flatten": 0, "batch": -2, "transposed": 1}[view]]
    if rows % blocks:
        raise ValueError(
            f"blocks = {blocks} does not divide the {rows} rows of a tensor of shape {tuple(shape)} under "
            f'matrix_view="{view}": give the tensors it does divide a param group of their own'
        )

"""Weight tensors of a model, viewed as groups × output units × input units × the rest; DTensors are gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from normopt._checks import is_quantized
from normopt.sharding.layout import full_tensor, is_dtensor
from normopt.sparsity.layouts import SparseLinear, prepare


@dataclass(frozen=True)
class Weight:
    """Weight tensor of two dims or more.

    Args:
        name: its name in the model.
        tensor: the tensor.
        groups: the groups of a grouped convolution, else 1.
        transposed: dim 0 holds the input units.
    """

    name: str
    tensor: Tensor
    groups: int
    transposed: bool

    def units(self) -> Tensor:
        """Return a view [groups, output units per group, input units per group, …].

        A DTensor is gathered: all its ranks must call this.
        """
        return self._units(full_tensor(self.tensor))

    def _units(self, w: Tensor) -> Tensor:
        units = torch.unflatten(w, 0, (self.groups, len(w) // self.groups)) if len(w) else w[None]
        return units.transpose(1, 2) if self.transposed else units

    def zero_(self, mask: Tensor) -> None:
        """Zero the masked entries of ``units()`` in place; the mask broadcasts to their shape."""
        w = full_tensor(self.tensor)
        self._units(w).masked_fill_(mask, 0)
        if is_dtensor(self.tensor):
            from torch.distributed.tensor import DTensor, Replicate

            mesh, placements = cast(DTensor, self.tensor).device_mesh, cast(DTensor, self.tensor).placements
            full = DTensor.from_local(w, mesh, [Replicate()] * mesh.ndim, run_check=False)
            self.tensor.copy_(full.redistribute(placements=placements))

    def dims(self, over: str) -> tuple[int, ...]:
        """Return the dims of ``units()`` that span one of "rows" or "columns".

        A row holds the incoming weights of an output unit, a column the outgoing weights of an input unit.
        """
        return (2 if over == "rows" else 1, *range(3, self.tensor.dim() + 1))


def weights(model: nn.Module) -> list[Weight]:
    """Return every weight tensor once, in definition order, under its first name.

    Rows are dim 0 and columns dim 1, swapped in transposed convolutions. Tensors of fewer than two dims (biases and
    gains) are left out, and so are integers and 8-bit floats (codes of quantized layers). FSDP2 modules are resharded.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a weight of a lazy module has no shape yet.
    """
    prepare(model)
    found: list[Weight] = []
    seen: set[int] = set()
    for place, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, SparseLinear):
            tensors["weight"] = nn.Parameter(module.weight.to_dense(), requires_grad=False)
        for own, w in tensors.items():
            name = f"{place}.{own}".lstrip(".")
            if isinstance(w, UninitializedParameter):
                raise ValueError(f"{name} is lazy and has no shape yet: run the model once to initialize it")
            if w.dim() < 2 or is_quantized(w) or id(w) in seen:
                continue
            seen.add(id(w))
            groups = module.groups if isinstance(module, _ConvNd) and own == "weight" else 1
            found.append(Weight(name, w, groups, isinstance(module, _ConvTransposeNd)))
    return found

"""The weight tensors of a model, each seen as groups × output units × input units × the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from normopt.sparsity.layouts import SparseLinear

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass(frozen=True)
class Weight:
    """A tensor of two dims or more.

    Args:
        name: its name in the model.
        tensor: the tensor itself.
        units: a view of it as [groups, output units of a group, input units of a group, …]; groups is 1 but for
            grouped convolutions, whose input units differ from group to group.
    """

    name: str
    tensor: Tensor
    units: Tensor

    @property
    def rows(self) -> tuple[int, ...]:
        """The dims of ``units`` that make up one row: all that comes into an output unit."""
        return tuple(range(2, self.units.dim()))

    @property
    def columns(self) -> tuple[int, ...]:
        """The dims of ``units`` that make up one column: all that goes out of an input unit."""
        return (1, *range(3, self.units.dim()))


def weights(model: nn.Module) -> list[Weight]:
    """Every weight tensor once, in the order of definition, under the first of its names.

    Rows are dim 0 and columns dim 1, but for transposed convolutions, which store them the other way round. What has
    fewer than two dims is a bias or a gain and no weight.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a weight of a lazy module that has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, but was given {type(model).__name__}")
    found: list[Weight] = []
    seen: set[int] = set()
    for place, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, SparseLinear):
            tensors["weight"] = nn.Parameter(module.weight.to_dense(), requires_grad=False)
        for own, w in tensors.items():
            name = f"{place}.{own}".lstrip(".")
            if isinstance(w, UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run the model once, so that its lazy modules get theirs")
            if w.dim() < 2 or id(w) in seen:
                continue
            seen.add(id(w))
            groups = module.groups if isinstance(module, CONVOLUTIONS) and own == "weight" else 1
            units = w.unflatten(0, (groups, len(w) // groups)) if len(w) else w[None]
            found.append(Weight(name, w, units.transpose(1, 2) if isinstance(module, TRANSPOSED) else units))
    return found

"""Weights in torch's sparse layouts: a model that runs on them, a state dict that stores them, and the ways back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normopt._checks import check_choice

Layout = Literal["coo", "csr", "csc"]
_LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr, "csc": torch.sparse_csc}


class SparseLinear(nn.Module):
    """A linear layer that stores its nonzero weights only, in compressed rows (CSR), for inference.

    ::

        y = x Wᵀ + b          x [..., in_features] → y [..., out_features]

    `to_sparse` makes it. Its buffers are ordinary dense tensors, so that copying, moving, saving and loading work as
    for any module (torch's own compressed tensors cannot be deep-copied inside one): ``values`` and ``bias`` in the
    weight's dtype, ``columns`` and ``row_ends`` in int64. Gradients flow to x, none to the weights. A state can only be
    loaded into a layer with as many nonzeros.

    Args:
        linear: the layer whose numbers it takes over; it is left as it is.

    Attributes:
        in_features: the length of an input, as of nn.Linear.
        out_features: the length of an output.
        values: the nonzero weights, row by row, shape [n].
        columns: the column of each, shape [n].
        row_ends: where each row begins in the two, and where the last one ends, shape [out_features + 1].
        bias: shape [out_features], or None.

    Memory: 12 bytes for every nonzero weight in float32, against 4 for every weight of a dense layer: it is smaller
    below a third of nonzeros.
    """

    values: Tensor
    columns: Tensor
    row_ends: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = _sparse(linear.weight.detach(), "csr")
        self.register_buffer("values", weight.values())
        self.register_buffer("columns", weight.col_indices())
        self.register_buffer("row_ends", weight.crow_indices())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features] as a sparse CSR tensor over the buffers."""
        return self._weight(check=False)

    def _weight(self, check: bool) -> Tensor:
        _hear_warning_once()
        size = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.row_ends, self.columns, self.values, size, check_invariants=check)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``, shape [..., out_features].

        Args:
            x: shape [..., in_features].
        """
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As of nn.Linear, with the number of nonzeros."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, nonzero={self.values.numel()}"


def to_sparse(model: nn.Module) -> nn.Module:
    """A copy of a model whose ``nn.Linear`` layers store and use their nonzero weights only (`SparseLinear`).

    For inference with large layers that are almost empty, on a CPU in float32 or float64. Against the dense layer, on
    one thread of a server's CPU (``python -m benchmarks sparsity`` measures it anew):

        units      nonzeros     speed with 1 input     with 256
        128        1 %          0.3 times              2 times
        512        1 %          1                      5
        2048       1 %          14                     4
        2048       5 %          2.5                    1
        any        20 %         0.3 to 0.5             0.2

    Whole units that are zero are better taken out with `shrink`, which leaves small dense layers. The layers compute
    in CSR, which torch's linear takes with a bias, unlike COO. Convolutions stay dense: torch has none for sparse
    weights.

    ``to_dense`` is the way back. The weights are the same numbers there, zeros of either sign becoming +0.

    Args:
        model: any module; only layers whose type is exactly ``nn.Linear`` change. A weight that two layers share is
            stored for each of them.

    Returns:
        A new model; the old one stays as it is.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> sparse = normopt.sparsity.to_sparse(model)
        >>> print(sparse[0])
        SparseLinear(in_features=3, out_features=2, bias=False, nonzero=2)
        >>> sparse(torch.tensor([1.0, 10.0, 100.0]))
        tensor([20.,  1.])
    """
    return _replaced(model, nn.Linear, SparseLinear)


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a model whose `SparseLinear` layers are ``nn.Linear`` again, ready to train; undoes `to_sparse`.

    Args:
        model: any module.

    Returns:
        A new model; the old one stays as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    return _replaced(model, SparseLinear, _linear)


def sparse_state_dict(model: nn.Module, layout: Layout = "csr") -> dict[str, Any]:
    """The state dict of a model with its weights in one of torch's sparse layouts, to be saved or handed on.

    Args:
        model: any module, dense or made by `to_sparse`, whose `SparseLinear` layers store their buffers as they are.
        layout: "csr" (the default) or "csc", which hold matrices, so that tensors of more dims stay dense; or "coo",
            which holds any. Tensors of fewer than two dims are always dense.

    Returns:
        Names to tensors. ``torch.save`` and ``torch.load`` take it; `dense_state_dict` makes it loadable into a model.

    Memory: CSR and CSC take 12 bytes a nonzero in float32, COO 4 + 8·dims.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown layout.

    Example:
        >>> state = normopt.sparsity.sparse_state_dict(torch.nn.Linear(3, 2))
        >>> state["weight"].layout
        torch.sparse_csr
        >>> model = torch.nn.Linear(3, 2)
        >>> model.load_state_dict(normopt.sparsity.dense_state_dict(state))
        <All keys matched successfully>
    """
    _check_module(model)
    check_choice("layout", layout, _LAYOUTS)

    def stored(value: Any) -> Any:
        takes = isinstance(value, Tensor) and (value.dim() == 2 or (value.dim() > 2 and layout == "coo"))
        return _sparse(value, layout) if takes else value

    return {name: stored(value) for name, value in model.state_dict().items()}


def dense_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with every sparse tensor made dense: undoes `sparse_state_dict`, exactly.

    Args:
        state: names to tensors, sparse or dense, or to anything else, which stays as it is.

    Returns:
        Names to dense tensors of the same shapes, for a model's ``load_state_dict``.
    """
    return {
        name: v.to_dense() if isinstance(v, Tensor) and v.layout != torch.strided else v for name, v in state.items()
    }


def _replaced(model: nn.Module, old: type[nn.Module], new: Any) -> nn.Module:
    """A copy with every module of exactly the type ``old`` replaced by ``new`` of it; a shared one stays shared."""
    _check_module(model)
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if type(module) is not old:
            return module
        if id(module) not in made:
            made[id(module)] = new(module).train(module.training)
        return made[id(module)]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a module's second place
            if child is not None:
                setattr(parent, name, replacement(child))
    return replacement(model)


def _check_loaded(layer: SparseLinear, _: object) -> None:
    """Indices that do not fit would read beyond the memory of x, so torch checks them: once, not in every step."""
    layer._weight(check=True)


def _linear(sparse: SparseLinear) -> nn.Linear:
    # On meta first: drawing initial weights would move torch's global generator.
    linear = nn.Linear(sparse.in_features, sparse.out_features, bias=sparse.bias is not None, device="meta")
    linear.weight = nn.Parameter(sparse.weight.to_dense())
    if sparse.bias is not None:
        linear.bias = nn.Parameter(sparse.bias.clone())
    return linear


def _sparse(w: Tensor, layout: Layout) -> Tensor:
    _hear_warning_once()
    return w.to_sparse(layout=_LAYOUTS[layout])


@cache
def _hear_warning_once() -> None:
    """Swallow torch's warning that compressed layouts are in beta, which it gives once a process.

    Not in every step, because Python's filters of warnings belong to all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, but was given {type(model).__name__}")

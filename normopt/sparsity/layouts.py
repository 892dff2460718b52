"""Convert models and state dicts to torch's sparse layouts and back."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normopt._checks import check_choice
from normopt.sharding.layout import full_tensor, is_dtensor

Layout = Literal["coo", "csr", "csc"]
_LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr, "csc": torch.sparse_csc}
# Module hooks that depend on tensor names, which change.
_STATE_HOOKS = [f"_{x}_hooks" for x in ("state_dict", "state_dict_pre", "load_state_dict_pre", "load_state_dict_post")]
# Attributes of a layer that its replacement does not take over.
_NOT_COPIED = ("_parameters", "_buffers", "_modules", "trainable")


class SparseLinear(nn.Module):
    """Linear layer for inference that stores only its nonzero weights, in compressed sparse rows (CSR).

    ::

        y = x Wᵀ + b          x [..., in_features] → y [..., out_features]

    Created by `to_sparse`. Its buffers are dense tensors, so that copying, moving, saving and loading work as for any
    module (torch's sparse CSR tensors cannot be deep-copied inside a module): ``values`` and ``bias`` in the weight's
    dtype, ``columns`` and ``row_ends`` in int64. Gradients flow to x, not to the weights. A state dict loads only into
    a layer with the same number of nonzeros.

    Args:
        linear: the layer to convert; it is not changed.

    Attributes:
        in_features: the size of each input, as in nn.Linear.
        out_features: the size of each output.
        values: the nonzero weights, row by row, shape [n].
        columns: their column indices, shape [n].
        row_ends: start of each row in the two, and end of the last, shape [out_features + 1].
        bias: shape [out_features], or None.
        trainable: whether the weight and the bias of ``linear`` required gradients, for `to_dense`.

    Memory: 12 bytes per nonzero weight in float32, against 4 bytes per weight in a dense layer: less if under a third
    of the weights are nonzero.
    """

    values: Tensor
    columns: Tensor
    row_ends: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.trainable = linear.weight.requires_grad, linear.bias is not None and linear.bias.requires_grad
        weight = _to_layout(linear.weight.detach(), "csr")
        self.register_buffer("values", weight.values())
        self.register_buffer("columns", weight.col_indices())
        self.register_buffer("row_ends", weight.crow_indices())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features] as a sparse CSR tensor over the buffers."""
        return self._weight(check=False)

    def _weight(self, check: bool) -> Tensor:
        _suppress_beta_warning()
        size = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(
            self.row_ends, self.columns, self.values, size, device=self.values.device, check_invariants=check
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # Invalid indices would read out of bounds. Check them once at loading, not in every forward pass.
        self._weight(check=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b``, shape [..., out_features].

        Args:
            x: shape [..., in_features].
        """
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the text of nn.Linear, plus the number of nonzeros."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, nonzero={self.values.numel()}"


def to_sparse(model: nn.Module) -> nn.Module:
    """Copy a model with its ``nn.Linear`` layers converted to `SparseLinear`, which store only nonzero weights.

    For inference with large, very sparse layers, on a CPU in float32 or float64. Speed relative to the dense layer, on
    one thread of a server CPU (measure it with ``python -m benchmarks sparsity``):

        units      nonzeros     speed with 1 input     with 256
        128        1 %          0.3 times              2 times
        512        1 %          1                      5
        2048       1 %          14                     4
        2048       5 %          2.5                    1
        any        20 %         0.3 to 0.5             0.2

    If whole units are zero, `shrink` is better: it leaves small dense layers. The layers use CSR, because torch's
    linear supports a bias with CSR but not with COO. Convolutions stay dense: torch has none for sparse weights.

    ``to_dense`` restores the same weights, except that −0 becomes +0. Layers keep their forward and backward hooks,
    attributes and mode, and ``to_dense`` restores which tensors require gradients.

    Args:
        model: any module; only layers whose type is exactly ``nn.Linear`` change. Subclasses and parametrized layers
            stay dense. A weight shared by two layers is stored for each of them.

    Returns:
        A new model; ``model`` is not changed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has DTensors; or an ``nn.Linear`` has what a `SparseLinear` cannot keep: tensors or
            submodules besides its weight and bias, state dict hooks, or a ``forward`` set on the instance.

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
    return _replace_layers(model, nn.Linear, {"weight", "bias"}, SparseLinear)


def to_dense(model: nn.Module) -> nn.Module:
    """Copy a model with its `SparseLinear` layers converted back to trainable ``nn.Linear``; inverse of `to_sparse`.

    Parameters that were frozen before `to_sparse` are frozen again.

    Args:
        model: any module.

    Returns:
        A new model; ``model`` is not changed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: as in `to_sparse`.
    """
    return _replace_layers(model, SparseLinear, {"values", "columns", "row_ends", "bias"}, _linear)


def sparse_state_dict(model: nn.Module, layout: Layout = "csr") -> dict[str, Any]:
    """Return a model's state dict with its weights in one of torch's sparse layouts.

    Args:
        model: any module, dense or made by `to_sparse`, whose `SparseLinear` layers store their buffers unchanged.
        layout: "csr" (the default) or "csc", which support matrices only, so that tensors of more dims stay dense; or
            "coo", for any number of dims. Tensors of fewer than two dims are always dense.

    Returns:
        Names to tensors, for ``torch.save`` and ``torch.load``; convert it by `dense_state_dict` to load it into a
        model. DTensors, as under FSDP2, are gathered: every rank must call this, and gets full tensors.

    Memory: CSR and CSC take 12 bytes per nonzero in float32, COO 4 + 8·dims. A dense weight takes 4, so matrices get
    smaller if more than two thirds of their entries are zero (four fifths in COO).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown layout.

    Example:
        >>> state = normopt.sparsity.sparse_state_dict(torch.nn.Linear(3, 2))
        >>> state["weight"].layout
        torch.sparse_csr
        >>> model = torch.nn.Linear(3, 2)
        >>> model.load_state_dict(normopt.sparsity.dense_state_dict(state))
        <All keys matched successfully>
    """
    prepare(model)
    check_choice("layout", layout, _LAYOUTS)

    def stored(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        w = full_tensor(value)
        return _to_layout(w, layout) if w.dim() == 2 or (w.dim() > 2 and layout == "coo") else w

    return {name: stored(value) for name, value in model.state_dict().items()}


def dense_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with every sparse tensor made dense: the exact inverse of `sparse_state_dict`.

    Args:
        state: names to tensors, sparse or dense; other values are kept unchanged.

    Returns:
        Names to dense tensors of the same shapes, for a model's ``load_state_dict``.
    """
    return {name: v.to_dense() if isinstance(v, Tensor) else v for name, v in state.items()}


def _replace_layers(
    model: nn.Module, old: type[nn.Module], tensors: set[str], new: Callable[[Any], nn.Module]
) -> nn.Module:
    """Copy a model with each module m of exactly the type ``old`` replaced by ``new(m)``; sharing is preserved.

    Args:
        tensors: the names of all parameters and buffers of an ``old``.
    """
    check_unsharded(model)
    for name, module in model.named_modules():
        if type(module) is old:
            _check_replaceable(name, module, tensors)
    model = copy.deepcopy(model)
    made = {module: new(module) for module in model.modules() if type(module) is old}
    for module, replacement in made.items():
        # Copy hooks, mode and user attributes.
        vars(replacement).update({k: v for k, v in vars(module).items() if k not in _NOT_COPIED})
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children skips repeated modules
            if child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)


def _check_replaceable(name: str, module: nn.Module, tensors: set[str]) -> None:
    """Raise if a layer has something that its replacement cannot keep."""
    held = {*module._parameters, *module._buffers, *module._modules}
    lost = [repr(x) for x in sorted(held ^ tensors)]
    if "forward" in vars(module):
        lost.append("a forward() of its own")
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        lost.append("state dict hooks")
    if lost:
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) differs from a plain layer by {', '.join(lost)}, which "
            "its replacement cannot keep: remove that first, such as by torch.nn.utils.prune.remove or "
            "torch.nn.utils.remove_weight_norm"
        )


def _linear(sparse: SparseLinear) -> nn.Linear:
    # Create on meta: initializing weights would advance torch's global generator.
    linear = nn.Linear(sparse.in_features, sparse.out_features, bias=sparse.bias is not None, device="meta")
    linear.weight = nn.Parameter(sparse.weight.to_dense(), sparse.trainable[0])
    if sparse.bias is not None:
        linear.bias = nn.Parameter(sparse.bias.clone(), sparse.trainable[1])
    return linear


def _to_layout(w: Tensor, layout: Layout) -> Tensor:
    _suppress_beta_warning()
    # Copied, because torch's indices are a part of a storage twice as large, which torch.save would write whole.
    return w.to_sparse(layout=_LAYOUTS[layout]).clone()


@cache
def _suppress_beta_warning() -> None:
    """Trigger and suppress torch's once-per-process warning that compressed layouts are in beta.

    Cached, because warning filters are global to all threads and must not change in every step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1, device="cpu").to_sparse_csr()


def prepare(model: nn.Module) -> None:
    """Raise a TypeError if it is not a module, and reshard FSDP2 modules, as torch's state_dict() does.

    After a forward pass their parameters may be unsharded copies; FSDP2 discards those, and any write to them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but was given {type(model).__name__}")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check_unsharded(model: nn.Module) -> None:
    """Raise if it is not a module, or a module with DTensors."""
    prepare(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if is_dtensor(x):
            raise ValueError(
                f"{name} is a DTensor of shape {tuple(x.shape)}, but unsharded tensors are needed: gather the state "
                "dict by torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True), load it into an unsharded model, and pass that"
            )

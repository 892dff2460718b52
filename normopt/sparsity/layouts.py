"""Weights in torch's sparse layouts: a model that runs on them, a state dict that stores them, and the ways back."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normopt._checks import check_choice
from normopt.sharding.layout import is_dtensor, whole

Layout = Literal["coo", "csr", "csc"]
_LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr, "csc": torch.sparse_csc}
# The hooks of a module that know the names of its tensors, which change.
_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
# What a layer holds tensors in, and what else is not for its replacement.
_NOT_COPIED = ("_parameters", "_buffers", "_modules", "trainable")


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
        trainable: whether the weight and the bias of ``linear`` required gradients, for `to_dense`.

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
        # Indices that do not fit would read beyond the memory of x, so torch checks them: once, not in every step.
        self._weight(check=True)

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


_TENSORS: dict[type[nn.Module], set[str]] = {
    nn.Linear: {"weight", "bias"},
    SparseLinear: {"values", "columns", "row_ends", "bias"},
}


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

    ``to_dense`` is the way back. The weights are the same numbers there, zeros of either sign becoming +0. Layers keep
    their forward and backward hooks, attributes, mode, and for ``to_dense`` which tensors required gradients.

    Args:
        model: any module; only layers whose type is exactly ``nn.Linear`` change, so that subclasses and layers with
            parametrizations stay dense. A weight that two layers share is stored for each of them.

    Returns:
        A new model; the old one stays as it is.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a model with DTensors; an ``nn.Linear`` with what a `SparseLinear` cannot keep: tensors or
            submodules beside its weight and bias, state dict hooks, or a ``forward`` set on the instance.

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
    return _replace_layers(model, nn.Linear, SparseLinear)


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a model whose `SparseLinear` layers are ``nn.Linear`` again, ready to train; undoes `to_sparse`.

    What was frozen before `to_sparse` is frozen again.

    Args:
        model: any module.

    Returns:
        A new model; the old one stays as it is.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: as of `to_sparse`.
    """
    return _replace_layers(model, SparseLinear, _linear)


def sparse_state_dict(model: nn.Module, layout: Layout = "csr") -> dict[str, Any]:
    """The state dict of a model with its weights in one of torch's sparse layouts, to be saved or handed on.

    Args:
        model: any module, dense or made by `to_sparse`, whose `SparseLinear` layers store their buffers as they are.
        layout: "csr" (the default) or "csc", which hold matrices, so that tensors of more dims stay dense; or "coo",
            which holds any. Tensors of fewer than two dims are always dense.

    Returns:
        Names to tensors. ``torch.save`` and ``torch.load`` take it; `dense_state_dict` makes it loadable into a model.
        DTensors, as under FSDP2, are gathered: every rank must call this, and gets whole tensors.

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
    check_module(model)
    check_choice("layout", layout, _LAYOUTS)

    def stored(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        w = whole(value)
        return _to_layout(w, layout) if w.dim() == 2 or (w.dim() > 2 and layout == "coo") else w

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


def _replace_layers(model: nn.Module, old: type[nn.Module], new: Any) -> nn.Module:
    """A copy with every module of exactly the type ``old`` replaced by ``new`` of it; a shared one stays shared."""
    check_unsharded(model)
    for name, module in model.named_modules():
        if type(module) is old:
            _check_replaceable(name, module)
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if type(module) is not old:
            return module
        if id(module) not in made:
            made[id(module)] = new(module)
            # Hooks, mode and attributes that a user has set.
            vars(made[id(module)]).update({k: v for k, v in vars(module).items() if k not in _NOT_COPIED})
        return made[id(module)]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a module's second place
            if child is not None:
                setattr(parent, name, replacement(child))
    return replacement(model)


def _check_replaceable(name: str, module: nn.Module) -> None:
    """Refuse a layer that has what its replacement could not keep."""
    held = {*module._parameters, *module._buffers, *module._modules}
    lost = [repr(x) for x in sorted(held ^ _TENSORS[type(module)])]
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
    # On meta first: drawing initial weights would move torch's global generator.
    linear = nn.Linear(sparse.in_features, sparse.out_features, bias=sparse.bias is not None, device="meta")
    linear.weight = nn.Parameter(sparse.weight.to_dense(), sparse.trainable[0])
    if sparse.bias is not None:
        linear.bias = nn.Parameter(sparse.bias.clone(), sparse.trainable[1])
    return linear


def _to_layout(w: Tensor, layout: Layout) -> Tensor:
    _suppress_beta_warning()
    return w.to_sparse(layout=_LAYOUTS[layout])


@cache
def _suppress_beta_warning() -> None:
    """Swallow torch's warning that compressed layouts are in beta, which it gives once a process.

    Not in every step, because Python's filters of warnings belong to all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1, device="cpu").to_sparse_csr()


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2 modules, as torch's state_dict() does.

    After a forward pass their parameters may be whole copies, which FSDP2 throws away with what is written into them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check_unsharded(model: nn.Module) -> None:
    """Refuse what is no module, and a module with DTensors."""
    check_module(model)
    reshard(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if is_dtensor(x):
            raise ValueError(
                f"{name} is a DTensor of shape {tuple(x.shape)}, but whole tensors are "
                "needed: gather the state dict by torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True), load it into a model that is not sharded, and give that"
            )


def check_module(model: object) -> None:
    """Raise a TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, but was given {type(model).__name__}")

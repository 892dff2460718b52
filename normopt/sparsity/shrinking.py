"""``shrink``: build a smaller model without dead units, and verify that its outputs are the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from normopt._checks import check_number
from normopt.sparsity.chain import leaf_modules, trace_chain
from normopt.sparsity.counting import aligned
from normopt.sparsity.layouts import check_unsharded
from normopt.sparsity.removal import remove_dead_units, replace_tensor


@dataclass(frozen=True)
class UnitCount:
    """Number of output units, or channels, of a layer before and after `shrink`.

    Attributes:
        name: the layer's name in the model.
        before: units before.
        after: units after.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Shrunk:
    """Result of `shrink`.

    Attributes:
        model: the smaller model; its modules keep their names.
        layers: one count per linear layer and convolution, in the order of the model.
        parameters_before: number of parameters of the original model, biases and gains included.
        parameters_after: number of parameters of the smaller model.
        error: the largest output difference, relative to the largest output.
    """

    model: nn.Module
    layers: tuple[UnitCount, ...]
    parameters_before: int
    parameters_after: int
    error: float

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise a TypeError: the network is ``model``."""
        raise TypeError("the result of shrink() is not a network: call its .model")

    def __str__(self) -> str:
        rows = [("layer", "units", "left"), *((c.name, f"{c.before:,}", f"{c.after:,}") for c in self.layers)]
        rows.append(("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"))
        return f"{aligned(rows, left=1)}\noutputs differ by {self.error:.1e} of the largest"


@torch.no_grad()
def shrink(model: nn.Module, example_inputs: Tensor, tolerance: float = 1e-6) -> Shrunk:
    """Return a physically smaller model without dead units, after checking that its outputs are the same.

    ::

        a unit u is dead if       its outgoing weights are zero, W_next[:, u] = 0, or
                                  its incoming weights are zero, so that it outputs a constant c
        a constant is folded      b_next ← b_next + W_next[:, u]·c       (for a convolution, summed over its kernel)
        until nothing changes     W ← W without row u,  W_next ← W_next without column u

    c is the bias after batch norm, activation and pooling; a zero batch-norm gain or a zero depthwise kernel makes any
    unit constant. If the next convolution pads with zeros, a constant c ≠ 0 is not constant at the border and cannot
    be folded: one such channel stays, scaled to replace all of them. The output layer keeps all its units, every other
    layer at least one. Inputs and outputs keep their shapes.

    The outputs are equal in **eval mode**, where the model is a deterministic function of its input. In training mode
    they differ: batch norm normalizes by the batch, so a constant unit gives only its β, whatever its running mean,
    and dropout draws fewer random numbers. The smaller model can still be trained.

    The model may be any nesting of nn.Sequential of Linear, Conv1d to Conv3d (groups=1 or depthwise), BatchNorm1d to
    3d with running statistics, Max, Avg and adaptive pooling, elementwise activations, Dropout, Identity and Flatten;
    also Unflatten before the first layer, and Softmax and LogSoftmax after the last. Anything else raises, such as a
    residual connection, which couples units in ways that a chain does not. If your model's forward() calls one
    nn.Sequential, pass that: ``model.net = shrink(model.net, x).model``. `prune_` and ℓp decay over rows make units
    dead; for scattered zeros use `to_sparse`.

    Args:
        model: the model; it is not changed, mode and buffers included.
        example_inputs: a batch of inputs, as for ``model(example_inputs)``, on which outputs are compared.
        tolerance: the largest allowed output difference, relative to the largest output. Default 1e-6.

    Returns:
        A `Shrunk`, whose ``model`` has the same dtypes, devices, mode and names as ``model``; ``print`` it for a table.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` not a floating-point tensor.
        ValueError: an unsupported module, named in the message; a model with DTensors; inputs that give no outputs; a
            negative or infinite tolerance.
        RuntimeError: outputs differ by more than the tolerance, or are not finite. The arithmetic is in float64, so
            the difference is rounding to the model's own dtype: give a larger tolerance for 16-bit weights.

    Memory: three copies of the model in float64 on the CPU while it runs.

    Source: ours. That ℓp decay leaves exact zeros: arXiv:2404.10824.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> _ = normopt.sparsity.prune_(model, fraction=0.5, over="rows", exclude=["2.weight"])
        >>> shrunk = normopt.sparsity.shrink(model, torch.randn(16, 4))
        >>> shrunk.parameters_before, shrunk.parameters_after
        (58, 30)
        >>> shrunk.model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    check_number("tolerance", tolerance, low=0, open_high=True)
    if not isinstance(example_inputs, Tensor) or not example_inputs.is_floating_point():
        kind = example_inputs.dtype if isinstance(example_inputs, Tensor) else type(example_inputs).__name__
        raise TypeError(f"example_inputs must be a floating-point tensor, a batch of the model's inputs, but is {kind}")
    check_unsharded(model)
    leaf_modules(model)  # check before the deep copy, which some modules do not support
    reference, small = (copy.deepcopy(model).to("cpu", torch.float64).eval() for _ in range(2))
    inputs = example_inputs.detach().to("cpu", torch.float64, copy=True)
    chain = trace_chain(small, inputs.clone())
    before = [len(stage.layer.weight) for stage in chain]
    remove_dead_units(chain)
    _restore(small, model)
    expected = reference(inputs.clone())
    if not expected.numel():
        raise ValueError(f"example_inputs of shape {tuple(inputs.shape)} give no outputs: pass a non-empty batch")
    found = copy.deepcopy(small).to("cpu", torch.float64).eval()(inputs)
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max()) / (largest or 1.0)
    if not error <= tolerance:  # also raises for NaN
        raise RuntimeError(
            f"the shrunk model's outputs differ by {error:.2g} of the largest, {largest:.3g}, on example_inputs, but "
            f"tolerance = {tolerance:g}: increase it if this is rounding of the weights' dtype"
        )
    layers = tuple(UnitCount(s.name, n, len(s.layer.weight)) for s, n in zip(chain, before, strict=True))
    return Shrunk(small, layers, _parameters(model), _parameters(small), error)


def _restore(small: nn.Module, model: nn.Module) -> None:
    """Restore every tensor's dtype and device, and every module's mode, from the original model."""
    for module, old in zip(small.modules(), model.modules(), strict=True):
        module.training = old.training
        tensors = dict(old.named_parameters(recurse=False)) | dict(old.named_buffers(recurse=False))
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            like = tensors[name if name in tensors else "weight"]  # a new bias follows its weight
            replace_tensor(module, name, value.detach().to(like.device, like.dtype))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

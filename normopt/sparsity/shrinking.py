"""``shrink``: a smaller model without the dead units, and the proof that it puts out the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from normopt._checks import check_number
from normopt.sparsity.chain import leaf_modules, trace_chain
from normopt.sparsity.layouts import check_unsharded
from normopt.sparsity.removal import remove_dead_units


@dataclass(frozen=True)
class UnitCount:
    """How many output units, or channels, a layer had and has.

    Attributes:
        name: the layer's name in the model.
        before: how many units there were.
        after: how many there are.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` made.

    Attributes:
        model: the smaller model, its modules under the names that they had.
        layers: a count for each linear layer and convolution, in the order of the model.
        parameters_before: how many parameters the whole model had, biases and gains included.
        parameters_after: how many it has.
        error: the largest difference of an output, relative to the largest output.
    """

    model: nn.Module
    layers: tuple[UnitCount, ...]
    parameters_before: int
    parameters_after: int
    error: float

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise a TypeError: the network is ``model``."""
        raise TypeError("what shrink() returns is no network but has one: call its .model")

    def __str__(self) -> str:
        rows = [("layer", "units", "left"), *((c.name, f"{c.before:,}", f"{c.after:,}") for c in self.layers)]
        rows.append(("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in rows]
        return "\n".join([*lines, f"outputs differ by {self.error:.1e} of the largest"])


@torch.no_grad()
def shrink(model: nn.Module, example_inputs: Tensor, tolerance: float = 1e-6) -> Shrunk:
    """A physically smaller model without dead units, whose outputs are checked to be the same.

    ::

        a unit u is dead if       all that goes out of it is zero, W_next[:, u] = 0, or
                                  all that comes into it is zero, so that it puts out a constant c
        a constant is folded      b_next ← b_next + W_next[:, u]·c       (of a convolution, summed over its kernel)
        until nothing changes     W ← W without row u,  W_next ← W_next without column u

    c is what the bias becomes on its way through batch norm, activation and pooling; a batch norm whose gain is zero,
    or a depthwise kernel of zeros, makes a constant of any unit. Where the next convolution pads with zeros, a
    constant c ≠ 0 is none at the border and cannot be a bias: one such channel stays, scaled to stand for all of them.
    The layer that puts out the model's outputs keeps its units, and every other one at least one. Inputs and outputs
    keep their shapes.

    The outputs are equal in **eval mode**, which has one function of each input. In training mode batch norm
    normalizes by the batch: a unit that is constant then gives its β alone, whatever its running mean says, and
    dropout draws other numbers for fewer units. Training can go on from the smaller model all the same.

    The model may be any nesting of nn.Sequential of Linear, Conv1d to Conv3d (groups=1 or depthwise), BatchNorm1d to
    3d with running statistics, Max, Avg and adaptive pooling, elementwise activations, Dropout, Identity and Flatten;
    Unflatten may stand before the first layer, Softmax and LogSoftmax behind the last. Anything else, such as a
    residual connection, is refused: there units are tied in ways that a chain has not. Of a model of your own whose
    forward() calls one nn.Sequential, give that: ``model.net = shrink(model.net, x).model``. `prune_` and ℓp decay over
    rows make units dead; zeros that are scattered are for `to_sparse`.

    Args:
        model: the model; it is left as it is, mode and buffers included.
        example_inputs: a batch of inputs, as for ``model(example_inputs)``, on which the outputs are compared.
        tolerance: by how much outputs may differ, relative to the largest. Default 1e-6.

    Returns:
        A `Shrunk`, whose ``model`` has the old one's dtypes, devices, mode and names; ``print`` it for a table.

    Raises:
        TypeError: ``model`` is no module, ``example_inputs`` no tensor of floats.
        ValueError: a module that is not supported, which is named; a model with DTensors; inputs of which there are no
            outputs; a tolerance that is negative or infinite.
        RuntimeError: outputs differ by more than the tolerance, or are not finite. The arithmetic is in float64, so
            that this is what rounding to the model's own dtype costs: for 16-bit weights give a larger tolerance.

    Memory: three copies of the model in float64 on the CPU, while it runs.

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
        raise TypeError(f"example_inputs must be a tensor of floats, a batch as the model takes it, but is {kind}")
    check_unsharded(model)
    leaf_modules(model)  # refused before anything is copied, which some modules cannot be
    reference, small = (copy.deepcopy(model).to("cpu", torch.float64).eval() for _ in range(2))
    inputs = example_inputs.detach().to("cpu", torch.float64, copy=True)
    chain = trace_chain(small, inputs.clone())
    before = [len(stage.layer.weight) for stage in chain]
    remove_dead_units(chain)
    _restore(small, model)
    expected = reference(inputs.clone())
    if not expected.numel():
        raise ValueError(f"example_inputs of shape {tuple(inputs.shape)} give no outputs to compare: give some")
    found = copy.deepcopy(small).to("cpu", torch.float64).eval()(inputs)
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max()) / (largest or 1.0)
    if not error <= tolerance:  # NaN, too
        raise RuntimeError(
            f"the shrunk model's outputs differ by {error:.2g} of the largest, {largest:.3g}, on example_inputs, and "
            f"tolerance = {tolerance:g}: give a larger one if this is the rounding of the weights' dtype"
        )
    return Shrunk(
        model=small,
        layers=tuple(UnitCount(s.name, n, len(s.layer.weight)) for s, n in zip(chain, before, strict=True)),
        parameters_before=_parameters(model),
        parameters_after=_parameters(small),
        error=error,
    )


def _restore(small: nn.Module, model: nn.Module) -> None:
    """Give every tensor the dtype and device, and every module the mode, of the one that it was made from."""
    for module, old in zip(small.modules(), model.modules(), strict=True):
        module.training = old.training
        tensors = dict(old.named_parameters(recurse=False)) | dict(old.named_buffers(recurse=False))
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            like = tensors[name if name in tensors else "weight"]  # a bias that was made is like its weight
            moved = value.detach().to(like.device, like.dtype)
            is_parameter = isinstance(value, nn.Parameter)
            setattr(module, name, nn.Parameter(moved, value.requires_grad) if is_parameter else moved)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

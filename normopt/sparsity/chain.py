"""Parse a sequential model into a chain of layers and the modules between them; raise for anything else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Conv
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
POOLS = {getattr(nn, f"{kind}Pool{d}d"): d for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)}
# Number of dims of the inputs after the channels; 0 for a linear layer, whose units are the last dim.
DIMS = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, **POOLS}
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
# Identities in eval mode.
NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
FINAL = (nn.Softmax, nn.LogSoftmax)
KNOWN = (*DIMS, *get_args(BatchNorm), *ACTIVATIONS, *NO_OPS, nn.Flatten, nn.Unflatten, *FINAL)
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
SUPPORTED = (
    "shrink supports (nested) nn.Sequential of nn.Linear, Conv1d to Conv3d (groups=1 or depthwise), BatchNorm1d to 3d, "
    "Max, Avg and adaptive pooling, elementwise activations, Dropout, Identity and Flatten, Unflatten before the first "
    "layer, and Softmax and LogSoftmax after the last"
)


class FlattenMap(NamedTuple):
    """Map per-channel values to the features after a Flatten: channel c becomes [:, c, :] of outer × channels × inner.

    After a convolution, the features of a channel are contiguous (inner); after a linear layer applied at many
    positions, they are strided (outer).
    """

    outer: int
    inner: int

    def __call__(self, of_channels: Tensor) -> Tensor:
        return of_channels.repeat_interleave(self.inner).repeat(self.outer)


class Stage(NamedTuple):
    """A layer, and the modules between it and the next layer, in order.

    Attributes:
        name: the layer's name in the model.
        layer: the layer whose output units may be removed.
        between: batch norms, depthwise convolutions, pools and activations, and `FlattenMap` for a Flatten.
    """

    name: str
    layer: Layer
    between: list[nn.Module | FlattenMap]


def is_depthwise(module: nn.Module) -> bool:
    """Return whether it is a convolution whose output channels each read exactly one of several input channels."""
    return isinstance(module, Conv) and module.groups == module.in_channels == module.out_channels > 1


def pads_with_zeros(conv: Conv) -> bool:
    """Return whether it pads with zeros, so that a constant channel is not constant at the border."""
    return conv.padding_mode == "zeros" and any(conv._reversed_padding_repeated_twice)


def trace_chain(model: nn.Module, x: Tensor) -> list[Stage]:
    """Trace an input through a model in eval mode, and return its chain of layers.

    Raises:
        ValueError: a module is not supported, or mixes units where it is; the message names it.
    """
    found: list[Stage] = []
    axis = 0  # channel dim of the last layer, negative
    end = ""  # first module that mixes the units
    for name, module in leaf_modules(model):
        if isinstance(module, Layer) and not is_depthwise(module):
            own = -1 - DIMS[type(module)]
            if isinstance(module, Conv) and module.groups != 1:
                raise _unsupported(name, module, f"has {module.groups} groups")
            if end:
                raise _unsupported(name, module, f"comes after {end}, which mixes units")
            if found and own != axis:
                hint = ": put a Flatten between" if own == -1 else ""
                raise _unsupported(name, module, f"acts on another dim than the units of {found[-1].name!r}{hint}")
            found.append(Stage(name, module, between=[]))
            axis = own
        elif found:
            step = _check_between(name, module, x, axis)
            if isinstance(module, FINAL):
                end = end or _named(name, module)
            found[-1].between.append(step)
            axis = -1 if isinstance(step, FlattenMap) else axis
        x = module(x)
    return found


def _check_between(name: str, module: nn.Module, x: Tensor, axis: int) -> nn.Module | FlattenMap:
    """Check a module after a layer, whose units are at dim ``axis`` of the module's input x."""
    if isinstance(module, nn.Unflatten):
        raise _unsupported(name, module, "splits the output of a layer")
    if isinstance(module, nn.Flatten):
        first, channels = module.start_dim % x.dim(), axis % x.dim()
        if first != 1 or module.end_dim % x.dim() != x.dim() - 1 or channels < 1:
            raise _unsupported(name, module, "must flatten all but the first dim, the batch")
        return FlattenMap(outer=x.shape[1:channels].numel(), inner=x.shape[channels + 1 :].numel())
    if type(module) in DIMS and axis != -1 - DIMS[type(module)]:
        raise _unsupported(name, module, "mixes the units of the layer before it")
    if isinstance(module, BatchNorm) and axis % x.dim() != 1:
        raise _unsupported(name, module, "does not have the units of the layer before it as its channels")
    return module


def leaf_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the leaves of nested nn.Sequential, in execution order.

    Raises:
        ValueError: a module is not supported or has hooks, or two share a tensor.
    """
    leaves = list(_leaves(model, ""))
    owners: dict[int, str] = {}
    for name, module in leaves:
        for tensor in chain(module.parameters(), module.buffers()):
            if id(tensor) in owners:
                raise _unsupported(name, module, f"shares a tensor with {owners[id(tensor)]!r}")
            owners[id(tensor)] = name
    return leaves


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if module._forward_hooks or module._forward_pre_hooks:
        raise _unsupported(name, module, "has forward hooks, which may change what it computes: remove them first")
    if "forward" in vars(module):
        raise _unsupported(name, module, "has a forward() set on the instance: remove it first")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for own, child in module._modules.items():
            if child is not None:
                yield from _leaves(child, f"{name}.{own}".lstrip("."))
        return
    if type(module) not in KNOWN:
        raise _unsupported(name, module, f"is not supported{_hint(module)}")
    if isinstance(module, BatchNorm) and module.running_mean is None:
        raise _unsupported(name, module, "has no running statistics, so its output depends on the batch")
    if getattr(module, "return_indices", False):
        raise _unsupported(name, module, "also returns indices")
    if more := {*module._parameters, *module._buffers, *module._modules} - TENSORS:
        raise _unsupported(name, module, f"has additional {', '.join(sorted(more))}, which cannot be cut: remove that")
    yield name, module


def _unsupported(name: str, module: nn.Module, why: str) -> ValueError:
    return ValueError(f"{_named(name, module)} {why}. {SUPPORTED}")


def _named(name: str, module: nn.Module) -> str:
    return f"{repr(name) if name else 'the model'} ({type(module).__name__})"


def _hint(module: nn.Module) -> str:
    """Return advice for a module with its own forward()."""
    if not any(module.children()):
        return ""
    stack = next((name for name, child in module.named_children() if isinstance(child, nn.Sequential)), "net")
    return (
        ": shrink cannot analyze its forward(). If that only calls one nn.Sequential, pass that one, such as "
        f"model.{stack}, and replace it by the smaller one; models with residual connections are not supported"
    )


class Constants(NamedTuple):
    """Features between a layer and the next that do not depend on the input.

    Attributes:
        known: mask over the features that the next layer reads, 1-d: constant for all inputs.
        values: their values; 0 where not constant.
        units: index of the unit that each feature comes from.
        input_free: mask over units: constant somewhere before the next layer, so that its inputs do not matter.
    """

    known: Tensor
    values: Tensor
    units: Tensor
    input_free: Tensor


@torch.no_grad()
def constants(stage: Stage) -> Constants:
    """Find the constant features after a layer in eval mode.

    A unit with all-zero weights outputs its bias, which batch norm, activation and pooling map to another constant. A
    zero batch-norm gain or a zero depthwise kernel makes any unit constant.
    """
    layer = stage.layer
    known = (layer.weight.flatten(1) == 0).all(1)
    values = layer.weight.new_zeros(len(known)) if layer.bias is None else layer.bias.clone()
    units = torch.arange(len(known), device=known.device)
    input_free = known.clone()
    for step in stage.between:
        if isinstance(step, FlattenMap):
            known, values, units = step(known), step(values), step(units)
        elif isinstance(step, BatchNorm):
            known, values = _through_batch_norm(step, known, values)
        elif isinstance(step, Conv):
            known, values = _through_depthwise(step, known, values)
        elif type(step) in POOLS:
            known = known & (_preserves_constants(step) | (values == 0))
        elif isinstance(step, ACTIVATIONS):
            values = step(values.clone())
        values = torch.where(known, values, 0)
        input_free = input_free | all_per_unit(known, units, len(input_free))
    return Constants(known, values, units, input_free)


def all_per_unit(features: Tensor, units: Tensor, n: int) -> Tensor:
    """Return the mask of the n units whose features are all true."""
    result = torch.ones(n, dtype=torch.bool, device=features.device)
    result[units[~features]] = False
    return result


def _through_batch_norm(norm: BatchNorm, known: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    values = (values - mean) / (variance + norm.eps).sqrt()
    if norm.affine:
        known = known | (norm.weight == 0)
        values = torch.where(norm.weight == 0, norm.bias, values * norm.weight + norm.bias)
    return known, values


def _through_depthwise(conv: Conv, known: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    kernels = conv.weight.flatten(1)
    known = (kernels == 0).all(1) | (known & ((values == 0) | (not pads_with_zeros(conv))))
    values = values * kernels.sum(1)
    return known, values if conv.bias is None else values + conv.bias


def _preserves_constants(pool: nn.Module) -> bool:
    """Return whether pooling keeps constants: not for a mean that counts zero padding or overrides the divisor."""
    if not isinstance(pool, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return True
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return getattr(pool, "divisor_override", None) is None and not (any(padding) and pool.count_include_pad)

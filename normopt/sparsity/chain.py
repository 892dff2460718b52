"""A sequential model as a chain of layers, and what stands between them; anything else is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Conv

DIMS: dict[type[nn.Module], int] = {
    kind: d
    for d in (1, 2, 3)
    for kind in (
        *(getattr(nn, f"{name}{d}d") for name in ("Conv", "BatchNorm", "MaxPool", "AvgPool")),
        *(getattr(nn, f"Adaptive{name}Pool{d}d") for name in ("Avg", "Max")),
    )
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = tuple(kind for kind in DIMS if kind not in (*CONVOLUTIONS, *BATCH_NORMS))
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
# In eval mode they all do nothing.
NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
FINAL = (nn.Softmax, nn.LogSoftmax)
KNOWN = (nn.Linear, *DIMS, *ACTIVATIONS, *NO_OPS, nn.Flatten, nn.Unflatten, *FINAL)
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
SUPPORTED = (
    "shrink takes nn.Sequential, nested ones too, of nn.Linear, Conv1d to Conv3d (groups=1 or depthwise), BatchNorm1d "
    "to 3d, Max, Avg and adaptive pooling, elementwise activations, Dropout, Identity and Flatten, of Unflatten before "
    "the first layer, and of Softmax and LogSoftmax after the last"
)


@dataclass(frozen=True)
class FlattenMap:
    """What a Flatten does with channels: of each it makes ``outer`` × ``inner`` features, those of c at [:, c, :].

    The features of one channel are neighbours behind a convolution (inner), and apart behind a linear layer that was
    applied at many places (outer).
    """

    outer: int
    inner: int

    def __call__(self, of_channels: Tensor) -> Tensor:
        return of_channels.repeat_interleave(self.inner).repeat(self.outer)


@dataclass
class Stage:
    """A layer, and in their order the modules between it and the next that matter to its units.

    Args:
        name: the layer's name in the model.
        layer: whose output units are in question.
        between: batch norms, depthwise convolutions, pools and activations, and `Spread` for a Flatten.
    """

    name: str
    layer: Layer
    between: list[nn.Module | FlattenMap] = field(default_factory=list)


def is_depthwise(conv: Conv) -> bool:
    """One input channel makes one output channel, and there are several."""
    return conv.groups == conv.in_channels == conv.out_channels > 1


def pads_with_zeros(conv: Conv) -> bool:
    """A constant channel is not constant at the border of what the convolution sees."""
    return conv.padding_mode == "zeros" and any(conv._reversed_padding_repeated_twice)


def trace_chain(model: nn.Module, x: Tensor) -> list[Stage]:
    """The chain of a model in eval mode, followed along an input.

    Raises:
        ValueError: a module that is not known, or stands where it mixes units; it is named, with what is supported.
    """
    found: list[Stage] = []
    axis = 0  # that of the channels of the last layer, counted from the end
    end: str | None = None
    for name, module in leaf_modules(model):
        kind = type(module)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not (
            isinstance(module, CONVOLUTIONS) and is_depthwise(module)
        ):
            own = -1 if isinstance(module, nn.Linear) else -1 - DIMS[kind]
            if isinstance(module, CONVOLUTIONS) and module.groups != 1:
                raise _unsupported(name, module, f"has {module.groups} groups")
            if end is not None:
                raise _unsupported(name, module, f"stands behind {end}, which mixes units")
            if found and own != axis:
                hint = ": put a Flatten between" if own == -1 else ""
                raise _unsupported(name, module, f"reads another dim than that of the units of {found[-1].name!r}{hint}")
            found.append(Stage(name, module))
            axis = own
        elif found:
            step = _check_between(name, module, x, axis)
            if isinstance(module, FINAL):
                end = end or f"{name!r} ({kind.__name__})"
            found[-1].between.append(step)
            axis = -1 if isinstance(step, FlattenMap) else axis
        x = module(x)
    return found


def _check_between(name: str, module: nn.Module, x: Tensor, axis: int) -> nn.Module | FlattenMap:
    """What a module that follows a layer does to its units, which x [..., units, …] has at ``axis``."""
    if isinstance(module, nn.Unflatten):
        raise _unsupported(name, module, "takes apart what a layer has put out")
    if isinstance(module, nn.Flatten):
        first, channels = module.start_dim % x.dim(), axis % x.dim()
        if first != 1 or module.end_dim % x.dim() != x.dim() - 1 or channels < 1:
            raise _unsupported(name, module, "must flatten all but the first dim, which is the batch")
        return FlattenMap(outer=x.shape[1:channels].numel(), inner=x.shape[channels + 1 :].numel())
    if type(module) in DIMS and not isinstance(module, BATCH_NORMS) and axis != -1 - DIMS[type(module)]:
        raise _unsupported(name, module, "mixes the units of the layer before it")
    if isinstance(module, BATCH_NORMS) and axis % x.dim() != 1:
        raise _unsupported(name, module, "does not have the units of the layer before it as its channels")
    return module


def leaf_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of nested nn.Sequential in the order in which they run, with their names.

    Raises:
        ValueError: a module that is not known or has hooks, or two that share a tensor.
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
        raise _unsupported(name, module, f"is not known{_hint(module)}")
    if isinstance(module, BATCH_NORMS) and module.running_mean is None:
        raise _unsupported(name, module, "has no running statistics, so that what it does depends on the batch")
    if getattr(module, "return_indices", False):
        raise _unsupported(name, module, "puts out indices too")
    if more := {*module._parameters, *module._buffers, *module._modules} - TENSORS:
        raise _unsupported(
            name, module, f"has {', '.join(sorted(more))} besides, which shrink cannot cut: remove that first"
        )
    yield name, module


def _unsupported(name: str, module: nn.Module, why: str) -> ValueError:
    where = f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    return ValueError(f"{where} {why}. {SUPPORTED}")


def _hint(module: nn.Module) -> str:
    """The way out for a module with a forward() of its own."""
    if not any(module.children()):
        return ""
    stack = next((name for name, child in module.named_children() if isinstance(child, nn.Sequential)), "net")
    return (
        ": shrink does not see what its forward() does. If that is to call one nn.Sequential, pass that one, such as "
        f"model.{stack}, and put the smaller one in its place; models with residual connections are not supported"
    )


@dataclass(frozen=True)
class Constants:
    """What does not depend on the input between a layer and the next.

    Args:
        known: of each feature that the next layer reads, in one dim, whether it is the same for every input.
        values: what it is then; 0 where it is not.
        units: the index of the unit that it comes from.
        unmoved: of each unit, whether it is constant somewhere on its way, so that nothing it reads matters.
    """

    known: Tensor
    values: Tensor
    units: Tensor
    input_free: Tensor


@torch.no_grad()
def constants(stage: Stage) -> Constants:
    """The constants behind a layer in eval mode.

    A unit whose weights are all zero puts out its bias, and batch norm, activation and pooling make another constant
    of that; a batch norm's gain or a depthwise kernel of zeros makes one of anything.
    """
    layer = stage.layer
    known = (layer.weight.flatten(1) == 0).all(1)
    values = layer.weight.new_zeros(len(known)) if layer.bias is None else layer.bias.clone()
    units = torch.arange(len(known), device=known.device)
    input_free = known.clone()
    for step in stage.between:
        if isinstance(step, FlattenMap):
            known, values, units = step(known), step(values), step(units)
        elif isinstance(step, BATCH_NORMS):
            known, values = _through_batch_norm(step, known, values)
        elif isinstance(step, CONVOLUTIONS):
            known, values = _through_depthwise(step, known, values)
        elif isinstance(step, POOLS):
            known = known & (_preserves_constants(step) | (values == 0))
        elif isinstance(step, ACTIVATIONS):
            values = step(values.clone())
        values = torch.where(known, values, 0)
        input_free = input_free | all_per_unit(known, units, len(input_free))
    return Constants(known, values, units, input_free)


def all_per_unit(features: Tensor, units: Tensor, n: int) -> Tensor:
    """Of which of n units every feature is true."""
    result = torch.ones(n, dtype=torch.bool, device=features.device)
    result[units[~features]] = False
    return result


def _through_batch_norm(norm: nn.Module, known: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = (values - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
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
    """Maxima and true means do; a mean over a border of zeros or with a divisor of its own does not."""
    if not isinstance(pool, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return True
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return getattr(pool, "divisor_override", None) is None and not (any(padding) and pool.count_include_pad)

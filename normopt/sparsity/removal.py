"""Remove dead units from a chain in place: fold constants into biases, then slice out unread units."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from normopt.sparsity.chain import BatchNorm, Conv, FlattenMap, Layer, Stage, all_per_unit, constants, pads_with_zeros


@torch.no_grad()
def remove_dead_units(chain: list[Stage]) -> None:
    """Remove dead units until none is left; removing one can make units before and after it dead."""
    changed = True
    while changed:
        changed = False
        # Backwards: a layer with fewer inputs can free units before it in the same pass.
        for stage, following in reversed(list(pairwise(chain))):
            changed |= _remove(stage, following.layer)


def _remove(stage: Stage, reader: Layer) -> bool:
    """Remove the dead units of one layer, whose next layer is ``reader``; return whether anything changed."""
    layer = stage.layer
    known, values, units, input_free = constants(stage)
    pads = isinstance(reader, Conv) and pads_with_zeros(reader)
    if pads:
        _merge(reader, known, values)
    unread = (reader.weight.transpose(0, 1).flatten(1) == 0).all(1)
    dead = all_per_unit(unread | (known & ((values == 0) | (not pads))), units, len(layer.weight))
    # The inputs of these units do not matter: zero their weights, which may make units before them dead.
    unused = dead | input_free
    changed = bool((layer.weight[unused] != 0).any())
    layer.weight[unused] = 0
    gone = dead[units]
    _fold(reader, torch.where(gone & known, values, 0))
    changed |= bool((reader.weight[:, gone] != 0).any())
    reader.weight[:, gone] = 0
    if dead.all():
        dead[0] = False  # keep one unread unit: torch has no convolution without channels
    if not dead.any():
        return changed
    _keep_inputs(reader, ~dead[units])
    _keep_outputs(stage, ~dead)
    return True


def _merge(reader: Layer, known: Tensor, values: Tensor) -> None:
    """Merge all constant channels into one, where zero padding prevents folding them into a bias.

    Constant channels differ only by a factor, padding included: W[:, a] + W[:, b]·(b/a) lets channel a replace both.
    """
    channels = (known & (values != 0)).nonzero().flatten()
    if len(channels) < 2:
        return
    kept = channels[values[channels].abs().argmax()]
    others = channels[channels != kept]
    factors = (values[others] / values[kept]).reshape(-1, *[1] * (reader.weight.dim() - 2))
    reader.weight[:, kept] += (reader.weight[:, others] * factors).sum(1)
    reader.weight[:, others] = 0


def _fold(reader: Layer, values: Tensor) -> None:
    """Add the contribution of constant features to the bias, creating it if needed."""
    kernels = reader.weight if reader.weight.dim() == 2 else reader.weight.flatten(2).sum(2)
    shift = kernels @ values
    if reader.bias is not None:
        reader.bias += shift
    elif (shift != 0).any():
        reader.bias = nn.Parameter(shift, requires_grad=reader.weight.requires_grad)


def _keep_inputs(layer: Layer, keep: Tensor) -> None:
    replace_tensor(layer, "weight", layer.weight[:, keep])
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", int(keep.sum()))


def _keep_outputs(stage: Stage, keep: Tensor) -> None:
    _keep(stage.layer, keep, "out_features" if isinstance(stage.layer, nn.Linear) else "out_channels")
    for step in stage.between:
        if isinstance(step, FlattenMap):
            keep = step(keep)
        elif isinstance(step, BatchNorm):
            _keep(step, keep, "num_features")
        elif isinstance(step, Conv):
            _keep(step, keep, "in_channels", "out_channels", "groups")


def _keep(module: nn.Module, keep: Tensor, *sizes: str) -> None:
    """Keep some entries of a module's tensors along their first dim; ``sizes`` are the attributes that count them."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (value := getattr(module, name, None)) is not None:
            replace_tensor(module, name, value[keep])
    for size in sizes:
        setattr(module, size, int(keep.sum()))


def replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a module's parameter or buffer by one of the same kind."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)

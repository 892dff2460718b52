"""Dead units taken out of a chain, in place: folding what is constant, then slicing what is not read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from normopt.sparsity.chain import (
    BATCH_NORMS,
    CONVOLUTIONS,
    Layer,
    FlattenMap,
    Stage,
    constants,
    all_per_unit,
    pads_with_zeros,
)


@torch.no_grad()
def remove_dead_units(chain: list[Stage]) -> None:
    """Take dead units out until there are none left: one that goes can make others dead, before and behind it."""
    changed = True
    while changed:
        changed = False
        # From the end: a layer that reads less frees units before it in the same round.
        for stage, following in reversed(list(pairwise(chain))):
            changed |= _remove(stage, following.layer)


def _remove(stage: Stage, reader: Layer) -> bool:
    """Take out the dead units of one layer, which ``reader`` reads; whether anything changed."""
    layer = stage.layer
    found = constants(stage)
    known, values, units = found.known, found.values, found.units
    pads = isinstance(reader, CONVOLUTIONS) and pads_with_zeros(reader)
    if pads:
        _merge(reader, known, values)
    unread = (reader.weight.transpose(0, 1).flatten(1) == 0).all(1)
    dead = all_per_unit(unread | (known & ((values == 0) | (not pads))), units, len(layer.weight))
    # What these read does not matter, so that units before them may be dead, too.
    idle = dead | found.input_free
    changed = bool((layer.weight[idle] != 0).any())
    layer.weight[idle] = 0
    gone = dead[units]
    _fold(reader, torch.where(gone & known, values, 0))
    changed |= bool((reader.weight[:, gone] != 0).any())
    reader.weight[:, gone] = 0
    if dead.all():
        dead[0] = False  # torch has no convolution without channels: one unit stays, which nobody reads
    if not dead.any():
        return changed
    _keep_inputs(reader, ~dead[units])
    _keep_outputs(stage, ~dead)
    return True


def _merge(reader: Layer, known: Tensor, values: Tensor) -> None:
    """Let one constant channel stand for all, where zeros at the border keep them from being folded into a bias.

    Constants differ by a factor only, border or not: with W[:, a] + W[:, b]·(b/a) the channel a does for both.
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
    """Add what constant features bring to the bias, which is made if there is none."""
    kernels = reader.weight if reader.weight.dim() == 2 else reader.weight.flatten(2).sum(2)
    shift = kernels @ values
    if reader.bias is not None:
        reader.bias += shift
    elif (shift != 0).any():
        reader.bias = nn.Parameter(shift, requires_grad=reader.weight.requires_grad)


def _keep_inputs(layer: Layer, keep: Tensor) -> None:
    _set(layer, "weight", layer.weight[:, keep])
    if isinstance(layer, nn.Linear):
        layer.in_features = int(keep.sum())
    else:
        layer.in_channels = int(keep.sum())


def _keep_outputs(stage: Stage, keep: Tensor) -> None:
    layer, count = stage.layer, int(keep.sum())
    _keep(layer, keep, ("weight", "bias"))
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    else:
        layer.out_channels = count
    for step in stage.between:
        if isinstance(step, FlattenMap):
            keep = step(keep)
            count = int(keep.sum())
        elif isinstance(step, BATCH_NORMS):
            _keep(step, keep, ("weight", "bias", "running_mean", "running_var"))
            step.num_features = count
        elif isinstance(step, CONVOLUTIONS):
            _keep(step, keep, ("weight", "bias"))
            step.in_channels = step.out_channels = step.groups = count


def _keep(module: nn.Module, keep: Tensor, names: tuple[str, ...]) -> None:
    for name in names:
        if (value := getattr(module, name)) is not None:
            _set(module, name, value[keep])


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)

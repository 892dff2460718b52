"""Random networks with dead units, for what must hold of all of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity)


def kill(rng, tensor, dim, share):
    """Set some rows or columns to zero."""
    dead = torch.from_numpy(rng.random(tensor.shape[dim]) < share)
    with torch.no_grad():
        tensor.transpose(0, dim)[dead] = 0


def settle(rng, model):
    """Statistics of batch norm as after training, and a few gains of zero."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
                kill(rng, norm.weight, 0, 0.2)


def mlp(rng, dtype):
    sizes = [3, *rng.integers(1, 9, rng.integers(1, 4)), 2]
    layers = []
    for i, (ins, outs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(int(ins), int(outs), bias=bool(rng.random() < 0.7))
        layers.append(layer)
        kill(rng, layer.weight, 0, rng.choice([0, 0.3, 1], p=[0.3, 0.6, 0.1]))
        kill(rng, layer.weight, 1, rng.choice([0, 0.3, 1], p=[0.3, 0.6, 0.1]))
        if i < len(sizes) - 2:
            if rng.random() < 0.4:
                layers.append(nn.BatchNorm1d(int(outs), affine=bool(rng.random() < 0.8)))
            layers.append(ACTIVATIONS[rng.integers(len(ACTIVATIONS))]())
            if rng.random() < 0.3:
                layers.append(nn.Dropout(0.5))
    model = nn.Sequential(*layers).to(dtype)
    settle(rng, model)
    return model


def cnn(rng, dtype, d=2):
    conv, norm = getattr(nn, f"Conv{d}d"), getattr(nn, f"BatchNorm{d}d")
    pools = [getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")]
    blocks, channels, side = [], 1, 8 if d < 3 else 6
    for _ in range(rng.integers(1, 4)):
        outs, layers = int(rng.integers(1, 7)), []
        size = int(rng.choice([1, 3]))
        pad = int(rng.integers(0, 2)) if size == 3 and side > 2 else size // 2
        mode = str(rng.choice(["zeros", "replicate"])) if pad else "zeros"
        layers.append(conv(channels, outs, size, padding=pad, padding_mode=mode, bias=bool(rng.random() < 0.6)))
        kill(rng, layers[0].weight, 0, rng.choice([0, 0.4, 1], p=[0.3, 0.6, 0.1]))
        kill(rng, layers[0].weight, 1, rng.choice([0, 0.3], p=[0.6, 0.4]))
        side += 2 * pad - size + 1
        if rng.random() < 0.5:
            layers.append(norm(outs))
        layers.append(ACTIVATIONS[rng.integers(len(ACTIVATIONS))]())
        if rng.random() < 0.3 and outs > 1:
            layers.append(conv(outs, outs, 3, padding=1, groups=outs, bias=bool(rng.random() < 0.5)))
            kill(rng, layers[-1].weight, 0, 0.3)
            layers.append(nn.Tanh())
        if rng.random() < 0.4 and side >= 2:
            kind = pools[rng.integers(4)]
            if kind in pools[2:]:
                side = 2
                layers.append(kind(2))
            else:
                padded = kind is pools[1] and rng.random() < 0.5
                layers.append(kind(2, padding=1 if padded else 0, ceil_mode=bool(rng.random() < 0.5)))
                side = layers[-1](torch.zeros(1, 1, *[side] * d)).shape[-1]
        blocks.append(nn.Sequential(*layers))
        channels = outs
    features = channels * side**d
    head = nn.Linear(features, 4, bias=bool(rng.random() < 0.7))
    for dim in (0, 1):
        kill(rng, head.weight, dim, 0.3)
    unread = torch.from_numpy(rng.random(channels) < 0.3).repeat_interleave(side**d)
    with torch.no_grad():
        head.weight[:, unread] = 0
    between = [nn.BatchNorm1d(features)] if rng.random() < 0.3 else []
    model = nn.Sequential(*blocks, nn.Flatten(), *between, head, nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    settle(rng, model)
    return model


def depthwise(model):
    return sum(getattr(module, "groups", 1) > 1 for module in model.modules())

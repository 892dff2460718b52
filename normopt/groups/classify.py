"""Classify a model's parameters: embedding, linear, convolution, output, norm layer or bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

Kind = Literal["embedding", "linear", "conv", "output", "norm", "bias"]
KINDS: tuple[Kind, ...] = ("embedding", "linear", "conv", "output", "norm", "bias")
MATRICES: tuple[Kind, ...] = ("embedding", "linear", "conv", "output")

NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.PReLU)
GATES = {"LSTM": 4, "GRU": 3}  # of recurrent layers, whose gates are stacked along the rows


@dataclass
class ParamInfo:
    """A parameter and its classification.

    Attributes:
        name: its first name in ``model.named_parameters()``.
        param: the parameter.
        modules: the names of the modules that own it; several if it is shared.
        module: the first of these modules.
        kind: its kind; None if unknown.
        matrix: non-default settings of a matrix norm: ``matrix_view`` and ``blocks``.
    """

    name: str
    param: nn.Parameter
    modules: list[str]
    module: nn.Module
    kind: Kind | None
    matrix: dict[str, str | int] = field(default_factory=dict)


def classify_params(model: nn.Module, output: str | None) -> list[ParamInfo]:
    """Return every parameter of the model once, in the model's order.

    Args:
        model: any module.
        output: the name of the output layer's module; "last" is the last linear layer or convolution in the order of
            definition; None means no output layer.

    Raises:
        ValueError: a parameter has no shape yet, or no module is called ``output``.
    """
    found: dict[int, ParamInfo] = {}
    for prefix, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run a batch through the model first")
            if id(param) in found:
                found[id(param)].modules.append(prefix)
                continue
            found[id(param)] = ParamInfo(name, param, [prefix], module, *_classify(module, attribute, param))
    infos = list(found.values())
    if output is not None:
        _mark_output(model, infos, output)
    return infos


def _classify(module: nn.Module, attribute: str, param: nn.Parameter) -> tuple[Kind | None, dict[str, str | int]]:
    """Return the kind of a module's own parameter, and its matrix settings."""
    if isinstance(module, NORM_LAYERS) or ("norm" in type(module).__name__.lower() and param.dim() <= 1):
        return "norm", {}
    if "bias" in attribute and (param.dim() <= 1 or isinstance(module, nn.MultiheadAttention)):
        return "bias", {}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", {"matrix_view": "transposed"}
    if isinstance(module, nn.Linear | nn.Bilinear):
        return "linear", {}
    if isinstance(module, nn.MultiheadAttention):
        return "linear", {"blocks": 3} if attribute == "in_proj_weight" else {}
    if isinstance(module, nn.RNNBase):
        gated = module.mode in GATES and attribute.startswith(("weight_ih", "weight_hh"))
        return "linear", {"blocks": GATES[module.mode]} if gated else {}
    if isinstance(module, _ConvTransposeNd):
        return "conv", {"matrix_view": "transposed"}
    if isinstance(module, _ConvNd):
        # Groups do not mix: the map is block-diagonal, so its spectral norm is that of the largest block.
        return "conv", {"blocks": module.groups} if module.groups > 1 else {}
    return None, {}


def _mark_output(model: nn.Module, found: list[ParamInfo], output: str) -> None:
    if output == "last":
        layers = [c for c in found if c.kind in ("linear", "conv") and not isinstance(c.module, nn.RNNBase)]
        # A tied weight counts by its last module, which is the head if the embedding comes first.
        order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        tied = [c for c in found if c.kind == "embedding" and len(c.modules) > 1]
        last = max([*layers, *tied], key=lambda c: max(order[name] for name in c.modules), default=None)
        marked = [] if last is None else [last]
    else:
        if output not in dict(model.named_modules()):
            last_names = [c.modules[-1] for c in found if c.kind in ("linear", "conv")][-3:]
            raise ValueError(
                f"no module of the model is called {output!r}: set output to the name of the output layer, "
                f'such as {", ".join(map(repr, last_names)) or "…"}, to "last", or to None for no output layer'
            )
        marked = [c for c in found if output in c.modules and c.kind in MATRICES]
        if not marked:
            raise ValueError(f"the module {output!r} has no weight matrix of a known kind: name another as output")
    for info in marked:
        info.kind = "output"
        info.matrix.pop("matrix_view", None)  # a tied embedding (vocabulary × features) is the head's out × in

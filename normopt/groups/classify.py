"""What each parameter of a model is: an embedding's, a linear layer's, a convolution's, a norm layer's, a bias."""

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
GATES = {"LSTM": 4, "GRU": 3}  # of a recurrent layer, whose matrices are stacked by rows


@dataclass
class ParamInfo:
    """A parameter and what it is.

    Attributes:
        name: its first name in ``model.named_parameters()``.
        param: the parameter.
        places: the names of the modules that hold it: several, where it is shared.
        module: the first of these modules.
        kind: what it is; None if nothing here knows.
        matrix: how a matrix norm is to read it: ``matrix_view`` and ``blocks``, where they are not the default.
    """

    name: str
    param: nn.Parameter
    places: list[str]
    module: nn.Module
    kind: Kind | None
    matrix: dict[str, str | int] = field(default_factory=dict)


def classify_params(model: nn.Module, output: str | None) -> list[ParamInfo]:
    """Every parameter of the model, in its order, once.

    Args:
        model: any module.
        output: the name of the module that is the output layer; "last" is the last linear layer or convolution in
            the order of definition; None is none.

    Raises:
        ValueError: a parameter has no shape yet, or no module is called ``output``.
    """
    found: dict[int, ParamInfo] = {}
    for place, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"{place}.{attribute} has no shape yet: run a batch through the model first")
            if id(param) in found:
                found[id(param)].places.append(place)
                continue
            kind, matrix = _of(module, attribute, param)
            name = f"{place}.{attribute}" if place else attribute
            found[id(param)] = ParamInfo(name, param, [place], module, kind, matrix)
    _mark_output(model, list(found.values()), output)
    return list(found.values())


def _of(module: nn.Module, attribute: str, param: nn.Parameter) -> tuple[Kind | None, dict[str, str | int]]:
    """The kind of a module's own parameter, and how it is a matrix."""
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
        gates = GATES.get(module.mode, 1) if attribute.startswith(("weight_ih", "weight_hh")) else 1
        return "linear", {"blocks": gates} if gates > 1 else {}
    if isinstance(module, _ConvTransposeNd):
        return "conv", {"matrix_view": "transposed"}
    if isinstance(module, _ConvNd):
        # Groups do not mix: the map is block-diagonal, and its spectral norm that of its largest block.
        return "conv", {"blocks": module.groups} if module.groups > 1 else {}
    return None, {}


def _mark_output(model: nn.Module, found: list[ParamInfo], output: str | None) -> None:
    if output is None:
        return
    if output == "last":
        layers = [c for c in found if c.kind in ("linear", "conv") and not isinstance(c.module, nn.RNNBase)]
        # The last place of a tied weight counts: the head, where an embedding comes first.
        order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        tied = [c for c in found if c.kind == "embedding" and len(c.places) > 1]
        last = max([*layers, *tied], key=lambda c: max(order[place] for place in c.places), default=None)
        marked = [] if last is None else [last]
    else:
        if output not in dict(model.named_modules()):
            last_names = [c.places[-1] for c in found if c.kind in ("linear", "conv")][-3:]
            raise ValueError(
                f"no module of the model is called {output!r}, which is to be its output layer: give the name of one, "
                f'such as {", ".join(map(repr, last_names)) or "…"}, or "last", or None for none'
            )
        marked = [c for c in found if output in c.places and c.kind in MATRICES]
        if not marked:
            raise ValueError(f"the module {output!r} has no weight matrix of a kind that is known: give another output")
    for info in marked:
        info.kind = "output"
        info.matrix.pop("matrix_view", None)  # a tied embedding, vocabulary × features, is the head's out × in

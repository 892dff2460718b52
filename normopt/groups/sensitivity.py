"""How much a layer's output can move the model's: sensitivities, by walking the model's graph from its end."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

# What moves its output by at most so much, in RMS, as its input moves: the Lipschitz constant, where it is not 1.
STEEP = {"gelu": 1.1290, "silu": 1.0999, "mish": 1.0885, "hardswish": 1.5, "selu": 1.7581, "sigmoid": 0.25}
# A normalisation is taken for 1, as in the modular norm, whose streams keep an RMS of about 1; so is attention in its
# queries, keys and values.
STEADY = {
    *("relu", "relu6", "leakyrelu", "elu", "celu", "tanh", "softplus", "softmax", "logsoftmax", "hardtanh", "abs"),
    *("dropout", "dropout1d", "dropout2d", "identity", "clone", "contiguous", "detach", "neg", "mean", "amax"),
    *("avgpool1d", "avgpool2d", "adaptiveavgpool1d", "adaptiveavgpool2d", "maxpool1d", "maxpool2d", "maxpool3d"),
    *("adaptivemaxpool2d", "upsample", "interpolate", "pixelshuffle"),
    *("flatten", "unflatten", "view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand"),
    *("chunk", "split", "unbind", "getitem", "select", "narrow", "cat", "concat", "stack", "movedim", "repeat"),
    *("float", "half", "bfloat16", "to", "type", "typeas", "maskedfill", "where", "pad", "roll"),
    *("layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "normalize"),
    *("batchnorm1d", "batchnorm2d", "batchnorm3d", "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d"),
    *("scaleddotproductattention", "add", "sub", "iadd", "isub"),
}
TURNED = ("T", "mT", "H", "mH")
DESCRIBING = ("shape", "device", "dtype", "ndim", "is_cuda", "requires_grad", "itemsize", "nbytes")
BLIND = {"size", "dim", "shape", "assertisnone", "eq", "floordiv", "arange"}  # what carries no activation

Uses = dict[str, float]


class Untraceable(ValueError):
    """The model's graph could not be had, or has a place whose sensitivity is not known."""


def sensitivities(model: nn.Module, layers: Iterable[str]) -> Uses:
    """How far, at most, the model's output moves in RMS as the output of a layer, or a bare parameter, moves by 1.

    One walk from the end of the traced graph back to its start: what a place moves is the sum over the places that
    read it, each times how steep that one is. A layer with weights is taken for 1 as steep, which is true if its
    weight's norm is at most 1. A layer that is used twice moves what both uses do.

    Args:
        model: a model that torch.fx can trace.
        layers: names of modules that are not looked into: those that have parameters of their own.

    Returns:
        Module names and names of bare parameters, each with its sensitivity.

    Raises:
        Untraceable: with what is in the way.
    """
    graph = _trace(model, set(layers))
    modules = dict(model.named_modules())
    uses: Uses = defaultdict(float)
    moved: dict[fx.Node, float] = defaultdict(float)
    for node in reversed(graph.nodes):
        if node.op == "output":
            for source in node.all_input_nodes:
                moved[source] += 1.0
            continue
        here = moved[node]
        if here == 0:
            continue
        if node.op in ("call_module", "get_attr"):
            uses[str(node.target)] += here
        for source, steepness in _reads(node, modules):
            moved[source] += here * steepness
    return dict(uses)


def _trace(model: nn.Module, layers: set[str]) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in layers or super().is_leaf_module(m, module_qualified_name)

    absent = {n: None for n, p in inspect.signature(model.forward).parameters.items() if p.default is None}
    try:
        return Tracer().trace(model, concrete_args=absent)
    except Exception as error:
        raise Untraceable(f"torch.fx cannot trace it: {error}") from error


def _reads(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, float]]:
    """The places that a place reads, and how steep it is in each."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.MultiheadAttention):
            return [(source, 1.0) for source in _nodes(node.args[:3]) + _nodes(node.kwargs.values())]
        own = next(module.parameters(recurse=False), None) is not None
        steep = 1.0 if own else _steepness(type(module).__name__, node)
        if not own and next(module.parameters(), None) is not None:
            raise Untraceable(f"{node.target} is a {type(module).__name__}, which torch.fx does not look into")
        return [(source, steep) for source in _nodes(node.args) + _nodes(node.kwargs.values())]
    name = _name(node.target)
    if name in BLIND or (name == "getattr" and node.args[1] in DESCRIBING):
        return []
    if name == "getattr" and node.args[1] not in TURNED:
        raise Untraceable(f"what .{node.args[1]} ({node.name}) does is not known")
    sources = _nodes(node.args) + _nodes(node.kwargs.values())
    if name in ("mul", "imul", "truediv", "itruediv", "div"):
        numbers = [a for a in node.args if isinstance(a, int | float)]
        if len(sources) != 1 or len(numbers) != 1 or (name.endswith("div") and node.args[0] is numbers[0]):
            raise Untraceable(f"{node.name} is a {name} of two values that both depend on the input")
        factor = abs(float(numbers[0]))
        return [(sources[0], factor if name.endswith("mul") else math.inf if factor == 0 else 1 / factor)]
    return [(source, 1.0 if name == "getattr" else _steepness(name, node)) for source in sources]


def _nodes(values: Any) -> list[fx.Node]:
    """Every node among arguments, one that is given twice twice."""
    found: list[fx.Node] = []
    for value in values:
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _nodes(value)
    return found


def _steepness(name: str, node: fx.Node) -> float:
    plain = _plain(name)
    if plain not in STEADY and plain not in STEEP:
        raise Untraceable(f"how steep {name!r} is ({node.name}) is not known")
    return STEEP.get(plain, 1.0)


def _name(target: str | Callable[..., Any]) -> str:
    return _plain(target if isinstance(target, str) else getattr(target, "__name__", str(target)))


def _plain(name: str) -> str:
    return name.replace("_", "").lower()

"""Sensitivities of the model's output to each layer's output, by a backward pass over the model's fx graph."""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import fx, nn

# Lipschitz constants in RMS, of operations where it is not 1.
LIPSCHITZ = {"gelu": 1.1290, "silu": 1.0999, "mish": 1.0885, "hardswish": 1.5, "selu": 1.7581, "sigmoid": 0.25}
# Operations with constant 1. As in the modular norm, whose streams keep an RMS of about 1, this is assumed for
# normalisation layers, and for attention in its queries, keys and values.
NONEXPANSIVE = {
    *("relu", "relu6", "leakyrelu", "elu", "celu", "tanh", "softplus", "softmax", "logsoftmax", "hardtanh", "abs"),
    *("dropout", "dropout1d", "dropout2d", "identity", "clone", "contiguous", "detach", "neg", "mean", "amax"),
    *("avgpool1d", "avgpool2d", "adaptiveavgpool1d", "adaptiveavgpool2d", "maxpool1d", "maxpool2d", "maxpool3d"),
    *("adaptivemaxpool2d", "upsample", "interpolate", "pixelshuffle"),
    *("flatten", "unflatten", "view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand"),
    *("chunk", "split", "unbind", "getitem", "select", "narrow", "cat", "concat", "stack", "movedim", "repeat"),
    *("float", "half", "bfloat16", "to", "type", "typeas", "maskedfill", "where", "pad", "roll"),
    *("layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "normalize"),
    *("batchnorm1d", "batchnorm2d", "batchnorm3d", "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d"),
    *("scaleddotproductattention", "add", "sub", "iadd", "isub", "stochasticdepth"),
    *("swapaxes", "flip", "reshapeas", "viewas", "expandas"),
}
TRANSPOSES = ("T", "mT", "H", "mH")
METADATA = ("shape", "device", "dtype", "ndim", "is_cuda", "requires_grad", "itemsize", "nbytes")
NO_ACTIVATION = {"size", "dim", "shape", "assertisnone", "eq", "floordiv", "arange"}  # results that carry no activation

# What a forward pass does that has no graph, by the words of the exception, the first that fit.
REASONS = {
    "cannot be iterated": "loops over a tensor or unpacks it",
    "control flow": "branches on the value or the size of a tensor",
    "'len' is not": "takes the length of a tensor",
    "item assignment": "writes into a part of a tensor",
    r"interpreted as an integer|(int|float|complex)\(\) argument": "needs a number that is in a tensor, or its size",
    "NoneType": "needs an argument that is None by default, and such arguments are left out",
    "co_varnames": "has its arguments behind a decorator",
    'required "forward"': "is not defined",
}

Uses = dict[str, float]


class Untraceable(ValueError):
    """Raised if the model cannot be traced, or its graph has an operation of unknown sensitivity."""


def sensitivities(model: nn.Module, layers: Iterable[str]) -> Uses:
    """Bound the change of the model's output, in RMS, per unit change of each layer's output or bare parameter.

    One backward pass over the traced graph: a node's sensitivity is the sum over its users of the user's sensitivity
    times the user's Lipschitz constant. A layer with weights counts as 1, which holds if its weight's norm is at most
    1. The sensitivities of a layer that is used twice add up.

    Args:
        model: a model that torch.fx can trace.
        layers: names of the modules to treat as leaves: those with parameters of their own.

    Returns:
        The sensitivities by module name or bare parameter name.

    Raises:
        Untraceable: the graph cannot be traced or has an unknown operation; the message names it.
    """
    graph = _trace(model, set(layers))
    modules = dict(model.named_modules())
    uses: Uses = defaultdict(float)
    sensitivity: dict[fx.Node, float] = defaultdict(float)
    for node in reversed(graph.nodes):
        if node.op == "output":
            for source in node.all_input_nodes:
                sensitivity[source] += 1.0
            continue
        own = sensitivity[node]
        if own == 0:
            continue
        if node.op in ("call_module", "get_attr"):
            uses[str(node.target)] += own
        for source, constant in _inputs(node, modules):
            sensitivity[source] += own * constant
    return dict(uses)


def _trace(model: nn.Module, layers: set[str]) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in layers or super().is_leaf_module(m, module_qualified_name)

        def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().call_module(m, *args, **kwargs)
            except Exception:
                failed.append((self.path_of_module(m), type(m)))  # the innermost first
                raise

    failed: list[tuple[str, type]] = []
    absent = {n: None for n, p in inspect.signature(model.forward).parameters.items() if p.default is None}
    try:
        return Tracer().trace(model, concrete_args=absent)
    except Exception as error:
        of = _shown(*failed[0]) if failed else f"the model ({type(model).__name__})"
        raise Untraceable(f"cannot trace it: the forward pass of {of} {_why(error)}") from error


def _shown(path: str, cls: type) -> str:
    return f"{path!r} ({cls.__name__})"


def _why(error: Exception) -> str:
    """Return what a forward pass does that has no graph, and where."""
    said = str(error).partition("\n")[0]
    try:
        frames = traceback.extract_tb(error.__traceback__)
    except RuntimeError:  # Python 3.11 cannot list frames that an older Dynamo has made
        frames = traceback.StackSummary()
    raised = not frames or (frames[-1].line or "").startswith(("raise ", "assert "))
    what = "makes a call that takes actual tensors and numbers only"
    if raised:  # by the model itself
        what = f"raises {type(error).__name__}: {said[:200]!r} (arguments that are None by default are left out)"
    what = next((reason for words, reason in REASONS.items() if re.search(words, said)), what)
    tracing = str(Path(__file__).parent), str(Path(fx.__file__).parent)
    code = next((f for f in reversed(frames) if f.line and not f.filename.startswith(tracing)), None)
    if code is None or (raised and code is frames[-1]):
        return what
    return f"{what}, at `{code.line}` ({Path(code.filename).name}, line {code.lineno})"


def _inputs(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, float]]:
    """Return a node's input nodes, each with the node's Lipschitz constant in that input."""
    if node.op in ("placeholder", "get_attr"):
        return []
    sources = _nodes(node.args) + _nodes(node.kwargs.values())
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.MultiheadAttention):
            return [(source, 1.0) for source in _nodes(node.args[:3]) + _nodes(node.kwargs.values())]
        has_weights = any(True for _ in module.parameters(recurse=False))
        constant = 1.0 if has_weights else _lipschitz(type(module).__name__, node)
        return [(source, constant) for source in sources]
    name = _name(node.target)
    if name in NO_ACTIVATION or (name == "getattr" and node.args[1] in METADATA):
        return []
    if name == "getattr":
        if node.args[1] not in TRANSPOSES:
            raise Untraceable(f"the sensitivity of .{node.args[1]}{_place(node)} is not known")
        return [(source, 1.0) for source in sources]
    if name in ("mul", "imul", "truediv", "itruediv", "div"):
        numbers = [a for a in node.args if isinstance(a, int | float)]
        if len(sources) != 1 or len(numbers) != 1 or (name.endswith("div") and node.args[0] is numbers[0]):
            raise Untraceable(f"there is a {name} of two values{_place(node)}, not by a constant")
        factor = abs(float(numbers[0]))
        return [(sources[0], factor if name.endswith("mul") else math.inf if factor == 0 else 1 / factor)]
    return [(source, _lipschitz(node.target, node)) for source in sources]


def _nodes(values: Any) -> list[fx.Node]:
    """Return all fx nodes in the arguments, with multiplicity."""
    found: list[fx.Node] = []
    for value in values:
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _nodes(value)
    return found


def _lipschitz(target: str | Callable[..., Any], node: fx.Node) -> float:
    plain = _name(target)
    if plain not in NONEXPANSIVE and plain not in LIPSCHITZ:
        name = getattr(target, "__name__", target)
        raise Untraceable(f"the sensitivity of {name!r}{_place(node)} is not known")
    return LIPSCHITZ.get(plain, 1.0)


def _place(node: fx.Node) -> str:
    """Return the module that a node is in, as words to append."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return f" in {_shown(*stack[-1])}" if stack else ""


def _name(target: str | Callable[..., Any]) -> str:
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.replace("_", "").lower()

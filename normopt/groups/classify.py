"""Classify a model's parameters: what kind of layer each belongs to, and which matrices its tensor stores."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

# fmt: off
Kind = Literal[
    "linear", "qkv", "gate_up", "experts", "router", "recurrent", "conv",
    "depthwise", "input_conv", "gate",
    "embedding", "table", "output",
    "norm", "bias", "vector", "state",
]
# fmt: on
KINDS: tuple[Kind, ...] = get_args(Kind)
VECTORS: tuple[Kind, ...] = KINDS[-4:]
MATRICES: tuple[Kind, ...] = KINDS[:-4]
UNDECAYED: tuple[Kind, ...] = ("table", *VECTORS)

NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.PReLU)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LAYERS = (
    *(nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    *NORM_LAYERS,
    *EMBEDDINGS,
)
GATES = {"LSTM": 4, "GRU": 3, "LSTMCell": 4, "GRUCell": 3}  # of recurrent layers, stacked along the rows

OLD_PARAMETRIZED = re.compile(r"(\w*weight\w*)_(g|v|orig)")
PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)")
# Names of a module: a fused projection of queries, keys and values, and one of a gate and what it multiplies.
QKV = re.compile(r"w?qkv(_proj)?|to_qkv|c_attn|query_key_value|att_proj|in_proj_qkv", re.IGNORECASE)
GATE_UP = re.compile(r"(gate_up|up_gate)(_proj)?|w13|w12|Wi|fc1|input_linear")
OTHER_ORDER = "query_key_value"  # its heads' queries, keys and values are interleaved
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head")
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads", "nhead", "h")
KV_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_head", "n_kv_heads", "kv_heads")
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate)(\.|$)", re.IGNORECASE)
# Names of a bare parameter.
TABLE = re.compile(
    r"((abs|rel|relative)_?)?pos(ition(al)?)?_?(emb|enc|table)\w*|\w*_?pos(ition)?(al)?_(emb|enc|table)\w*|\w*_?pos_[hw]"
    r"|((abs|rel|relative)_)?pos(itions?)?|w?pe|cls|\w*registers?|latent_array"
    r"|\w*tokens?|\w*quer(y|ies)|\w*latents?|probe|\w*prompts?|\w*embed(ding)?s?(_table)?|\w*codevectors?|\w*codebooks?"
)
STATE = re.compile(r"A|A_logs?|Ds?|dt_\w+|time_\w+|recurrent_param|lambda\w*|alpha\w*")
FACTOR = re.compile(r"lora_(embedding_)?(A|B|down|up)(\.\w+)?")
# Names of an output layer, or of a container of one: at any depth, at the top or inside of such, or for want of others.
DEEP = re.compile(
    r"lm_head|embed_out|output_projection|unembed|seq_relationship|cls_score|bbox_(pred|reg|embed|ctrness)|cls_logits"
    r"|(\w+_)?class_embed|enc_score_head|mask_fcn_logits|kps_score_lowres|(classification|regression)_head|class_labels_classifier"
)
TOP = re.compile(
    r"(?!conv_)(\w+_)?heads?|head_dist|(?!pre_)\w*classifier\w*(?<!_pre)|cls|score|(bbox|class)_predictor|(?!pre_)(\w+_)?logits(_proj)?"
    r"|decoder_pred|conv_out|proj_out(_2)?|qa_outputs|aux\w*|objective",
    re.IGNORECASE,
)
WEAK = "fc"  # of an output if no other is found, or if it is the last
ATTENTION = re.compile(r"(q|k|v|qkv|query|key|value|queries|keys|values)(_proj)?")  # layers of what "heads" may also be
TASKS = re.compile("For[A-Z]|LMHead|DoubleHeads")
# Names of a layer of the model's own that is an output if it is the last one of these.
OUT = re.compile(r"decoder|out|output|(fc|linear)_?out|output_layer")
OWN = re.compile(rf"{OUT.pattern}|fc\d+")
LAST = re.compile(r"(^sequence_summary|\.final_layer|^(joint|decoder)\.head)$")


@dataclass
class ParamInfo:
    """A parameter and its classification.

    Attributes:
        names: its names; several if it is shared.
        param: the parameter.
        modules: the names of the modules that own it; several if it is shared. Of a parametrized weight it is the
            layer that uses it.
        holders: these modules.
        kind: its kind; None if unknown.
        matrix: non-default settings of a matrix norm: ``matrix_view`` and ``blocks``.
        attribute: its name in that module.
        parent: the module that holds that module; None at the top.
        guessed: whether the kind follows from a name alone.
        decays: False if it has no weight decay whatever its kind is.
    """

    names: list[str]
    param: nn.Parameter
    modules: list[str]
    holders: list[nn.Module]
    kind: Kind | None
    matrix: dict[str, Any] = field(default_factory=dict)
    attribute: str = ""
    parent: nn.Module | None = None
    guessed: bool = False
    decays: bool = True

    @property
    def name(self) -> str:
        """Its first name in ``model.named_parameters()``."""
        return self.names[0]

    @property
    def module(self) -> nn.Module:
        """The first module that owns it."""
        return self.holders[0]


def classify_params(model: nn.Module, output: str | Sequence[str] | None) -> tuple[list[ParamInfo], list[str]]:
    """Return every parameter of the model once, in the model's order, and notes for the user.

    Args:
        model: any module.
        output: "auto", "last", the name or names of the output layers' modules, or None; see `param_groups`.

    Raises:
        ValueError: a parameter has no shape yet, or no module is called ``output``.
    """
    modules = dict(model.named_modules())
    found: dict[int, ParamInfo] = {}
    embeds: dict[int, set[bool]] = {}  # whether the layers that own a parameter are embeddings
    seen_conv = False
    for path, holder in modules.items():
        if not holder._parameters:
            continue
        prefix, module, own = path, holder, None
        if "parametrizations." in path and (match := PARAMETRIZED.fullmatch(path)):
            prefix, own = match[1] or "", match[2]
            module = modules[prefix]
        for attribute, param in holder._parameters.items():
            if param is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run a batch through the model first")
            old = OLD_PARAMETRIZED.fullmatch(attribute)
            made = own or (old[1] if old and _get(module, old[1]) is not None else None)
            shown = made or attribute
            kind, matrix, guessed = _classify(modules, prefix, module, shown, param)
            if made and sum(size > 1 for size in param.shape) <= 1:
                kind, matrix = "vector", {}  # lengths
            owned = isinstance(module, LAYERS) and kind is not None
            info = found.setdefault(id(param), ParamInfo([], param, [], [], None))
            if not info.names or (owned and not isinstance(info.module, LAYERS)):
                if isinstance(module, _ConvNd):
                    kind = "gate" if kind == "input_conv" and seen_conv else kind
                    seen_conv = True
                info.kind, info.matrix, info.guessed, info.attribute = kind, matrix, guessed, shown
                info.modules.insert(0, prefix)
                info.holders.insert(0, module)
                info.parent = modules.get(prefix.rpartition(".")[0]) if prefix else None
            else:
                info.modules.append(prefix)
                info.holders.append(module)
            info.names.append(name)
            info.decays &= made is None
            is_embedding = isinstance(module, EMBEDDINGS) or "Embedding" in type(module).__name__
            if owned or is_embedding or shown == "weight":  # not a second name that a module has for it
                embeds.setdefault(id(param), set()).add(is_embedding)
    infos = list(found.values())
    for info in infos:
        # Tied: of an embedding and of a layer that is the output.
        if info.param.dim() > 1 and embeds.get(id(info.param)) == {True, False}:
            info.kind, info.matrix, info.guessed = "output", {}, False
    every = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in modules.items()}
    for path in [path for path in every if path not in modules]:  # other names of a module
        for info in (info for info in infos if first[id(every[path])] in info.modules):
            info.modules.append(path)
            info.names.append(f"{path}.{info.attribute}")
    for path, module in _outermost(modules, ["no_weight_decay"]):
        names = {f"{path}.{name}" if path else name for name in _call(module, "no_weight_decay") or ()}
        for info in infos:
            info.decays &= info.name not in names
    return infos, [] if output is None else _mark_outputs(every, infos, output)


Classified = tuple[Kind | None, dict[str, Any], bool]


def _classify(
    modules: dict[str, nn.Module], prefix: str, module: nn.Module, attribute: str, param: nn.Parameter
) -> Classified:
    """Return the kind of a module's own parameter, its matrix settings, and whether its name alone tells."""
    wide = sum(size > 1 for size in param.shape)
    kind_of = type(module).__name__
    is_layer = isinstance(module, (nn.Linear, _ConvNd, *EMBEDDINGS)) and attribute == "weight"
    if isinstance(module, NORM_LAYERS) or ("norm" in kind_of.lower() and wide <= 1 and not is_layer):
        return "norm", {}, False
    if "bias" in attribute:
        return "bias", {}, wide > 1 and param.dim() != 1
    is_layer |= FACTOR.search(f"{prefix}.{attribute}") is not None
    if wide <= 1 and not (is_layer and param.dim() > 1) and not (param.dim() == 3 and "Expert" in kind_of):
        return "vector", {}, False
    if attribute == "weight" and isinstance(module, EMBEDDINGS):
        return "embedding", {"matrix_view": "transposed"}, False
    if attribute == "weight" and isinstance(module, _ConvNd):
        return _conv(module, param)
    if isinstance(module, nn.MultiheadAttention):
        return ("qkv", {"blocks": 3 * module.num_heads}, False) if "in_proj" in attribute else ("linear", {}, False)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = (
            GATES.get(getattr(module, "mode", kind_of), 1) if attribute.startswith(("weight_ih", "weight_hh")) else 1
        )
        return "recurrent", {"blocks": gates} if gates > 1 else {}, False
    if attribute == "weight" and (isinstance(module, nn.Linear) or (kind_of == "Conv1D" and param.dim() == 2)):
        return _linear(modules, prefix, module, param)
    if attribute == "weight" and isinstance(module, nn.Bilinear):
        return "linear", {}, False
    return _bare(kind_of, prefix, module, attribute, param)


def _conv(module: _ConvNd, param: nn.Parameter) -> Classified:
    groups, taps = module.groups, math.prod(module.kernel_size)
    if groups > 1 and groups == module.in_channels:
        return "depthwise", {"blocks": groups} if module.out_channels % groups == 0 else {}, False
    if isinstance(module, _ConvTransposeNd):
        # In groups, its tensor holds them along the columns, which no view separates.
        return "conv", {"matrix_view": "transposed"}, False
    patches = taps > 1 and tuple(module.stride) == tuple(module.kernel_size)
    # Groups do not mix: the map is block-diagonal, so its spectral norm is that of the largest block.
    matrix: dict[str, Any] = ({"matrix_view": "patches"} if patches else {}) | (
        {"blocks": groups} if groups > 1 else {}
    )
    if module.in_channels <= 4 and not patches:
        return "input_conv", matrix, False
    if min(module.out_channels // groups, math.prod(param.shape[1:])) < 4:
        return "gate", matrix, False
    return "conv", matrix, False


def _linear(modules: dict[str, nn.Module], prefix: str, module: nn.Module, param: nn.Parameter) -> Classified:
    """Return the kind of a linear layer's weight, out × in, or in × out of transformers' Conv1D."""
    turned = not isinstance(module, nn.Linear)
    rows, columns = param.shape[::-1] if turned else param.shape
    view = {"matrix_view": "transposed"} if turned else {}
    if min(rows, columns) < 4:
        return "gate", view, False
    path, _, name = prefix.rpartition(".")
    parent = modules.get(path)
    if QKV.fullmatch(name) or (name == "in_proj" and "SelfAttention" in type(parent).__name__):
        blocks = _heads(parent, name, rows, columns)
        return "qkv", view | ({"blocks": blocks} if blocks > 1 else {}), True
    if GATE_UP.fullmatch(name) and rows % 2 == 0 and _halved(parent, module, rows, columns):
        return "gate_up", view | {"blocks": 2}, True
    if name in ("gate", "router") and _get(parent, "experts") is not None:
        return "router", view, True
    return "linear", view, False


def blocks_of(kind: str | None, info: ParamInfo) -> int:
    """Return how many matrices a tensor of two dims holds if it is of this kind."""
    turned = info.matrix.get("matrix_view") == "transposed"
    rows, columns = info.param.shape[::-1] if turned else info.param.shape
    if kind == "qkv":
        return _heads(info.parent, info.modules[0].rpartition(".")[2], rows, columns)
    return 2 if kind == "gate_up" and rows % 2 == 0 else 1


def _heads(parent: nn.Module | None, name: str, rows: int, columns: int) -> int:
    """Return the blocks of a fused projection: its heads, or 3 where they are not told; 1 if its layout is not known.

    Heads are separate in every layout: queries, keys and values one after the other, or interleaved, of equal numbers
    or not.
    """
    size = _first(parent, HEAD_SIZES)
    heads = _first(parent, HEADS)
    all_heads = heads + 2 * (_first(parent, KV_HEADS) or heads)
    if not size and heads and rows % all_heads == 0 and _get(parent, "key_dim") is None:  # else of unequal sizes
        size = rows // all_heads
    if size and rows % size == 0:
        return rows // size
    return 3 if rows == 3 * columns and name != OTHER_ORDER else 1


def _get(module: nn.Module | None, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # a property that cannot be read yet
        return None


def _first(module: nn.Module | None, names: Sequence[str]) -> int:
    return next((v for v in (_get(module, name) for name in names) if isinstance(v, int) and v > 0), 0)


def _halved(parent: nn.Module | None, module: nn.Module, rows: int, columns: int) -> bool:
    """Return whether a sibling takes half of the rows: the product of the two halves."""
    siblings = [m for m in parent.children() if m is not module] if parent is not None else []
    takes = [m.in_features for m in siblings if isinstance(m, nn.Linear)]
    return rows // 2 in takes and rows not in takes


def _bare(kind_of: str, prefix: str, module: nn.Module, attribute: str, param: nn.Parameter) -> Classified:
    """Return the kind of a tensor of two dims or more that no known layer owns."""
    if "expert" in (prefix + kind_of).lower() and param.dim() == 3:
        told = _get(module, "is_transposed")
        turned = bool(told) or kind_of == "Llama4TextExperts"
        fused = attribute.startswith(("gate_up", "w13")) and getattr(module, "is_concatenated", True)
        view = "batch-transposed" if turned else "batch"
        return "experts", {"matrix_view": view} | ({"blocks": 2} if fused else {}), told is None and not turned
    if param.dim() == 2 and attribute == "weight" and ("Router" in kind_of or ROUTER.search(prefix)):
        return ("gate" if min(param.shape) < 4 else "router"), {}, True
    if kind_of.endswith("Loss") and attribute == "weight":
        return "output", {"matrix_view": "transposed"}, True
    if param.dim() == 2 and (factor := FACTOR.search(f"{prefix}.{attribute}")):
        return ("embedding" if factor[1] else "gate" if min(param.shape) < 4 else "linear"), {}, True
    if STATE.fullmatch(attribute):
        return "state", {}, True
    if TABLE.fullmatch(attribute) or ("Embed" in kind_of and attribute in ("weight", "weights")):
        return "table", {"matrix_view": "transposed" if param.dim() == 2 else "batch-transposed"}, True
    if "Linear" in kind_of and attribute == "weight" and param.dim() == 2:
        return "linear", {}, True
    return None, {}, False


def _outermost(modules: dict[str, nn.Module], methods: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that have one of the methods, and that no other such module contains."""
    last: str | None = None
    for path, module in modules.items():
        if any(hasattr(type(module), method) for method in methods) and (
            last is None or not f"{path}.".startswith(last)
        ):
            last = f"{path}." if path else ""
            yield path, module


def _call(module: nn.Module, method: str) -> Any:
    try:
        return getattr(module, method)()
    except Exception:  # libraries have classes whose method is not implemented
        return None


def _mark_outputs(modules: dict[str, nn.Module], infos: list[ParamInfo], output: str | Sequence[str]) -> list[str]:
    """Make "output" the kind of the output layers' weights; return a note if none was found."""
    by_module: dict[str, list[ParamInfo]] = {}
    for info in infos:
        for path in info.modules:
            by_module.setdefault(path, []).append(info)
    layers = [path for path, own in by_module.items() if any(_is_layer(info) for info in own)]
    notes: list[str] = []
    if output == "auto":
        marked, guessed, weak = _found_outputs(modules, by_module, layers)
        if marked and len(alike := dict.fromkeys([*marked, *weak])) > 1 and weak:
            names = [", ".join(paths) for paths in (alike, marked)]
            notes = [f"{names[0]} look like output layers, and {names[1]} was taken for it: pass output= to choose"]
        if not marked and not any(info.kind == "output" for info in infos):
            last = _last(modules, by_module, [p for p in layers if any(i.param.requires_grad for i in by_module[p])])
            if last is None:
                return []
            return [f"no output layer was found: pass output={last!r} if it is one, or a list if there are several"]
    elif output == "last":
        last = _last(modules, by_module, layers)
        marked, guessed = [last] if last is not None else [], False
    else:
        marked, guessed = [output] if isinstance(output, str) else list(output), False
        for path in marked:
            if path not in modules:
                last_names = [info.modules[-1] for info in infos if info.kind in ("linear", "conv")][-3:]
                raise ValueError(
                    f"no module of the model is called {path!r}: set output to the name of the output layer, such as "
                    f'{", ".join(map(repr, last_names)) or "…"}, to a list of names, to "auto", to "last", or to None'
                )
            if not any(info.kind in MATRICES for info in by_module.get(path, ())):
                raise ValueError(f"the module {path!r} has no weight matrix of a known kind: name another as output")
    for path in marked:
        for info in by_module[path]:
            if info.kind in MATRICES:
                info.guessed = guessed and info.kind != "output"  # a tie is known
                info.kind = "output"
                # A tied embedding (vocabulary × features) is the head's out × in.
                if not isinstance(info.module, _ConvTransposeNd) and type(info.module).__name__ != "Conv1D":
                    info.matrix.pop("matrix_view", None)
                info.matrix.pop("blocks", None)
    return notes


def _is_layer(info: ParamInfo) -> bool:
    """Return whether a parameter is the weight of a layer that can be an output."""
    if info.kind == "output":
        return True
    return info.attribute == "weight" and isinstance(info.module, nn.Linear | _ConvNd | nn.Bilinear)


def _last(modules: dict[str, nn.Module], by_module: dict[str, list[ParamInfo]], layers: list[str]) -> str | None:
    """Return the last linear layer or convolution in the order of definition, frozen or not."""
    own = [info for path in layers for info in by_module[path]]
    names = {path for info in own if _is_layer(info) for path in info.modules}
    order = {name: i for i, name in enumerate(modules)}
    return max(names, key=lambda name: order.get(name, -1), default=None)


def _found_outputs(
    modules: dict[str, nn.Module], by_module: dict[str, list[ParamInfo]], layers: list[str]
) -> tuple[list[str], bool, list[str]]:
    """Return the output layers that the model's methods tell, or else its names; whether names alone do; doubtful ones.

    The last are layers that have the name of an output layer, but a weak one, beside others.
    """
    paths = {id(module): path for path, module in modules.items()}
    top = _trunk(modules)
    told: list[str] = []
    inner: list[str] = []  # which a part of the model would have as its own output
    classifies = False
    methods = ("get_output_embeddings", "get_classifier")
    for path, module in _outermost(modules, methods):
        for method in methods:
            heads = [paths[id(part)] for part in _flat(_call(module, method)) if id(part) in paths]
            ends = [end for head in heads for end in _ends(head, modules, layers)]
            told += ends
            classifies = classifies or (method == "get_classifier" and bool(ends))
            inner += ends if method == "get_classifier" and not top.startswith(path) else []
            if not ends and not path and method == "get_classifier" and hasattr(type(module), method):
                return [], False, []  # made without one
    outside = [p for p in modules if p.startswith(top) and p != top.rstrip(".") and "." not in p[len(top) :]]
    root = modules[top.rstrip(".")]
    # The classes of transformers that have no task have no head.
    bare = [hasattr(m, "base_model_prefix") and not TASKS.search(type(m).__name__) for m in (modules[""], root)]
    if bare[1]:
        outside = []
    heads = [path for path in outside if TOP.fullmatch(path[len(top) :]) and not _attends(path, modules)]
    if inner and any(end not in told for path in heads for end in _ends(path, modules, layers)):
        told = [path for path in told if path not in inner]
    elif told:  # beside what is told, layers and classifiers only
        outside = [path for path in outside if path in layers or ("classifier" in path and not classifies)]
    deep = [path for path in modules if _is_deep(path)]
    named = [path for path in heads if path in outside and not any(inside.startswith(f"{path}.") for inside in deep)]
    ends = [end for path in named + deep for end in _ends(path, modules, layers)]
    own = [path for path in outside if any(f"{layer}.".startswith(f"{path}.") for layer in layers)]
    weak = [path for path in own if path == f"{top}{WEAK}"]
    if weak == own[-1:]:
        ends += [end for path in weak for end in _ends(path, modules, layers)]
    if not told and not ends and not bare[0]:
        ends = [end for path in modules if LAST.search(path) for end in _ends(path, modules, layers)]
    if not told and not ends and not hasattr(root, "base_model_prefix"):
        ends = [path for path in own[-1:] if path in layers and OWN.fullmatch(path[len(top) :])]
        weak = [path for path in own if path in layers and OUT.fullmatch(path[len(top) :])]
    if not told and not ends and (end := _end_of_sequence(top.rstrip("."), modules, layers)) is not None:
        return [end], False, []
    return list(dict.fromkeys(told + ends)), not told, weak


def _attends(path: str, modules: dict[str, nn.Module]) -> bool:
    """Return whether a module has layers of queries, keys and values in it, as a list of attention heads has."""
    return any(n.startswith(f"{path}.") and ATTENTION.fullmatch(n.rpartition(".")[2]) for n in modules)


def _trunk(modules: dict[str, nn.Module]) -> str:
    """Return the prefix of the names in the model that wrappers hold, such as "module." or "model."; "" without any."""
    prefix = ""
    while True:
        module = modules[prefix.rstrip(".")]
        children = [n for n, m in module.named_children() if next(m.parameters(), None) is not None]
        own = any(p is not None for p in module._parameters.values())
        if own or len(children) != 1 or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return prefix
        if TOP.fullmatch(children[0]) or children[0] == WEAK or f"{prefix}{children[0]}" not in modules:
            return prefix
        prefix += f"{children[0]}."


def _is_deep(path: str) -> bool:
    """Return whether a module has the name of an output layer, and is not in a numbered block."""
    *above, name = path.split(".")
    return DEEP.fullmatch(name) is not None and not any(part.isdigit() for part in above)


def _ends(path: str, modules: dict[str, nn.Module], layers: list[str]) -> list[str]:
    """Return the output layers in a module: itself, or of a container those with names of such, or the last layer."""
    if path in layers:
        return [path]
    module = modules.get(path)
    if module is None:  # another path's, too
        return []
    children = [name for name, _ in module.named_children()]
    named = [name for name in children if TOP.fullmatch(name) or DEEP.fullmatch(name)]
    named = named or [name for name in children if name == WEAK]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # one for each layer or task
        each = [[layer for layer in layers if f"{layer}.".startswith(f"{path}.{name}.")] for name in children]
        ends = [inside[-1] for inside in each if inside]
        shapes = [cast(Any, modules[end]).weight.shape for end in ends]
        several = re.fullmatch(r"(\w+_)?(heads|classifiers)", path.rpartition(".")[2]) or isinstance(
            module, nn.ModuleDict
        )
        chained = not several and all(first[0] == second[1] for first, second in itertools.pairwise(shapes))
        return ends[-1:] if chained else ends
    if len(children) == 1:
        named = children
    if named:
        return [end for name in named for end in _ends(f"{path}.{name}", modules, layers)]
    inside = [layer for layer in layers if layer.startswith(f"{path}.")]
    return inside[-1:]


def _end_of_sequence(path: str, modules: dict[str, nn.Module], layers: list[str]) -> str | None:
    """Return the last layer of a chain of layers, if the last module with parameters is one."""
    if path in layers:
        return path
    if not isinstance(modules[path], nn.Sequential):
        return None
    parts = [name for name, child in modules[path].named_children() if next(child.parameters(), None) is not None]
    return _end_of_sequence(f"{path}.{parts[-1]}" if path else parts[-1], modules, layers) if parts else None


def _flat(modules: Any) -> list[nn.Module]:
    if isinstance(modules, nn.ModuleDict):
        modules = list(modules.values())
    if isinstance(modules, nn.ModuleList | tuple | list):
        return [part for one in modules for part in _flat(one)]
    return [modules] if isinstance(modules, nn.Module) else []

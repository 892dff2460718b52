"""What each parameter of a real model must get, from what its own library says about it.

Nothing here is read from normopt. The facts are transformers' `get_output_embeddings()`, `base_model`, `num_labels` and
`vocab_size`, its experts' `is_transposed` and `is_concatenated`; timm's `get_classifier()`; the names of torchvision's
predictors; of all three, the modules' types, the attention modules' head sizes, the convolutions' strides and groups,
and one Parameter held by two modules. A bare parameter is a matrix only if it is in a table here, made by reading how
its module's forward pass multiplies with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tests.architectures.models import LABELS

HIDDEN = frozenset({"linear", "qkv", "gate_up", "experts", "router", "recurrent", "conv"})
VECTORS = frozenset({"norm", "bias", "vector", "state"})
ANY = HIDDEN | VECTORS | {"depthwise", "input_conv", "gate", "embedding", "table"}

# Fused projections of q, k and v, by the last part of their name in their library's attention modules.
FUSED = {"qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value", "att_proj", "to_qkv"}
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
# Cut into two by chunk(2, -1) in the forward pass of every module that has one.
GLU = {"gate_up_proj", "Wi"}
# Projections of which several are fused, but not as equal q, k and v: any cut is as good as none.
CUT_OR_NOT = {"kv", "qk", "kv_proj", "to_kv", "kv_b_proj", "in_proj_qkv", "in_proj_qkvz", "q_b_proj", "query_key"}

# Bare parameters (dims > 1 at least two) that a forward pass multiplies with, by (module type, attribute): how.
ROWS, TURNED = "out x in, as F.linear takes it", "in x out, as x @ W takes it"
MATRICES = {
    ("Conv1D", "weight"): TURNED,  # addmm(bias, x, weight), transformers/pytorch_utils.py
    ("QuantLinear", "weight"): ROWS,  # I-BERT's
}
# Of these, whether a step orthogonalises them is a choice, but not which way round they are.
MATRICES_OR_NOT = {
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): TURNED,
    ("T5Gemma2MultiModalProjector", "mm_input_projection_weight"): TURNED,
    ("OmDetTurboLanguageBackbone", "text_projection"): TURNED,
    ("XCLIPModel", "prompts_visual_projection"): TURNED,
    ("DeepseekV4HyperConnection", "fn"): ROWS,
    ("DeepseekV4HyperHead", "hc_fn"): ROWS,
    ("Glm5NextTextHyperConnection", "fn"): ROWS,
    ("HYV4HyperConnection", "fn"): ROWS,
    ("HYV4HyperHead", "hc_fn"): ROWS,
    ("HYV4VLHyperConnection", "fn"): ROWS,
    ("HYV4VLHyperHead", "hc_fn"): ROWS,
    ("Glm5NextTextIndexer", "index_kpool_compress_gate"): ROWS,
}
# Stacks (n, out, in) of separate matrices beside experts, also a choice.
STACKS_OR_NOT = {
    ("RecurrentGemmaRglru", "input_gate_weight"),
    ("RecurrentGemmaRglru", "recurrent_gate_weight"),
    ("ZambaMambaMixer", "x_proj_weight"),
    ("ZambaMambaMixer", "dt_proj_weight"),
}
# Experts whose module does not say which way round they are: x @ W in the forward pass.
EXPERTS_IN_BY_OUT = {"Llama4TextExperts"}
STATE = re.compile(r"(^|\.)(A_log|D|dt_bias|A|time_decay|time_first|recurrent_param|dt_proj_weight|dt_proj_bias)$")


@dataclass(frozen=True)
class Given:
    """What param_groups gave a parameter."""

    kind: str
    norm: str
    view: str
    blocks: Any
    decay: Any


@dataclass(frozen=True)
class Expected:
    """What a parameter must get.

    Attributes:
        why: the fact it follows from.
        step: "orthogonal", "other" (no matrix norm of Muon's), "either", or "none" (in no group).
        kinds: the kinds it may have.
        views: the views under which an orthogonal step is of the right matrices.
        blocks: the allowed numbers of blocks; None allows all.
        decays: whether it may have weight decay; vectors and tables have none anyway.
        may_be_output: whether calling it an output is right, too.
    """

    why: str
    step: str
    kinds: frozenset[str]
    views: frozenset[str] = frozenset()
    blocks: frozenset[int] | None = field(default=frozenset({1}))
    decays: bool = True
    may_be_output: bool = False

    def problem(self, given: Given | None) -> str:
        """Return what is wrong with what was given, or nothing."""
        if given is None or self.step == "none":
            wrong = (given is None) != (self.step == "none")
            return ("is in no group" if given is None else "is frozen, but in a group") if wrong else ""
        orthogonal = given.norm == "spectral"
        if given.kind == "output" and self.may_be_output:
            return "is an output, but orthogonalised" if orthogonal else ""
        if given.kind not in self.kinds:
            return f"is {given.kind!r}, not one of {sorted(self.kinds)}"
        if orthogonal and self.step == "other":
            return f"is orthogonalised (as {given.kind!r})"
        if not orthogonal and self.step == "orthogonal":
            return f"is not orthogonalised (as {given.kind!r})"
        if (given.decay == 0) == (self.decays and given.kind not in VECTORS | {"table"}):
            return f"has weight_decay {given.decay} (as {given.kind!r})"
        if not orthogonal:
            return ""
        if given.view not in self.views:
            return f"is read as {given.view!r}, not {sorted(self.views)}"
        if self.blocks is not None and given.blocks not in self.blocks:
            return f"has {given.blocks} blocks, not {sorted(self.blocks)}"
        return ""


def expected_of(
    model: nn.Module, outputs: Iterable[nn.Module], may_be_output: Iterable[nn.Module] = ()
) -> dict[str, Expected]:
    """Return what each parameter must get, by its first name.

    Args:
        model: the model.
        outputs: the modules that the library calls its heads.
        may_be_output: modules whose last matrix may be called a head, too.
    """
    modules = dict(model.named_modules())
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in modules.items():
        for attribute, param in module.named_parameters(recurse=False):
            owner, name, own = _layer(modules, prefix, attribute)
            owners.setdefault(id(param), []).append((owner, own, name))
    heads = {id(p) for module in outputs for p in _matrices(module)}
    first = next((m for m in modules.values() if isinstance(m, _ConvNd)), None)
    maybe = {id(p) for module in may_be_output for p in _matrices(module)}
    no_decay = set(_call(model, "no_weight_decay") or ())
    found = {}
    for name, param in model.named_parameters():
        held = owners[id(param)]
        expected = _expected(modules, name, param, held, id(param) in heads)
        if first is not None and param is first.weight and first.in_channels <= 4 and expected.step == "either":
            expected = Expected("the first convolution", "other", frozenset({"input_conv"}))
        if id(param) in maybe:
            expected = _replace(expected, may_be_output=True)
        if re.search(r"parametrizations\.|weight_[gv]$", name) or name in no_decay:
            expected = _replace(expected, decays=False)
        found[name] = expected
    return found


def _layer(modules: dict[str, nn.Module], prefix: str, attribute: str) -> tuple[str, str, nn.Module]:
    """Return (name, attribute, module) of the layer that owns a parameter, also if it is parametrized."""
    if match := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)", prefix):
        return match[1] or "", match[2], modules[match[1] or ""]
    return prefix, attribute, modules[prefix]


def _expected(
    modules: dict[str, nn.Module], name: str, param: nn.Parameter, held: list[tuple[str, nn.Module, str]], head: bool
) -> Expected:
    prefix, module, attribute = held[0]
    wide = sum(size > 1 for size in param.shape)
    types = {type(m).__name__: m for _, m, _ in held}
    embeds = any(_is_embedding(m) for m in types.values())
    if not param.requires_grad:
        return Expected("frozen", "none", frozenset())
    if head and not (wide <= 1 and attribute != "weight"):
        also = (
            {"gate", "vector"} if wide <= 1 else {"embedding"} if all(_is_embedding(m) for m in types.values()) else ()
        )
        return Expected("the library's output", "other", frozenset({"output", *also}))
    if embeds and any(isinstance(m, nn.Linear) for m in types.values()):
        return Expected("tied: one Parameter of an Embedding and a Linear", "other", frozenset({"output"}))
    if embeds and attribute == "weight":
        small = VECTORS if wide <= 1 else frozenset()
        return Expected("an Embedding", "other", frozenset({"embedding", "table", "output"}) | small)
    layers = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    if wide <= 1 and not (isinstance(module, layers) and "weight" in attribute and param.dim() > 1):
        return Expected("at most one dim larger than 1", "other", VECTORS, decays=False)
    if name.rpartition(".")[2] in ("weight_g", "original0") and wide <= 1:
        return Expected("the lengths of a parametrized weight", "other", VECTORS, decays=False)
    if STATE.search(name):
        return Expected("a state-space parameter", "other", VECTORS | {"table"}, decays=False)
    if "bias" in attribute:
        return Expected("a bias, of any shape", "other", VECTORS | {"table", "embedding"})
    if isinstance(module, _ConvNd):
        return _conv(module, param)
    if isinstance(module, nn.MultiheadAttention):
        heads = module.num_heads
        cut = {3 * heads} if attribute == "in_proj_weight" else {1, heads}
        return _matrix("nn.MultiheadAttention", {"rows"}, cut)
    if isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        return _matrix("nn.RNNBase", {"rows"}, {gates if attribute.startswith(("weight_ih", "weight_hh")) else 1})
    if isinstance(module, nn.RNNCellBase):
        return _matrix("nn.RNNCellBase", {"rows"}, {{"LSTMCell": 4, "GRUCell": 3}.get(type(module).__name__, 1)})
    key = (type(module).__name__, attribute)
    parent = prefix.rpartition(".")[0]
    if isinstance(module, nn.Linear) or key in MATRICES:
        return _linear(modules.get(parent), prefix, module, attribute, param)
    if "Router" in key[0] and attribute == "weight" and param.dim() == 2:
        if min(param.shape) < 4:
            return Expected("a router of few experts", "other", frozenset({"gate", "router"}))
        return _matrix("a router, F.linear(x, weight)", {"rows"}, {1})
    if key in MATRICES_OR_NOT:
        turned = MATRICES_OR_NOT[key] is TURNED
        return Expected(MATRICES_OR_NOT[key], "either", ANY, frozenset({"turned" if turned else "rows"}))
    if key in STACKS_OR_NOT:
        return Expected("a stack of matrices", "either", ANY, frozenset({"batch", "batch-transposed"}))
    if "Expert" in key[0] and param.dim() == 3:
        return _experts(module, attribute)
    return Expected("a bare parameter that is no known matrix", "other", ANY - HIDDEN)


def _matrix(why: str, views: set[str], blocks: set[int] | None) -> Expected:
    cuts = None if blocks is None else frozenset(blocks)
    return Expected(why, "orthogonal", HIDDEN - {"conv"}, frozenset(views), cuts)


def _linear(parent: nn.Module | None, prefix: str, module: nn.Module, attribute: str, param: nn.Parameter) -> Expected:
    """Return what a Linear's weight must get, or that of a module that multiplies like one."""
    child = prefix.rpartition(".")[2]
    kind = MATRICES.get((type(module).__name__, attribute), ROWS)
    turned = kind is TURNED
    rows, columns = (param.shape[1], param.shape[0]) if turned else (param.shape[0], param.shape[1])
    if min(rows, columns) < 4:
        return Expected("a Linear of fewer than four rows or columns", "other", frozenset({"gate", "router"}))
    views = {"turned"} if turned else {"rows"}
    fused = child in FUSED or (child == "in_proj" and "SelfAttention" in type(parent).__name__)
    if fused:
        size = _first(parent, HEAD_SIZES)
        if size and rows % size == 0:
            return _matrix(f"fused q, k and v with heads of {size}", views, {rows // size})
        heads = 0 if hasattr(parent, "key_dim") else _first(parent, HEADS)  # else of unequal sizes
        cut = ({3} if rows == 3 * columns else set()) | ({3 * heads} if heads else set())
        return _matrix("fused q, k and v", views, cut or None)
    if child in GLU:
        return _matrix("a gate and the values it multiplies", views, {2})
    if child in CUT_OR_NOT or "dt_proj" in child or child == "linear" or type(module).__name__.startswith("DeepseekV4"):
        return Expected(
            "a Linear that may be cut", "either" if "dt" in child else "orthogonal", ANY, frozenset(views), None
        )
    return _matrix("a Linear", views, {1, 2} if child in ("fc1", "w12", "input_linear") else {1})


def _experts(module: nn.Module, attribute: str) -> Expected:
    turned = type(module).__name__ in EXPERTS_IN_BY_OUT or bool(getattr(module, "is_transposed", False))
    interleaved = not getattr(module, "is_concatenated", True)
    cut = {2} if attribute.startswith("gate_up") and not interleaved else {1}
    if type(module).__name__ == "JetMoeParallelExperts":
        cut = {1, 2}  # one class for the projections that its user cuts and those that it does not
    return _matrix("experts", {"batch-transposed" if turned else "batch"}, cut)


def _conv(module: _ConvNd, param: nn.Parameter) -> Expected:
    taps = param[0, 0].numel()
    groups = module.groups
    wide = sum(size > 1 for size in param.shape)
    if wide <= 1:
        return Expected("a convolution with one dim", "other", ANY | {"output"})
    if groups > 1 and groups == module.in_channels:
        return Expected("a depthwise convolution", "other", frozenset({"depthwise"}))
    if isinstance(module, _ConvTransposeNd):
        if groups > 1:
            return Expected(
                "a transposed convolution in groups", "either", ANY, frozenset({"transposed", "turned"}), None
            )
        return Expected("a transposed convolution", "orthogonal", HIDDEN, frozenset({"transposed", "turned"}))
    patches = tuple(module.stride) == tuple(module.kernel_size) and taps > 1
    views = {"patches"} if patches else {"flatten"} if taps > 1 else {"flatten", "patches", "rows"}
    rows, columns = param.shape[0] // groups, param[0].numel()
    why = "a patch convolution" if patches else "a convolution"
    if module.in_channels <= 4 and not patches:
        # The first one is for pixels; another is as any.
        return Expected("a convolution of few channels", "either", ANY, frozenset(views), frozenset({groups}))
    step = "either" if min(rows, columns) < 4 else "orthogonal"
    cuts = None if module.kernel_size.count(1) == len(module.kernel_size) and groups == 1 else frozenset({groups})
    return Expected(why, step, ANY if step == "either" else HIDDEN, frozenset(views), cuts)


def normal_view(shape: tuple[int, ...], view: str) -> str:
    """Return one word for the views that read a tensor of this shape as the same matrices."""
    if len(shape) == 2:
        return "turned" if view in ("transposed", "batch-transposed") else "rows"
    return view


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__ == "QuantEmbedding"


def _first(module: nn.Module | None, names: Iterable[str]) -> int:
    return next((v for v in (getattr(module, name, None) for name in names) if isinstance(v, int) and v > 0), 0)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    own = [p for _, p in module.named_parameters(recurse=False) if p.dim() > 1]
    return own or [p for p in module.parameters() if p.dim() > 1][-1:]


def _call(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method)()
    except Exception:
        return None


def _replace(expected: Expected, **changes: Any) -> Expected:
    return Expected(**{**expected.__dict__, **changes})


def _flat(modules: Any) -> list[nn.Module]:
    """Return the modules of a head that may be a tuple, a list or None."""
    if isinstance(modules, nn.ModuleList | nn.ModuleDict | tuple | list):
        inner = modules.values() if isinstance(modules, nn.ModuleDict) else modules
        return [m for part in inner for m in _flat(part)]
    return [modules] if isinstance(modules, nn.Module) and any(p.dim() > 1 for p in modules.parameters()) else []


def _labelled(model: nn.Module, outputs: set[int]) -> list[nn.Module]:
    """Return the linear layers and convolutions that have one of these numbers of outputs."""
    return [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features in outputs)
        or (isinstance(module, _ConvNd) and module.out_channels in outputs)
        or type(module).__name__ == "AMSoftmaxLoss"  # of XVectors: width x labels
    ]


def of_transformers(model: Any) -> dict[str, Expected]:
    """Return what each parameter of a model of transformers must get."""
    base = getattr(model, "base_model_prefix", "")
    whole = not base or not isinstance(getattr(model, base, None), nn.Module)
    leaves = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    if whole:  # a base class, or one whose parts are all at the top
        outside = [(n, m) for n, m in leaves if "For" in type(model).__name__ and n.count(".") <= 1]
    else:
        outside = [(n, m) for n, m in leaves if not n.startswith(f"{base}.")]
    vocabulary = getattr(model.config, "vocab_size", None)
    to_tokens = [m for _, m in outside if isinstance(vocabulary, int) and m.weight.shape[0] == vocabulary]
    heads = [*_flat(_call(model, "get_output_embeddings")), *_labelled(model, {LABELS, LABELS + 1}), *to_tokens]
    if "ForDepthEstimation" in type(model).__name__:  # a head of several parts
        outside = [(n, m) for n, m in leaves if "head" in n]
    # What CLIP and its kin compare; their libraries call it no head, and nothing follows it.
    heads_below = [m for n, m in leaves if re.search(r"(lm_head|output_projection|bbox_embed.*)$", n)]
    projections = [m for n, m in leaves if re.search(r"(visual|vision|text|image|audio|video)_projection$", n)]
    return expected_of(model, heads, [*(m for _, m in outside), *projections, *heads_below])


def of_timm(model: Any) -> dict[str, Expected]:
    """Return what each parameter of a model of timm must get."""
    return expected_of(model, [*_flat(_call(model, "get_classifier")), *_labelled(model, {LABELS})])


# The last layers of torchvision's detectors, by their names in its source.
PREDICTORS = re.compile(
    r"(cls_logits|cls_score|bbox_pred|bbox_reg|bbox_ctrness|mask_fcn_logits|kps_score_lowres|"
    r"head\.(classification|regression)_head\.module_list\.\d+(\.1)?)$"
)


def of_torchvision(model: nn.Module) -> dict[str, Expected]:
    """Return what each parameter of a model of torchvision must get."""
    named = [m for n, m in model.named_modules() if PREDICTORS.search(n) and isinstance(m, nn.Linear | _ConvNd)]
    return expected_of(model, [*named, *_labelled(model, {LABELS})])

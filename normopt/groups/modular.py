"""The modular norm: radii per parameter from masses and sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from normopt.groups.classify import ParamInfo
from normopt.groups.sensitivity import Untraceable, sensitivities

# Total masses, as in the authors' GPT: the ends move as far in a deeper model. Their GPT has no biases and gains;
# here these share a mass of their own.
HIDDEN_MASS = 5.0
END_MASS = 1.0


# The kinds of a part of the model; any other is a part of its own.
PARTS = {
    "hidden": "linear qkv gate_up experts router recurrent conv depthwise input_conv gate",
    "embedding": "embedding table",
    "vectors": "norm bias vector state",
}
PART_OF = {kind: part for part, kinds in PARTS.items() for kind in kinds.split()}
# How many layers are fused in one matrix of a kind, at most: more blocks are heads. A stack of experts is one layer,
# because the experts' outputs are averaged.
FUSED = {"linear": 3, "qkv": 3, "gate_up": 2, "experts": 2, "recurrent": 4}

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def budgets(
    model: nn.Module, infos: Sequence[ParamInfo], masses: dict[str, float], residual_depth: int | None
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Return every parameter's share of the model's mass and its sensitivity, by its name; and notes for the user.

    ::

        radius_k = (m_k / Σm) / s_k          share m_k / Σm in (0, 1], sensitivity s_k

    The sensitivity bounds the change of the model's output per unit change of the output of the parameter's layer, if
    the weights of later layers have norms of at most 1. To first order, all steps together then move the output by at
    most the learning rate, if the norms of all weights and the RMS of every layer's input are at most 1.

    Args:
        model: the model.
        infos: its parameters; frozen ones have no mass and are not returned.
        masses: the user's masses, by parameter name.
        residual_depth: the number of residual branches, None to trace the model.

    Raises:
        ValueError: the model cannot be traced, no residual_depth is given, and its config does not tell it.
    """
    mass = _masses([info for info in infos if info.param.requires_grad]) | masses
    total = sum(mass.values())
    notes: list[str] = []
    if residual_depth:
        sensitivity = _from_depth(infos, residual_depth)
    else:
        try:
            sensitivity = _from_trace(model, infos)
        except Untraceable as error:
            sensitivity, note = _from_config(model, infos, error)
            notes = [note]
    return {name: (m / total, sensitivity[name]) for name, m in mass.items()}, notes


def _masses(infos: Sequence[ParamInfo]) -> dict[str, float]:
    """Return each parameter's mass: equal within a part of the model, except that each of fused layers counts."""
    parts: dict[str, dict[str, float]] = {}
    for info in infos:
        kind, blocks = str(info.kind), info.matrix.get("blocks", 1)
        count = len(blocks) if isinstance(blocks, tuple) else blocks
        parts.setdefault(PART_OF.get(kind, kind), {})[info.name] = float(min(int(count), FUSED.get(kind, 1)))
    scale = {part: (HIDDEN_MASS if part == "hidden" else END_MASS) / sum(m.values()) for part, m in parts.items()}
    return {name: mass * scale[part] for part, members in parts.items() for name, mass in members.items()}


def _from_trace(model: nn.Module, infos: Sequence[ParamInfo]) -> dict[str, float]:
    """Return each parameter's sensitivity from the model's traced graph."""
    uses = sensitivities(model, {name for info in infos for name in info.modules if name})
    # A parameter that the forward pass never uses gets no gradient, so its radius does not matter.
    return {i.name: uses.get(i.name, 0.0) + sum(_module_use(uses, name) for name in i.modules) or 1.0 for i in infos}


def _module_use(uses: Mapping[str, float], name: str) -> float:
    """Return the sensitivity of a module, or of the traced layer that contains it, as for attention's ``out_proj``."""
    while name and name not in uses:
        name = name.rpartition(".")[0]
    return uses.get(name, 0.0)


def _from_config(model: nn.Module, infos: Sequence[ParamInfo], error: Untraceable) -> tuple[dict[str, float], str]:
    """Return each parameter's sensitivity if the model's config tells its depth, and a note of that.

    Raises:
        ValueError: it does not.
    """
    found = _depth_of(model, infos)
    for inner in ("module", "_orig_mod"):  # of nn.DataParallel, DistributedDataParallel, torch.compile
        if found is None and type(model).__module__.startswith("torch.") and hasattr(model, inner):
            raise ValueError(
                f'preset="modular" does not look into a {type(model).__name__}: pass the model in it, model.{inner}'
            ) from None
    if found is None:
        raise ValueError(
            f'preset="modular" computes sensitivities from the model\'s graph, but {error}. Set the depth instead: '
            "residual_depth=L for a residual stream with L branches, or 1 for a chain of layers without residual "
            "connections"
        ) from error.__cause__ or error
    key, layers, stack = found
    note = (
        f"residual_depth={2 * layers} is from the model's config ({key} = {layers}, an attention and an MLP branch "
        f"each), because the model's graph does not give sensitivities: {error}"
    )
    return _from_depth(infos, 2 * layers, stack), note


def _depth_of(model: nn.Module, infos: Sequence[ParamInfo]) -> tuple[str, int, str] | None:
    """Return (the config's key, the number of layers, the name of their list) if that is plain.

    It is for one stack of transformer layers: not for an encoder and a decoder, several configs, stages, layers that
    share weights, or state-space layers.
    """
    config = getattr(model, "config", None)
    several = ("is_encoder_decoder", "depths", "hidden_sizes", "sub_configs")
    if any(getattr(config, key, None) for key in several) or any(info.name.endswith("A_log") for info in infos):
        return None
    key = next((key for key in LAYERS if isinstance(getattr(config, key, None), int)), None)
    if key is None or not any(isinstance(getattr(config, heads, None), int) for heads in HEADS):
        return None
    layers, modules = getattr(config, key), dict(model.named_modules())
    stacks = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == layers]
    stack = next(iter(stacks), None)
    if stack is None:
        return None
    blocks = set(map(type, modules[stack].children()))
    others = [n for n, m in modules.items() if n in stacks[1:] or type(m) in blocks]
    return (key, layers, stack) if all(n.startswith(f"{stack}.") for n in others) else None


def _from_depth(infos: Sequence[ParamInfo], depth: int, stack: str | None = None) -> dict[str, float]:
    """Return sensitivity 1/L inside the L branches, which contribute 1/L of the stream each, and 1 at the ends.

    The ends are what is outside of ``stack``, the name of a module. If that is None, they are embeddings, the output
    layer, and, if there are numbered blocks, everything outside them.
    """
    if stack is not None:
        return {i.name: 1 / depth if i.name.startswith(f"{stack}.") else 1.0 for i in infos}
    ends = {name for i in infos if i.kind in ("embedding", "output") for name in i.modules}
    in_blocks = {i.name for i in infos if any(part.isdigit() for part in i.name.split("."))}
    inside = {i.name for i in infos if not ends.intersection(i.modules) and (not in_blocks or i.name in in_blocks)}
    inside -= {i.name for i in infos if str(i.kind) == "table"} - in_blocks
    return {i.name: 1 / depth if i.name in inside else 1.0 for i in infos}

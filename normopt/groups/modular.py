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


def budgets(
    model: nn.Module, infos: Sequence[ParamInfo], masses: dict[str, float], residual_depth: int | None
) -> dict[str, tuple[float, float]]:
    """Return every parameter's share of the model's mass and its sensitivity, by its name.

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
        ValueError: the model cannot be traced, and no residual_depth is given.
    """
    mass = _masses([info for info in infos if info.param.requires_grad]) | masses
    total = sum(mass.values())
    sensitivity = _from_depth(infos, residual_depth) if residual_depth else _from_trace(model, infos)
    return {name: (m / total, sensitivity[name]) for name, m in mass.items()}


def _masses(infos: Sequence[ParamInfo]) -> dict[str, float]:
    """Return each parameter's mass: equal within a part of the model, except that a fused matrix counts per block."""
    parts: dict[str, dict[str, float]] = {}
    for info in infos:
        kind = str(info.kind)
        part = {"linear": "hidden", "conv": "hidden", "norm": "vectors", "bias": "vectors"}.get(kind, kind)
        blocks = info.matrix.get("blocks", 1) if info.kind == "linear" else 1
        parts.setdefault(part, {})[info.name] = float(len(blocks) if isinstance(blocks, tuple) else blocks)
    scale = {part: (HIDDEN_MASS if part == "hidden" else END_MASS) / sum(m.values()) for part, m in parts.items()}
    return {name: mass * scale[part] for part, members in parts.items() for name, mass in members.items()}


def _from_trace(model: nn.Module, infos: Sequence[ParamInfo]) -> dict[str, float]:
    """Return each parameter's sensitivity from the model's traced graph."""
    try:
        uses = sensitivities(model, {name for info in infos for name in info.modules if name})
    except Untraceable as error:
        raise ValueError(
            f'preset="modular" computes sensitivities from the model\'s graph, but {error}. Set the depth instead: '
            "residual_depth=L for a residual stream with L branches, or 1 for a chain of layers without residual "
            "connections"
        ) from error
    # A parameter that the forward pass never uses gets no gradient, so its radius does not matter.
    return {i.name: uses.get(i.name, 0.0) + sum(_module_use(uses, name) for name in i.modules) or 1.0 for i in infos}


def _module_use(uses: Mapping[str, float], name: str) -> float:
    """Return the sensitivity of a module, or of the traced layer that contains it, as for attention's ``out_proj``."""
    while name and name not in uses:
        name = name.rpartition(".")[0]
    return uses.get(name, 0.0)


def _from_depth(infos: Sequence[ParamInfo], depth: int) -> dict[str, float]:
    """Return sensitivity 1/L inside the L branches, which contribute 1/L of the stream each, and 1 at the ends.

    The ends are embeddings, the output layer, and, if there are numbered blocks, everything outside them.
    """
    ends = {name for i in infos if i.kind in ("embedding", "output") for name in i.modules}
    in_blocks = {i.name for i in infos if any(part.isdigit() for part in i.name.split("."))}
    inside = {i.name for i in infos if not ends.intersection(i.modules) and (not in_blocks or i.name in in_blocks)}
    return {i.name: 1 / depth if i.name in inside else 1.0 for i in infos}

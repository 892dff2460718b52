"""The modular norm: how much of the model's movement each layer is given, from masses and sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from normopt.groups.classify import ParamInfo
from normopt.groups.sensitivity import Untraceable, sensitivities

# Total masses, as in the authors' GPT: a model that grows deeper moves its ends as before. Biases and gains, which
# theirs has none of, share one of their own.
HIDDEN_MASS = 5.0
END_MASS = 1.0


@dataclass(frozen=True)
class Budget:
    """What one parameter may do to the model's output.

    Attributes:
        share: its part of the model's mass, in (0, 1].
        sensitivity: how far, at most, the model's output moves as this parameter's layer's output moves by 1, if the
            weights behind it have norms of at most 1.
    """

    share: float
    sensitivity: float

    @property
    def radius(self) -> float:
        """The radius of its steps.

        To first order, all steps together then move the output by at most the learning rate, if the norms of all
        weights and the RMS of what every layer reads are at most 1.
        """
        return self.share / self.sensitivity


def budgets(
    model: nn.Module, claimed: Sequence[ParamInfo], masses: Mapping[str, float], residual_depth: int | None
) -> dict[str, Budget]:
    """The budget of every parameter, by its name.

    ::

        radius_k = (m_k / Σm) / s_k

    Args:
        model: the model.
        claimed: its parameters; those that are frozen have no mass and no budget.
        masses: the masses that the user gives, by parameter name.
        residual_depth: the number of residual branches, None to trace the model.

    Raises:
        ValueError: the model cannot be traced, and no depth is declared.
    """
    mass = {**_masses([c for c in claimed if c.param.requires_grad]), **masses}
    total = sum(mass.values())
    steep = _declared(claimed, residual_depth) if residual_depth else _traced(model, claimed)
    return {name: Budget(m / total, steep[name]) for name, m in mass.items()}


def _masses(claimed: Sequence[ParamInfo]) -> dict[str, float]:
    """Each parameter's mass: equal among those of a part of the model, a fused matrix counting once a block."""
    parts: dict[str, dict[str, float]] = {}
    for info in claimed:
        part = {"linear": "hidden", "conv": "hidden", "norm": "vectors", "bias": "vectors"}.get(str(info.kind))
        fused = float(info.matrix.get("blocks", 1)) if info.kind == "linear" else 1.0
        parts.setdefault(part or str(info.kind), {})[info.name] = fused
    scale = {part: (HIDDEN_MASS if part == "hidden" else END_MASS) / sum(m.values()) for part, m in parts.items()}
    return {name: mass * scale[part] for part, members in parts.items() for name, mass in members.items()}


def _traced(model: nn.Module, claimed: Sequence[ParamInfo]) -> dict[str, float]:
    try:
        uses = sensitivities(model, {place for info in claimed for place in info.places if place})
    except Untraceable as error:
        raise ValueError(
            f'preset="modular" reads the sensitivity of every layer from the model\'s graph, but {error}. Declare the '
            "depth instead: residual_depth=L, if the model is a residual stream with L branches; 1, if it is a chain "
            "of layers, which adds nothing up"
        ) from error
    # What the forward pass never reaches gets no gradient either, and any radius will do.
    return {c.name: uses.get(c.name, 0.0) + sum(_use(uses, place) for place in c.places) or 1.0 for c in claimed}


def _use(uses: Mapping[str, float], place: str) -> float:
    """The use of a module, or of the layer that it is inside of, such as attention's ``out_proj``."""
    while place and place not in uses:
        place = place.rpartition(".")[0]
    return uses.get(place, 0.0)


def _declared(claimed: Sequence[ParamInfo], depth: int) -> dict[str, float]:
    """1/L inside the L branches, each of which makes an L-th of the stream; 1 at the ends.

    The ends are embeddings, the output layer, and what stands outside of the numbered blocks if there are any.
    """
    ends = {place for c in claimed if c.kind in ("embedding", "output") for place in c.places}
    numbered = {c.name for c in claimed if any(part.isdigit() for part in c.name.split("."))}
    inside = {c.name for c in claimed if not ends.intersection(c.places) and (not numbered or c.name in numbered)}
    return {c.name: 1 / depth if c.name in inside else 1.0 for c in claimed}

"""Weight decay: coupled (ℓ2, in the gradient), decoupled (ℓ2, on the weight), and ℓp, which sparsifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from normopt._checks import equals
from normopt.kernels.flags import Number, mode_of, wide
from normopt.stages.base import Batch, Op, Stage, number, one_of, register, register_stage, setting


class Rule:
    """A kind of weight decay. A subclass overrides ``update`` and, to run fused, ``lower``.

    Attributes:
        name: how ``backend()`` calls it.
        before_momentum: whether it changes the gradient, by ``in_gradient``, and not the update.
        in_direction: whether λw is added to the direction, before that is rescaled, and the update is plain.
        reads_p: whether it depends on ``decay_p``.
    """

    name: str = ""
    before_momentum: ClassVar[bool] = False
    in_direction: ClassVar[bool] = False
    reads_p: ClassVar[bool] = False

    def in_gradient(self, batch: Batch, s: Decay) -> None:
        """Change the gradient before the momentum. Default: no change."""

    def update(self, batch: Batch, s: Decay) -> None:
        """Update batch.w by the step u, and decay it."""
        descend_(batch.w, batch.u, batch.step_size)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        """Return the decay as a kernel computes it, or the reason why it cannot.

        A kernel computes ``w ← (weight_factor·w − ηru)·F`` with one of two factors of the old weight::

            F = X/(X + strength)       inverse=False       X = |w|^exponent; strength = 0 gives 1
            F = 1/(1 + strength·X)     inverse=True

        ``coupled`` adds ``coupled·w`` to the gradient. With ``wide=True``, F is 1 for tensors of less than 2 dims; with
        ``cautious=True``, F and weight_factor are 1 where u·w < 0.
        """
        return f"the decay {type(self).__name__} has no kernel"


NO_DECAY = Rule()
R = TypeVar("R", bound=type[Rule])
RULES: dict[str, Rule] = {}


def register_decay(name: str) -> Callable[[R], R]:
    """Register a kind of weight decay, so that ``decay="name"`` works in every optimizer. A decorator of a `Rule`.

    Args:
        name: the kind's name.
    """

    def decorate(cls: R) -> R:
        register(RULES, name, cls())
        RULES[name].name = {"lp": "ℓp"}.get(name, name)
        return cls

    return decorate


def factor(exponent: float, strength: Number, inverse: bool, wide: bool) -> Op:
    """Return the `Op` of a factor F of the update; see `Rule.lower`."""
    flags = {"decay_mode": mode_of(exponent), "decay_inverse": inverse, "decay": True, "decay_wide": wide}
    return Op(flags, {"decay_exponent": exponent, "decay_strength": strength})


def cautious(lowered: Op | str) -> Op | str:
    """Return the `Op` of a decay that acts only where u·w ≥ 0."""
    return lowered if isinstance(lowered, str) else lowered._replace(flags={**lowered.flags, "cautious": True})


@register_decay("coupled")
class Coupled(Rule):
    """``g ← g + λw``, before the momentum. Source: torch.optim.SGD."""

    before_momentum = True

    def in_gradient(self, batch: Batch, s: Decay) -> None:
        batch.c = batch.g = coupled(batch.g, batch.old, batch.weight_decay)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return Op({"coupled": True}, {"coupled": wide(s.weight_decay)})


@register_decay("decoupled")
class Decoupled(Rule):
    """``w ← (1 − ηλ)w − ηru``. Source: AdamW, arXiv:1711.05101."""

    def update(self, batch: Batch, s: Decay) -> None:
        torch._foreach_mul_(batch.w, 1 - batch.lr * batch.weight_decay)
        descend_(batch.w, batch.u, batch.step_size)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return Op({"scales_weight": True}, {"weight_factor": 1 - lr * wide(s.weight_decay)})


@register_decay("proximal")
class Proximal(Rule):
    """``w ← (w − ηru)/(1 + ηλ)``. Source: Adan, arXiv:2208.06677."""

    def update(self, batch: Batch, s: Decay) -> None:
        descend_(batch.w, batch.u, batch.step_size)
        torch._foreach_div_(batch.w, 1 + batch.lr * batch.weight_decay)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return factor(0.0, lr * wide(s.weight_decay), True, False)


@register_decay("inside")
class Inside(Rule):
    """``u ← u + λw``, before u is rescaled. Source: LAMB, arXiv:1904.00962."""

    in_direction = True


@register_decay("lp")
class LpDecay(Rule):
    """``w ← (w − ηru)·X/(X + pηλ)`` with X = |w|^(2−p), on tensors of 2 or more dims; see `lp_factors`."""

    reads_p = True

    def update(self, batch: Batch, s: Decay) -> None:
        wide = [i for i, p in enumerate(batch.params) if p.dim() >= 2]
        factors = self.factors([batch.old[i] for i in wide], [batch.u[i] for i in wide], batch, s)
        descend_(batch.w, batch.u, batch.step_size)
        scale_([batch.w[i] for i in wide], factors)

    def factors(self, w: list[Tensor], u: list[Tensor], batch: Batch, s: Decay) -> list[Tensor]:
        """Return the factors of the updated weights, given the old weights and their directions."""
        return lp_factors(w, s.decay_p, batch.lr * batch.weight_decay)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return factor(abs(2 - s.decay_p), s.decay_p * lr * wide(s.weight_decay), s.decay_p >= 2, True)


@register_decay("cautious")
class Cautious(Decoupled):
    """``w ← w − η(ru + λ·1[u·w ≥ 0]·w)``: only weights that the step does not enlarge. Source: arXiv:2510.12402."""

    def update(self, batch: Batch, s: Decay) -> None:
        kept = 1 - batch.lr * batch.weight_decay
        factors = where_aligned(batch.u, batch.old, [x.new_ones(()) * kept for x in batch.w])
        scale_(batch.w, factors)
        descend_(batch.w, batch.u, batch.step_size)

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return cautious(super().lower(lr, s))


@register_decay("cautious-lp")
class CautiousLp(LpDecay):
    """``w ← (w − ηru)·F`` with F of ℓp decay where u·w ≥ 0, else 1. Source: arXiv:2404.10824 and 2510.12402; ours."""

    def factors(self, w: list[Tensor], u: list[Tensor], batch: Batch, s: Decay) -> list[Tensor]:
        return where_aligned(u, w, super().factors(w, u, batch, s))

    def lower(self, lr: Number, s: Decay) -> Op | str:
        return cautious(super().lower(lr, s))


@register_stage
@dataclass
class Decay(Stage):
    """Weight decay of the kind that ``decay`` names; λ = 0 runs none. A λ that is a tensor always runs."""

    place = "gradient"

    weight_decay: float | Tensor = setting(
        0.0, number(low=0, open_high=True, tensor=True), "λ ≥ 0, a float or a one-element tensor"
    )
    decay: Literal["coupled", "decoupled", "proximal", "inside", "lp", "cautious", "cautious-lp"] | str = setting(
        "decoupled",
        one_of(RULES),
        '"coupled", "decoupled", "proximal", "inside", "lp", "cautious", "cautious-lp", or your own; runs if λ ≠ 0',
    )
    decay_p: float = setting(
        1.0,
        number(low=0, open_low=True, open_high=True),
        'p of decay="lp" and "cautious-lp", p > 0 (p < 1 too), which act on tensors of 2 or more dims',
    )

    def runs(self) -> bool:
        return not equals(self.weight_decay, 0)

    @property
    def reads_p(self) -> bool:
        """True if the kind of decay depends on ``decay_p``, whether it runs or not."""
        return RULES[self.decay].reads_p

    @property
    def rule(self) -> Rule:
        """The kind of decay; one that does nothing if λ = 0."""
        return RULES[self.decay] if self.runs() else NO_DECAY

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        if self.rule.before_momentum:
            self.rule.in_gradient(batch, self)

    def lower(self) -> Op | str:
        return self.rule.lower(0.0, self) if self.rule.before_momentum else Op()  # the write lowers the others

    def structure(self) -> object:
        return self.decay, self.runs(), self.decay_p, isinstance(self.weight_decay, Tensor)

    def describe(self) -> str:
        return self.words() if self.rule.before_momentum else ""

    def words(self) -> str:
        """Return the decay in words, with its numbers."""
        strength = "a tensor" if isinstance(self.weight_decay, Tensor) else f"{self.weight_decay:g}"
        return f"{self.rule.name} decay λ = {strength}" + (f", p = {self.decay_p:g}" if self.rule.reads_p else "")


@register_stage
@dataclass
class DecayInside(Stage):
    """The decay kinds that act on the direction: ``u ← u + λw``."""

    place = "length"
    lowers_others = True

    decay: Decay = field(default=cast(Any, None), init=False)  # which the recipe sets

    def runs(self) -> bool:
        return self.decay.rule.in_direction

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        batch.u = coupled(batch.u, batch.old, batch.weight_decay)

    def lower(self) -> Op | str:
        return Op({"inside": True}, {"coupled": wide(self.decay.weight_decay)})

    def describe(self) -> str:
        return self.decay.words()


def coupled(g: list[Tensor], w: list[Tensor], weight_decay: Number) -> list[Tensor]:
    """Return ``g + λw``."""
    if isinstance(weight_decay, Tensor):
        decayed = zip(torch._foreach_mul(w, weight_decay), g, strict=True)
        return list(torch._foreach_add(g, [x.to(y.dtype) for x, y in decayed]))  # 0-d tensors may have been promoted
    return list(torch._foreach_add(g, w, alpha=weight_decay))


def descend_(w: list[Tensor], u: list[Tensor], step_size: Number) -> None:
    """Apply ``w ← w − ηru``; a tensor is not read on the host, which would sync."""
    if isinstance(step_size, Tensor):
        torch._foreach_sub_(w, torch._foreach_mul(u, step_size))
    else:
        torch._foreach_add_(w, u, alpha=-step_size)


def where_aligned(u: list[Tensor], w: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """Return the factors where u·w ≥ 0, else 1; by signs, because the product may underflow."""
    return [torch.where(x.sign() * y.sign() < 0, 1, f) for x, y, f in zip(u, w, factors, strict=True)]


def scale_(w: list[Tensor], factors: list[Tensor]) -> None:
    """Apply ``w ← w · factor`` elementwise, as ℓp decay does after the step."""
    if w:
        torch._foreach_mul_(w, factors)


def lp_factors(w: list[Tensor], p: float, lr_times_decay: Number) -> list[Tensor]:
    """Return the factors of ℓp decay (pWD): ``w ← (w − ηu) · X/(X + pηλ)`` with X = |w_old|^(2−p).

    For p < 2, smaller weights shrink faster and reach exactly 0 in finite time. Zero is then absorbing: a
    weight that starts at 0 never trains. For p ≥ 2 the factor is computed as ``1/(1 + pηλ|w_old|^(p−2))``,
    which avoids 0/0. Where pηλ is 0, or below the dtype's normal numbers, the factor is 1.

    Without a gradient, a weight w₀ reaches 0 after about ``|w₀|^(2−p) / ((2−p)·pηλ)`` steps. Only the product
    ηλ matters, so a larger learning rate sparsifies as a larger λ does.

    Source: Decoupled weight decay for any p norm, arXiv:2404.10824.
    """
    k = p * lr_times_decay
    factors = []
    for x in w:
        least = torch.finfo(x.dtype).tiny  # below it k may be 0 in x's dtype, where a weight of 0 would give 0/0
        if not isinstance(k, Tensor) and k < least:
            factors.append(torch.ones_like(x))
            continue
        size = x.abs().pow_(abs(2 - p))
        if p >= 2:
            factor = size.mul_(k).add_(1).reciprocal_()
        else:
            # Clamped to finite, so that a huge weight gives a factor of 1 and not ∞/∞.
            size.clamp_(max=torch.finfo(x.dtype).max)
            factor = size.div_(size + k)
        factors.append(factor.masked_fill_(k < least, 1) if isinstance(k, Tensor) else factor)
    return factors

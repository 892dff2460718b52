"""Momentum: every rule with one buffer is five coefficients. μ always weights the OLD state.

::

    m' = a·m + b·g          c = d·m + e·g + f·m'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from normopt._checks import check_bool, check_number
from normopt.kernels.flags import GRADIENT, NEW, OLD, RUNS, SAME, Number
from normopt.norms.base import fast_scalar, stack
from normopt.stages.base import Batch, Op, Slot, Stage, number, one_of, register, register_stage, setting

STATE_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Coefficients(NamedTuple):
    """The coefficients of a momentum rule, ``m' = a·m + b·g`` and ``c = d·m + e·g + f·m'``, from m = 0.

    Attributes:
        a, b, d, e, f: as above.
        first: b of the first step, None for b itself.
        averages: whether m' and c are weighted averages, a + b = 1 and d + e + f = 1, which are computed as
            interpolations: other roundings than a sum of products.
    """

    a: float
    b: float
    d: float = 0.0
    e: float = 0.0
    f: float = 1.0
    first: float | None = None
    averages: bool = False


Rule = Callable[["Momentum"], Coefficients]
RULES: dict[str, Rule] = {}


def register_momentum(name: str) -> Callable[[Rule], Rule]:
    """Register a momentum rule, so that ``momentum_rule="name"`` works in every optimizer, also fused. A decorator.

    Args:
        name: the rule's name.

    Returns:
        The decorator of a function from the settings (``momentum``, ``beta2``, ``dampening``, ``nesterov``) to
        `Coefficients`.
    """

    def decorate(rule: Rule) -> Rule:
        register(RULES, name, rule)
        return rule

    return decorate


@register_momentum("heavy")
def heavy(s: Momentum) -> Coefficients:
    """Heavy ball: ``m ← μm + (1−τ)g``, the first m = g; c = m, or with Nesterov c = g + μm.

    τ is the dampening. Source: torch.optim.SGD, reproduced bit for bit.
    """
    rule = Coefficients(s.momentum, 1 - s.dampening, first=1.0)
    return rule._replace(e=1.0, f=s.momentum) if s.nesterov else rule


@register_momentum("ema")
def ema(s: Momentum) -> Coefficients:
    """Moving average: ``m ← μm + (1−μ)g`` from m = 0; c = m, or with Nesterov c = (1−μ)g + μm.

    Source: LPSGDM, arXiv:2606.02078; Nesterov as in torch.optim.Muon. No bias correction, as in both.
    """
    rule = Coefficients(s.momentum, 1 - s.momentum, averages=True)
    return rule._replace(e=1 - s.momentum, f=s.momentum) if s.nesterov else rule


@register_momentum("lion")
def lion(s: Momentum) -> Coefficients:
    """Lion's rule: ``c = μm + (1−μ)g``, then ``m ← β₂m + (1−β₂)g``, from m = 0.

    Source: Lion, arXiv:2302.06675, whose β₁ is μ.
    """
    return Coefficients(s.beta2, 1 - s.beta2, d=s.momentum, e=1 - s.momentum, f=0.0, averages=True)


def scalar(_: torch.Size) -> torch.Size:
    """Return the shape of a number: 0-d."""
    return torch.Size()


STEP = Slot("step", "float32", shape=scalar)


@register_stage
@dataclass
class Count(Stage):
    """Count the steps of each parameter, for bias corrections: ``c ← c/Σ`` with Σ the sum of the weights in c."""

    place = "momentum"
    state = (STEP.name,)

    bias_correction: bool = setting(
        False,
        check_bool,
        'divide the momentum ("ema", "lion") and the average of the metric by the sums of their weights',
    )

    def runs(self) -> bool:
        return self.bias_correction

    def slots(self) -> tuple[Slot, ...]:
        return (STEP,) if self.bias_correction else ()

    def advance(self, batch: Batch, by: Number = 1) -> list[Tensor]:
        """Count a step, or none if ``by`` is 0, and return the number of it for each parameter."""
        old = batch.read(STEP)
        steps = [
            torch.zeros((), dtype=torch.float32, device=p.device) if x is None else x
            for x, p in zip(old, batch.params, strict=True)
        ]
        torch._foreach_add_(steps, [by] * len(steps) if isinstance(by, Tensor) else by)
        batch.store(STEP, steps)
        return steps

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        steps = self.advance(batch)
        batch.step = [float(x) for x in steps] if on_host(steps) else stack(steps).double()

    def lower(self) -> Op | str:
        return Op({"corrected": True})

    def describe(self) -> str:
        return "bias correction"


def on_host(xs: list[Tensor]) -> bool:
    """Return whether reading the tensors waits for no device."""
    return all(type(x) is Tensor and x.is_cpu for x in xs) and not torch.compiler.is_compiling()


@register_stage
@dataclass
class Momentum(Stage):
    """Momentum, by the rule that ``momentum_rule`` names; momentum = 0 runs none and keeps no buffer."""

    place = "momentum"
    state = ("momentum_buffer",)  # torch.optim.SGD's name: checkpoints load both ways

    momentum: float = setting(
        0.0, number(low=0), "μ, the weight of the OLD state, 0 ≤ μ < 1 (heavy: ≤ 1); 0 keeps no buffer"
    )
    momentum_rule: Literal["heavy", "ema", "lion"] | str = setting(
        "heavy", one_of(RULES), '"heavy" (torch.optim.SGD\'s), "ema", "lion", or your own'
    )
    beta2: float = setting(0.99, number(low=0, high=1, open_high=True), 'β₂ of "lion", the weight of the old state')
    dampening: float = setting(0.0, number(open_low=True, open_high=True), 'τ of "heavy", any finite number')
    nesterov: bool = setting(False, check_bool, 'c = g + μm ("heavy") or (1−μ)g + μm ("ema")')
    state_dtype: str | torch.dtype | None = setting(
        None, one_of(STATE_DTYPES), "the momentum's dtype; None is the parameter's own"
    )

    def runs(self) -> bool:
        return self.momentum != 0

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer", cast("str | None", self.state_dtype)),)

    def reads(self, name: str) -> bool:
        """Return whether the rule depends on a setting that is a number."""
        other = replace(self, **{name: 0.5 * getattr(self, name) + 0.1})
        return self.coefficients() != other.coefficients()

    def coefficients(self) -> Coefficients:
        """Return the rule's coefficients under these settings."""
        return RULES[self.momentum_rule](self)

    @property
    def starts_otherwise(self) -> bool:
        """True if the first step weighs the gradient otherwise than later steps."""
        k = self.coefficients()
        return k.first is not None and k.first != k.b

    def weight(self, t: Any) -> Any:
        """Return the sum of the weights of the gradients in c, at step t = 1, 2, …"""
        k = self.coefficients()
        if k.averages:
            old, new = 1 - k.a ** (t - 1), 1 - k.a**t
        else:
            old, new = (k.b * (s if k.a == 1 else (1 - k.a**s) / (1 - k.a)) for s in (t - 1, t))
        return k.d * old + k.e + k.f * new

    def check(self) -> None:
        heavy = self.momentum_rule == "heavy"
        check_number("momentum", self.momentum, low=0, high=1, open_high=not heavy)
        if self.nesterov and self.momentum_rule == "lion":
            raise ValueError('nesterov=True has no meaning under momentum_rule="lion": use "heavy" or "ema"')
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, but "
                f"momentum = {self.momentum}, dampening = {self.dampening}"
            )
        if self.dampening != 0 and not heavy:
            raise ValueError(f'dampening belongs to momentum_rule="heavy", not {self.momentum_rule!r}: set dampening=0')

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        k, g = self.coefficients(), batch.g
        m = batch.state_in_place("momentum_buffer")
        if m is not None:
            batch.c = step_(k, m, g, fast_scalar(k.a, m))
            batch.owns_c = batch.c is not m and batch.c is not g
            self._correct(batch)
            return
        (slot,) = self.slots()
        old = batch.read(slot)
        m = [torch.zeros_like(x) if b is None else b for b, x in zip(old, g, strict=True)]
        if k.first is None or all(b is not None for b in old):
            batch.c = step_(k, m, g)
        else:  # those that are new have another b
            first = k._replace(b=k.first)
            if k.d == 0:  # not from 0, whose sum with a −0 is 0
                m = [x * k.first if b is None else b for b, x in zip(old, g, strict=True)]
                first = k._replace(a=1.0, b=0.0)
            each = zip(old, m, g, strict=True)
            batch.c = [step_(first if b is None else k, [x], [y])[0] for b, x, y in each]
        batch.store(slot, m)
        self._correct(batch)

    def _correct(self, batch: Batch) -> None:
        if batch.step is not None:
            batch.c = list(torch._foreach_div(batch.c, batch.of_steps(self.weight, batch.c)))
            batch.owns_c = True

    def lower(self) -> Op | str:
        k = self.coefficients()
        code = RUNS | OLD * (k.d != 0) | GRADIENT * (k.e != 0) | NEW * (k.f != 0)
        first = k.b if k.first is None else k.first
        numbers = dict(keep=k.a, take=k.b, first=first, from_old=k.d, from_gradient=k.e, from_new=k.f)
        return Op({"momentum": code | SAME if (k.d, k.e, k.f) == (0, 0, 1) else code}, numbers)

    def structure(self) -> object:
        return self.momentum_rule, self.nesterov, self.state_dtype, self.momentum == 0, self.dampening == 0

    def describe(self) -> str:
        more = [f"β₂ = {self.beta2:g}"] if self.momentum_rule == "lion" else []
        more += [f"dampening {self.dampening:g}"] if self.dampening != 0 else []
        more += ["Nesterov"] if self.nesterov else []
        more += [f"in {self.state_dtype}"] if self.state_dtype else []
        return f"{self.momentum_rule} momentum {self.momentum:g}" + (f" ({', '.join(more)})" if more else "")


DIFFERENCE, PREVIOUS = Slot("exp_avg_diff", "compute"), Slot("previous_grad", "compute")


@register_stage
@dataclass
class Difference(Stage):
    """Adan's gradient differences, with any momentum: g is after AGR and coupled decay, and the first difference is 0.

    ::

        d ← βd + (1−β)(g − g_prev),  c ← c + β·d/(1−βᵗ)      β = difference_beta; /(1−βᵗ) under bias_correction
        the metric sees g + β(g − g_prev)

    Source: Xie et al., "Adan", arXiv:2208.06677, whose β₂ is 1 − β.
    """

    place = "momentum"
    state = (DIFFERENCE.name, PREVIOUS.name)

    difference_beta: float = setting(
        0.0, number(low=0, high=1, open_high=True), "β of Adan's average of gradient differences; 0 keeps none"
    )

    def runs(self) -> bool:
        return self.difference_beta != 0

    def slots(self) -> tuple[Slot, ...]:
        return (DIFFERENCE, PREVIOUS) if self.runs() else ()

    def weight(self, t: Any) -> Any:
        """Return the sum of the weights in d, at step t = 1, 2, …"""
        return 1 - self.difference_beta**t

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        g, beta = batch.g, self.difference_beta
        differences = [
            torch.zeros_like(x) if y is None else x - y for x, y in zip(g, batch.read(PREVIOUS), strict=True)
        ]
        d = batch.read_or_zeros(DIFFERENCE)
        torch._foreach_lerp_(d, differences, 1 - beta)
        batch.store(DIFFERENCE, d)
        batch.store(PREVIOUS, [x.clone() for x in g])
        batch.s = list(torch._foreach_add(g, differences, alpha=beta))
        added = d if batch.step is None else torch._foreach_div(d, batch.of_steps(self.weight, d))
        batch.c, batch.owns_c = list(torch._foreach_add(batch.c, added, alpha=beta)), True

    def structure(self) -> object:
        return self.runs()

    def describe(self) -> str:
        return f"differences of gradients, β = {self.difference_beta:g}"

    def lower(self) -> Op | str:
        beta = self.difference_beta
        return Op({"differs": True}, {"difference_keep": beta, "difference_take": 1 - beta})


def step_(k: Coefficients, m: list[Tensor], g: list[Tensor], a: Number | None = None) -> list[Tensor]:
    """Update m in place and return c, which may be m. ``a`` is the coefficient of this name as a `fast_scalar`."""
    c = g
    if k.d != 0:  # of the old m
        c = list(torch._foreach_lerp(m, g, k.e)) if k.averages and k.f == 0 else _sum(m, k.d, g, k.e)
    if k.averages:
        torch._foreach_lerp_(m, g, k.b)
    else:
        if k.a != 1:
            torch._foreach_mul_(m, k.a if a is None else a)
        if k.b != 0 or k.a != 1:  # 0 times a NaN is one
            torch._foreach_add_(m, g, alpha=k.b)
    if k.f == 0:
        return c if k.d != 0 else list(torch._foreach_mul(g, k.e))
    if k.d != 0:
        return _sum(c, 1.0, m, k.f)
    if k.e == 0:
        return m if k.f == 1 else list(torch._foreach_mul(m, k.f))
    return list(torch._foreach_lerp(g, m, k.f)) if k.averages else _sum(g, k.e, m, k.f)


def _sum(x: list[Tensor], a: float, y: list[Tensor], b: float) -> list[Tensor]:
    """Return ax + by."""
    return list(torch._foreach_add(x if a == 1 else torch._foreach_mul(x, a), y, alpha=b))

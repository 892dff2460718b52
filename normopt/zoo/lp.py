"""The ℓp family: SGD, signSGD, and everything between. Tensors are treated as vectors."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normopt._checks import check_integer
from normopt.arguments import fixed_kwargs
from normopt.engine import SteepestDescent
from normopt.norms.base import Scale
from normopt.settings import Coordinates, Settings

EPS = 1e-8  # ε of arXiv:2606.02078


class SGD(SteepestDescent):
    """Steepest descent under ℓ2: torch.optim.SGD, with ``foreach=False`` bit for bit.

    ::

        g ← g + λw
        m ← μm + (1−τ)g  (first m = g)         c = m, or g + μm with Nesterov, or g at μ = 0
        w ← w − ηc

    ``foreach=False`` equals ``torch.optim.SGD(foreach=False)`` bit for bit in float32 and float64 on CPU.

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-3, torch's.
        momentum: μ. Default 0, torch's.
        dampening: τ. Default 0, torch's.
        weight_decay: λ. Default 0; coupled (ℓ2 in the gradient) by default, as in torch.
        nesterov: use Nesterov momentum.
        decay: the kind of decay. Default "coupled", torch's.
        **settings: any of [`Coordinates`][normopt.settings.Coordinates], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Sutskever et al., 2013, as implemented by torch.optim.SGD.

    Example:
        >>> opt = normopt.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decay: Literal["coupled", "decoupled", "lp"] | str = "coupled",
        **settings: Unpack[Coordinates],
    ) -> None:
        fixed = fixed_kwargs("SGD", settings, norm="l2", scale="dual", momentum_rule="heavy")
        momenta = dict[str, Any](momentum=momentum, dampening=dampening, nesterov=nesterov)
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **momenta, **fixed)


class NormalizedSGD(SteepestDescent):
    """Unit steps under ℓ2: every tensor moves by exactly lr, independent of the gradient's norm.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← w − η · m/‖m‖₂                      0 where m = 0

    Args:
        params: parameters or param groups.
        lr: η, the ℓ2 norm of each tensor's step. Default 1e-2, our choice.
        momentum: μ. Default 0; the paper recommends 0.9 for stochastic gradients.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from the paper: it normalises all weights as one vector; here each tensor is normalised separately.
    ``SteepestDescent(norm="l2", scale="unit", scope="group", momentum_rule="ema")`` is the paper's rule.

    Source: Cutkosky and Mehta, "Momentum Improves Normalized SGD", arXiv:2002.03305.

    Example:
        >>> opt = normopt.NormalizedSGD(model.parameters(), lr=0.01, momentum=0.9)
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, momentum: float = 0.0, **settings: Unpack[Settings]
    ) -> None:
        fixed = fixed_kwargs("NormalizedSGD", settings, norm="l2", scale="unit", momentum_rule="ema")
        super().__init__(params, lr, momentum=momentum, **fixed)


class SignSGD(SteepestDescent):
    """Unit steps under ℓ∞: the sign of the gradient.

    ::

        w ← w − η · sign(g)                     sign(NaN) = NaN, sign(0) = 0

    Args:
        params: parameters or param groups.
        lr: η, how far every weight moves. Default 1e-4, the paper's for ImageNet.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: none. AGR never changes a sign, so here it can only erase an entry that is the only nonzero one.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Bernstein et al., "signSGD", arXiv:1802.04434.

    Example:
        >>> opt = normopt.SignSGD(model.parameters(), lr=1e-4)
    """

    _no_momentum = True

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-4, **settings: Unpack[Settings]) -> None:
        super().__init__(params, lr, **fixed_kwargs("SignSGD", settings, norm="linf", scale="unit", momentum=0.0))


class Signum(SteepestDescent):
    """Unit steps under ℓ∞ with a moving average: the sign of the momentum.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← w − η · sign(m)

    Args:
        params: parameters or param groups.
        lr: η, how far every weight moves. Default 1e-4, the paper's for ImageNet.
        momentum: μ. Default 0.9, the paper's.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Bernstein et al., "signSGD", arXiv:1802.04434.

    Example:
        >>> opt = normopt.Signum(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, momentum: float = 0.9, **settings: Unpack[Settings]
    ) -> None:
        fixed = fixed_kwargs("Signum", settings, norm="linf", scale="unit", momentum_rule="ema")
        super().__init__(params, lr, momentum=momentum, **fixed)


class Lion(SteepestDescent):
    """EvoLved Sign Momentum: unit steps under ℓ∞, where the step and the buffer use different averages.

    ::

        c = μm + (1−μ)g                         μ is the paper's β₁
        w ← (1 − ηλ)w − η · sign(c)
        m ← β₂m + (1−β₂)g  (first m = 0)

    Args:
        params: parameters or param groups.
        lr: η, how far every weight moves. Default 1e-4, the paper's.
        momentum: μ = β₁. Default 0.9, the paper's. The name lets OneCycleLR and trainers find it.
        beta2: β₂. Default 0.99, the paper's.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.

    Example:
        >>> opt = normopt.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        beta2: float = 0.99,
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("Lion", settings, norm="linf", scale="unit", momentum_rule="lion")
        super().__init__(params, lr, momentum=momentum, beta2=beta2, **fixed)


class PowerStep(SteepestDescent):
    """A small power of the heavy-ball momentum: per-coordinate adaptivity without a second moment.

    ::

        m ← μm + g  (first m = g)
        w ← (1 − ηλ)w − η · sign(m)·|m|^(1/(p−1))

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-3, our choice (Adam's): steps with the power 0.1 have about that size.
        p: the norm's order. Default 11, the paper's exponent 0.1 = 1/(p−1).
        momentum: μ. Default 0.9.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from the paper only in rounding: both decay the OLD weight, so its ``w − η(u + λw)`` is the same
    step as the line above.

    Source: Lu et al., "PowerStep: Memory-Efficient Adaptive Optimization via ℓp-Norm Steepest
    Descent", arXiv:2605.10335.

    Example:
        >>> opt = normopt.PowerStep(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 11.0,
        momentum: float = 0.9,
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("PowerStep", settings, norm="lp", scale="power", momentum_rule="heavy")
        super().__init__(params, lr, p=p, momentum=momentum, **fixed)


class LPSGD(SteepestDescent):
    """Scheduled ℓp steepest descent without momentum, on the un-normalised power map.

    ::

        w ← (1 − ηλ)w − η · sign(g)·|g|^(1/(p−1))          ε = 0
        w ← (1 − ηλ)w − η · g·(|g| + ε)^(−ρ)               ε > 0, ρ = 1 − 1/(p−1)

    p = 2 is exactly SGD and p = ∞ at ε = 0 exactly signSGD. Without a schedule p stays constant, which is NOT the
    paper's method: it anneals p from p_max to 2 over the epochs. Add the schedule::

        opt = normopt.LPSGD(model.parameters(), p=6.0)
        sched = normopt.schedules.CosineP(opt, total_steps=epochs)      # sched.step() after each epoch

    A script that has no place for it says ``LPSGD(…, p_steps=S)``: then every step of the optimizer counts, and p is 2
    from step S on. The number of steps made is in the param groups, and so in ``state_dict()``; copies by
    ``copy.deepcopy`` and ``pickle`` have no schedule.

    Annealing p under this scale also changes the step length: at |g| = 1e-3 a weight moves by 1e-3·η
    at p = 2 and by 1e-1·η at p = 4. ``scale="matched"`` removes this effect.

    Args:
        params: parameters or param groups.
        lr: η. Default 3e-2, our choice: near-optimal on the digits (``python -m benchmarks run quick``);
            the paper's are from 5e-4 to 0.01, with a warm-up and a cosine.
        p: the norm's order, the schedule's initial value. Default 6, the paper's for most networks.
        eps: ε. Default 1e-8, the paper's. 0 is exact at p = ∞; at p = 2 there is none.
        scale: "power", the paper's, or "matched", a control with SGD's step length, which has no ε.
        p_steps: S, to anneal p in S steps of the optimizer by [`CosineP`][normopt.schedules.CosineP]. Default None, no
            schedule.
        p_end: the final p of that schedule. Default 2, the paper's.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`. The paper's
            LPSGD has no weight decay.

    State: none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, momentum.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Xu and Yang, "Beyond ℓ2-norm and ℓ∞-norm: A Curvature-Inspired ℓp-Norm Scheme for Deep
    Neural Networks", arXiv:2606.02078.

    Example:
        >>> opt = normopt.LPSGD(model.parameters(), lr=0.03)
    """

    _no_momentum = True
    _usual_fields: ClassVar = {"eps": EPS}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-2,
        p: float = 6.0,
        eps: float = EPS,
        *,
        scale: Scale = "power",
        p_steps: int | None = None,
        p_end: float = 2.0,
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("LPSGD", settings, norm="lp", momentum=0.0)
        super().__init__(params, lr, p=p, scale=scale, eps=eps, **fixed)
        _anneal(self, p_steps, p_end)


class LPSGDM(SteepestDescent):
    """Scheduled ℓp steepest descent with a moving average and decoupled weight decay.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − η · sign(m)·|m|^(1/(p−1))          ε = 0
        w ← (1 − ηλ)w − η · m·(|m| + ε)^(−ρ)               ε > 0, ρ = 1 − 1/(p−1)

    Without a schedule p stays constant, which is NOT the paper's method: add the schedule, as for
    [`LPSGD`][normopt.LPSGD], which also explains the step length. At p = 2 a step is (1−μ) times torch's
    heavy-ball step, so multiply a learning rate taken from SGD by 1/(1−μ).

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-2, our choice: near-optimal on the digits (``python -m benchmarks run quick``);
            the paper's are from 5e-4 to 0.01, with a warm-up and a cosine.
        p: the norm's order, the schedule's initial value. Default 6, the paper's for most networks.
        momentum: μ. Default 0.9, the paper's β.
        eps: ε. Default 1e-8, the paper's. 0 is exact at p = ∞; at p = 2 there is none.
        scale: "power", the paper's, or "matched", a control with SGD's step length, which has no ε.
        p_steps: S, to anneal p in S steps of the optimizer by [`CosineP`][normopt.schedules.CosineP]. Default None, no
            schedule.
        p_end: the final p of that schedule. Default 2, the paper's.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Xu and Yang, "Beyond ℓ2-norm and ℓ∞-norm: A Curvature-Inspired ℓp-Norm Scheme for Deep
    Neural Networks", arXiv:2606.02078.

    Example:
        >>> opt = normopt.LPSGDM(model.parameters(), lr=0.01, weight_decay=1e-2)
    """

    _usual_fields: ClassVar = {"eps": EPS}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        p: float = 6.0,
        momentum: float = 0.9,
        eps: float = EPS,
        *,
        scale: Scale = "power",
        p_steps: int | None = None,
        p_end: float = 2.0,
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("LPSGDM", settings, norm="lp", momentum_rule="ema")
        super().__init__(params, lr, p=p, scale=scale, eps=eps, momentum=momentum, **fixed)
        _anneal(self, p_steps, p_end)


def _anneal(optimizer: SteepestDescent, p_steps: int | None, p_end: float) -> None:
    """Anneal an optimizer's p by its own steps."""
    if p_steps is not None:
        from normopt.schedules import CosineP  # only here, since no other optimizer needs it

        check_integer("p_steps", p_steps)
        CosineP(optimizer, p_steps, p_end).step_with_optimizer()
    elif p_end != 2:
        raise ValueError(f"p_end = {p_end} does nothing without p_steps: give the number of steps, too")


class Stacey(SteepestDescent):
    """Smoothed ℓp steps of Lion's momentum, coupled to a second iterate that takes plain steps: Stacey(p, 2).

    ::

        c = μm + (1−μ)g                         μ is the paper's β₁
        z ← z − αc  (first z = w)
        u = c·(|c| + ε)^(−ρ)                    ρ = 1 − 1/(p−1)
        w ← (1 − τ − ηλ)w + τz − η(1−τ)u
        m ← β₂m + (1−β₂)g  (first m = 0)

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-3, the authors'.
        p: the norm's order. Default 3, the authors'.
        momentum: μ = β₁. Default 0.9, the authors'.
        beta2: β₂. Default 0.999, the authors'.
        eps: ε. Default 1e-4, the authors'.
        coupling: τ. Default 1e-3, the authors'.
        coupling_rate: α. Default 1e-3, the authors'.
        weight_decay: λ. Default 5e-4, the authors'.
        decay: the kind of decay. Default "decoupled", the authors'.
        **settings: any of [`Coordinates`][normopt.settings.Coordinates], as in `SteepestDescent`.

    State: two buffers per parameter; z is float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    α and τ are not multiplied by η: a schedule of lr alone does not stop it, and lr = 0 does not hold the weights.
    Not offered: Stacey(p, p), whose second iterate takes steps under ℓp.

    Source: Luo et al., "Stacey: Promoting Stochastic Steepest Descent via Accelerated ℓp-Smooth Nonconvex
    Optimization", arXiv:2506.06606, in the authors' code.

    Example:
        >>> opt = normopt.Stacey(model.parameters(), lr=1e-3, p=3.0)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 3.0,
        momentum: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-4,
        *,
        coupling: float = 1e-3,
        coupling_rate: float = 1e-3,
        weight_decay: float | Tensor = 5e-4,
        decay: Literal["coupled", "decoupled", "lp"] | str = "decoupled",
        **settings: Unpack[Coordinates],
    ) -> None:
        fixed = fixed_kwargs("Stacey", settings, norm="lp", scale="power", momentum_rule="lion")
        rule = dict[str, Any](p=p, momentum=momentum, beta2=beta2, eps=eps)
        coupled = dict[str, Any](coupling=coupling, coupling_rate=coupling_rate)
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **rule, **coupled, **fixed)

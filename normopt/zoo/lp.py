"""The ℓp family: SGD, signSGD, and everything between; no matrix is looked at."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normopt.engine import SteepestDescent
from normopt.norms.base import Scale
from normopt.settings import Common, Decay, Settings
from normopt.zoo.fixed import fixed_kwargs


class SGD(SteepestDescent):
    """Steepest descent under ℓ2: torch.optim.SGD, bit for bit.

    ::

        g ← g + λw
        m ← μm + (1−τ)g  (first m = g)         c = m, or g + μm with Nesterov, or g at μ = 0
        w ← w − ηc

    The for-loop path gives the bits of ``torch.optim.SGD(foreach=False)`` in float32 and float64 on CPU.

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-3, torch's.
        momentum: μ. Default 0, torch's.
        dampening: τ. Default 0, torch's.
        weight_decay: λ. Default 0; coupled (ℓ2 in the gradient) by default, as in torch.
        nesterov: Nesterov momentum.
        decay: the kind of decay. Default "coupled", torch's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, else none.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Sutskever et al., 2013, as implemented by torch.optim.SGD.
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
        decay: Decay = "coupled",
        **settings: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decay=decay,
            **fixed_kwargs("SGD", settings, norm="l2", scale="dual", momentum_rule="heavy"),
        )


class NormalizedSGD(SteepestDescent):
    """Unit steps under ℓ2: every tensor moves by exactly lr, whatever the gradient's size.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← w − η · m/‖m‖₂                      0 where m = 0

    Args:
        params: parameters or param groups.
        lr: η, the length of each tensor's step. Default 1e-2, our choice.
        momentum: μ. Default 0; 0.9 is what the paper recommends for stochastic gradients.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, else none.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Differs from the paper: its normalisation is over all weights as one vector; here over each tensor.
    ``SteepestDescent(norm="l2", scale="unit", scope="group", momentum_rule="ema")`` is the paper's.

    Source: Cutkosky and Mehta, "Momentum Improves Normalized SGD", arXiv:2002.03305.
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

    State: none. AGR never changes a sign, so all it can do here is erase an entry that is alone among zeros.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Bernstein et al., "signSGD", arXiv:1802.04434.
    """

    _no_momentum = True

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-4, **settings: Unpack[Settings]) -> None:
        super().__init__(params, lr, **fixed_kwargs("SignSGD", settings, norm="linf", scale="unit", momentum=0.0))


class Signum(SteepestDescent):
    """Unit steps under ℓ∞ of a moving average: the sign of the momentum.

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
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Bernstein et al., "signSGD", arXiv:1802.04434.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, momentum: float = 0.9, **settings: Unpack[Settings]
    ) -> None:
        fixed = fixed_kwargs("Signum", settings, norm="linf", scale="unit", momentum_rule="ema")
        super().__init__(params, lr, momentum=momentum, **fixed)


class Lion(SteepestDescent):
    """Unit steps under ℓ∞ of an interpolation that is not what is stored: EvoLved Sign Momentum.

    ::

        c = μm + (1−μ)g                         μ is the paper's β₁
        w ← (1 − ηλ)w − η · sign(c)
        m ← β₂m + (1−β₂)g  (first m = 0)

    Args:
        params: parameters or param groups.
        lr: η, how far every weight moves. Default 1e-4, the paper's.
        momentum: μ = β₁. Default 0.9, the paper's. Named so that OneCycleLR and trainers find it.
        beta2: β₂. Default 0.99, the paper's.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.
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
    """A small power of the heavy-ball momentum: adaptivity per coordinate without a second moment.

    ::

        m ← μm + g  (first m = g)
        w ← (1 − ηλ)w − η · sign(m)·|m|^(1/(p−1))

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-3, our choice (Adam's): the power 0.1 makes steps of about that size.
        p: the norm's order. Default 11, which is the paper's exponent 0.1 = 1/(p−1).
        momentum: μ. Default 0.9.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm, scale or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Differs from the paper: the decayed weight is the OLD one in both, so ``w − η(u + λw)`` there and
    the line above are the same step; only the rounding differs.

    Source: Lu et al., "PowerStep: Memory-Efficient Adaptive Optimization via ℓp-Norm Steepest
    Descent", arXiv:2605.10335.
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

    p = 2 is SGD and p = ∞ is signSGD, exactly. On its own this keeps p constant, which is NOT the
    paper's method: that anneals p from p_max to 2 over the epochs. Add the schedule::

        opt = normopt.LPSGD(model.parameters(), p=8.0)
        sched = normopt.schedules.CosineP(opt, total_steps=epochs)      # sched.step() after each epoch

    Annealing p under this scale changes the step's length too: at |g| = 1e-3 a weight moves by 1e-3·η
    at p = 2 and by 1e-1·η at p = 4. ``scale="matched"`` takes that out.

    Args:
        params: parameters or param groups.
        lr: η. Default 3e-2, our choice: near the best on the digits (``python -m benchmarks run quick``);
            the paper's value was not obtainable.
        p: the norm's order, where the schedule starts. Default 8, our choice.
        eps: ε. Default 0, which is exact at p = 2 and ∞ (the paper has ε > 0; its value was not obtainable).
        scale: "power" is the paper's; "matched" is its control with SGD's step length.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`. The paper's
            LPSGD has no weight decay.

    State: none.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm or momentum, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Xu and Yang, "Beyond ℓ2-norm and ℓ∞-norm: A Curvature-Inspired ℓp-Norm Scheme for Deep
    Neural Networks", arXiv:2606.02078.
    """

    _no_momentum = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-2,
        p: float = 8.0,
        eps: float = 0.0,
        *,
        scale: Scale = "power",
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("LPSGD", settings, norm="lp", momentum=0.0)
        super().__init__(params, lr, p=p, scale=scale, eps=eps, **fixed)


class LPSGDM(SteepestDescent):
    """Scheduled ℓp steepest descent of a moving average, with decoupled weight decay.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − η · sign(m)·|m|^(1/(p−1))          ε = 0
        w ← (1 − ηλ)w − η · m·(|m| + ε)^(−ρ)               ε > 0, ρ = 1 − 1/(p−1)

    On its own this keeps p constant, which is NOT the paper's method: add the schedule, as for
    [`LPSGD`][normopt.LPSGD], where the step's length is spoken of too. At p = 2 a step is (1−μ)
    times torch's heavy-ball step, so a learning rate taken from SGD needs to be 1/(1−μ) times as large.

    Args:
        params: parameters or param groups.
        lr: η. Default 1e-2, our choice: near the best on the digits (``python -m benchmarks run quick``);
            the paper's value was not obtainable.
        p: the norm's order, where the schedule starts. Default 8, our choice.
        momentum: μ. Default 0.9, our choice (the paper's β was not obtainable).
        eps: ε. Default 0, exact at p = 2 and ∞.
        scale: "power" is the paper's; "matched" is its control with SGD's step length.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting of the wrong type, an unknown one, or norm or momentum_rule, which are fixed here.
        ValueError: a setting out of range, or in contradiction to another; see `SteepestDescent`, for warnings too.

    Source: Xu and Yang, "Beyond ℓ2-norm and ℓ∞-norm: A Curvature-Inspired ℓp-Norm Scheme for Deep
    Neural Networks", arXiv:2606.02078.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        p: float = 8.0,
        momentum: float = 0.9,
        eps: float = 0.0,
        *,
        scale: Scale = "power",
        **settings: Unpack[Settings],
    ) -> None:
        fixed = fixed_kwargs("LPSGDM", settings, norm="lp", momentum_rule="ema")
        super().__init__(params, lr, p=p, scale=scale, eps=eps, momentum=momentum, **fixed)

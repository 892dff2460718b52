"""The adaptive family: Adam and its relatives, steepest descent in coordinates that follow the gradients."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normopt._checks import check_bool
from normopt.arguments import ADAN, fixed_kwargs, from_torch
from normopt.engine import SteepestDescent
from normopt.settings import Common, Coordinates


class AdamW(SteepestDescent):
    """Steepest descent under ℓ2 in adaptive coordinates, with decoupled weight decay: torch.optim.AdamW.

    ::

        m ← β₁m + (1−β₁)g,  m̂ = m/(1 − β₁ᵗ)
        v ← β₂v + (1−β₂)g²,  v̂ = v/(1 − β₂ᵗ)   with amsgrad the largest v so far instead of v
        w ← (1 − ηλ)w − η · m̂/(√v̂ + ε)

    Args:
        params: parameters or param groups. ``betas``, ``eps`` and ``amsgrad`` of a group are read as here.
        lr: η. Default 1e-3, torch's.
        betas: β₁ and β₂. Default (0.9, 0.999), torch's. In groups and state they are ``momentum`` and ``metric_beta``.
        eps: ε > 0. Default 1e-8, torch's. In groups it is ``metric_eps``.
        weight_decay: λ. Default 1e-2, torch's.
        amsgrad: use the largest v so far. In groups it is ``metric_rule="max"``.
        decay: the kind of decay. Default "decoupled", torch's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: two buffers per parameter, three with amsgrad, and a count of steps; v is float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, metric,
            bias_correction.
        ValueError: a setting is out of range, contradicts another, or is given twice, as betas and as momentum. See
            `SteepestDescent`, also for warnings.

    Differs from torch's: ε = 0 is refused, and v is float32 for 16-bit weights, which bfloat16 could not move at
    β₂ = 0.999. ``capturable`` is not needed. torch's checkpoints load, and
    [`to_torch_state_dict`][normopt.to_torch_state_dict] gives them back.

    Source: Kingma and Ba, "Adam", arXiv:1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
    arXiv:1711.05101; AMSGrad: Reddi et al., arXiv:1904.09237.

    Example:
        >>> opt = normopt.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), agr=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        decay: Literal["coupled", "decoupled", "lp"] | str = "decoupled",
        **settings: Unpack[Common],
    ) -> None:
        adam = from_torch(_adam("AdamW", settings) | {"betas": betas, "eps": eps, "amsgrad": amsgrad})
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **adam)


class Adam(SteepestDescent):
    """Steepest descent under ℓ2 in adaptive coordinates, with coupled weight decay: torch.optim.Adam.

    ::

        g ← g + λw                              then as AdamW with λ = 0

    Args:
        params: parameters or param groups. ``betas``, ``eps`` and ``amsgrad`` of a group are read as here.
        lr: η. Default 1e-3, torch's.
        betas: β₁ and β₂. Default (0.9, 0.999), torch's.
        eps: ε > 0. Default 1e-8, torch's.
        weight_decay: λ. Default 0, torch's.
        amsgrad: use the largest v so far.
        decay: the kind of decay. Default "coupled", torch's; "decoupled" is [`AdamW`][normopt.AdamW], which says more.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: two buffers per parameter, three with amsgrad, and a count of steps; v is float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, metric,
            bias_correction.
        ValueError: a setting is out of range, contradicts another, or is given twice, as betas and as momentum. See
            `SteepestDescent`, also for warnings.

    Source: Kingma and Ba, "Adam", arXiv:1412.6980.

    Example:
        >>> opt = normopt.Adam(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        *,
        decay: Literal["coupled", "decoupled", "lp"] | str = "coupled",
        **settings: Unpack[Common],
    ) -> None:
        adam = from_torch(_adam("Adam", settings) | {"betas": betas, "eps": eps, "amsgrad": amsgrad})
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **adam)


class Adagrad(SteepestDescent):
    """Steepest descent under ℓ2 in coordinates that follow the sum of all squared gradients: torch.optim.Adagrad.

    ::

        g ← g + λw
        v ← v + g²
        w ← w − η · g/(√v + ε)

    Args:
        params: parameters or param groups. ``eps`` of a group is read as here.
        lr: η. Default 1e-2, torch's.
        weight_decay: λ. Default 0, torch's.
        eps: ε > 0. Default 1e-10, torch's. In groups it is ``metric_eps``.
        decay: the kind of decay. Default "coupled", torch's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: one buffer per parameter, float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum, momentum_rule,
            metric, metric_rule, bias_correction.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Not offered: torch's ``lr_decay``, for which there are learning-rate schedulers (``LambdaLR`` with
    1/(1 + t·lr_decay)), and ``initial_accumulator_value``, a second ε under the root.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    JMLR 2011, in torch.optim.Adagrad's form.

    Example:
        >>> opt = normopt.Adagrad(model.parameters(), lr=1e-2)
    """

    _no_momentum = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        weight_decay: float | Tensor = 0.0,
        eps: float = 1e-10,
        decay: Literal["coupled", "decoupled", "lp"] | str = "coupled",
        **settings: Unpack[Common],
    ) -> None:
        fixed = _adam("Adagrad", settings, momentum=0.0, metric_rule="sum", bias_correction=False)
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **from_torch(fixed | {"eps": eps}))


class RMSprop(SteepestDescent):
    """Steepest descent under ℓ2 in adaptive coordinates, without momentum: torch.optim.RMSprop.

    ::

        g ← g + λw
        v ← αv + (1−α)g²
        w ← w − η · g/(√v + ε)

    Args:
        params: parameters or param groups. ``alpha`` and ``eps`` of a group are read as here.
        lr: η. Default 1e-2, torch's.
        alpha: α, the weight of the OLD v. Default 0.99, torch's. In groups it is ``metric_beta``.
        eps: ε > 0. Default 1e-8, torch's. In groups it is ``metric_eps``.
        weight_decay: λ. Default 0, torch's.
        decay: the kind of decay. Default "coupled", torch's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: one buffer per parameter, float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum, momentum_rule,
            metric, metric_rule, bias_correction.
        ValueError: a setting is out of range, contradicts another, or is given twice, as alpha and as metric_beta. See
            `SteepestDescent`, also for warnings.

    Not offered: torch's ``momentum``, which averages g/(√v + ε), where every momentum here averages g; and
    ``centered``, which needs one more buffer.

    Source: Tieleman and Hinton, Lecture 6.5 of "Neural Networks for Machine Learning", 2012, in torch.optim.RMSprop's
    form.

    Example:
        >>> opt = normopt.RMSprop(model.parameters(), lr=1e-3)
    """

    _no_momentum = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        decay: Literal["coupled", "decoupled", "lp"] | str = "coupled",
        **settings: Unpack[Common],
    ) -> None:
        fixed = _adam("RMSprop", settings, momentum=0.0, metric_rule="average", bias_correction=False)
        theirs = from_torch(fixed | {"alpha": alpha, "eps": eps})
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **theirs)


class Adan(SteepestDescent):
    """Adam with an average of the gradients' differences, and proximal weight decay.

    ::

        m ← β₁m + (1−β₁)g
        d ← β₂d + (1−β₂)(g − g_prev)            first difference 0
        v ← β₃v + (1−β₃)(g + β₂(g − g_prev))²
        u = (m̂ + β₂d̂)/(√v̂ + ε)                  m̂ = m/(1 − β₁ᵗ), d̂ and v̂ likewise
        w ← (w − ηu)/(1 + ηλ)

    Args:
        params: parameters or param groups. ``betas`` and ``eps`` of a group are read as here.
        lr: η. Default 1e-3, the authors'.
        betas: β₁, β₂ and β₃, the weights of OLD averages: 1 minus the paper's. Default (0.98, 0.92, 0.99), the
            authors'. In groups and state they are ``momentum``, ``difference_beta`` and ``metric_beta``.
        eps: ε > 0. Default 1e-8, the authors'. In groups it is ``metric_eps``.
        weight_decay: λ. Default 0, the authors'.
        no_prox: the authors' name for decay="decoupled".
        decay: the kind of decay. Default "proximal", the paper's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: four buffers per parameter, float32 for 16-bit weights but for the momentum, and a count of steps. With AGR
    the previous gradient is the regularized one.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, metric,
            metric_rule, bias_correction.
        ValueError: a setting is out of range, contradicts another, or is given twice, as betas and as momentum, or by
            no_prox and decay. See `SteepestDescent`, also for warnings.

    Differs from the paper's Algorithm 1, as the authors' code does: averages begin at 0 and are corrected, and there is
    no restart. Not offered: the code's ``max_grad_norm``; clip the gradients.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
    arXiv:2208.06677, and the authors' code.

    Example:
        >>> opt = normopt.Adan(model.parameters(), lr=1e-3, weight_decay=0.02)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        no_prox: bool = False,
        decay: Literal["coupled", "decoupled", "lp", "proximal"] | str = "proximal",
        **settings: Unpack[Common],
    ) -> None:
        check_bool("no_prox", no_prox)
        if no_prox and decay not in ("proximal", "decoupled"):
            raise ValueError(f'no_prox=True is decay="decoupled", but decay is {decay!r}: leave out one of them')
        decay = "decoupled" if no_prox else decay
        fixed = _adam("Adan", settings, metric_rule="average")
        theirs = from_torch(fixed | {"betas": betas, "eps": eps}, ADAN)
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **theirs)


class LARS(SteepestDescent):
    """Steps along the averaged momentum that are as long as η times the tensor's own weights.

    ::

        m ← μm + (1−μ)(g + λw)  (first m = 0)
        w ← w − η · m · ‖w‖₂/‖m‖₂               each tensor; the factor is 1 where w = 0

    Args:
        params: parameters or param groups. Biases and gains usually take plain steps, by a group with scale="dual".
        lr: η, the length of a step relative to the weights'. Default 1e-2, our choice.
        momentum: μ. Default 0.9, the paper's.
        weight_decay: λ. Default 0, our choice.
        decay: the kind of decay. Default "coupled", the paper's.
        **settings: any of [`Coordinates`][normopt.settings.Coordinates], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    It is Algorithm 1 of the paper, with its φ(x) = x. Not offered: LARS of 2017 (arXiv:1708.03888), which rescales the
    gradient before the momentum, by a factor with a trust coefficient and λ in it, and clipped factors.

    Source: You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962, Algorithm 1.

    Example:
        >>> matrices = [p for p in model.parameters() if p.dim() >= 2]
        >>> vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "scale": "dual"}
        >>> opt = normopt.LARS([{"params": matrices}, vectors], lr=1e-2, weight_decay=1e-4)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0.0,
        *,
        decay: Literal["coupled", "decoupled", "lp"] | str = "coupled",
        **settings: Unpack[Coordinates],
    ) -> None:
        fixed = fixed_kwargs("LARS", settings, norm="l2", scale="relative", momentum_rule="ema")
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, decay=decay, **fixed)


class LAMB(SteepestDescent):
    """Adam's direction plus λw, rescaled in each tensor to the length of its weights.

    ::

        m ← β₁m + (1−β₁)g,  m̂ = m/(1 − β₁ᵗ)
        v ← β₂v + (1−β₂)g²,  v̂ = v/(1 − β₂ᵗ)
        u = m̂/(√v̂ + ε) + λw
        w ← w − η · u · ‖w‖₂/‖u‖₂               each tensor; the factor is 1 where w = 0

    Args:
        params: parameters or param groups. ``betas`` and ``eps`` of a group are read as here.
        lr: η, the length of a step relative to the weights'. Default 1e-3, that of other implementations (apex, timm).
        betas: β₁ and β₂. Default (0.9, 0.999), the paper's.
        eps: ε > 0. Default 1e-6, that of other implementations.
        weight_decay: λ. Default 1e-2, that of other implementations.
        decay: the kind of decay. Default "inside", the paper's.
        **settings: any of [`Common`][normopt.settings.Common], as in `SteepestDescent`.

    State: two buffers per parameter and a count of steps; v is float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, metric,
            metric_rule, bias_correction.
        ValueError: a setting is out of range, contradicts another, or is given twice, as betas and as momentum. See
            `SteepestDescent`, also for warnings.

    It is Algorithm 2 of the paper, with its φ(x) = x. Not offered: clipped factors. Biases and gains usually take
    Adam's own steps, by a group with scale="dual" and decay="decoupled".

    Source: You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962, Algorithm 2.

    Example:
        >>> matrices = [p for p in model.parameters() if p.dim() >= 2]
        >>> vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "scale": "dual"}
        >>> opt = normopt.LAMB([{"params": matrices}, vectors], lr=2e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 1e-2,
        *,
        decay: Literal["coupled", "decoupled", "inside", "lp"] | str = "inside",
        **settings: Unpack[Common],
    ) -> None:
        adam = from_torch(
            _adam("LAMB", settings, scale="relative", metric_rule="average") | {"betas": betas, "eps": eps}
        )
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **adam)


def _adam(name: str, given: Any, **fixed: Any) -> dict[str, Any]:
    """Return the settings that make an Adam, with the user's own."""
    adam = dict(norm="l2", scale="dual", momentum_rule="ema", metric="diagonal", bias_correction=True)
    return fixed_kwargs(name, given, **adam | fixed)

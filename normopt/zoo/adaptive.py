"""The adaptive family: Adam and its relatives, steepest descent in coordinates that follow the gradients."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normopt.arguments import fixed_kwargs, from_torch
from normopt.engine import SteepestDescent
from normopt.settings import Common


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
        adam = _adam("AdamW", settings, betas=betas, eps=eps, amsgrad=amsgrad)
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
        adam = _adam("Adam", settings, betas=betas, eps=eps, amsgrad=amsgrad)
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
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum, metric,
            metric_rule, bias_correction.
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
        fixed = fixed_kwargs("Adagrad", settings, norm="l2", scale="dual", momentum=0.0, **_METRIC, metric_rule="sum")
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
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum, metric,
            metric_rule, bias_correction.
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
        fixed = fixed_kwargs(
            "RMSprop", settings, norm="l2", scale="dual", momentum=0.0, **_METRIC, metric_rule="average"
        )
        theirs = from_torch(fixed | {"alpha": alpha, "eps": eps})
        super().__init__(params, lr, weight_decay=weight_decay, decay=decay, **theirs)


_METRIC: dict[str, Any] = {"metric": "diagonal", "bias_correction": False}


def _adam(name: str, given: Any, **theirs: Any) -> dict[str, Any]:
    """Return the settings of Adam, with the user's own and those that have torch's names."""
    fixed = fixed_kwargs(
        name, given, norm="l2", scale="dual", momentum_rule="ema", **_METRIC | {"bias_correction": True}
    )
    return from_torch(fixed | theirs)

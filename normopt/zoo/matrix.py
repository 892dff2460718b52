"""The matrix family: steepest descent under norms of a matrix's singular values or of its rows.

These are for matrices (linear layers, convolutions, attention). Use another optimizer, or param groups
with another norm, for embeddings, norm layers and biases.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normopt._checks import check_choice, check_number
from normopt.arguments import fixed_kwargs
from normopt.engine import SteepestDescent
from normopt.settings import Coordinates, Settings


class Muon(SteepestDescent):
    """Unit steps under the spectral norm with a moving average: the orthogonalised momentum.

    ::

        m ← μm + (1−μ)g  (first m = 0)          c = (1−μ)g + μm with Nesterov, else m
        u = f · UVᵀ of c = UΣVᵀ                 by a polynomial iteration
        w ← (1 − ηλ)w − ηu

    Args:
        params: parameters or param groups of matrices; convolutions are read as out × rest.
        lr: η. Default 0.02, Keller Jordan's; torch's is 1e-3.
        momentum: μ. Default 0.95, both conventions'.
        nesterov: use Nesterov momentum. Default True, both conventions'.
        method: "newton-schulz", both conventions' polynomial, "polar-express", or "svd", which is exact.
        steps: the number of polynomial iterations. Default 5.
        aspect: the factor f by the matrix's shape: "original" √max(1, rows/columns) (Keller Jordan's, torch's
            default), "match_rms_adamw" 0.2·√max(rows, columns), "rms" √(rows/columns), or "none".
        dtype: the dtype of the iteration, "bfloat16", "float32", or "auto" (the default): float32 on a CPU without
            instructions for bfloat16, else bfloat16.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`. λ is 0 by
            default, as in Keller Jordan's; torch's is 0.1.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from torch.optim.Muon: gradients below 1e-7 in norm are orthogonalised too (torch's fade out),
    and the momentum is never overwritten (torch does so in bfloat16 without Nesterov). From the same state,
    a step agrees with torch's within 2^-7 of its length.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the framework is
    arXiv:2409.20325; "match_rms_adamw" is arXiv:2502.16982.

    Example:
        >>> opt = normopt.Muon(normopt.param_groups(model, preset="muon-adamw"), lr=0.02, weight_decay=0.1)
    """

    _usual_fields: ClassVar = {"norm_dtype": "auto"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        method: str = "newton-schulz",
        steps: int = 5,
        aspect: str = "original",
        dtype: str = "auto",
        **settings: Unpack[Settings],
    ) -> None:
        fixed = dict[str, Any](norm_method=method, norm_steps=steps, norm_aspect=aspect, norm_dtype=dtype)
        fixed |= dict(norm="spectral", scale="unit", momentum_rule="ema")
        fixed = fixed_kwargs(type(self).__name__, settings, **fixed)
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, **fixed)


class NorMuon(Muon):
    """Muon whose update has rows of equal size, in an average over the steps.

    ::

        U as Muon's u without f
        V ← βV + (1−β)·mean of U² over each row  (first V = 0; no bias correction)
        u = f · Û·‖U‖_F/‖Û‖_F,  Û = U/(√V + 1e-8)
        w ← (1 − ηλ)w − ηu

    Args:
        params: parameters or param groups of matrices; convolutions are read as out × rest. Groups that name another
            norm have no row averages, unless they set row_beta.
        lr: η. Default 0.02, Muon's.
        momentum: μ. Default 0.95.
        nesterov: use Nesterov momentum. Default True, Muon's.
        row_beta: β, the weight of the OLD V. Default 0.95, the paper's β₂.
        method: as in `Muon`. Default "newton-schulz".
        steps: as in `Muon`. Default 5.
        aspect: as in `Muon`. Default "original".
        dtype: as in `Muon`. Default "auto".
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter, and one number per row, float32 for 16-bit weights.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from the paper: the update keeps the length of Muon's, as in the implementation in dion. The paper's has an
    RMS of 0.2, which is aspect="match_rms_adamw" if all singular values of U are 1.

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491.

    Example:
        >>> opt = normopt.NorMuon([p for p in model.parameters() if p.dim() == 2], lr=0.02)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        row_beta: float = 0.95,
        method: str = "newton-schulz",
        steps: int = 5,
        aspect: str = "original",
        dtype: str = "auto",
        **settings: Unpack[Settings],
    ) -> None:
        own = dict[str, Any](row_beta=row_beta, method=method, steps=steps, aspect=aspect, dtype=dtype, **settings)
        super().__init__(params, lr, momentum, nesterov, **own)


class SpectralSGD(SteepestDescent):
    """Steepest descent under the spectral norm: Muon's direction, scaled by the gradient's nuclear norm.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − η · (Σσ) · UVᵀ          of m = UΣVᵀ

    Args:
        params: parameters or param groups of matrices.
        lr: η. Default 1e-3, our choice.
        momentum: μ. Default 0.
        method: "svd", which is exact, "newton-schulz" or "polar-express".
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: Carlson et al., "Preconditioned Spectral Descent for Deep Learning", 2015; the framework is
    arXiv:2409.20325. With a momentum it is PolarGrad, arXiv:2505.21799.

    Example:
        >>> opt = normopt.SpectralSGD([p for p in model.parameters() if p.dim() == 2], lr=1e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        method: str = "svd",
        **settings: Unpack[Settings],
    ) -> None:
        rule = dict[str, Any](norm="spectral", scale="dual", momentum_rule="ema", norm_method=method)
        super().__init__(params, lr, momentum=momentum, **fixed_kwargs("SpectralSGD", settings, **rule))


class NucGD(SteepestDescent):
    """Unit steps under the nuclear norm: rank-one updates along the top singular pair.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − η · u₁v₁ᵀ               of m = UΣVᵀ

    Args:
        params: parameters or param groups of matrices.
        lr: η, the Frobenius norm of a step. Default 1e-2, our choice.
        momentum: μ. Default 0.
        method: "lanczos", a few matrix–vector products, or "svd", which is exact.
        steps: the number of Lanczos steps, with two such products each. Default 24. On Gaussian matrices of
            256 × 256, 128 × 512 and 512 × 128, uᵀmv is then within 0.3 % of σ₁, and within 0.002 % on average
            (16 steps: 2.2 % and 0.08 %). On a CPU, 24 steps on 256 × 256 matrices take a seventh of the time of their
            SVDs. Exact from min(rows, columns) steps on.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: the nuclear-norm case of the framework of arXiv:2409.20325. The name is of arXiv:2603.22824;
    arXiv:2512.09678 calls the same step Neon.

    Example:
        >>> opt = normopt.NucGD([p for p in model.parameters() if p.dim() == 2], lr=1e-3)
    """

    _usual_fields: ClassVar = {"norm_steps": 24}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        *,
        method: str = "lanczos",
        steps: int = 24,
        **settings: Unpack[Settings],
    ) -> None:
        rule = dict[str, Any](norm="nuclear", scale="unit", momentum_rule="ema", norm_method=method, norm_steps=steps)
        super().__init__(params, lr, momentum=momentum, **fixed_kwargs("NucGD", settings, **rule))


class Freon(SteepestDescent):
    """A power of the singular values, ``(GGᵀ)^(−c) G``: from normalized SGD (c = 0) to Muon (c = 1/2) and on.

    ::

        m ← μm + g  (first m = g)               G = m/‖m‖_Sq, q = 2 − 2c
        w ← (1 − ηλ)w − η · U Σ^(1−2c) Vᵀ       of G = UΣVᵀ

    ‖m‖_Sq is the ℓq norm of the singular values: the length of a step does not depend on the gradient's. For c ≤ 1/2
    this is the unit step of the Schatten norm with 1/p + 1/q = 1. For 1/2 < c < 1, where the paper reports its best
    exponents on GPT-2, ‖·‖_Sq is a quasi-norm, and the step is that of no norm.

    Args:
        params: parameters or param groups of matrices.
        lr: η. Default 1e-2, our choice.
        c: the power of GGᵀ, c < 1 under scale="unit". Default 0.5, which is Muon's direction.
        momentum: μ. Default 0.95, the paper's.
        scale: "unit", the paper's, or "power", our variant without the division by ‖m‖_Sq and with a moving average,
            m ← μm + (1−μ)g: a gradient 1000 times smaller then changes the step's length by 1000^(2c−1). Default
            "unit".
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, momentum_rule,
            norm_exponent.
        ValueError: c is not finite, or c ≥ 1 under scale="unit", where q ≤ 0 and no ‖·‖_Sq exists; a setting is out of
            range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from the paper: the power is computed by an SVD instead of an iteration (QDWH), and singular values that
    count as zero stay zero.

    Source: Shumaylov et al., "Muon is Not That Special", arXiv:2605.11181, where c = 1 − q/2. HTMuon's
    σ^0.125, arXiv:2603.10067, is c = 0.4375.

    Example:
        >>> opt = normopt.Freon([p for p in model.parameters() if p.dim() == 2], lr=0.01)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        c: float = 0.5,
        momentum: float = 0.95,
        *,
        scale: Literal["unit", "power"] = "unit",
        **settings: Unpack[Settings],
    ) -> None:
        check_number("c", c, open_low=True, open_high=True)
        check_choice("scale", scale, ("unit", "power"))
        if c >= 1 and scale == "unit":
            raise ValueError(
                f"c = {c} means q = 2 − 2c = {2 - 2 * c:g} ≤ 0, for which there is no ‖m‖_Sq to divide by: use c < 1, "
                'or scale="power"'
            )
        rule = "heavy" if scale == "unit" else "ema"
        fixed = fixed_kwargs("Freon", settings, norm="spectral", momentum_rule=rule, norm_exponent=1 - 2 * c)
        super().__init__(params, lr, momentum=momentum, scale=scale, **fixed)


class Scion(SteepestDescent):
    """Steps of norm ηr; with weight decay a conditional gradient, which keeps the weights in a norm ball.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − ηr·D(m)                 D(m) = √(out/in)·UVᵀ by default

    λ = 1 is Scion: w stays a convex combination of points of the ball, so that ‖w‖ ≤ r always holds if it does
    initially (1.2r with "newton-schulz", whose ‖D(m)‖ may reach 1.2). λ = 0 is unconstrained Scion; in between
    the ball has radius r/λ. Each kind of layer has its own norm and radius:
    [`param_groups`][normopt.param_groups] sets the paper's with ``preset="scion"``::

        opt = normopt.Scion(normopt.param_groups(model, preset="scion"), lr=2**-12)

    Args:
        params: parameters or param groups. A plain list is treated as hidden layers: matrices and convolutions
            under the RMS → RMS norm, biases and gains under the RMS.
        lr: η. Default 2⁻¹², the paper's for a GPT with the radii of the preset.
        momentum: μ, the weight of the OLD state: the paper's α is 1 − μ. Default 0.9, its α = 0.1.
        radius: r. Default 50, the paper's for hidden layers of a GPT; it uses 8 for a small CNN and 1 for an MLP.
        weight_decay: λ. Default 1.
        decay: the kind of decay. Default "decoupled"; "lp" does not keep the weights in a ball.
        method: "newton-schulz", as in the paper, "polar-express", or "svd", which is exact.
        **settings: any of [`Coordinates`][normopt.settings.Coordinates], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, norm_aspect,
            norm_dtype.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Differs from the paper: it draws the initial weights from the ball's boundary. For λ = 1, start inside the
    ball, as PyTorch's default initialisations do at these radii. It also adds 1e-8 to every norm, where D(0) = 0
    here.

    Source: Pethick et al., "Training Deep Learning Models with Norm-Constrained LMOs", arXiv:2502.07529.

    Example:
        >>> opt = normopt.Scion(normopt.param_groups(model, preset="scion"), lr=2**-12)
    """

    _usual_fields: ClassVar = {"norm_dtype": "auto"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2**-12,
        momentum: float = 0.9,
        *,
        radius: float = 50.0,
        weight_decay: float | Tensor = 1.0,
        decay: Literal["coupled", "decoupled", "lp"] | str = "decoupled",
        method: str = "newton-schulz",
        **settings: Unpack[Coordinates],
    ) -> None:
        rule = dict[str, Any](norm="spectral", scale="unit", momentum_rule="ema", norm_aspect="rms", norm_method=method)
        fixed = fixed_kwargs("Scion", settings, norm_dtype="auto", **rule)
        ball = dict[str, Any](radius=radius, weight_decay=weight_decay, decay=decay)
        super().__init__(params, lr, momentum=momentum, **ball, **fixed)


class SCALE(SteepestDescent):
    """Normalise each output unit's gradient to RMS 1; only the last layer uses momentum.

    ::

        m ← μm + (1−μ)g  (first m = 0)          in the last layer; elsewhere μ = 0 and m = g
        w_i ← (1 − ηλ)w_i − η · m_i/RMS(m_i)    for the weights of each output unit i; 0 where m_i = 0

    [`param_groups`][normopt.param_groups] finds the last layer and the orientation of embeddings::

        opt = normopt.SCALE(normopt.param_groups(model, preset="scale"), lr=1e-3)

    Args:
        params: parameters or param groups. A plain list is treated as layers before the last.
        lr: η. Default 1e-3, of the order of the authors'.
        momentum: μ. Default 0; the preset gives the last layer 0.9, the authors'.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter in groups with momentum, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule, norm_aspect.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    A column of the paper's d_in × d_out matrices is a row of PyTorch's. Embeddings have the opposite layout, so
    the preset transposes them. As in the authors' code, the divisor is the RMS, not the paper's ℓ2 norm.

    Differs from the authors' code: with the preset, vectors take sign steps, where theirs use AdamW. They
    clamp the RMS at 1e-8, where D(0) = 0 here.

    Source: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", arXiv:2506.16659.

    Example:
        >>> opt = normopt.SCALE(normopt.param_groups(model, preset="scale"), lr=1e-3)
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0.0, **settings: Unpack[Settings]
    ) -> None:
        fixed = fixed_kwargs("SCALE", settings, norm="row", scale="unit", momentum_rule="ema", norm_aspect="columns")
        super().__init__(params, lr, momentum=momentum, **fixed)


class RowNormSGD(SteepestDescent):
    """Unit steps under the largest row norm: every row of every matrix moves by exactly lr.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w_i ← (1 − ηλ)w_i − η · m_i/‖m_i‖₂      for each row i; 0 where m_i = 0

    Args:
        params: parameters or param groups; the rows of a convolution are its output channels, those of a vector its
            entries.
        lr: η, the ℓ2 norm of each row's step. Default 1e-2, our choice.
        momentum: μ. Default 0.9, our choice.
        **settings: any of [`Settings`][normopt.settings.Settings], as in `SteepestDescent`.

    State: one buffer per parameter if momentum ≠ 0, otherwise none.

    Raises:
        TypeError: a setting has the wrong type, is unknown, or is fixed here: norm, scale, momentum_rule.
        ValueError: a setting is out of range or contradicts another. See `SteepestDescent`, also for warnings.

    Source: the 2 → ∞ operator norm in the framework of arXiv:2409.20325. Published as RMNP, arXiv:2603.20527.

    Example:
        >>> opt = normopt.RowNormSGD([p for p in model.parameters() if p.dim() == 2], lr=1e-3)
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, momentum: float = 0.9, **settings: Unpack[Settings]
    ) -> None:
        fixed = fixed_kwargs("RowNormSGD", settings, norm="row", scale="unit", momentum_rule="ema")
        super().__init__(params, lr, momentum=momentum, **fixed)

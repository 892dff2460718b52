"""ℓp decay on any optimizer: of entries, which sparsifies, and of rows, columns or heads, which removes them whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_bool, check_choice, check_number, equals, is_low_precision, is_quantized, near
from normopt.addons.attach import AddOn, Closure, refuse_sparse
from normopt.addons.lengths import lengths
from normopt.engine import SteepestDescent
from normopt.norms.base import as_real, to_compute_dtype
from normopt.params import warn_if_stuck
from normopt.sharding.layout import is_dtensor, layout_of, local
from normopt.stages.decay import lp_factors
from normopt.stages.write import scale_

Over = Literal["entries", "rows", "columns", "heads"]


def _strength(name: str, value: object) -> None:
    check_number(name, value, low=0, open_high=True, tensor=True)


def _exponent(name: str, value: object) -> None:
    check_number(name, value, low=0, open_low=True, open_high=True)


def _over(name: str, value: object) -> None:
    check_choice(name, value, ("entries", "rows", "columns", "heads"))


def _count(name: str, value: object, low: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but is {value!r} ({type(value).__name__})")
    check_number(name, value, low=low)


def _heads(name: str, value: object) -> None:
    if value is not None:
        _count(name, value, low=1)


# Of each setting: what it is called among the arguments, and what is asked of it.
_SETTINGS: dict[str, tuple[str, Callable[[str, object], None]]] = {
    "lp_decay": ("weight_decay", _strength),
    "lp_p": ("p", _exponent),
    "lp_over": ("over", _over),
    "lp_heads": ("heads", _heads),
    "lp_warmup": ("warmup", _count),
    "lp_elastic": ("elastic", check_bool),
    "lp_step": ("lp_step", _count),
}


class LpDecay(AddOn):
    """ℓp weight decay (pWD) on any optimizer: small weights shrink the fastest, down to exactly zero.

    ::

        w ← step(w) · X/(X + pηλ)          X = |w_old|^(2−p)             over "entries"
                                           X = ‖w_old,G‖₂^(2−p)          "rows", "columns", "heads"

    η is the ``lr`` that the group has in this step, scheduled or not, and w_old the weight before the step (with a
    closure: before the closure). Only tensors of 2 or more dims that have a gradient decay, as the authors have it.
    At p < 2 a weight w₀ without a gradient is gone after about ``|w₀|^(2−p) / ((2−p)·pηλ)`` steps, and a group likewise
    by its length, so that λ means nothing without η. A group of n entries is about √n times as long as one of them, and
    takes a λ n^(1−p/2) times as large: 12 times at n = 64 and p = 0.8, 63 times at n = 1000. η = 0 changes nothing.

    Over groups of entries the factor is one for the whole group G, so that a row or a head disappears as one:

    - "rows": w[o] and all that lies behind it: what comes into a unit, or an output channel of a convolution;
    - "columns": w[:, i]: what an input unit or channel goes out to (a transposed convolution has these two turned);
    - "heads": ``heads`` equal blocks of rows, such as attention heads in a projection to queries, keys or values.

    At p = 1 the penalty is that of the group lasso, λ·Σ‖w_G‖₂, not weighted by the groups' sizes. Its proximal step
    would be the factor max(0, 1 − ηλ/‖w_G‖₂), which agrees with this one to first order in η and cuts off at once
    where this one halves and then vanishes ever faster. p < 1 is harder on short groups and lighter on long ones. The
    bias of a unit is not part of its row, and does not decay.

    With ``warmup=n`` the exponent goes from 2 to p in n steps,

        p_s = 2 + (p − 2)·s/n              s = 0 … n − 1, then p

    so that weights that start at zero can leave it in the first step, in which zero is not absorbing: without, those
    of a zero-initialised layer are held at zero for ever, and a warning says so. s is the group's ``lp_step``; it
    counts the calls of ``step()``. Calls with the number 0 as the lr do not count, because no weight can leave zero in
    them. A weight that still is zero after the first step stays there, as where a fused step under a GradScaler was
    skipped.

    A group's own weight decay beside this one is refused, unless ``elastic=True``: then it stays what it is, and this
    one follows. For decoupled ℓ2 decay that is ``((1 − ηλ₂)w − ηu)·X/(X + pηλ)``, where the authors have one factor,
    ``(w − ηu)·X/(X(1 + ηλ₂) + pηλ)``. The two agree to first order in η; at the second theirs minus this one is
    ``η²λ₂·(u + λ₂w + pλ·sign(w)|w|^(p−1))``.

    A step that a GradScaler skips decays nothing. An optimizer that keeps copies of the weights, as Lookahead or the
    schedule-free ones, does not learn of the decay, and one that scales its lr inside, as Prodigy, not of its η.
    ``detach()`` takes the decay off. `torch.compile` of the step breaks its graph here, and goes on after it.

    Args:
        optimizer: any optimizer but torch.optim.LBFGS; of normopt's own only for groups of entries, since for entries
            they have ``decay="lp", weight_decay=…, decay_p=…``.
        p: p > 0, p < 1 too. Default 0.8, the authors' for CIFAR-10.
        weight_decay: λ ≥ 0, a float or a one-element tensor, which is never read on the host. Default 1e-3, theirs too.
        over: "entries" (the default), or groups of them: "rows", "columns" or "heads".
        heads: how many blocks of rows over "heads", where it must be given, or ``lp_heads`` be in each group; None
            (the default) over anything else.
        warmup: over how many steps the exponent goes from 2 to p. Default 0, none.
        elastic: let the optimizer's own weight decay stay. Default False.

    Settings of a param group: ``lp_decay`` (λ; 0 leaves the group alone), ``lp_p``, ``lp_over``, ``lp_heads``,
    ``lp_warmup``, ``lp_elastic`` and ``lp_step``, how many steps of the warm-up are done. What a group has when the
    decay is attached it keeps, whatever the arguments say. A group that has all of them comes from a checkpoint or a
    copy: a warning says where it differs, and ``group["lp_decay"] = 0.1`` changes it. Tensors are not compared.

    Memory: one number per decayed weight over entries, one per group of them else, while the step runs. For 16-bit
    weights the factor is computed in float32; what rounds to a factor of 1 does nothing, which for bfloat16 are those
    above 1 − 1/512.

    Raises:
        TypeError: not an optimizer, one that wraps another and has no hooks, or a setting of the wrong type.
        ValueError: a setting out of range, LBFGS, a normopt optimizer with "entries", an optimizer that is
            ``differentiable`` or carries an LpDecay already, or a group with a weight decay of its own or with
            an unknown ``lp_…`` setting; in ``step()``, for what was made so since.
        RuntimeError: in ``step()``, for a sparse gradient.

    Warns:
        UserWarning: a tensor that decay with p < 2 and no warm-up will hold at zero for ever because it starts there;
            a group that had all the settings already and keeps them, where they differ from the arguments.

    Source: Decoupled weight decay for any p norm, arXiv:2404.10824. Over groups and the warm-up as written: ours.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        >>> decay = normopt.LpDecay(opt, p=0.8, weight_decay=0.1)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        p: float = 0.8,
        weight_decay: float | Tensor = 1e-3,
        over: Over = "entries",
        heads: int | None = None,
        warmup: int = 0,
        elastic: bool = False,
    ) -> None:
        settings = {
            "lp_decay": weight_decay,
            "lp_p": p,
            "lp_over": over,
            "lp_heads": heads,
            "lp_warmup": warmup,
            "lp_elastic": elastic,
            "lp_step": 0,
        }
        for key, value in settings.items():
            argument, check = _SETTINGS[key]
            check(argument, value)
        if heads is not None and over != "heads":
            raise ValueError(f'heads = {heads} is of over="heads", but over = {over!r}')
        self._due: list[tuple[Tensor, Tensor]] = []  # weights and their factors
        before = [dict(group) for group in optimizer.param_groups] if isinstance(optimizer, Optimizer) else []
        super().__init__(optimizer, settings)
        for i, group in enumerate(before):
            if settings.keys() <= group.keys():
                _warn_if_kept(i, group, settings)

    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        for key in group:
            if key.startswith("lp_") and key not in _SETTINGS and key not in self.optimizer.defaults:
                raise ValueError(f"{where} has an unknown setting {key!r}{near(key, _SETTINGS)}")
        for key, (_, check) in _SETTINGS.items():
            check(f"{key} of {where}", group[key])
        if equals(group["lp_decay"], 0):
            return
        if group.get("lr") is None:
            raise ValueError(f"{where} has no lr, which ℓp decay is multiplied by: set lp_decay=0 there")
        own = group.get("weight_decay", 0)
        if not group["lp_elastic"] and not equals(own, 0):
            raise ValueError(
                f"{where} has weight_decay = {own} of its own beside LpDecay: set that to 0, or elastic=True to have "
                "both"
            )
        if group["lp_over"] == "heads":
            _check_heads(where, group)
        if isinstance(self.optimizer, SteepestDescent):
            _check_normopt(where, group)

    def _greet(self, group: Mapping[str, Any]) -> None:
        if not equals(group["lp_decay"], 0) and _exponent_now(group) < 2:
            remedy = "lp_decay=0 in a param group of their own, or a warmup"
            dense = [w for w in group["params"] if w.layout == torch.strided]  # others are refused with a gradient
            warn_if_stuck(dense, group["lp_p"], remedy, stacklevel=6)

    def _before(self, closure: Closure | None) -> Closure | None:
        decayed = [
            (group, [w for w in group["params"] if w.dim() >= 2 and w.numel() and not is_quantized(w)])
            for group in self.optimizer.param_groups
            if not equals(group["lp_decay"], 0)
        ]

        def refuse() -> None:
            refuse_sparse((w for _, weights in decayed for w in weights), "LpDecay")

        if closure is None:
            refuse()
        for group, weights in decayed:
            # Which weights a closure will give a gradient is not known yet.
            dense = [w for w in weights if w.layout == torch.strided]
            self._note(group, [w for w in dense if closure is not None or w.grad is not None])
        if closure is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            refuse()
            return loss

        return checked

    @torch.no_grad()
    def _note(self, group: Mapping[str, Any], weights: list[Tensor]) -> None:
        """Keep the factors of weights as they are now, for after the step."""
        p, over = _exponent_now(group), group["lp_over"]
        heads = group["lp_heads"] if over == "heads" else None
        for w in weights:
            reach = _on(group["lr"], w) * _on(group["lp_decay"], w)
            here = to_compute_dtype(_reals(w))
            sizes = here if over == "entries" else lengths(here, layout_of(w), over, heads)
            self._due.append((w, lp_factors([sizes], p, reach)[0]))

    @torch.no_grad()
    def _after(self, closure: Closure | None) -> None:
        stepped = [(w, factor) for w, factor in self._due if closure is None or w.grad is not None]
        due = [(_reals(w), factor) for w, factor in stepped]
        found_inf = getattr(self.optimizer, "found_inf", None)  # a GradScaler's, while a fused step runs
        if isinstance(found_inf, Tensor):
            due = [(w, torch.where(found_inf.reshape(()).to(w.device) == 0, factor, 1)) for w, factor in due]
        scale_([w for w, _ in due], [factor for _, factor in due])
        for w in filter(is_dtensor, (w for w, _ in stepped)):
            torch.autograd.graph.increment_version(w)  # its part was written, of which autograd does not know
        self._due = []
        for group in self.optimizer.param_groups:
            if group["lp_step"] < group["lp_warmup"] and not equals(group.get("lr", 1), 0):
                group["lp_step"] += 1

    def _recover(self) -> None:
        self._due = []


def _warn_if_kept(i: int, group: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Warn of settings that a group keeps from before, against the arguments; how far a warm-up is, is none of them."""
    kept = {
        key: group[key]
        for key, value in settings.items()
        if key != "lp_step" and not isinstance(value, Tensor) and not isinstance(group[key], Tensor)
        if group[key] != value
    }
    if kept:
        key = next(iter(kept))
        warnings.warn(
            f"group {i} has its settings already, as from a checkpoint or a copy, and keeps "
            f"{', '.join(f'{k} = {v!r}' for k, v in kept.items())}, though the arguments say "
            f"{', '.join(f'{_SETTINGS[k][0]} = {settings[k]!r}' for k in kept)}. To change one, set it in the group: "
            f"optimizer.param_groups[{i}][{key!r}] = {settings[key]!r}",
            UserWarning,
            stacklevel=3,
        )


def _check_heads(where: str, group: Mapping[str, Any]) -> None:
    heads = group["lp_heads"]
    if heads is None:
        raise ValueError(f'over="heads" needs to know how many there are: give heads, or lp_heads to {where}')
    for w in group["params"]:
        if w.dim() >= 2 and len(w) % heads:
            raise ValueError(
                f"{where} has a tensor of {len(w)} rows, which {heads} heads do not divide: put what has heads into "
                "a param group of its own, and lp_decay=0 or another lp_over into the rest"
            )


def _check_normopt(where: str, group: Mapping[str, Any]) -> None:
    if group["lp_over"] == "entries":
        raise ValueError(
            "ℓp decay of entries is a setting of normopt's own optimizers: give them "
            'decay="lp", weight_decay=…, decay_p=… in place of LpDecay, which is for groups of entries there'
        )
    if group["rounding"] == "kahan" and any(w.dim() >= 2 and is_low_precision(w) for w in group["params"]):
        raise ValueError(
            f'{where} has rounding="kahan", which would bring back what LpDecay takes away: use "nearest" or '
            '"stochastic"'
        )


def _exponent_now(group: Mapping[str, Any]) -> float:
    """p, or where its way from 2 to p is in this step of the warm-up."""
    p, s, n = float(group["lp_p"]), group["lp_step"], group["lp_warmup"]
    return p if s >= n else 2 + (p - 2) * s / n


def _reals(w: Tensor) -> Tensor:
    """Return the local shard of a weight as reals, sharing its memory; a lazy conjugation is undone."""
    here = local(w)
    return as_real(here.conj() if here.is_conj() else here)  # the sign of an imaginary part plays no role in a factor


def _on(value: float | Tensor, w: Tensor) -> float | Tensor:
    return value.reshape(()).to(w.device) if isinstance(value, Tensor) else float(value)

"""ℓp decay for any optimizer: over entries (sparsifies), or over rows, columns or heads (removes whole blocks)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import (
    check_bool,
    check_integer,
    equals,
    is_low_precision,
    is_quantized,
    names_arguments,
    near,
    warn,
)
from normopt.addons.attach import AddOn, Closure, check_dense_grads
from normopt.addons.block_norms import block_norms
from normopt.engine import SteepestDescent
from normopt.kernels.support import why_not
from normopt.norms.base import as_real, to_compute_dtype
from normopt.params import warn_if_stuck
from normopt.recipe import TINY
from normopt.sharding.layout import is_dtensor, layout_of, to_local
from normopt.stages.base import Check, number, one_of
from normopt.stages.decay import lp_factors, scale_

Over = Literal["entries", "rows", "columns", "heads"]


def _check_count(name: str, value: object) -> None:
    check_integer(name, value, low=0)


def _check_heads(name: str, value: object) -> None:
    if value is not None:
        check_integer(name, value)


# Param group key → (constructor argument, check of its value).
_SETTINGS: dict[str, tuple[str, Check]] = {
    "lp_decay": ("weight_decay", number(low=0, open_high=True, tensor=True)),
    "lp_p": ("p", number(low=0, open_low=True, open_high=True)),
    "lp_over": ("over", one_of(get_args(Over))),
    "lp_heads": ("heads", _check_heads),
    "lp_warmup": ("warmup", _check_count),
    "lp_elastic": ("elastic", check_bool),
    "lp_step": ("lp_step", _check_count),
}


class LpDecay(AddOn):
    """ℓp weight decay (pWD) for any optimizer: small weights shrink the fastest, down to exactly zero.

    ::

        w ← step(w) · X/(X + pηλ)          X = |w_old|^(2−p)             over "entries"
                                           X = ‖w_old,G‖₂^(2−p)          "rows", "columns", "heads"

    η is the group's current ``lr``. w_old is the weight before the step (with a closure, before the closure). Only
    tensors of 2 or more dims that have a gradient decay, as in the paper. At p < 2 a weight w₀ with no gradient
    reaches zero after about ``|w₀|^(2−p) / ((2−p)·pηλ)`` steps, and a block likewise by its norm, so λ has a meaning
    only together with η. A block of n entries has about √n times the norm of one entry, and needs a λ n^(1−p/2) times
    as large: 12 times at n = 64 and p = 0.8, 63 times at n = 1000. η = 0 changes nothing.

    Over blocks of entries, each block G has one factor, so that a row or a head disappears as a whole:

    - "rows": w[o], the incoming weights of a unit, or of an output channel of a convolution;
    - "columns": w[:, i], the outgoing weights of an input unit or channel (the two are swapped in a transposed
      convolution);
    - "heads": ``heads`` equal blocks of rows, such as attention heads in a projection to queries, keys or values.

    At p = 1 the penalty is that of the group lasso, λ·Σ‖w_G‖₂, not weighted by block size. Its proximal step would
    have the factor max(0, 1 − ηλ/‖w_G‖₂). The two agree to first order in η; the proximal step sets small blocks to
    zero at once, this one halves them and then shrinks them ever faster. p < 1 shrinks blocks of small norm more and
    those of large norm less. A unit's bias is not part of its row, and does not decay.

    With ``warmup=n`` the exponent goes from 2 to p in n steps,

        p_s = 2 + (p − 2)·s/n              s = 0 … n − 1, then p

    so that weights that start at zero can leave it in the first step, in which zero is not absorbing. Without a
    warm-up, a zero-initialised layer stays at zero, and a warning says so. s is the group's ``lp_step``,
    which counts calls of ``step()``, except those with the number 0 as the lr, in which no weight can leave zero. A
    weight that is still zero after the first step stays zero, as when a GradScaler skipped a fused step.

    A group's own weight decay is an error unless ``elastic=True``; then it applies first, and this one after it. For
    decoupled ℓ2 decay the result is ``((1 − ηλ₂)w − ηu)·X/(X + pηλ)``; the authors use one factor,
    ``(w − ηu)·X/(X(1 + ηλ₂) + pηλ)``. The two agree to first order in η; at second order theirs minus this one is
    ``η²λ₂·(u + λ₂w + pλ·sign(w)|w|^(p−1))``.

    A step that a GradScaler skips decays nothing. Optimizers that keep copies of the weights (Lookahead, schedule-free
    ones) do not apply the decay to the copies; those that scale the lr internally (Prodigy) do not scale this η.
    ``detach()`` removes the decay. Under `torch.compile` it causes a graph break.

    Args:
        optimizer: any optimizer but torch.optim.LBFGS; normopt's own only over blocks, since for entries they have
            ``decay="lp", weight_decay=…, decay_p=…``.
        p: p > 0, p < 1 too. Default 0.8, the authors' for CIFAR-10.
        weight_decay: λ ≥ 0, a float or a one-element tensor, which is never read on the host. Default 1e-3, theirs too.
        over: "entries" (the default), or blocks of them: "rows", "columns" or "heads".
        heads: the number of blocks of rows, required with over="heads" unless each group has ``lp_heads``; otherwise
            None (the default).
        warmup: the number of steps in which the exponent goes from 2 to p. Default 0, none.
        elastic: allow the optimizer's own weight decay as well. Default False.

    Settings of a param group: ``lp_decay`` (λ; 0 exempts the group), ``lp_p``, ``lp_over``, ``lp_heads``,
    ``lp_warmup``, ``lp_elastic`` and ``lp_step``, the number of warm-up steps done. Settings that a group already has
    override the arguments. If it has all of them, as from a checkpoint or a copy, a warning lists the differences
    (tensors are not compared); set ``group["lp_decay"] = 0.1`` to change one.

    Memory: one number per decayed weight over entries, else one per block, during the step. For 16-bit weights the
    factor is computed in float32; a factor that rounds to 1 has no effect (in bfloat16, above 1 − 1/512).

    Where Numba is installed, kernels compute the factors of entries on a CPU, to 1e-6 of 1 − factor, if the weights are
    contiguous, in float32 or bfloat16 and more than 8,192 in the group, and η and λ are floats.

    Raises:
        TypeError: not an optimizer, a wrapper around one that has no hooks, or a setting of the wrong type.
        ValueError: a setting out of range, LBFGS, a normopt optimizer with "entries", an optimizer that is
            ``differentiable`` or already has an LpDecay, or a group with its own weight decay, an unknown ``lp_…``
            setting or the authors' ``lambda_p``; in ``step()``, if a later change of a group causes one of these.
        RuntimeError: in ``step()``, for a sparse gradient.

    Warns:
        UserWarning: a tensor starts at zero and would stay there, with p < 2 and no warm-up; a group that
            already had all settings keeps some that differ from the arguments.

    Source: Decoupled weight decay for any p norm, arXiv:2404.10824. Over blocks and the warm-up as written: ours.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        >>> decay = normopt.LpDecay(opt, p=0.8, weight_decay=0.1)
    """

    @names_arguments
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
        given = dict(weight_decay=weight_decay, p=p, over=over, heads=heads, warmup=warmup, elastic=elastic, lp_step=0)
        for argument, check in _SETTINGS.values():
            check(argument, given[argument])
        settings = {key: given[argument] for key, (argument, _) in _SETTINGS.items()}
        if heads is not None and over != "heads":
            raise ValueError(f'heads = {heads} needs over="heads", but over = {over!r}')
        self._decayed: list[tuple[Mapping[str, Any], list[Tensor]]] = []  # groups and their weights, for one step
        self._pending: list[tuple[Tensor, Tensor]] = []  # weights and their factors
        before = [dict(group) for group in optimizer.param_groups] if isinstance(optimizer, Optimizer) else []
        super().__init__(optimizer, settings)
        for i, group in enumerate(before):
            if settings.keys() <= group.keys():
                _warn_kept_settings(i, group, settings)

    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        if "lambda_p" in group:
            raise ValueError(f"{where} has lambda_p, the authors' name for λ, which is not read: here it is lp_decay")
        for key in group:
            if key.startswith("lp_") and key not in _SETTINGS and key not in self.optimizer.defaults:
                raise ValueError(f"{where} has an unknown setting {key!r}{near(key, _SETTINGS)}")
        for key, (_, check) in _SETTINGS.items():
            check(f"{key} of {where}", group[key])
        if equals(group["lp_decay"], 0):
            return
        if group.get("lr") is None:
            raise ValueError(f"{where} has no lr, which ℓp decay needs: set lp_decay=0 there")
        if isinstance(self.optimizer, SteepestDescent):
            _check_normopt(where, group)
        own = group.get("weight_decay", 0)
        if not group["lp_elastic"] and not equals(own, 0):
            raise ValueError(f"{where} has weight_decay = {own} of its own: set it to 0, or elastic=True to use both")
        if group["lp_over"] == "heads":
            _check_divisible(where, group)

    def _warn_new_group(self, group: Mapping[str, Any]) -> None:
        if not equals(group["lp_decay"], 0) and _current_p(group) < 2:
            remedy = "lp_decay=0 in a param group of their own, or a warmup"
            dense = [w for w in group["params"] if w.layout == torch.strided]  # others raise once they have a gradient
            warn_if_stuck(dense, group["lp_p"], remedy)

    def _pre_step(self, closure: Closure | None) -> Closure | None:
        self._decayed = [
            (group, [w for w in group["params"] if w.dim() >= 2 and w.numel() and not is_quantized(w)])
            for group in self.optimizer.param_groups
            if not equals(group["lp_decay"], 0)
        ]
        replacement = super()._pre_step(closure)
        for group, weights in self._decayed:
            # With a closure, it is not known yet which weights will have a gradient.
            dense = [w for w in weights if w.layout == torch.strided]
            self._save_factors(group, [w for w in dense if closure is not None or w.grad is not None])
        return replacement

    def _on_gradients(self) -> None:
        check_dense_grads((w for _, weights in self._decayed for w in weights), "LpDecay")

    @torch.no_grad()
    def _save_factors(self, group: Mapping[str, Any], weights: list[Tensor]) -> None:
        """Compute the decay factors from the current weights, to be applied after the step."""
        p, over = _current_p(group), group["lp_over"]
        fast, others = _for_kernels(group, weights)
        for same in fast:
            from normopt.kernels.cpu import lp_factors as by_kernel

            found = by_kernel(same, p, p * (float(group["lr"]) * float(group["lp_decay"])))
            self._pending += zip(same, found, strict=True)
        for w in others:
            reach = _to_device_of(group["lr"], w) * _to_device_of(group["lp_decay"], w)
            here = to_compute_dtype(_local_real(w))
            sizes = here if over == "entries" else block_norms(here, layout_of(w), over, group["lp_heads"])
            self._pending.append((w, lp_factors([sizes], p, reach)[0]))

    @torch.no_grad()
    def _post_step(self, closure: Closure | None) -> None:
        stepped = [(w, factor) for w, factor in self._pending if closure is None or w.grad is not None]
        due = [(_local_real(w), factor) for w, factor in stepped]
        found_inf = getattr(self.optimizer, "found_inf", None)  # a GradScaler's, while a fused step runs
        if isinstance(found_inf, Tensor):
            due = [(w, torch.where(found_inf.reshape(()).to(w.device) == 0, factor, 1)) for w, factor in due]
        scale_([w for w, _ in due], [factor for _, factor in due])
        for w in filter(is_dtensor, (w for w, _ in stepped)):
            torch.autograd.graph.increment_version(w)  # autograd does not see a write to the local shard
        self._pending = []
        for group in self.optimizer.param_groups:
            if group["lp_step"] < group["lp_warmup"] and not equals(group.get("lr", 1), 0):
                group["lp_step"] += 1

    def _abort(self) -> None:
        self._pending = []


def _warn_kept_settings(i: int, group: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Warn if a group's existing settings override the arguments (warm-up progress excepted)."""
    kept = {
        key: group[key]
        for key, value in settings.items()
        if key != "lp_step" and not isinstance(value, Tensor) and not isinstance(group[key], Tensor)
        if group[key] != value
    }
    if kept:
        key = next(iter(kept))
        warn(
            f"group {i} already has LpDecay settings, as from a checkpoint or a copy, and keeps "
            f"{', '.join(f'{k} = {v!r}' for k, v in kept.items())} instead of the arguments' "
            f"{', '.join(f'{_SETTINGS[k][0]} = {settings[k]!r}' for k in kept)}. To change one, set it in the group: "
            f"optimizer.param_groups[{i}][{key!r}] = {settings[key]!r}"
        )


def _check_divisible(where: str, group: Mapping[str, Any]) -> None:
    heads = group["lp_heads"]
    if heads is None:
        raise ValueError(f'over="heads" needs the number of heads: give heads, or set lp_heads in {where}')
    for w in group["params"]:
        if w.dim() >= 2 and len(w) % heads:
            raise ValueError(
                f"{where} has a tensor of {len(w)} rows, which {heads} heads do not divide: put tensors with heads "
                "into a param group of their own, and set lp_decay=0 or another lp_over for the rest"
            )


def _check_normopt(where: str, group: Mapping[str, Any]) -> None:
    if group["lp_over"] == "entries":
        raise ValueError(
            "ℓp decay of entries is a setting of normopt's own optimizers: give them "
            'decay="lp", weight_decay=…, decay_p=…. There LpDecay is only for over="rows", "columns" or "heads"'
        )
    if group["rounding"] == "kahan" and any(w.dim() >= 2 and is_low_precision(w) for w in group["params"]):
        raise ValueError(f'{where} has rounding="kahan", which would undo LpDecay: use "nearest" or "stochastic"')


def _current_p(group: Mapping[str, Any]) -> float:
    """Return the exponent of this step: p, or the interpolation from 2 to p during the warm-up."""
    p, s, n = float(group["lp_p"]), group["lp_step"], group["lp_warmup"]
    return p if s >= n else 2 + (p - 2) * s / n


def _local_real(w: Tensor) -> Tensor:
    """Return the local shard as a real view; a lazy conjugation is undone."""
    here = to_local(w)
    # The factor does not depend on the sign of the imaginary part.
    return as_real(here.conj() if here.is_conj() else here)


def _for_kernels(group: Mapping[str, Any], weights: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Split weights into those whose factors Numba's kernels compute, in lists of one dtype, and the others."""
    numbers = group["lr"], group["lp_decay"]
    unread = torch.compiler.is_compiling() or any(isinstance(x, Tensor) for x in numbers)
    if group["lp_over"] != "entries" or unread or 0 in numbers or sum(w.numel() for w in weights) <= TINY:
        return [], weights
    lists: dict[torch.dtype, list[Tensor]] = {}
    others: list[Tensor] = []
    for w in weights:
        plain = w.is_cpu and w.is_contiguous() and not is_dtensor(w) and why_not(False, None, [w], {}) is None
        (lists.setdefault(w.dtype, []) if plain else others).append(w)
    return list(lists.values()), others


def _to_device_of(value: float | Tensor, w: Tensor) -> float | Tensor:
    return value.reshape(()).to(w.device) if isinstance(value, Tensor) else float(value)

"""The engine: one optimizer, SteepestDescent, that walks a gradient through the stages to the weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from normopt._checks import is_low_precision, plain
from normopt.kernels.fused import Remembered, Stepper
from normopt.loading import match_params, prepare_state_dict
from normopt.norms import registry, scales
from normopt.norms.base import Norm, Scale, as_real, num_reals, to_compute_dtype, without_autocast
from normopt.norms.lp import Lp
from normopt.norms.scales import NormPair, group_norms
from normopt.params import batches, check_admissible, warn_if_stuck, with_gradients
from normopt.plan import Plan, make_plan
from normopt.settings import (
    DEFAULT_BETA2,
    DEFAULT_DECAY_P,
    Decay,
    MomentumRule,
    Rounding,
    Scope,
    check_settings,
    check_unknown_arguments,
    check_unknown_keys,
    check_unused,
    warn_vectors,
)
from normopt.sharding.agreement import check_agreement
from normopt.sharding.direction import direction
from normopt.sharding.exchange import Walk, alone, combined, lockstep
from normopt.sharding.layout import any_dtensor, check_parts, gradient_of, layout_of, local, resolved, spread
from normopt.stages import agr
from normopt.stages.decay import coupled, decoupled_, lp_factors
from normopt.stages.momentum import ema, heavy, lion
from normopt.stages.write import descend_, kahan_, nearest_, scale_, stochastic_
from normopt.state import BUFFER, COMPENSATION, check_like, check_writable, state_dtype


class SteepestDescent(Optimizer):
    """Steepest descent under any norm: the engine of every optimizer of normopt.

    One step walks every gradient through the same stages, each of which is optional but the norm::

        g ← −g                                   maximize
        g ← g·(1 − |g|/Σ|g|)                     agr
        g ← g + λw                               decay "coupled"

        m ← μm + (1−τ)g (first m = g),  c = m    momentum_rule "heavy"
        m ← μm + (1−μ)g (first m = 0),  c = m    "ema"
        c = μm + (1−μ)g, m ← β₂m + (1−β₂)g       "lion"

        u ← ‖c‖⋆^κ · D(c)                        scale "unit" κ = 0, "dual" κ = 1,
                                                       "power" κ = 1/(p−1)
        u ← D(c) · RMS(c)/RMS(D(c))              "matched"

        w ← w − ηru                              no decay; r = radius
        w ← (1 − ηλ)w − ηru                      decay "decoupled"
        w ← (w − ηru) · X/(X + pηλ)              decay "lp"; X = |w|^(2−p), p = decay_p

    with ‖·‖⋆ the dual norm and D the dual map of the chosen norm (see [`Norm`][normopt.norms.Norm]).
    Every argument but ``params`` is a setting that a param group may override; there, all are numbers,
    tensors, strings, bools or None.

    Args:
        params: parameters, named parameters or param-group dicts, as for torch.optim.
        lr: η, a float or a one-element tensor; a tensor is never read on the host. Default 1e-3, as torch's SGD.
        norm: a registered name ("lp", "l1", "l2", "linf", or your own) or a Norm object, which is
            unpacked into ``norm``, ``p`` and ``norm_<field>``. Default "l2".
        p: the norm's order, for norms that have one; 1 ≤ p ≤ ∞ for "lp", a float or a one-element tensor. None
            (the default) for the others.
        scale: "power" (the un-normalised power map; needs p > 1), "dual" (true steepest descent),
            "unit" (the LMO step), or "matched" (SGD's step length at every p). Default "dual".
        scope: the norm over each "tensor" (the default), or over the whole param "group" as one vector.
        radius: r > 0, the radius of the norm's ball, by which a group's steps differ from another's under
            the same learning rate; the weight decay is not scaled by it. Default 1.
        eps: ε of the power scale, ``c·(|c| + ε)^(−ρ)``. Default 0, which is exact at p = 2 and ∞.
        momentum: μ, the weight of the OLD state, 0 ≤ μ < 1 (heavy: ≤ 1). Default 0, which keeps no buffer.
        momentum_rule: "heavy" (the default, torch.optim.SGD's), "ema" or "lion".
        beta2: β₂ of "lion", the weight of the old state in what is stored. Default 0.99, as Lion's.
        dampening: τ, any finite number, of "heavy" alone. Default 0, as torch's SGD.
        nesterov: c = g + μm ("heavy") or (1−μ)g + μm ("ema").
        agr: adaptive gradient regularization.
        weight_decay: λ ≥ 0, a float or a one-element tensor. Default 0.
        decay: "coupled", "decoupled" or "lp"; runs if λ ≠ 0. Default "decoupled".
        decay_p: p of the ℓp decay, p > 0 (p < 1 too); only tensors of 2 or more dims are ℓp-decayed. Default 1, the
            authors' script's.
        state_dtype: the dtype of the momentum, such as "float32"; None is the parameter's own.
        rounding: how 16-bit weights take a step: to the "nearest" (the default; a step below half a unit in the last
            place is lost), "stochastic" (bfloat16; right on average), or "kahan" (one more buffer, in
            which what was lost is kept). Weights of 32 bits and more are not touched by it.
        maximize: walk uphill.
        foreach: multi-tensor operations; None leaves the choice to ``fused`` and to what is faster.
        fused: kernels that do the whole step of a group in one to three passes: Triton's on CUDA, Numba's on a CPU
            (the extra "cpu"). For ℓp norms with p > 1. None takes them on CUDA wherever they work, and not on
            a CPU; `backend` says what was chosen, and why.
        differentiable: let autograd see the step.
        **norm_fields: ``norm_<field>=value`` for the other fields of a norm of your own.

    State: ``momentum_buffer``, shaped like its parameter, if momentum ≠ 0, and ``kahan_compensation``,
    shaped and typed like it, if a 16-bit weight is rounded so; else none. Complex parameters are taken as pairs of
    reals. 16-bit parameters are computed in float32. Of DTensors, such as FSDP2's, each rank steps the part that
    it has, by norms of the whole tensor, and the state lies as they do; all ranks must step alike. lr, p and
    weight_decay given as tensors are never read on the host. Each group has its own copies, as ``group["lr"]``:
    changing those in place neither syncs nor recompiles, and changing the tensor that was given does nothing. One that
    requires a gradient is not copied. The momentum of a complex parameter has its dtype.

    Raises:
        ValueError: at construction and in ``add_param_group``, for a setting that is out of range,
            unknown, or in contradiction to another; in ``step()``, for one that was made so since. At construction
            also for one that does nothing in any group, such as decay="lp" without weight_decay, and for a parameter
            that has no shape yet (a lazy module's).
        TypeError: likewise, for a setting of the wrong type; at construction, for one that does not exist.
        RuntimeError: in ``step()``, before anything is written: for a gradient that is not dense, and for a gradient or
            state that has not the shape and device of its parameter, or whose memory was freed.

    Warns:
        UserWarning: a tensor that ℓp decay with p < 2 will hold at zero for ever because it starts there; vectors
            under a norm of matrices that their group does not name; a setting that does nothing unless a schedule
            moves the momentum or p: dampening or state_dtype without momentum, eps at p = 2.

    Source: the frame is Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv:2409.20325.

    Example:
        >>> opt = normopt.SteepestDescent(model.parameters(), lr=0.01, norm="lp", p=3.0, scale="dual",
        ...                               momentum=0.9, agr=True, weight_decay=1e-3, decay="lp", decay_p=0.8)
    """

    # What makes a class another optimizer: the fields of its norm that its constructor gives of its own accord, and
    # whether it fixes the momentum at 0.
    _usual_fields: ClassVar[Mapping[str, Any]] = {}
    _no_momentum: ClassVar[bool] = False

    # None is saved: what the last step measured, what fused steps keep of each group's tables, and whether the ranks
    # were asked if they are about to make the same step: before the first, or after a change.
    _measured: list[tuple[Plan, list[NormPair | None]]]
    _remembered: dict[int, Remembered]
    _steppers: dict[tuple[int, int], Stepper]
    _agreed: bool

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        norm: str | Norm = "l2",
        p: float | Tensor | None = None,
        scale: Scale = "dual",
        scope: Scope = "tensor",
        radius: float = 1.0,
        eps: float = 0.0,
        momentum: float = 0.0,
        momentum_rule: MomentumRule = "heavy",
        beta2: float = DEFAULT_BETA2,
        dampening: float = 0.0,
        nesterov: bool = False,
        agr: bool = False,
        weight_decay: float | Tensor = 0.0,
        decay: Decay = "decoupled",
        decay_p: float = DEFAULT_DECAY_P,
        state_dtype: str | torch.dtype | None = None,
        rounding: Rounding = "nearest",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **norm_fields: Any,
    ) -> None:
        settings = dict(
            lr=lr,
            norm=norm,
            p=p,
            scale=scale,
            scope=scope,
            radius=radius,
            eps=eps,
            momentum=momentum,
            momentum_rule=momentum_rule,
            beta2=beta2,
            dampening=dampening,
            nesterov=nesterov,
            agr=agr,
            weight_decay=weight_decay,
            decay=decay,
            decay_p=decay_p,
            state_dtype=_dtype_name(state_dtype),
            rounding=rounding,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            differentiable=differentiable,
            **norm_fields,
        )
        check_unknown_arguments(type(self).__name__, norm, norm_fields, settings)
        settings |= registry.flatten(norm, settings)
        settings = {key: plain(value) for key, value in settings.items()}
        check_settings(settings)  # refuse before the base class has touched anything
        self._forget()
        super().__init__(params, settings)
        check_unused(settings, self.param_groups, self._usual_fields, self._no_momentum)

    def _forget(self) -> None:
        self._measured, self._remembered, self._steppers, self._agreed = [], {}, {}, False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after checking its settings; a refused group leaves no trace.

        Args:
            param_group: a dict with ``params``, and the settings in which it differs from the optimizer's own.

        Raises:
            ValueError: a setting is out of range, in contradiction to another, or misspelt; a parameter is in another
                group already or has no shape yet, or the norm does not take its shape or dtype.
            TypeError: the group is no dict, or a setting of the wrong type.

        Warns:
            UserWarning: a tensor that ℓp decay with p < 2 will hold at zero for ever because it starts there; vectors
                under a norm of matrices that the group does not name.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict, but is a {type(param_group).__name__}")
        group = dict(param_group)
        if "norm" in group:
            # A group that names the optimizer's own norm keeps the optimizer's fields of it.
            own = group["norm"] == self.defaults["norm"]
            group |= registry.flatten(group["norm"], {**self.defaults, **group} if own else group)
        if "state_dtype" in group:
            group["state_dtype"] = _dtype_name(group["state_dtype"])
        check_unknown_keys(group, self.defaults)
        # The other keys are the user's own.
        ours = {key: plain(v) for key, v in group.items() if key in self.defaults or key.startswith("norm_")}
        self._agreed = False
        super().add_param_group(group | ours)
        try:
            self._admit(self.param_groups[-1], chosen="norm" in group)
        except Exception:
            self.param_groups.pop()
            raise

    def _admit(self, group: dict[str, Any], chosen: bool) -> None:
        """Check a new group, of which ``chosen`` says whether it names its norm itself."""
        check_admissible(group["params"])
        _unshare(group)
        plan = self._plan(group, group["params"])
        check_parts(group["params"])
        if plan.decays == "lp" and plan.decay_p < 2:
            warn_if_stuck(group["params"], plan.decay_p)
        if not chosen:
            warn_vectors(type(self).__name__, plan.norm, group["params"])

    def _plan(self, settings: Mapping[str, Any], params: list[Tensor]) -> Plan:
        """The plan of a group's settings, which are checked against those that the optimizer fixes, too."""
        plan = make_plan(settings, params)
        if self._no_momentum and plan.momentum != 0:
            raise ValueError(
                f"{type(self).__name__} fixes momentum = 0, but a param group has {plan.momentum:g}. OneCycleLR and "
                "CyclicLR set it unless they are given cycle_momentum=False; for a rule with momentum, use another "
                "optimizer, such as normopt.SteepestDescent"
            )
        return plan

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give what an older version pickled the settings that are newer."""
        self._forget()
        super().__setstate__(state)
        newer = inspect.signature(SteepestDescent.__init__).parameters.items()
        self.defaults = {k: v.default for k, v in newer if v.default is not v.empty} | self.defaults
        for group in self.param_groups:
            group.update({**self.defaults, **group})
            _unshare(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave, the momentum in the group's ``state_dtype``.

        Settings that the checkpoint lacks, because an older version or torch.optim.SGD wrote it, stay
        as they are. torch rounds all loaded state to the parameter's dtype, which would cost a float32
        momentum of 16-bit weights its lower half; here it does not.

        Args:
            state_dict: of an optimizer of the same parameters, in the same groups and order.

        Raises:
            ValueError: a momentum has not the shape of its parameter, a setting is refused, or there are other groups;
                the checkpoint is another optimizer's: it has another norm, scale or momentum rule, or was not written
                by normopt and has state that no stage here reads. Nothing is changed then.
            TypeError: a setting is of the wrong type; nothing is changed then.

        Warns:
            UserWarning: a checkpoint of normopt has state that no stage here reads, such as your own; it is loaded.
        """
        seen: list[dict[str, Any]] = []

        def complete(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            name, read = type(self).__name__, (BUFFER, COMPENSATION)
            seen.append(prepare_state_dict(name, self.param_groups, state, read, self._plan))
            return seen[0]

        def restore(_: Optimizer) -> None:
            for group in self.param_groups:
                _unshare(group)
            for group, i, p in match_params(self.param_groups, seen[0]):
                buffer = seen[0]["state"].get(i, {}).get(BUFFER)
                if buffer is not None:
                    dtype = state_dtype(group["state_dtype"], p)
                    self.state[p][BUFFER] = resolved(buffer.to(device=p.device, dtype=dtype))

        # After the user's own pre-hooks, which may rewrite the state, and before their post-hooks.
        before = self.register_load_state_dict_pre_hook(complete)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            self._agreed = False

    def backend(self) -> str:
        """What each param group does, and on which backend and why: one line a group.

        Raises:
            ValueError: a setting was made wrong since construction; the next ``step()`` would refuse it, too.
            TypeError: one was made of the wrong type.
        """
        plans = (self._plan(group, group["params"]) for group in self.param_groups)
        return "\n".join(f"group {i}: {plan}" for i, plan in enumerate(plans))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every param group.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, None without one.

        Raises:
            ValueError: a setting was made wrong since construction; nothing has been written then.
            TypeError: one was made of the wrong type; nothing has been written then.
            RuntimeError: a gradient is not dense; a gradient or a state has not the shape or device of its parameter,
                or a tensor has lost its memory; or the ranks of DTensors are about to make different steps, which the
                first step checks. Nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i in [i for i in self._remembered if i >= len(self.param_groups)]:  # of a group that was taken away
            del self._remembered[i]
        # Everything that can be refused is refused before anything is written.
        work = [self._ready(i, group) for i, group in enumerate(self.param_groups)]
        if not self._agreed and not torch.compiler.is_compiling():
            check_agreement([(plan, [p for params, _ in parts for p in params]) for plan, parts in work])
            self._agreed = True
        # ℓp norms have no products of matrices, which are all that autocast changes of a step.
        kinds = {p.device.type for plan, parts in work if not isinstance(plan.norm, Lp) for ps, _ in parts for p in ps}
        without_autocast(kinds, self._step_all, work)
        return loss

    def _step_all(self, work: list[tuple[Plan, list[tuple[list[Tensor], Stepper | None]]]]) -> None:
        """Step every group, given what `_ready` says of each."""
        self._measured = []
        together: list[Walk[NormPair | None]] = []  # of DTensors: what they ask other ranks travels together
        places: list[tuple[int, int]] = []
        for i, (plan, parts) in enumerate(work):
            pairs: list[NormPair | None] = []
            self._measured.append((plan, pairs))
            with torch.set_grad_enabled(plan.differentiable and torch.is_grad_enabled()):
                for j, (batch, stepper) in enumerate(parts):
                    walk = self._fused(plan, batch, stepper) if stepper else self._walk(plan, batch)
                    sharded = bool(stepper.layouts) if stepper else any_dtensor(batch)
                    if sharded:
                        together.append(walk)
                        places.append((i, j))
                    pairs.append(None if sharded else alone(walk))
        with torch.no_grad():
            for (i, j), pair in zip(places, lockstep(together), strict=True):
                self._measured[i][1][j] = pair

    def _ready(self, i: int, group: dict[str, Any]) -> tuple[Plan, list[tuple[list[Tensor], Stepper | None]]]:
        """A group's plan, and its parameters that have gradients: batch by batch, with what steps them if it is fused.

        Raises:
            RuntimeError: a gradient or a state has not the shape of its parameter, or a tensor has lost its memory.
        """
        known = None if torch.compiler.is_compiling() else self._remembered.get(i)
        if known is not None and known.holds(group, self.state):
            return known.plan, [(group["params"], known.stepper)]
        self._remembered.pop(i, None)
        plan, ready = self._plan(group, group["params"]), with_gradients(group["params"])
        if not torch.compiler.is_compiling():
            check_like("gradient", ((cast(Tensor, p.grad), p) for p in ready))
            check_writable("parameter", ready)
            for name in (BUFFER, COMPENSATION):
                kept = [(x, p) for p in ready if (x := self.state.get(p, {}).get(name)) is not None]
                check_like(name, kept)
                check_writable(name, (x for x, _ in kept))
        if plan.backend != "fused":
            return plan, [(params, None) for params in batches(plan, ready)]
        parts: list[tuple[list[Tensor], Stepper | None]] = []
        waiting = list(batches(plan, ready))
        while waiting:
            params, stepper = waiting.pop(0), self._steppers.setdefault((i, len(parts)), Stepper())
            stepper.look(plan, params, self.state)
            if not stepper.overlaps or any_dtensor(params):
                parts.append((params, stepper))
            # Those that share memory are stepped one after the other, as by the for-loop.
            elif len(params) > 1 and plan.scope != "group":
                waiting = [[p] for p in params] + waiting
            else:
                raise RuntimeError(
                    "parameters or states share memory that a fused step would write at once: give each its own, or "
                    "set fused=False"
                )
        if len(parts) == 1 and len(ready) == len(group["params"]) and not any_dtensor(ready):
            self._remembered[i] = Remembered(group, plan, cast(Stepper, parts[0][1]), list(self.defaults))
        return plan, parts

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: whether the step unscales its gradients, and skips itself, without the host knowing.

        A heavy ball with dampening has to know whether its first step was skipped.
        """
        if any(any_dtensor(group["params"]) for group in self.param_groups):
            return False  # ranks would not skip the same steps
        plans = [self._plan(group, group["params"]) for group in self.param_groups]
        return all(p.backend == "fused" and not (p.momentum_rule == "heavy" and p.dampening) for p in plans)

    def _fused(self, plan: Plan, params: list[Tensor], stepper: Stepper) -> Walk[NormPair | None]:
        """The walk, by fused kernels."""
        grad_scale, found_inf = (cast(Tensor | None, getattr(self, k, None)) for k in ("grad_scale", "found_inf"))
        unscale = None if grad_scale is None else 1 / grad_scale
        return stepper.step(plan, params, self.state, unscale, found_inf)

    def norm_pairs(self) -> list[NormPair | None]:
        """How large the last step was: of each param group, its update's norm, and the dual norm of what it is made of.

        That is c: the gradient after AGR and coupled decay, or the momentum where there is one. Both are the
        step's own numbers, so that reading them costs nothing more than adding them up; where a method is
        iterative they have its error, and ``update`` is what the rule says. Over a group's tensors the norm
        is the largest and so the dual norm the sum, but for ``scope="group"``, where it is that of all of
        them as one vector.

        Returns:
            One [`NormPair`][normopt.norms.NormPair] of 0-d tensors a group, in the order of ``param_groups``;
            None for a group whose step needs no norm (SGD, signs, every "power" scale), that had no
            gradient, or that was added since. Empty before the first step.

        Example:
            >>> opt.step()
            >>> for group, pair in zip(opt.param_groups, opt.norm_pairs()):
            ...     print(group["norm"], pair and (float(pair.update), float(pair.dual)))
        """
        known = [group_norms(pairs, plan.scope == "group", plan.radius) for plan, pairs in self._measured]
        return known and known + [None] * (len(self.param_groups) - len(known))

    def _walk(self, plan: Plan, params: list[Tensor]) -> Walk[NormPair | None]:
        """The walk of a gradient: the one place where the order of the stages stands."""
        weights, w, g = self._read(plan, params)
        layouts = [layout_of(p) for p in params]
        # What follows could be said once, for cut and whole tensors alike, but torch.compile loses what a
        # `yield from` gives.
        cut = any(layouts)
        # What autograd keeps must not be written; without autograd nothing is kept.
        old = [x.clone() for x in w] if plan.differentiable else w
        lr, weight_decay = (_like(x, w) for x in (plan.lr, plan.weight_decay))
        reach = lr if plan.radius == 1 else lr * plan.radius
        if plan.agr and cut:
            sums = yield from combined(agr.measure(g), layouts, agr.combine)
            g = agr.apply(g, sums, list(map(num_reals, params)))
        elif plan.agr:
            g = agr.agr(g)
        if plan.decays == "coupled":
            g = coupled(g, old, weight_decay)
        c = self._momentum(plan, params, g)
        norm, whole_group = plan.norm.on(w[0].device), plan.scope == "group"
        if cut:
            u, measured = yield from direction(norm, c, layouts, plan.scale, whole_group, plan.eps)
        else:
            u, measured = scales.direction(norm, c, plan.scale, whole_group, plan.eps)
        if plan.decays == "lp":
            wide = [i for i, p in enumerate(params) if p.dim() >= 2]
            factors = lp_factors([old[i] for i in wide], plan.decay_p, lr * weight_decay)
            descend_(w, u, reach)
            scale_([w[i] for i in wide], factors)
        else:
            if plan.decays == "decoupled":
                decoupled_(w, lr * weight_decay)
            descend_(w, u, reach)
        self._write(plan, params, weights, w)
        return measured

    def _read(self, plan: Plan, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights as reals, the same in the dtype that is computed in (no copy if it is theirs), and gradients.

        Of DTensors they are the parts that are here.
        """
        weights = [as_real(local(p)) for p in params]
        w = [to_compute_dtype(x) for x in weights]
        if plan.rounding == "kahan":
            for p, x in zip(params, w, strict=True):
                if is_low_precision(p) and COMPENSATION in self.state[p]:
                    x.add_(local(self.state[p][COMPENSATION]))
        g = [as_real(gradient_of(p)).to(x.dtype) for p, x in zip(params, w, strict=True)]
        return weights, w, list(torch._foreach_neg(g)) if plan.maximize else g

    def _write(self, plan: Plan, params: list[Tensor], weights: list[Tensor], w: list[Tensor]) -> None:
        """Round what was computed in more bits into the weights, as the plan says."""
        if plan.rounding == "stochastic":
            stochastic_(weights, w)
        elif plan.rounding == "kahan" and any(is_low_precision(p) for p in params):
            low = [(p, x, y) for p, x, y in zip(params, weights, w, strict=True) if is_low_precision(p)]
            for p, x, _ in low:
                if COMPENSATION not in self.state[p]:
                    self.state[p][COMPENSATION] = spread(torch.zeros_like(x), p)
            kahan_([x for _, x, _ in low], [y for *_, y in low], [local(self.state[p][COMPENSATION]) for p, *_ in low])
        else:
            nearest_(weights, w)

    def _momentum(self, plan: Plan, params: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        """c from g and the state; buffers are made when they are first needed, never before."""
        if plan.momentum == 0:
            return g
        kept = [self.state[p].get(BUFFER) for p in params]
        stored = [None if b is None else local(b) for b in kept]
        old = [None if b is None else as_real(b).to(x.dtype) for b, x in zip(stored, g, strict=True)]
        if plan.differentiable:
            old = [None if m is None else m.clone() for m in old]
        if plan.momentum_rule == "heavy":
            c, new = heavy(old, g, plan.momentum, plan.dampening, plan.nesterov)
        elif plan.momentum_rule == "ema":
            c, new = ema(old, g, plan.momentum, plan.nesterov)
        else:
            c, new = lion(old, g, plan.momentum, plan.beta2)
        for p, b, m in zip(params, stored, new, strict=True):
            dtype = state_dtype(plan.state_dtype, p)
            if b is None or b.dtype != dtype or plan.differentiable:  # != where the parameter's has changed since
                self.state[p][BUFFER] = spread((torch.view_as_complex(m) if p.is_complex() else m).to(dtype), p)
            elif as_real(b).dtype != m.dtype:  # m is a copy in more bits; else it is b itself, already written
                as_real(b).copy_(m)
        return c


def _like(value: float | Tensor, w: list[Tensor]) -> float | Tensor:
    """A number as it is; a tensor on the device and in the widest dtype of w, in which 1 − ηλ loses nothing."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(()).to(w[0].device, functools.reduce(torch.promote_types, [x.dtype for x in w]))


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """A dtype as the primitive that a param group holds: ``torch.float32`` is "float32"."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _unshare(group: dict[str, Any]) -> None:
    """Give a group tensors of its own: a schedule writes into them, and would move those of other groups as well."""
    for key in ("lr", "p", "weight_decay"):
        if isinstance(group[key], Tensor) and not group[key].requires_grad:
            group[key] = group[key].clone()

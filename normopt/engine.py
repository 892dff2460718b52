"""The engine: one optimizer, SteepestDescent, which takes a gradient through the stages to the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from normopt._checks import plain
from normopt.arguments import (
    ADAN,
    TORCHS,
    check_preset,
    check_unknown_arguments,
    check_unknown_keys,
    check_unused,
    from_torch,
    show_settings,
    warn_vectors,
)
from normopt.kernels.fused import FusedBatch, FusedUpdate
from normopt.loading import match_params, prepare_state_dict, warn_if_unscheduled
from normopt.norms import registry
from normopt.norms.base import without_autocast
from normopt.norms.lp import Lp
from normopt.norms.scales import NormPair, group_norms
from normopt.params import (
    are_plain,
    batches,
    check_admissible,
    check_dense,
    check_no_zeros,
    check_own_shapes,
    check_tensors,
    pieces,
    warn_if_stuck,
    with_gradients,
)
from normopt.recipe import CachedRecipe, Recipe, check_settings, make_recipe, slots_of
from normopt.settings import Arguments
from normopt.sharding.agreement import check_agreement
from normopt.sharding.exchange import run_together
from normopt.sharding.layout import any_dtensor, check_parts, resolved
from normopt.stages import Batch
from normopt.stages.base import default_settings, owners

L = TypeVar("L")  # what a closure returns: the loss, as a float or a tensor
P = ParamSpec("P")
LOGGER = logging.getLogger("normopt")
REFUSALS = (ValueError, TypeError)  # of settings


class SteepestDescent(Optimizer):
    """Steepest descent under any norm: the engine of every optimizer of normopt.

    One step takes every gradient through these stages, each optional except the norm::

        g ← −g                                   maximize
        g ← g·(1 − |g|/Σ|g|)                     agr; Σ over each tensor, or agr_scope "group"
        g ← g + λw                               decay "coupled"

        m ← μm + (1−τ)g (first m = g),  c = m    momentum_rule "heavy"
        m ← μm + (1−μ)g (first m = 0),  c = m    "ema"
        c = μm + (1−μ)g, m ← β₂m + (1−β₂)g       "lion"

        c ← c/Σ of its weights                   bias_correction, "ema" and "lion"
        d ← βd + (1−β)(g − g_prev), c ← c + βd   difference_beta

        v ← βv + (1−β)g²,  P = diag(√v̂ + ε)      metric "diagonal"; "none": P = 1
        c ← P^−½ c
        u ← ‖c‖⋆^κ · D(c)                        scale "unit" κ = 0, "dual" κ = 1,
                                                       "power" κ = 1/(p−1)
        u ← P^−½ u
        each row of u by its average size        row_beta
        u ← u + λw                               decay "inside"
        u ← u · ‖P⁻¹c‖₂/‖u‖₂                     scale "matched"
        u ← u · ‖w‖₂/‖u‖₂                        scale "relative"
        z ← z − αc,  u ← (1−τ)u                  coupling τ

        w ← w − ηru                              no decay; r = radius
        w ← (1 − ηλ)w − ηru                      decay "decoupled"
        w ← (w − ηru)/(1 + ηλ)                   "proximal"
        w ← (w − ηru) · X/(X + pηλ)              "lp"; X = |w|^(2−p), p = decay_p
                                                 "cautious", "cautious-lp": where u·w ≥ 0
        w ← w + τ(z − w_old)                     coupling τ
        w ← R·w/‖w‖₂                             constraint "sphere"

    with ‖·‖⋆ the dual norm and D the dual map of the chosen norm (see [`Norm`][normopt.norms.Norm]).
    Every argument but ``params`` is a setting that a param group may override; there, all are numbers,
    tensors, strings, bools or None.

    Args:
        params: parameters, named parameters or param-group dicts, as for torch.optim.
        lr: η, a float or a one-element tensor, which is never read on the host. Default 0.001.
        maximize: maximize the objective: negate the gradient. Default False.
        agr: adaptive gradient regularization. Default False.
        agr_scope: AGR's sums over each "tensor", as in the paper, or the param "group". Default "tensor".
        weight_decay: λ ≥ 0, a float or a one-element tensor. Default 0.
        decay: "coupled", "decoupled", "proximal", "inside", "lp", "cautious", "cautious-lp", or your own; runs if λ
            ≠ 0. Default "decoupled".
        decay_p: p of decay="lp" and "cautious-lp", p > 0 (p < 1 too), which act on tensors of 2 or more dims.
            Default 1.
        bias_correction: divide the momentum ("ema", "lion") and the average of the metric by the sums of their
            weights. Default False.
        momentum: μ, the weight of the OLD state, 0 ≤ μ < 1 (heavy: ≤ 1); 0 keeps no buffer. Default 0.
        momentum_rule: "heavy" (torch.optim.SGD's), "ema", "lion", or your own. Default "heavy".
        beta2: β₂ of "lion", the weight of the old state. Default 0.99.
        dampening: τ of "heavy", any finite number. Default 0.
        nesterov: c = g + μm ("heavy") or (1−μ)g + μm ("ema"). Default False.
        state_dtype: the momentum's dtype; None is the parameter's own. Default None.
        difference_beta: β of Adan's average of gradient differences; 0 keeps none. Default 0.
        metric: the coordinates of the norm: "none" or "diagonal", P = diag(√v̂ + ε). Default "none".
        metric_beta: β of v ← βv + (1−β)g², the weight of the OLD state. Default 0.999.
        metric_eps: ε > 0 of P. Default 1e-08.
        metric_rule: v is the "average" of g², their "sum" (Adagrad) or the "max" of the averages (AMSGrad). Default
            "average".
        norm: a registered name ("lp", "l1", "l2", "linf", or your own) or a Norm object, which is unpacked into
            ``norm``, ``p`` and ``norm_<field>``. Default "l2".
        p: the norm's order, for norms that have one; 1 ≤ p ≤ ∞, a float or a one-element tensor. Default None.
        scale: "power" (the un-normalised power map; needs p > 1), "dual" (true steepest descent), "unit" (the LMO
            step), "matched" (SGD's step length at every p) or "relative" (the length of the weights). Default "dual".
        scope: the norm over each "tensor", or over the param "group" as one vector. Default "tensor".
        eps: ε of scale="power", ``c·(|c| + ε)^(−ρ)``; 0 is exact at p = 2 and ∞. Default 0.
        row_beta: β of the average of the direction's squares by rows, of NorMuon; 0 keeps none. Default 0.
        coupling: τ of Stacey's coupling to a second iterate; 0 keeps none. Default 0.
        coupling_rate: α, the step size of Stacey's second iterate. Default 0.001.
        radius: r > 0, the radius of the norm's ball: it multiplies the step, and not the decay. Default 1.
        lr_ratio: a factor of lr, in the step and in the decay: a group of another learning rate under one schedule.
            Default 1.
        constraint: "sphere" keeps the ℓ2 norm R that each tensor has at its first step: w ← R·N(w − ηrR·N(u)), N(x)
            = x/‖x‖₂. Default "none".
        rounding: how 16-bit weights are rounded: "nearest" (a step below half a unit in the last place is lost),
            "stochastic" (bfloat16; right on average) or "kahan" (the rounding error is kept, in one more buffer).
            Default "nearest".
        foreach: multi-tensor operations; None uses them where they are faster. Default None.
        fused: kernels that do the whole step of a group, Triton's on CUDA and Numba's on CPU (the extra "cpu"), for
            ℓp norms with p > 1; None uses them where they are installed and support the step, but for tiny groups on a
            CPU. Default None.
        differentiable: let autograd differentiate through the step. Default False.
        **settings: also ``norm_<field>=value`` for the fields of a norm, and the settings of stages of your own.

    State: ``momentum_buffer``, shaped like its parameter, if momentum ≠ 0; ``kahan_compensation``, shaped and typed
    like it, if a 16-bit weight is rounded so; ``exp_avg_sq`` under metric="diagonal" (and ``max_exp_avg_sq`` under
    its rule "max"), float32 for 16-bit weights; ``step``, float32 and 0-d, under bias_correction; likewise float32 for
    16-bit weights ``exp_avg_diff`` and ``previous_grad`` with difference_beta, ``dual_iterate`` with coupling,
    ``row_avg_sq`` (one number per row) with row_beta, and ``sphere_radius`` (0-d) under the constraint. Complex
    parameters are treated as pairs of reals, and their momentum has their dtype. Steps of 16-bit parameters are
    computed in float32. With DTensors, such as FSDP2's, each rank steps its local shard, with norms of the whole
    tensor; the state has the placements of its parameter, and all ranks must make the same step. lr, p and
    weight_decay given as tensors are never read on the host. Each group has its own copy, such as ``group["lr"]``:
    changing it in place neither syncs nor recompiles, and changing the tensor that was passed does nothing. A tensor
    that requires a gradient is not copied.

    Raises:
        ValueError: at construction and in ``add_param_group``, for a setting that is out of range or unknown, or
            contradicts another; in ``step()``, for one that became so later. At construction also for a setting that
            does nothing in any group, such as decay="lp" without weight_decay, for a parameter without a shape (of a
            lazy module), and for the groups of a preset that is for another optimizer.
        TypeError: likewise, for a setting of the wrong type; at construction, for one that does not exist.
        RuntimeError: in ``step()``, before anything is written: for a gradient that is not dense, and for a gradient or
            state that does not have the shape and device of its parameter, or, if fused, whose memory was freed;
            under bias_correction for averages that did not begin together.

    Warns:
        UserWarning: a tensor starts at zero, where ℓp decay with p < 2 keeps it; vectors are under a norm of matrices
            that their group does not name; a setting does nothing unless a schedule changes the momentum or p:
            dampening or state_dtype without momentum, eps at p = 2.

    Source: the framework is Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv:2409.20325. metric="diagonal"
    under ℓ2 with scale="dual" is Adam, arXiv:1412.6980. Each stage's docstring names its own source.

    Example:
        >>> opt = normopt.SteepestDescent(model.parameters(), lr=0.01, norm="lp", p=3.0, scale="dual",
        ...                               momentum=0.9, agr=True, weight_decay=1e-3, decay="lp", decay_p=0.8)
    """

    # What makes a class another optimizer: the norm fields that its constructor sets by default, and
    # whether it fixes the momentum at 0.
    _usual_fields: ClassVar[Mapping[str, Any]] = {}
    _no_momentum: ClassVar[bool] = False

    # Not saved: the sizes of the last step, the recipe of each group, the tables of fused steps by group and batch, and
    # whether the ranks have compared what they are about to do: before the first step, and after a change.
    _measured: dict[str, list[tuple[Sequence[Batch], bool, float]]]  # at "last"; see _step_all
    _recipes: dict[int, CachedRecipe]
    _updates: dict[int, list[FusedUpdate]]
    _agreed: bool
    _loaded: bool

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-3, **settings: Unpack[Arguments]) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params is a {type(params).__name__}, a module: give model.parameters(), or a norm for each kind of "
                "layer by normopt.param_groups(model)"
            )
        check_preset(type(self), params)
        declared = default_settings()
        given: dict[str, Any] = {"lr": lr, **settings}
        check_unknown_arguments(type(self), given.get("norm", declared["norm"]), given, declared)
        values = declared | given
        values |= registry.flatten(values["norm"], values)
        values = {key: plain(value) for key, value in values.items()}
        check_settings(values)  # refuse before the base class has touched anything
        self._forget()
        super().__init__(params, values)
        check_unused(values, self.param_groups, self._usual_fields, self._no_momentum)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the keyword arguments behind ``**settings`` by name, in help() and to inspect.signature."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            show_settings(cls.__init__)

    @staticmethod
    def profile_hook_step(func: Callable[P, L]) -> Callable[P, L]:
        """Wrap ``step`` as torch.optim does, for hooks and profilers, but only where there are any.

        Naming the step to a profiler that does not run would cost as much as a fifth of a step of six small tensors.

        Args:
            func: a class's ``step``.

        Returns:
            What torch.optim puts in its place at the class's first construction.
        """
        watched = Optimizer.profile_hook_step(func)
        everywhere = _global_optimizer_pre_hooks, _global_optimizer_post_hooks

        @wraps(func)
        def step(*args: P.args, **kwargs: P.kwargs) -> L:
            if not torch.compiler.is_compiling():
                self = cast(Optimizer, args[0])
                hooks = *everywhere, self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
                if not any(hooks) and not _profiler_enabled():
                    return func(*args, **kwargs)
            return watched(*args, **kwargs)

        return step

    def _forget(self) -> None:
        self._measured, self._recipes, self._updates = {"last": []}, {}, {}
        self._agreed = self._loaded = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after checking its settings; after an error the optimizer is unchanged.

        Args:
            param_group: a dict with ``params``, and the settings in which it differs from the optimizer's own. With a
                metric, ``betas``, ``alpha``, ``eps`` and ``amsgrad`` are read as torch.optim's adaptive optimizers do.

        Raises:
            ValueError: a setting is out of range, contradicts another, or is misspelt; a parameter is in another
                group already or has no shape yet, or the norm does not take its shape or dtype.
            TypeError: the group is no dict, or a setting of the wrong type.

        Warns:
            UserWarning: a tensor starts at zero, where ℓp decay with p < 2 keeps it; vectors are under a norm of
                matrices that the group does not name.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict, but is a {type(param_group).__name__}")
        group = dict(param_group)
        whole = {**self.defaults, **group}
        if whole["metric"] != "none":
            # A group of another optimizer has both; the power map has an ε of its own.
            kept = {"eps"} & group.keys() if "metric_eps" in group or whole["scale"] == "power" else set()
            theirs = {key: value for key, value in group.items() if key not in kept}
            if "amsgrad" in group and whole["metric_rule"] == "sum":
                raise ValueError(
                    'amsgrad is for metric_rule="average", but the metric takes the sum: leave amsgrad out'
                )
            betas = ADAN if whole["difference_beta"] != 0 else TORCHS["betas"]
            group = from_torch(theirs, betas) | {key: group[key] for key in kept}
        if whole["scale"] != "power":
            group = {"eps": 0.0} | group  # an optimizer's own default does not follow it to another scale
        if "norm" in group:
            # A group that names the optimizer's own norm keeps the optimizer's fields of it, and its eps and row_beta.
            own = group["norm"] == self.defaults["norm"]
            group |= registry.flatten(group["norm"], {**self.defaults, **group} if own else group)
            group = group if own else {"eps": 0.0, "row_beta": 0.0} | group
        check_unknown_keys(group, self.defaults, type(self))
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
        recipe = self._make_recipe(group, group["params"])
        check_parts(group["params"])
        if recipe.decay.rule.reads_p and recipe.decay.decay_p < 2:
            warn_if_stuck(group["params"], recipe.decay.decay_p)
        if recipe.sphere.runs():
            check_no_zeros(group["params"], group.get("param_names", ()))
        if not chosen:
            warn_vectors(type(self).__name__, recipe.norm, group["params"])

    def _make_recipe(self, settings: Mapping[str, Any], params: list[Tensor]) -> Recipe:
        """Return a group's recipe, after checking its settings against those that the optimizer fixes, too."""
        for name in owners():
            if name in self.defaults and name not in settings:
                raise ValueError(f"a param group has no {name!r} any more: set it again")
        for name in ("alpha", "amsgrad", "betas") if settings["metric"] != "none" else ():
            if name in settings:
                raise ValueError(
                    f"{name!r} of a param group is read when the group is added: now set {' and '.join(TORCHS[name])}"
                )
        recipe = make_recipe(settings, params)
        if self._no_momentum and recipe.momentum.runs():
            raise ValueError(
                f"{type(self).__name__} fixes momentum = 0, but a param group has {recipe.momentum.momentum:g}. "
                "OneCycleLR and CyclicLR set it unless they are given cycle_momentum=False; for a rule with momentum, "
                "use another optimizer, such as normopt.SteepestDescent"
            )
        return recipe

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give what an older version pickled the settings that are newer."""
        self._forget()
        super().__setstate__(state)
        self.defaults = default_settings() | self.defaults
        for group in self.param_groups:
            group.update({**self.defaults, **group})
            _unshare(group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the settings, as torch.optim does, and the backend of each group.

        Returns:
            A dict of ``state`` and ``param_groups``, whose ``backend`` is "for-loop", "foreach" or "fused".
        """
        saved = super().state_dict()
        for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
            with suppress(*REFUSALS):  # of a setting made wrong, which the next step will refuse
                group["backend"] = self._make_recipe(own, own["params"]).backend
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave, the momentum in the group's ``state_dtype``.

        Settings that the checkpoint lacks, because an older version or torch.optim.SGD wrote it, stay as they are.
        Checkpoints of torch.optim.AdamW and Adam load where all groups have Adam's rule. torch rounds all loaded state
        to the parameter's dtype, which would cost a float32 momentum of 16-bit weights its lower half; here it does
        not.

        Args:
            state_dict: of an optimizer of the same parameters, in the same groups and order.

        Raises:
            ValueError: a momentum does not have the shape of its parameter, a setting is invalid, the groups differ,
                or their names are in another order; the checkpoint is another optimizer's: it has another norm, scale
                or momentum rule, or was not written by normopt and has state that no stage here reads. Nothing is
                changed then.
            TypeError: a setting is of the wrong type; nothing is changed then.

        Warns:
            UserWarning: a checkpoint of normopt has state that no stage here reads, such as your own; it is loaded. In
                the next ``step()``: a schedule of p made the checkpoint's p, and this optimizer has none.
        """
        seen: list[dict[str, Any]] = []

        def complete(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            seen.append(prepare_state_dict(type(self).__name__, self.param_groups, state, self._make_recipe))
            return seen[0]

        def restore(_: Optimizer) -> None:
            self._recipes, self._loaded = {}, True
            for i, group in enumerate(self.param_groups):
                _unshare(group)
                made_on = group.pop("backend", None)
                now = self._make_recipe(group, group["params"]).backend
                if made_on not in (None, now):
                    LOGGER.info("group %d: the checkpoint was made on %s, this optimizer steps on %s", i, made_on, now)
            for group, i, p in match_params(self.param_groups, seen[0]):
                for slot in slots_of(group):
                    x = seen[0]["state"].get(i, {}).get(slot.name)
                    if x is not None:
                        x = torch.as_tensor(x)  # old torch counts steps in Python's numbers
                        self.state[p][slot.name] = resolved(x.to(device=p.device, dtype=slot.dtype_of(p)))

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
        """Return the stages of each param group, its backend and the reason for it: one line a group.

        Raises:
            ValueError: a setting was made wrong since construction; the next ``step()`` would refuse it, too.
            TypeError: one was made of the wrong type.
        """
        recipes = (self._make_recipe(group, group["params"]) for group in self.param_groups)
        return "\n".join(f"group {i}: {recipe}" for i, recipe in enumerate(recipes))

    def __repr__(self) -> str:
        """Return the size, the learning rate, the user's own keys and the stages of each group."""
        text = ""
        for i, group in enumerate(self.param_groups):
            params = group["params"]
            shown = {k: v for k, v in group.items() if k == "lr" or k not in (*self.defaults, "params", "param_names")}
            try:
                stages = str(self._make_recipe(group, params))
            except (ValueError, TypeError) as error:
                stages = f"the next step is refused: {error}"
            lines = [f"group {i}: {len(params)} tensors, {sum(p.numel() for p in params):,} entries"]
            lines += [f"    {k}: {v}" for k, v in shown.items() if not k.startswith("norm_")] + [f"    {stages}"]
            text += "".join(f"    {line}\n" for line in lines)
        return f"{type(self).__name__}(\n{text})"

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], L]) -> L: ...

    def step(self, closure: Callable[[], L] | None = None) -> L | None:
        """One step of every param group.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, None without one.

        Raises:
            ValueError: a setting became invalid after construction; nothing has been written then.
            TypeError: a setting became one of the wrong type; nothing has been written then.
            RuntimeError: a gradient is not dense; a gradient or a state does not have the shape or device of its
                parameter, or, if fused, its memory was freed; averages under bias_correction did not begin together;
                or the ranks of DTensors are about to make different steps, which the first step checks. Nothing has
                been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if len(self._recipes) > len(self.param_groups):  # groups were taken away
            self._recipes, self._updates = {}, {}
        # Everything that can be refused is refused before anything is written.
        recording = torch.is_grad_enabled()
        with torch.no_grad():
            work = [self._ready(i, group) for i, group in enumerate(self.param_groups)]
            if not self._agreed and not torch.compiler.is_compiling():
                check_agreement([(recipe, [p for batch in found for p in batch]) for recipe, found in work])
                self._agreed = True
                if self._loaded:
                    warn_if_unscheduled(self)
                    self._loaded = False
            # ℓp norms have no products of matrices, which are all that autocast changes of a step.
            mapped = [found for recipe, found in work if not isinstance(recipe.norm, Lp)]
            kinds = {p.device.type for found in mapped for batch in found for p in batch}
            without_autocast(kinds, self._step_all, work, recording)
        return loss

    def _step_all(self, work: list[tuple[Recipe, Sequence[Batch]]], recording: bool) -> None:
        """Step every group: unsharded tensors batch by batch through all stages, sharded ones together, by stages."""
        # An entry of a dict: up to torch 2.11 Dynamo does not take an attribute that is set, and of a list that is
        # changed it watches the length.
        self._measured["last"] = []
        together: list[Batch] = []
        for recipe, found in work:
            if recipe.differentiable and recording:
                with torch.enable_grad():
                    self._step_batches(found)
            else:
                together += self._step_batches(found)
        if together:
            run_together(together)
        self._measured["last"] = [(found, recipe.direction.whole_group, recipe.write.radius) for recipe, found in work]

    @staticmethod
    def _step_batches(found: Sequence[Batch]) -> list[Batch]:
        """Step batches of unsharded tensors; return the others, loaded."""
        sharded = []
        for batch in found:
            batch.load()
            if batch.layouts:
                sharded.append(batch)
                continue
            for stage in batch.phases:
                partials = stage.measure(batch)
                stage.apply(batch, None if partials is None else stage.combine(partials[:, None]))
            batch.release()
        return sharded

    def _ready(self, i: int, group: dict[str, Any]) -> tuple[Recipe, Sequence[Batch]]:
        """Return a group's recipe, and its parameters that have gradients, batch by batch, after checking all.

        Raises:
            RuntimeError: a gradient or a state does not have its parameter's shape, or a tensor has lost its memory.
        """
        compiling = torch.compiler.is_compiling()
        # Taken out, so that a recipe whose change is refused is not used again.
        known = None if compiling else self._recipes.pop(i, None)
        recipe = None if known is None else known.current(group)
        params, gradients = with_gradients(group["params"])
        updates = self._updates.get(i, [])
        fused = recipe is not None and recipe.backend == "fused" and len(updates) == 1
        if recipe and fused and updates[0].check_unchanged(recipe, params, self.state, gradients):
            self._recipes[i] = cast(CachedRecipe, known)
            return recipe, [self._fused_batch(recipe, params, updates[0])]
        check_dense(gradients)
        if recipe is None or not cast(CachedRecipe, known).still_fits(group["params"]):
            recipe = self._make_recipe(group, group["params"])
            known = None if compiling else CachedRecipe(group, recipe)
        if known is not None:
            self._recipes[i] = known
        if len(recipe.shaped) < len(recipe.slots) and not compiling:
            check_own_shapes(params, self.state, recipe)
        if recipe.backend == "fused":
            return recipe, self._fused(i, recipe, params)
        if compiling:
            return recipe, [Batch(recipe, some, self.state) for some in batches(recipe, params)]
        states = {name: [self.state.get(p, {}).get(name) for p in params] for name in recipe.shaped}
        if known and known.may_be_plain and are_plain(params, gradients, states.values(), known.kinds):
            found = []
            for piece in pieces(recipe, params):
                some, theirs = ([xs[j] for j in piece] for xs in (params, gradients))
                own = {name: [cast(Tensor, xs[j]) for j in piece] for name, xs in states.items()}
                found.append(Batch(recipe, some, self.state, theirs, own))
            return recipe, found
        check_tensors(params, gradients, states)
        return recipe, [Batch(recipe, some, self.state) for some in batches(recipe, params)]

    def _fused_batch(self, recipe: Recipe, params: list[Tensor], update: FusedUpdate) -> FusedBatch:
        given = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # by a GradScaler
        return FusedBatch(recipe, params, self.state, update, *given)

    def _fused(self, i: int, recipe: Recipe, params: list[Tensor]) -> list[FusedBatch]:
        """Return a group's batches for the kernels, after checking all memory; what overlaps is stepped one by one."""
        known, found, waiting = self._updates.get(i, []), [], list(batches(recipe, params))
        self._updates[i] = []
        while waiting:
            some = waiting.pop(0)
            update = known.pop(0) if known else FusedUpdate()
            update.check(recipe, some, self.state)
            if not update.overlaps or any_dtensor(some):
                found.append(self._fused_batch(recipe, some, update))
                self._updates[i].append(update)
            elif len(some) > 1:
                waiting = [[p] for p in some] + waiting
            else:
                raise RuntimeError(
                    "parameters or states share memory that a fused step would write at once: give each its own, or "
                    "set fused=False"
                )
        return found

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: whether the step unscales its gradients, and skips itself, without the host knowing.

        A rule whose first step is another has to know whether that was skipped.
        """
        if any(any_dtensor(group["params"]) for group in self.param_groups):
            return False  # ranks would not skip the same steps
        recipes = [self._make_recipe(group, group["params"]) for group in self.param_groups]
        otherwise = (r.difference.runs() or (r.momentum.runs() and r.momentum.starts_otherwise) for r in recipes)
        return all(r.backend == "fused" for r in recipes) and not any(otherwise)

    def norm_pairs(self) -> list[NormPair | None]:
        """Return the norm of each param group's last update, and the dual norm of what it was made from.

        That is c: the gradient after AGR and coupled decay, or the momentum where there is one. Both are the
        step's own numbers, so that reading them costs nothing more than adding them up; where a method is
        iterative they have its error, and ``update`` is what the rule says. Over a group's tensors the norm
        is the largest and so the dual norm the sum, but for ``scope="group"``, where it is that of all of
        them as one vector.

        Returns:
            One [`NormPair`][normopt.norms.NormPair] of 0-d tensors a group, in the order of ``param_groups``;
            None for a group whose step needs no norm (SGD, signs, every "power" scale), that had no
            gradient or no entries, or that was added since. Empty before the first step.

        Example:
            >>> opt.step()
            >>> for group, pair in zip(opt.param_groups, opt.norm_pairs()):
            ...     print(group["norm"], pair and (float(pair.update), float(pair.dual)))
        """
        known = [
            group_norms([b.norm_pair() for b in found if any(p.numel() for p in b.params)], whole_group, radius)
            for found, whole_group, radius in self._measured["last"]
        ]
        return known and known + [None] * (len(self.param_groups) - len(known))


def _unshare(group: dict[str, Any]) -> None:
    """Give a group tensors of its own: a schedule writes into them, and would move those of other groups as well."""
    for key in ("lr", "p", "weight_decay"):
        if isinstance(group[key], Tensor) and not group[key].requires_grad:
            group[key] = group[key].clone()


show_settings(SteepestDescent.__init__)

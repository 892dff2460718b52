"""The fused steps of a param group: what the kernels need is laid out, for as long as it stays, and they are run.

On many small tensors a step costs what looking at each of them from Python costs. So they are looked at closely only
when something has changed: a setting, a parameter, or where in memory a tensor lies.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from normopt._checks import is_low_precision
from normopt.kernels.flags import Flags, Numbers, flags_of, numbers_of
from normopt.kernels.tables import Batch, Chunks
from normopt.norms.scales import NormPair
from normopt.sharding.exchange import Walk
from normopt.sharding.layout import any_dtensor, gradient_of, layout_of, local, spread
from normopt.state import BUFFER, COMPENSATION, state_dtype

if TYPE_CHECKING:
    from normopt.plan import Plan

State = MutableMapping[Tensor, dict[str, Any]]
Group = dict[str, Any]

Array = np.ndarray

address, contiguous = Tensor.data_ptr, Tensor.is_contiguous


class Look(NamedTuple):
    """A group's gradients, and where they and the weights lie."""

    gradients: list[Tensor]
    gradients_at: list[int]
    weights_at: list[int]


class Remembered:
    """The plan of a group's last step, as long as it holds."""

    def __init__(self, group: Group, plan: Plan) -> None:
        self.plan = plan
        self._settings = _settings(group)
        self._params = list(group["params"])
        self._at = [address(p) for p in self._params]

    def look(self, group: Group) -> Look | None:
        """None unless the plan holds: settings, parameters and their places are the same, and all gradients dense."""
        params = group["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        settings = _settings(group)
        if settings.keys() != self._settings.keys():
            return None
        for key, value in settings.items():
            old = self._settings[key]
            if value is not old and (isinstance(value, Tensor) or isinstance(old, Tensor) or value != old):
                return None
        gradients = [p.grad for p in params]
        try:
            look = Look(gradients, list(map(address, gradients)), self._at)
            moved = list(map(address, params)) != self._at
        except (TypeError, RuntimeError):  # None has no address, and a sparse tensor has none either
            return None
        return None if moved else look


class Stepper:
    """The fused steps of parameters of one group, device and dtype.

    Tensors that do not lie contiguously are stepped as contiguous copies, and copied back.
    """

    def __init__(self) -> None:
        self._at: dict[str, tuple[list[int], Array]] = {}  # the addresses of each list
        self._momenta: list[Tensor] = []
        self._plan: Plan | None = None  # of which these are the flags and the numbers
        self._flags: Flags | None = None
        self._numbers: Numbers | None = None
        self._shapes: list[torch.Size] = []
        self._chunks = Chunks([])
        self._kept: dict[str, Any] = {}

    def step(
        self,
        plan: Plan,
        params: list[Tensor],
        state: State,
        look: Look | None,
        unscale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Walk[NormPair | None]:
        """The engine's walk.

        Args:
            plan: a plan whose backend is "fused".
            params: the parameters, which have dense gradients.
            state: the optimizer's; what is missing in it is made.
            look: what is known of them already.
            unscale: what their gradients are multiplied by, for a GradScaler.
            found_inf: where it is not 0, nothing is written.

        Returns:
            ``‖u‖`` and ``‖c‖⋆`` of each tensor, where the step needs them.
        """
        # What is known already are no DTensors.
        layouts = [] if look else [lay for p in params if (lay := layout_of(p)) is not None]
        spread_out = look is None and any_dtensor(params)
        if look is None:
            self._momenta = []
            gradients = [gradient_of(p) for p in params]
            look = Look(gradients, list(map(address, gradients)), [address(local(p)) for p in params])
        momenta, new = self._momenta_of(plan, params, state)
        lost = None
        if plan.rounding == "kahan" and is_low_precision(params[0]):
            lost = [_kept_in(state[p], COMPENSATION, p, p.dtype)[0] for p in params]
        if spread_out:
            params = [local(p) for p in params]
        if self._moved("weights", look.weights_at) and self._shapes != (shapes := [p.shape for p in params]):
            self._shapes, self._chunks, self._kept = shapes, Chunks(shapes), {}
        if not len(self._chunks) and not layouts:
            return None
        weights = self._flat("weights", params, look.weights_at)
        # A gradient may be another tensor at an old one's address, in another order.
        gradients = self._flat("gradients", look.gradients, look.gradients_at, always=True)
        states = momenta and (momenta if momenta is self._momenta else self._flat("states", momenta))
        losses = lost and self._flat("compensations", lost)
        if weights[0].is_cuda:
            from normopt.kernels.triton import run
        else:
            from normopt.kernels.cpu import run
        dtypes = weights[0].dtype, gradients[0].dtype, (states or weights)[0].dtype
        if self._plan is not plan or self._flags is None or self._flags[-3:] != dtypes or plan.has_tensors:
            self._plan, self._flags, self._numbers = plan, flags_of(plan, *dtypes), numbers_of(plan)
        measured = yield from run(
            self._flags,
            cast(Numbers, self._numbers),
            plan.scale,
            plan.scope == "group",
            Batch(
                self._chunks,
                weights[0].device,
                self._at["weights"][1],
                self._at["gradients"][1],
                self._at["states"][1] if states else None,
                self._at["compensations"][1] if lost else None,
                new,
                self._kept,
            ),
            unscale=unscale,
            found_inf=found_inf,
            seed=int(torch.randint(2**31, ())) if plan.rounding == "stochastic" else 0,
            layouts=layouts,
        )
        self._momenta = momenta if momenta and momenta is states else []
        for originals, copies in ((params, weights), (momenta, states), (lost, losses)):
            if originals and copies and originals is not copies:
                torch._foreach_copy_(originals, copies)
        if measured is None:
            return None
        dual, factor = measured
        return NormPair(torch.where(dual > 0, factor, dual), dual)

    def _moved(self, name: str, pointers: list[int]) -> bool:
        return name not in self._at or self._at[name][0] != pointers

    def _flat(
        self, name: str, tensors: list[Tensor], pointers: list[int] | None = None, always: bool = False
    ) -> list[Tensor]:
        """The tensors, or contiguous copies if some do not lie so; notes where they lie.

        They are looked at if they have moved, or ``always``.
        """
        pointers = pointers or list(map(address, tensors))
        moved = self._moved(name, pointers)
        if (moved or always) and not all(map(contiguous, tensors)):
            tensors = [x.contiguous() for x in tensors]
            pointers, moved = list(map(address, tensors)), True
        if moved:
            self._at[name] = pointers, np.array(pointers, dtype=np.int64)
        return tensors

    def _momenta_of(self, plan: Plan, params: list[Tensor], state: State) -> tuple[list[Tensor] | None, list[int]]:
        """The momentum of each parameter, and the places of those that had to be made: they are zero."""
        if plan.momentum == 0:
            return None, []
        if self._momenta:
            # A state that is theirs alone is in their order: no need to hash them.
            own = state.values() if len(state) == len(params) else [state[p] for p in params]
            try:
                if all(map(is_, map(itemgetter(BUFFER), own), self._momenta)):
                    return self._momenta, []
            except KeyError:  # somebody has taken one away
                pass
        dtype = state_dtype(plan.state_dtype, params[0])
        made = [_kept_in(state[p], BUFFER, p, dtype) for p in params]
        return [m for m, _ in made], [i for i, (_, new) in enumerate(made) if new]


def _settings(group: Group) -> Group:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _kept_in(own: dict[str, Any], name: str, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A tensor of a parameter's state, what is here of it, and whether it had to be made."""
    x = own.get(name)
    if x is None:
        x = torch.zeros_like(local(p), dtype=dtype, memory_format=torch.contiguous_format)
        own[name] = spread(x, p)
        return x, True
    if x.dtype != dtype:  # the parameter's has changed since
        own[name] = x = x.to(dtype)
    return local(x), False

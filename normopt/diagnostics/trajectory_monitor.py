"""The monitor that keeps a training's trajectory, of any optimizer, through the hooks of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_bool
from normopt.diagnostics.iterates import LOSS, LR, OnDisk, Sketched, Weights
from normopt.diagnostics.measures import number
from normopt.diagnostics.sketch import check_size
from normopt.diagnostics.trajectory import Trajectory, from_walk
from normopt.hooks import OutermostStep


class TrajectoryMonitor:
    """Records a training of any ``torch.optim.Optimizer``, so that its `Trajectory` can be computed at the end.

    ::

        at the start of step t      θ_t ← the weights,  U_{t−1} = θ_t − θ_{t−1}
                                    keep S·U_{t−1} and ‖U_{t−1}‖², or with ``directory`` θ_t, and η_t
        record(loss)                keep ℓ_t
        result()                    θ_T ← the weights as they are

    The final weights, which everything is measured against, are only known at the end. S is a random
    projection to ``sketch`` numbers, so that they need not be known before: by linearity, S(θ_T − θ_t) is the sum of
    the S·U from t on. See `Trajectory` for what is computed, and its 95 % intervals; with
    ``directory`` it is exact.

    An update is all that happened to the weights from the start of one step to the start of the next, other hooks and
    clipping by hand included: ℓ_t was computed at θ_t. The optimizer does what it would do without a monitor,
    bit for bit. Several monitors may watch one optimizer.

    **Call ``record(loss)`` once for every step**, always before ``step()`` or always after it (the first call of the
    two decides which), with the loss at the weights before the step: for a step with a closure, what it
    returned. Two records for one step raise; a step without one is kept, and its γ is NaN and counted in
    `Trajectory.invalid`. A step that raises does not count, a step within a step is part of it, and that by which
    torch.distributed.checkpoint has an optimizer create its state is none.

    Args:
        optimizer: any; all its parameters are watched, those without a gradient too. None may be added later.
        sketch: k, from 64 to 16,384. Default 2048, which keeps a distance within 3.5 % and a cosine within ±.05 at
            95 % confidence; the error falls with √k. Not used with a directory.
        seed: of the sketch. Default 0.
        directory: a folder, made if it is not there, for exact results: every iterate is appended to
            ``iterates.bin`` (raw, float64 if any weight is, else float32), losses and learning rates to
            ``steps.bin``. What was written outlives a crash of the process: see `Trajectory.load`. None (the
            default) keeps the sketch, in memory.
        may_skip: a record without a step is a step that was skipped, an update of exactly zero, instead of an error.
            For a ``torch.amp.GradScaler``, which does not call ``step()`` where a gradient overflowed.
            Then ``record`` must come before ``step()``, or skipped steps could not be told from others. Default False.

    Of DTensors every rank watches the part that it has, with its own monitor, state and folder ``rank-<r>`` of the
    directory, and ``result()`` puts the sums together: call it on all ranks. The losses are those that a rank
    recorded: record the mean over the ranks if they differ. Exact results are those of whole weights, and sketched
    ones are within the same intervals.

    Memory per parameter: 4 bytes for the last weights (8 if any is in float64) and 2 for the sketch; for a moment in a
    step, five times the former. Per step: 4k bytes on the device of the first parameter. With ``directory``: nothing
    is kept in memory, and a step writes 4 bytes (8) a parameter, for which the host waits. Without it neither a step
    nor ``record`` waits for the device.

    Raises:
        TypeError: at construction, for what is no optimizer.
        ValueError: at construction, for a sketch of an impossible size, or for DTensors over several process groups;
            at the first step, for a directory that already
            holds a trajectory.
        RuntimeError: in ``record``, see there; in ``step()``, if the optimizer's parameters are no longer the
            same or have other shapes, or for a step without a record under ``may_skip``. The weights are then as they
            were.

    Source: as `Trajectory`; that sketches of the updates are enough: ours.

    Example:
        >>> with normopt.TrajectoryMonitor(optimizer) as monitor:
        ...     for x, y in batches:
        ...         loss = loss_of(model(x), y)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         monitor.record(loss)
        >>> monitor.result().straightness
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        sketch: int = 2048,
        seed: int = 0,
        directory: str | Path | None = None,
        may_skip: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a monitor takes a torch.optim.Optimizer, but was given {type(optimizer).__name__}")
        check_size(sketch)
        check_bool("may_skip", may_skip)
        self.optimizer = optimizer
        self.may_skip = may_skip
        self._params = _params(optimizer)
        for p in self._params:
            if torch.nn.parameter.is_lazy(p):
                raise TypeError("a parameter has no shape yet: run the model once, then make the monitor")
        weights = Weights(self._params)
        if directory is None:
            self._store: Sketched | OnDisk = Sketched(weights, sketch, seed)
        else:
            folder = Path(directory) if weights.cut is None else Path(directory) / f"rank-{weights.cut.rank}"
            self._store = OnDisk(weights, folder)
        self._order: Literal["before", "after"] | None = "before" if may_skip else None
        self._stepped = self._recorded = 0
        self._moved = False  # a step was made whose update is not in the store yet
        self._lr: float | Tensor = 0.0
        self._outermost = OutermostStep()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def __repr__(self) -> str:
        """What it watches, how it keeps that, and how many steps it has seen."""
        store = self._store
        where = (
            f"sketch={store.sketch.k}, seed={store.seed}"
            if isinstance(store, Sketched)
            else f"directory={str(store.directory)!r}"
        )
        return (
            f"TrajectoryMonitor({type(self.optimizer).__name__}, {where}, may_skip={self.may_skip}, "
            f"{self._stepped} steps, {'attached' if self._handles else 'closed'})"
        )

    def record(self, loss: float | Tensor) -> None:
        """Keep the loss of this step.

        Args:
            loss: ℓ_t, a number, or a tensor of one element, which is not read before the end.

        Raises:
            TypeError: the loss is neither.
            ValueError: a tensor of more or less than one element.
            RuntimeError: this step has its loss already, or the monitor is closed.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"the loss must have one element, but its shape is {tuple(loss.shape)}")
            loss = loss.detach().reshape(())
        elif isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise TypeError(f"the loss must be a number or a tensor, but is {loss!r} ({type(loss).__name__})")
        if not self._handles:
            raise RuntimeError("this monitor is closed: make another one to record more")
        self._order = self._order or "before"
        # How many losses there may be before this one: those of the steps made, but the one it is for.
        allowed = self._stepped - (self._order == "after")
        if self._recorded > allowed:
            if not self.may_skip:
                raise RuntimeError(
                    f"record() was called {self._order} step() until now, and now twice for one step: call it once a "
                    "step; if a GradScaler skips steps, make the monitor with may_skip=True"
                )
            self._skip()
        self._store.put(self._recorded, LOSS, loss)
        self._recorded += 1

    def result(self, inf_loss: float = 0.0) -> Trajectory:
        """The trajectory until now, with the weights as they are as its end; training may go on after it.

        Args:
            inf_loss: inf ℓ, a lower bound of the losses. Default 0, which is the infimum of a
                cross-entropy and of a squared error, though not of a loss with weight decay in it.

        Raises:
            ValueError: no step was made yet, ``inf_loss`` is NaN, or a recorded loss lies below it.
            TypeError: ``inf_loss`` is no number.
            RuntimeError: a parameter has another shape than at the start.
        """
        self._settle()
        if not self._store.steps:
            raise ValueError("no step has been made yet, so there is no trajectory: call result() after training")
        return from_walk(self._store.walk(), inf_loss)

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded, as tensors and primitive values, the last weights included.

        With ``directory``, the iterates stay there and only their number is saved.
        """
        return {
            "order": self._order,
            "stepped": self._stepped,
            "recorded": self._recorded,
            "moved": self._moved,
            "store": self._store.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the saved trajectory. Steps in the ``directory`` that are not in the state are dropped.

        Args:
            state_dict: what ``state_dict()`` of a monitor of the same parameters and the same sketch gave.

        Raises:
            ValueError: the state is of other parameters or another sketch, or the directory lacks its steps.
        """
        self._store.load_state_dict(state_dict["store"])
        self._order = state_dict["order"]
        self._stepped, self._recorded = state_dict["stepped"], state_dict["recorded"]
        self._moved = state_dict["moved"]

    def close(self) -> None:
        """Detach from the optimizer, with the weights as they are as the end; `result` still works.

        Raises:
            RuntimeError: a parameter has another shape than at the start; it is detached then, too.
        """
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if handles:
            self._settle()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return
        if self.may_skip and self._recorded <= self._stepped:
            raise RuntimeError("with may_skip=True, record(loss) must be called before step(): this step has no loss")
        params = _params(optimizer)
        if len(params) != len(self._params) or any(p is not q for p, q in zip(params, self._params, strict=True)):
            raise RuntimeError(
                "the optimizer's parameters are not those of the monitor's start: close() it, and make another one "
                "after the last parameter was added"
            )
        self._settle()
        self._store.begin()
        self._lr = _single_lr(optimizer)

    def _after(self, *_: object) -> None:
        if not self._outermost.leave():
            return
        self._order = self._order or "after"
        if self._recorded < self._stepped + (self._order == "before"):
            self._recorded += 1  # the loss that was not recorded stays NaN
        self._store.put(self._stepped, LR, self._lr)
        self._stepped += 1
        self._moved = True

    def _settle(self) -> None:
        """Put the last step's update into the store."""
        if self._moved:
            self._store.move()
            self._moved = False

    def _skip(self) -> None:
        self._settle()
        self._store.begin()
        self._store.put(self._stepped, LR, _single_lr(self.optimizer))
        self._store.stay()
        self._stepped += 1


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _single_lr(optimizer: Optimizer) -> float | Tensor:
    """The learning rate that all groups have, NaN if they have none or several; a tensor is not read."""
    lrs = [number(group, "lr") for group in optimizer.param_groups if group["params"]]
    tensor = next((lr for lr in lrs if isinstance(lr, Tensor)), None)
    if tensor is None:
        return lrs[0] if all(lr == lrs[0] for lr in lrs) else torch.nan
    made = [
        lr.to(tensor.device, torch.float64)
        if isinstance(lr, Tensor)
        else torch.full((), lr, dtype=torch.float64, device=tensor.device)
        for lr in lrs
    ]
    first = made[0].clone()  # schedulers change it in place
    return torch.where((torch.stack(made) == first).all(), first, torch.nan)

"""Monitor that records a training trajectory through the step hooks of any optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_bool
from normopt.diagnostics.iterates import LOSS, LR, DiskStore, FlatParams, SketchStore
from normopt.diagnostics.measures import learning_rate
from normopt.diagnostics.sketch import check_size
from normopt.diagnostics.trajectory import Trajectory, from_record
from normopt.hooks import OutermostStep


class TrajectoryMonitor:
    """Record a training run of any ``torch.optim.Optimizer``, to compute its `Trajectory` at the end.

    ::

        at the start of step t      θ_t ← the weights,  U_{t−1} = θ_t − θ_{t−1}
                                    store S·U_{t−1} and ‖U_{t−1}‖², or with ``directory`` θ_t, and η_t
        record(loss)                store ℓ_t
        result()                    θ_T ← the current weights

    All quantities are relative to the final weights, which are only known at the end. S is a random projection to
    ``sketch`` numbers; by linearity, S(θ_T − θ_t) is the sum of the S·U from t on, so θ_T is not needed earlier.
    `Trajectory` lists what is computed, with 95 % confidence intervals; with ``directory`` it is exact.

    An update is the total change of the weights from the start of one step to the start of the next, including other
    hooks and manual clipping: ℓ_t was computed at θ_t. The optimizer's results are bitwise the same as without a
    monitor. Several monitors may watch one optimizer.

    **Call ``record(loss)`` once per step**, always before ``step()`` or always after it (whichever is called first
    decides), with the loss at the weights before the step; for a step with a closure, pass what it returned. Two
    records for one step raise. A step without a record is stored; its γ is NaN and counted in `Trajectory.invalid`. A
    step that raises does not count, nested steps count as one, and the step in which torch.distributed.checkpoint
    creates optimizer state is not counted.

    Args:
        optimizer: any optimizer; all parameters are watched, with or without gradients. None may be added later.
        sketch: k, from 64 to 16,384. Default 2048, which keeps a distance within 3.5 % and a cosine within ±.05 at
            95 % confidence; the error falls as 1/√k. Not used with a directory.
        seed: seed of the sketch. Default 0.
        directory: a folder, created if missing, for exact results: every iterate is appended to ``iterates.bin``
            (raw, float64 if any weight is, else float32), losses and learning rates to ``steps.bin``. The files
            survive a crash of the process: see `Trajectory.load`. None (the default) keeps a sketch in memory.
        may_skip: treat a record without a step as a skipped step with an update of exactly zero, instead of an error.
            For a ``torch.amp.GradScaler``, which does not call ``step()`` if a gradient overflowed. ``record`` must
            then come before ``step()``, so that skipped steps can be detected. Default False.

    With DTensors every rank watches its local shards, with its own monitor, state and folder ``rank-<r>`` of the
    directory. ``result()`` reduces over the ranks: call it on all of them. Losses are those recorded on each rank:
    record the mean over the ranks if they differ. Exact results equal those of unsharded weights; sketched ones have
    the same intervals.

    Memory per parameter: 4 bytes for the last weights (8 if any is in float64) and 2 for the sketch; briefly, during a
    step, five times the former. Per step: 4k bytes on the device of the first parameter. With ``directory``, nothing
    is kept in memory, and a step writes 4 (8) bytes per parameter, synchronously. Without it, neither a step nor
    ``record`` syncs with the device.

    Raises:
        TypeError: at construction, if it is not an optimizer.
        ValueError: at construction, for an invalid sketch size, or DTensors over several process groups; at the first
            step, if the directory already holds a trajectory.
        RuntimeError: in ``record``, see there; in ``step()``, if the optimizer's parameters or their shapes have
            changed, or for a step without a record under ``may_skip``. The weights are then unchanged.

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
            raise TypeError(f"a monitor needs a torch.optim.Optimizer, but was given {type(optimizer).__name__}")
        check_size(sketch)
        check_bool("may_skip", may_skip)
        self.optimizer, self.may_skip = optimizer, may_skip
        self._params = _params(optimizer)
        if any(map(torch.nn.parameter.is_lazy, self._params)):
            raise TypeError("a parameter is lazy and has no shape yet: run the model once, then make the monitor")
        weights = FlatParams(self._params)
        if directory is None:
            self._store: SketchStore | DiskStore = SketchStore(weights, sketch, seed)
        else:
            folder = Path(directory) if weights.layout is None else Path(directory) / f"rank-{weights.layout.rank}"
            self._store = DiskStore(weights, folder)
        self._order: Literal["before", "after"] | None = "before" if may_skip else None
        self._stepped = self._recorded = 0
        self._lr: float | Tensor = 0.0
        self._outermost = OutermostStep()
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def __repr__(self) -> str:
        """Return the optimizer's type, the settings and the number of steps seen."""
        return (
            f"TrajectoryMonitor({type(self.optimizer).__name__}, {self._store.shown}, may_skip={self.may_skip}, "
            f"{self._stepped} steps, {'attached' if self._handles else 'closed'})"
        )

    def record(self, loss: float | Tensor) -> None:
        """Store the loss of this step.

        Args:
            loss: ℓ_t, a number or a one-element tensor, which without ``directory`` is not read before ``result()``.

        Raises:
            TypeError: the loss is neither.
            ValueError: the tensor does not have exactly one element.
            RuntimeError: this step has a loss already, or the monitor is closed.
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
        # Losses that may precede this one: one per finished step, less this loss's own step if it was already made.
        allowed = self._stepped - (self._order == "after")
        if self._recorded > allowed:
            if not self.may_skip:
                raise RuntimeError(
                    f"record() was called {self._order} step() until now, and now twice for one step: call it once per "
                    "step; if a GradScaler skips steps, make the monitor with may_skip=True"
                )
            self._skip()
        self._store.record_scalar(self._recorded, LOSS, loss)
        self._recorded += 1

    def result(self, inf_loss: float = 0.0) -> Trajectory:
        """Return the trajectory so far, with the current weights as its end; training may continue.

        Args:
            inf_loss: inf ℓ, a lower bound of the losses. Default 0, the infimum of a cross-entropy and of a squared
                error, but not of a loss that includes weight decay.

        Raises:
            ValueError: no step was made yet, ``inf_loss`` is NaN, or a recorded loss is below it.
            TypeError: ``inf_loss`` is not a number.
            RuntimeError: a parameter's shape has changed since the start.
        """
        self._flush_update()
        if not self._store.steps:
            raise ValueError("no step has been made yet, so there is no trajectory: call result() after training")
        return from_record(self._store.to_record(), inf_loss)

    def state_dict(self) -> dict[str, Any]:
        """Return all that was recorded, and the last weights, as tensors and primitive values.

        With ``directory``, the iterates stay in its files and only their number is saved.
        """
        moved = self._store.steps < self._stepped
        counts = {"stepped": self._stepped, "recorded": self._recorded, "moved": moved}
        return {"order": self._order, **counts, "store": self._store.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved trajectory. Steps in the ``directory`` that are not in the state are dropped.

        Args:
            state_dict: the ``state_dict()`` of a monitor with the same parameters and sketch.

        Raises:
            ValueError: the state has other parameters or another sketch, or the directory lacks its steps.
        """
        self._store.load_state_dict(state_dict["store"])
        self._order = state_dict["order"]
        self._stepped, self._recorded = state_dict["stepped"], state_dict["recorded"]

    def close(self) -> None:
        """Detach from the optimizer, and take the current weights as the end; `result` still works.

        Raises:
            RuntimeError: a parameter's shape has changed since the start; the monitor is detached all the same.
        """
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if handles:
            self._flush_update()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return
        if self.may_skip and self._recorded <= self._stepped:
            raise RuntimeError("with may_skip=True, record(loss) must be called before step(): this step has no loss")
        if [*map(id, _params(optimizer))] != [*map(id, self._params)]:
            raise RuntimeError("the optimizer's parameters have changed: close() this monitor, then make another one")
        self._flush_update()
        self._store.start()
        self._lr = _single_lr(optimizer)

    def _post_hook(self, *_: object) -> None:
        if not self._outermost.leave():
            return
        self._order = self._order or "after"
        if self._recorded < self._stepped + (self._order == "before"):
            self._recorded += 1  # a loss that was not recorded stays NaN
        self._store.record_scalar(self._stepped, LR, self._lr)
        self._stepped += 1

    def _flush_update(self) -> None:
        """Store the last step's update, unless it is stored already."""
        if self._store.steps < self._stepped:
            self._store.record_update()

    def _skip(self) -> None:
        self._flush_update()
        self._store.start()
        self._store.record_scalar(self._stepped, LR, _single_lr(self.optimizer))
        self._store.record_zero()
        self._stepped += 1


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _single_lr(optimizer: Optimizer) -> float | Tensor:
    """Return the common learning rate of all groups, NaN if none or several; tensors are not read on the host."""
    lrs = [learning_rate(group) for group in optimizer.param_groups if group["params"]]
    tensor = next((lr for lr in lrs if isinstance(lr, Tensor)), None)
    if tensor is None:
        return lrs[0] if all(lr == lrs[0] for lr in lrs) else torch.nan
    # torch.full passes a number as a kernel argument: no copy to the device, no sync.
    device, wide = tensor.device, torch.float64
    made = [x.to(device, wide) if isinstance(x, Tensor) else torch.full((), x, dtype=wide, device=device) for x in lrs]
    first = made[0].clone()  # schedulers write to it in place
    return torch.where((torch.stack(made) == first).all(), first, torch.nan)

"""The calls of a monitor: right ones, wrong ones, and the optimizers that make them hard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normopt.diagnostics import TrajectoryMonitor
from tests.diagnostics.trainings import one_parameter, oracle, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_record_is_refused_and_a_missing_one_is_counted(when, tmp_path):
    p, monitor, opt = one_parameter(directory=tmp_path)
    for t in range(4):
        if when == "before" and t != 2:
            monitor.record(10.0 - t)
        step(p, opt)
        if when == "after" and t != 2:
            monitor.record(torch.tensor(10.0 - t))
            if t != 3:
                with pytest.raises(RuntimeError, match="twice for one step"):
                    monitor.record(0.0)
    if when == "before":
        monitor.record(6.0)  # of a step that has yet to come
        with pytest.raises(RuntimeError, match="GradScaler"):
            monitor.record(0.0)
    found = monitor.result()
    np.testing.assert_array_equal(found.loss, [10, 9, math.nan, 7])
    assert found.invalid == {"no finite loss was recorded": 1}
    assert np.isnan(found.gamma).tolist() == [False, False, True, False]


def test_an_update_is_what_happened_from_step_to_step(tmp_path):
    p, monitor, opt = one_parameter(directory=tmp_path)
    seen = [p.detach().numpy().copy()]
    for _ in range(3):
        step(p, opt)
        monitor.record(1.0)
        p.data.clamp_(min=0.85, max=2.15)
        seen.append(p.detach().numpy().copy())
    np.testing.assert_allclose(monitor.result().update_l2, oracle(seen, np.ones(3), np.ones(3))[1], rtol=1e-12)


def test_a_step_in_a_step_is_one_step(tmp_path):
    class Base(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    p = nn.Parameter(torch.ones(2))
    opt = Base([p], lr=0.1)
    monitor = TrajectoryMonitor(opt, sketch=64)
    for _ in range(2):
        step(p, opt)
        monitor.record(1.0)
    assert len(monitor.result().loss) == 2


def test_a_step_that_raises_does_not_count():
    p, monitor, opt = one_parameter()

    def bad():
        raise ZeroDivisionError

    for closure in (bad, None, bad, None):
        p.grad = torch.ones(2, dtype=p.dtype)
        if closure is None:
            opt.step()
            monitor.record(1.0)
        else:
            with pytest.raises(ZeroDivisionError):
                opt.step(closure)
    assert len(monitor.result().loss) == 2
    np.testing.assert_allclose(monitor.result().update_l2, 0.1 * math.sqrt(2))


@pytest.mark.parametrize("place", ["returned", "inside"])
def test_closures(place):
    p = nn.Parameter(torch.tensor([3.0, 1.0]))
    opt = torch.optim.LBFGS([p], lr=0.5, max_iter=1 if place == "inside" else 4)
    monitor = TrajectoryMonitor(opt, sketch=64)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        if place == "inside":
            monitor.record(loss)
        return loss

    losses = []
    for _ in range(3):
        losses.append(p.detach().square().sum().item())
        loss = opt.step(closure)
        if place == "returned":
            monitor.record(loss)
    np.testing.assert_allclose(monitor.result().loss, losses, rtol=1e-6)


def test_steps_that_a_scaler_skips():
    p = nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor = TrajectoryMonitor(opt, sketch=64, may_skip=True)
    norms = []
    for factor in (math.inf, 1.0, math.inf, math.inf, 2.0, 1.0):
        loss = p.sum() * factor
        before = p.detach().clone()
        opt.zero_grad()
        scaler.scale(loss).backward()
        monitor.record(3.0)
        scaler.step(opt)
        scaler.update()
        norms.append((p.detach() - before).norm().item())
    found = monitor.result()
    np.testing.assert_allclose(found.update_l2, norms, rtol=1e-6)
    assert found.invalid == {"the weights did not move": 3}
    assert not found.update_l2[[0, 2, 3]].any()
    with pytest.raises(RuntimeError, match="before step"):
        step(p, opt)


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_neither_a_step_nor_a_record_waits_for_the_device():
    class Descent(torch.optim.Optimizer):  # torch's own read a tensor rate on a CPU
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"])

    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = Descent([{"params": [p], "lr": torch.tensor(0.1)} for p in params], {})
    monitor = TrajectoryMonitor(opt, sketch=64)
    loss = torch.tensor(2.0, requires_grad=True)
    with NoSync():
        with pytest.raises(AssertionError, match="scalar"):
            loss.item()
        for _ in range(300):  # more than one chunk
            opt.step()
            monitor.record(loss)
    assert len(monitor.result().loss) == 300


def test_parameters_that_come_later_are_refused_before_anything_moves():
    p, monitor, opt = one_parameter()
    step(p, opt)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="close"):
        step(p, opt)
    assert torch.equal(p, before)
    monitor.close()
    step(p, opt)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda opt: TrajectoryMonitor(object()), TypeError, "optim.Optimizer"),
        (lambda opt: TrajectoryMonitor(opt, sketch=100.0), TypeError, "integer"),
        (lambda opt: TrajectoryMonitor(opt, sketch=32), ValueError, "64, 16384"),
        (lambda opt: TrajectoryMonitor(opt, sketch=20000), ValueError, "64, 16384"),
        (lambda opt: TrajectoryMonitor(opt, may_skip=1), TypeError, "True or False"),
        (lambda opt: TrajectoryMonitor(opt).result(), ValueError, "no step"),
        (lambda opt: TrajectoryMonitor(opt).record("1"), TypeError, "number or a tensor"),
        (lambda opt: TrajectoryMonitor(opt).record(torch.ones(2)), ValueError, "one element"),
        (lambda opt: TrajectoryMonitor(torch.optim.SGD(nn.LazyLinear(2).parameters(), lr=1)), TypeError, "no shape"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))

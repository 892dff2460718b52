"""Trajectories that are saved, cut off, asked for early."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from normopt.diagnostics import Trajectory, TrajectoryMonitor
from tests.diagnostics.trainings import MAKERS, digits, network, one_parameter, oracle, step, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_resumed_training_goes_on_with_one_trajectory(exact, when, tmp_path):
    whole, cut = (tmp_path / "whole", tmp_path / "cut") if exact else (None, None)
    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    x, y = digits()

    def run(model, optimizer, monitor, steps):
        for t in steps:
            loss = nn.functional.cross_entropy(model(x[64 * t : 64 * t + 64]), y[64 * t : 64 * t + 64])
            optimizer.zero_grad()
            loss.backward()
            if when == "before":
                monitor.record(loss)
            optimizer.step()
            if when == "after":
                monitor.record(loss)

    monitor = TrajectoryMonitor(optimizer, directory=whole)
    run(model, optimizer, monitor, range(12))
    expected = monitor.result()

    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    monitor = TrajectoryMonitor(optimizer, directory=cut)
    run(model, optimizer, monitor, range(7))
    states = [s.state_dict() for s in (model, optimizer, monitor)]
    torch.save(states, tmp_path / "checkpoint.pt")
    run(model, optimizer, monitor, range(7, 10))  # what a crash takes away

    model = network(seed=1)
    optimizer = MAKERS["adamw"](model.parameters())
    monitor = TrajectoryMonitor(optimizer, directory=cut)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for thing, state in zip((model, optimizer, monitor), loaded, strict=True):
        thing.load_state_dict(state)
    run(model, optimizer, monitor, range(7, 12))
    found = monitor.result()
    for name in ("loss", "lr", "distance", "update_l2", "cosine", "consecutive_cosine", "gamma"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_state_of_before_the_first_step(tmp_path):
    p, monitor, opt = one_parameter(directory=tmp_path)
    monitor.record(5.0)
    state = monitor.state_dict()
    step(p, opt)
    step(p, opt)
    monitor = TrajectoryMonitor(torch.optim.SGD([p], lr=0.1), directory=tmp_path)
    monitor.load_state_dict(state)
    step(p, monitor.optimizer)
    assert monitor.result().loss.tolist() == [5]
    np.testing.assert_allclose(monitor.result().update_l2, 0.1 * math.sqrt(2))


def test_states_that_do_not_fit(tmp_path):
    p, monitor, opt = one_parameter()
    step(p, opt)
    state = monitor.state_dict()
    with pytest.raises(ValueError, match="use the same arguments"):
        TrajectoryMonitor(opt, sketch=128).load_state_dict(state)
    with pytest.raises(ValueError, match="use the same arguments"):
        TrajectoryMonitor(opt, directory=tmp_path / "a").load_state_dict(state)
    p, monitor, opt = one_parameter(directory=tmp_path / "b")
    step(p, opt)
    step(p, opt)
    state = monitor.state_dict()
    monitor.close()
    with pytest.raises(ValueError, match="does not hold"):
        TrajectoryMonitor(opt, directory=tmp_path / "c").load_state_dict(state)
    other = TrajectoryMonitor(opt, directory=tmp_path / "b")
    with pytest.raises(ValueError, match="holds a trajectory already"):
        other.record(1.0)
    with pytest.raises(ValueError, match="holds a trajectory already"):
        step(p, opt)


def test_what_a_crash_leaves_can_be_read(tmp_path):
    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    monitor = TrajectoryMonitor(optimizer, directory=tmp_path)
    iterates, losses, lrs = train(model, optimizer, 6, [monitor])
    # Neither closed nor asked: θ_0 … θ_5 are there, the last step's end is not; and a write was cut off.
    with (tmp_path / "iterates.bin").open("ab") as file:
        file.write(b"\0" * 100)
    found = Trajectory.load(tmp_path)
    distance, _, cosine, _, _ = oracle(iterates[:6], losses[:5], lrs[:5])
    np.testing.assert_allclose(found.distance, distance, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-9)
    np.testing.assert_array_equal(found.loss, losses[:5])
    with pytest.raises(ValueError, match="holds no trajectory"):
        Trajectory.load(tmp_path / "elsewhere")


def test_a_result_may_be_asked_for_in_between():
    model, twin = network(), network()
    results = []
    for net, ask in ((model, True), (twin, False)):
        optimizer = MAKERS["sgd"](net.parameters())
        monitor = TrajectoryMonitor(optimizer)
        train(net, optimizer, 4, [monitor])
        if ask:
            assert len(monitor.result().loss) == 4
        train(net, optimizer, 3, [monitor])
        results.append(monitor.result())
    np.testing.assert_array_equal(results[0].distance, results[1].distance)
    np.testing.assert_array_equal(results[0].gamma, results[1].gamma)


def test_an_optimizer_can_be_copied_while_it_is_watched():
    p, monitor, opt = one_parameter()
    step(p, opt)
    twin = copy.deepcopy(opt)
    twin.step()
    assert len(monitor.result().loss) == 1

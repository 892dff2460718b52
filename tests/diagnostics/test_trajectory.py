from __future__ import annotations

import csv
import doctest
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from normopt.diagnostics import Trajectory, TrajectoryMonitor
from tests.diagnostics.trainings import MAKERS, digits, network, one_parameter, oracle, step, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MAKERS)
def test_exact_equals_the_definitions(name, when, tmp_path):
    model = network(torch.float64)
    optimizer = MAKERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    with TrajectoryMonitor(optimizer, directory=tmp_path) as monitor:
        iterates, losses, lrs = train(model, optimizer, 40, [monitor], when, schedule=schedule)
    found = monitor.result()
    distance, norm, cosine, consecutive, gamma = oracle(iterates, losses, lrs)
    assert found.sketch is None
    np.testing.assert_array_equal(found.loss, losses)
    np.testing.assert_array_equal(found.lr, lrs)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found.update_l2, norm, rtol=1e-10)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.consecutive_cosine, consecutive, rtol=1e-10, atol=1e-12)
    # The oracle takes the difference of two squares, which costs it digits.
    scale = np.abs(gamma) + distance[:-1] ** 2 / (2 * np.array(lrs) * np.array(losses))
    assert (np.abs(found.gamma - gamma) <= 1e-10 * scale).all()
    assert found.valid.all()
    assert found.min_gamma == pytest.approx(gamma.min(), rel=1e-6)
    assert found.straightness == pytest.approx(distance[0] / norm.sum(), rel=1e-10)
    assert found.cosine[-1] == pytest.approx(1)
    assert found.distance_half == 0
    assert not found.gamma_half.any()


@pytest.mark.parametrize("directory", [None, "there"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizer_goes_on_bit_for_bit(name, directory, tmp_path):
    plain, watched = network(), network()
    optimizer = MAKERS[name](plain.parameters())
    train(plain, optimizer, 10)
    other = MAKERS[name](watched.parameters())
    with TrajectoryMonitor(other, directory=directory and tmp_path / directory) as monitor:
        train(watched, other, 5, [monitor], seed=0)
        monitor.result()
    # Detached, it goes on as well.
    plain, watched = network(), network()
    optimizer, other = MAKERS[name](plain.parameters()), MAKERS[name](watched.parameters())
    monitor = TrajectoryMonitor(other, directory=directory and tmp_path / "another")
    for attached in (True, False):
        train(plain, optimizer, 6)
        train(watched, other, 6, [monitor] if attached else [])
        monitor.close()
        for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(p, q)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert not other._optimizer_step_pre_hooks
    assert not other._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="closed"):
        monitor.record(1.0)
    assert len(monitor.result().loss) == 6


def test_reasons(tmp_path):
    p, monitor, opt = one_parameter(directory=tmp_path)
    for loss, lr, gradient in [
        (2.0, 0.1, (1, 1)),
        (1.5, 0.0, (1, 1)),
        (1.0, 0.1, (0, 0)),
        (1.001, 0.1, (1, 2)),
        (math.inf, 0.1, (1, 2)),
        (1.5, 0.2, (3, 1)),
    ]:
        opt.param_groups[0]["lr"] = lr
        monitor.record(loss)
        step(p, opt, gradient)
    found = monitor.result(inf_loss=1.0)
    assert found.reason.tolist() == [
        "",
        "the weights did not move",
        "the weights did not move",
        "the loss is at its infimum",
        "no finite loss was recorded",
        "",
    ]
    assert found.valid.tolist() == [True, False, False, False, False, True]
    # The last step: D = 0.2·√10, ‖U‖ the same, so (D² − 0)/(2·0.2·0.5).
    assert found.gamma[-1] == pytest.approx(0.04 * 10 / (2 * 0.2 * 0.5))
    with pytest.raises(ValueError, match=r"inf_loss = 1.2 is above the loss of step 2, 1"):
        monitor.result(inf_loss=1.2)
    moved = torch.optim.SGD([p], lr=0.0, momentum=0.9)
    with TrajectoryMonitor(moved, directory=tmp_path / "zero") as still:
        still.record(1.0)
        p.data += 1  # before the step begins: not its update
        step(p, moved)
        p.data += 1  # after it
    assert still.result().reason.tolist() == ["the learning rate is 0"]


def test_nothing_that_is_valid_leaves_a_nan():
    p, monitor, opt = one_parameter()
    step(p, opt, (math.nan, 1))
    monitor.record(1.0)
    found = monitor.result()
    assert found.invalid == {"the weights are not finite": 1}
    assert math.isnan(found.min_gamma)
    assert math.isnan(found.gamma_half[0])


@pytest.mark.parametrize("tensor", [False, True])
def test_groups_with_different_rates_have_none(tensor):
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    make = torch.tensor if tensor else float
    opt = torch.optim.SGD([{"params": [a], "lr": make(0.1)}, {"params": [b], "lr": 0.1}], foreach=False)
    monitor = TrajectoryMonitor(opt, sketch=64)
    for other in (0.1, 0.2):
        opt.param_groups[1]["lr"] = other if not tensor else torch.tensor(other)
        for p in (a, b):
            p.grad = torch.ones(2)
        opt.step()
        monitor.record(1.0)
    found = monitor.result()
    assert found.lr[0] == pytest.approx(0.1)
    assert found.reason.tolist() == ["", "no single learning rate"]


def test_a_tensor_rate_that_is_changed_in_place_and_a_loss_that_is():
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=torch.tensor(0.1))
    monitor = TrajectoryMonitor(opt, sketch=64)
    loss = torch.tensor(2.0)
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
        monitor.record(loss)
        opt.param_groups[0]["lr"].mul_(0.5)
        loss -= 1
    np.testing.assert_allclose(monitor.result().lr, [0.1, 0.05], rtol=1e-6)
    np.testing.assert_array_equal(monitor.result().loss, [2, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_and_mixed_dtypes_and_parameters_without_a_gradient(dtype, tmp_path):
    low, wide, alone, pair = (
        nn.Parameter(torch.linspace(-1, 1, n).to(t))
        for n, t in ((50, dtype), (30, torch.float64), (20, torch.float32), (10, torch.complex64))
    )
    params = [low, wide, alone, pair]
    opt = torch.optim.SGD(params, lr=0.25)
    exact = TrajectoryMonitor(opt, directory=tmp_path)
    sketched = TrajectoryMonitor(opt)

    def now():
        parts = [low.double(), wide, alone.double(), torch.view_as_real(pair.detach()).double().flatten()]
        return torch.cat([q.detach() for q in parts]).numpy()

    torch.manual_seed(0)
    iterates = [now()]
    for _ in range(5):
        for q in (low, wide, pair):
            q.grad = torch.randn_like(q)
        opt.step()
        exact.record(1.0)
        sketched.record(1.0)
        iterates.append(now())
    found = exact.result()
    distance, norm, cosine, *_ = oracle(iterates, np.ones(5), np.ones(5))
    np.testing.assert_allclose(found.update_l2, norm, rtol=1e-12)
    np.testing.assert_allclose(sketched.result().update_l2, norm, rtol=1e-12)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)


def test_csv_and_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    with TrajectoryMonitor(optimizer) as monitor:
        train(model, optimizer, 10, [monitor])
    found = monitor.result()
    found.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["gamma"]) for r in rows] == found.gamma.tolist()
    assert [float(r["distance"]) for r in rows] == found.distance[:-1].tolist()
    assert rows[-1]["consecutive_cosine"] == "nan"
    assert [r["step"] for r in rows] == [str(t) for t in range(10)]
    fig = found.plot()
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "distance to the end", "cosine to the end", "γ"]
    np.testing.assert_array_equal(fig.axes[2].lines[0].get_ydata(), found.cosine)
    fig.savefig(tmp_path / "t.png")
    plt.close(fig)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    p, monitor, opt = one_parameter()
    step(p, opt)
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"normopt\[plots\]"):
        monitor.result().plot()


def test_the_examples_of_the_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    model = network()
    names = {
        "normopt": SimpleNamespace(TrajectoryMonitor=TrajectoryMonitor),
        "model": model,
        "optimizer": MAKERS["sgd"](model.parameters()),
        "loss_of": nn.functional.cross_entropy,
        "batches": [(x[:64], y[:64]) for x, y in [digits()] * 3],
    }
    for thing in (TrajectoryMonitor, Trajectory):
        for example in doctest.DocTestParser().get_examples(thing.__doc__):
            exec(example.source, names)
    assert (tmp_path / "trajectory.csv").exists()
    assert (tmp_path / "trajectory.png").exists()
    assert len(names["found"].loss) == 3
    pytest.importorskip("matplotlib.pyplot").close("all")


def test_two_monitors_see_the_same():
    p, monitor, opt = one_parameter()
    other = TrajectoryMonitor(opt, sketch=64)
    for _ in range(3):
        step(p, opt)
        monitor.record(2.0)
        other.record(2.0)
    np.testing.assert_array_equal(monitor.result().gamma, other.result().gamma)

"""p = 2 is torch.optim.SGD, bit for bit; p = ∞ is signSGD, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import normopt

COMBINATIONS = [
    dict(momentum=mu, dampening=tau, nesterov=nesterov, weight_decay=lam, maximize=maximize)
    for mu, tau, nesterov, lam, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 1e-2), (False, True)
    )
    if not (nesterov and (mu == 0 or tau != 0))
]


def train(make_optimizer, dtype, steps=50):
    """Weights after every step of a small regression whose gradients depend on the weights."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).to(dtype)
    opt = make_optimizer(net.parameters())
    history = []
    for _ in range(steps):
        x = torch.randn(11, 7, dtype=dtype)
        opt.zero_grad()
        (net(x) - x[:, :3].sin()).square().mean().backward()
        opt.step()
        history += [p.detach().clone() for p in net.parameters()]
    return history


@pytest.mark.filterwarnings("ignore:dampening = 0.3 does nothing:UserWarning")  # as torch's does without momentum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_bitwise_torch_sgd_over_50_steps(settings, dtype):
    ours = train(lambda ps: normopt.SGD(ps, lr=0.05, foreach=False, **settings), dtype)
    theirs = train(lambda ps: torch.optim.SGD(ps, lr=0.05, foreach=False, **settings), dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum_rule", ["heavy", "ema", "lion"])
def test_power_at_the_ends_is_exact(momentum_rule, dtype):
    def power(p):
        return lambda ps: normopt.SteepestDescent(
            ps, lr=0.01, norm="lp", p=p, scale="power", momentum=0.9, momentum_rule=momentum_rule
        )

    def named(norm, scale):
        return lambda ps: normopt.SteepestDescent(
            ps, lr=0.01, norm=norm, scale=scale, momentum=0.9, momentum_rule=momentum_rule
        )

    for p, norm, scale in ((2.0, "l2", "dual"), (math.inf, "linf", "unit")):
        pairs = zip(train(power(p), dtype), train(named(norm, scale), dtype), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_lpsgd_at_2_is_torch_sgd_and_at_infinity_moves_by_the_sign():
    ours = train(lambda ps: normopt.LPSGD(ps, lr=0.05, p=2.0), torch.float32)
    theirs = train(lambda ps: torch.optim.SGD(ps, lr=0.05, foreach=False), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    w.grad = torch.tensor([-1e-30, 0.0, 5.0, math.nan])
    normopt.LPSGD([w], lr=0.5, p=math.inf, eps=0.0).step()
    assert w.tolist()[:3] == [1.5, 2.0, 2.5]
    assert w[3].isnan()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_matched_at_2_is_sgd_to_roundoff(dtype, rtol):
    matched = train(lambda ps: normopt.LPSGD(ps, lr=0.05, p=2.0, scale="matched"), dtype, steps=5)
    sgd = train(lambda ps: torch.optim.SGD(ps, lr=0.05), dtype, steps=5)
    for a, b in zip(matched, sgd, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_matched_has_sgds_step_length_at_every_p():
    g = torch.randn(40, 30)
    for p in (1.0, 1.5, 3.0, 8.0, math.inf):
        w = torch.nn.Parameter(torch.zeros_like(g))
        w.grad = g
        normopt.SteepestDescent([w], lr=1.0, norm="lp", p=p, scale="matched").step()
        assert float(w.detach().double().norm()) == pytest.approx(float(g.double().norm()), rel=1e-6)

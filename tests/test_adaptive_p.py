"""AdaptiveP: the rule against NumPy, and the same life as the other schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.schedules import AdaptiveP, CosineP
from normopt.schedules.adaptive import density

SHAPES = ((4, 3), (7,))


def optimizer(p=8.0, shapes=SHAPES, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return normopt.LPSGDM([torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes], lr=0.01, p=p, **kwargs)


def backward(opt, seed, sparse=0.0):
    """Gradients, some of whose entries are zero."""
    rng = torch.Generator().manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            g = torch.randn(p.shape, generator=rng) * (torch.rand(p.shape, generator=rng) >= sparse)
            p.grad = g.to(p.dtype)


def phi(params):
    g = np.concatenate([p.grad.double().numpy().ravel() for p in params if p.grad is not None])
    return np.abs(g).sum() ** 2 / (g.size * (g**2).sum())


class Oracle:
    """The rule of the docstring, of one group."""

    def __init__(self, start, end=2.0, beta=0.9, low=0.0, high=2 / math.pi):
        self.start, self.end, self.beta, self.low, self.high = start, end, beta, low, high
        self.average = None

    def step(self, found):
        self.average = found if self.average is None else self.beta * self.average + (1 - self.beta) * found
        t = np.clip((self.average - self.low) / (self.high - self.low), 0, 1)
        first, last = (0.0 if p == math.inf else 1 / (p - 1) for p in (self.start, self.end))
        exponent = last + (first - last) * t
        return math.inf if exponent == 0 else 1 + 1 / exponent


@pytest.mark.parametrize("start", [8.0, 1.5, math.inf])
@pytest.mark.parametrize("settings", [{}, {"p_end": 3.0, "beta": 0.5, "low": 0.2, "high": 0.5}, {"beta": 0.0}])
def test_the_rule(start, settings):
    opt = optimizer(start)
    sched = AdaptiveP(opt, **settings)
    oracle = Oracle(start, **({"end": settings["p_end"]} if "p_end" in settings else {}), **without(settings, "p_end"))
    assert sched.get_last_p() == [oracle.end]
    for step in range(12):
        backward(opt, step, sparse=step / 24)
        opt.step()
        sched.step()
        expected = oracle.step(phi(opt.param_groups[0]["params"]))
        assert 1 / (opt.param_groups[0]["p"] - 1) == pytest.approx(1 / (expected - 1), rel=1e-5, abs=1e-7)
        assert sched.densities == [pytest.approx(oracle.average, rel=1e-6)]


def without(settings, key):
    return {k: v for k, v in settings.items() if k != key}


def test_the_ends_are_exact():
    opt = optimizer(8.0, shapes=((50,),))
    p = opt.param_groups[0]["params"][0]
    sched = AdaptiveP(opt, beta=0.0, low=0.1)
    for gradient, expected in ((torch.ones(50), 8.0), (torch.eye(50)[0], 2.0), (torch.ones(50), 8.0)):
        p.grad = gradient.clone()
        sched.step()
        assert opt.param_groups[0]["p"] == expected


def test_a_gaussian_gradient_keeps_the_start_and_half_of_one_goes_half_the_way():
    opt = optimizer(5.0, shapes=((200_000,),))
    p = opt.param_groups[0]["params"][0]
    sched = AdaptiveP(opt, beta=0.0)
    p.grad = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    sched.step()
    assert opt.param_groups[0]["p"] == pytest.approx(5.0, rel=0.01)
    p.grad[::2] = 0
    sched.step()
    assert 1 / (opt.param_groups[0]["p"] - 1) == pytest.approx((1 / 4 + 1) / 2, rel=0.01)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_scale_of_the_gradient_does_not_matter(dtype, scale):
    found = []
    for factor in (1.0, scale):
        opt = optimizer(dtype=dtype)
        sched = AdaptiveP(opt)
        backward(opt, 3)
        for p in opt.param_groups[0]["params"]:
            p.grad *= factor
        sched.step()
        found.append(opt.param_groups[0]["p"])
    assert found[1] == pytest.approx(found[0], rel=0.01 if dtype == torch.bfloat16 else 1e-5)


def test_groups_are_measured_apart_and_those_without_a_p_passed_over():
    a, b, c, d = (torch.nn.Parameter(torch.randn(30)) for _ in range(4))
    opt = normopt.SteepestDescent(
        [
            {"params": [a], "norm": "lp", "p": 8.0},
            {"params": [b], "norm": "linf"},
            {"params": [c], "norm": "lp", "p": 4.0},
            {"params": [d], "norm": "lp", "p": 6.0},
        ],
        lr=0.1,
    )
    sched = AdaptiveP(opt)
    oracles = {0: Oracle(8.0), 2: Oracle(4.0)}
    for step in range(3):
        backward(opt, step, sparse=0.5)
        d.grad = None  # frozen
        sched.step()
        for i, oracle in oracles.items():
            expected = oracle.step(phi(opt.param_groups[i]["params"]))
            assert opt.param_groups[i]["p"] == pytest.approx(expected, rel=1e-5)
        assert opt.param_groups[1]["p"] is None
        assert opt.param_groups[3]["p"] == 2.0
    assert sched.densities[1] is sched.densities[3] is None
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "norm": "lp", "p": 3.0})
    sched.step()
    assert sched.get_last_p()[4] == 3.0


def test_a_tensor_p_is_filled_in_place():
    opt = optimizer(torch.tensor(8.0, dtype=torch.float64))
    held = opt.param_groups[0]["p"]
    sched, twin = AdaptiveP(opt), optimizer(8.0)
    other = AdaptiveP(twin)
    for step in range(3):
        for o, s in ((opt, sched), (twin, other)):
            backward(o, step, sparse=0.5)
            s.step()
        assert opt.param_groups[0]["p"] is held
        assert float(held) == twin.param_groups[0]["p"] < 8


@pytest.mark.parametrize("p", [8.0, torch.tensor(8.0)])
def test_saved_and_restored_it_goes_on_bit_for_bit(p, tmp_path):
    def train(opt, sched, steps):
        for step in steps:
            backward(opt, step, sparse=step / 20)
            opt.step()
            sched.step()

    whole = optimizer(p)
    sched = AdaptiveP(whole, beta=0.7, low=0.1)
    train(whole, sched, range(6))
    torch.save([whole.state_dict(), sched.state_dict()], tmp_path / "run.pt")
    weights = [x.detach().clone() for x in whole.param_groups[0]["params"]]
    saved = sched.state_dict()
    kept = list(saved["densities"])
    train(whole, sched, range(6, 12))
    assert saved["densities"] == kept  # a state is not changed by what comes after it

    again = optimizer(p)
    resumed = AdaptiveP(again)
    with torch.no_grad():
        for x, w in zip(again.param_groups[0]["params"], weights, strict=True):
            x.copy_(w)
    opt_state, sched_state = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(opt_state)
    resumed.load_state_dict(sched_state)
    train(again, resumed, range(6, 12))
    assert resumed.state_dict() == sched.state_dict()
    assert float(again.param_groups[0]["p"]) == float(whole.param_groups[0]["p"])
    for x, y in zip(again.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="not from CosineP"):
        CosineP(again, total_steps=30).load_state_dict(sched_state)


def test_without_gradients_it_refuses_and_changes_nothing():
    opt = optimizer()
    sched = AdaptiveP(opt)
    backward(opt, 1)
    sched.step()
    before = sched.state_dict(), opt.param_groups[0]["p"]
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"before optimizer\.zero_grad"):
        sched.step()
    assert (sched.state_dict(), opt.param_groups[0]["p"]) == before


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_gradient_that_has_no_density_is_passed_over(value):
    opt = optimizer()
    sched = AdaptiveP(opt)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.full_like(p, value)
    sched.step()
    assert opt.param_groups[0]["p"] == 2.0
    backward(opt, 1)
    sched.step()
    found = opt.param_groups[0]["p"]
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.full_like(p, value)
    sched.step()
    assert opt.param_groups[0]["p"] == found


def test_what_it_measures_stays_as_it_is():
    opt = optimizer()
    backward(opt, 1)
    kept = [p.grad.clone() for p in opt.param_groups[0]["params"]]
    AdaptiveP(opt).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(opt.param_groups[0]["params"], kept, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaptiveP(object()), TypeError, "optimizer"),
        (lambda: AdaptiveP(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1)), ValueError, "no param group"),
        (lambda: AdaptiveP(optimizer(), p_end=1.0), ValueError, "p_end"),
        (lambda: AdaptiveP(optimizer(), p_end="2"), TypeError, "p_end"),
        (lambda: AdaptiveP(optimizer(), beta=1.0), ValueError, "beta"),
        (lambda: AdaptiveP(optimizer(), low=0.7), ValueError, "low"),
        (lambda: AdaptiveP(optimizer(), low=-0.1), ValueError, "low"),
        (lambda: AdaptiveP(optimizer(), high=1.1), ValueError, "high"),
        (lambda: AdaptiveP(optimizer(), high=0.0), ValueError, "high"),
        (lambda: AdaptiveP(optimizer(1.0, scale="matched")), ValueError, "p = 1"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("what", ["conjugated", "negated", "csr", "coo", "of several dtypes"])
def test_what_a_gradient_is_stored_as_does_not_matter(what):
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.complex64)
    stored = {
        "conjugated": [z.conj()],
        "negated": [z.conj().imag],
        "csr": [z.real.contiguous().to_sparse_csr()],
        "coo": [z.real.to_sparse()],
        "of several dtypes": [z.real.double(), z.imag.bfloat16(), z],
    }[what]
    dense = [g.to_dense().resolve_conj().resolve_neg() for g in stored]
    x = np.concatenate([(torch.view_as_real(g) if g.is_complex() else g).double().numpy().ravel() for g in dense])
    found = density(stored)
    np.testing.assert_allclose(float(found), np.abs(x).sum() ** 2 / (x.size * (x**2).sum()), rtol=1e-6)


def test_a_default_device_that_is_not_the_weights():
    starts, found = [8.0, torch.tensor(8.0)], []
    for device in ("cpu", "meta"):
        opts = [optimizer(p=p) for p in starts]
        for opt in opts:
            backward(opt, seed=3, sparse=0.5)
        with torch.device(device):
            schedules = [AdaptiveP(opt) for opt in opts]
            for schedule in schedules:
                schedule.step()
        found.append([float(opt.param_groups[0]["p"]) for opt in opts])
    assert found[0] == found[1]
    assert found[0][0] not in (2.0, 8.0)


@pytest.mark.parametrize("p", [np.ones(3), [np.ones(2)], torch.ones(3), "a"], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("make", [AdaptiveP, lambda opt: CosineP(opt, 3)], ids=["AdaptiveP", "CosineP"])
def test_a_p_that_is_no_number_is_refused(make, p):
    opt = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "p": p, "mine": np.ones(3)}], lr=0.1)
    with pytest.raises((TypeError, ValueError), match="p of group 0 must be"):
        make(opt)

"""The papers' rules: fifty steps of an optimizer with add-ons and a cosine lr are what NumPy says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import normopt
from normopt.addons import AGR, LpDecay
from tests.addons import rules
from tests.addons.optimizers import CASES, SHAPES, Adan, build, copies, give, gradients
from tests.oracle import agr, lp_decay_factor

STEPS = 50
ADDONS = [(True, None), (False, (0.8, 0.02)), (True, (0.8, 0.02)), (True, (1.0, 0.02)), (True, (3.0, 0.5))]


def trained(make, dtype, recorded, with_agr, decay):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]
    start = [p.detach().double().numpy().copy() for p in params]
    opt = make(params)
    if with_agr:
        AGR(opt)
    if decay:
        LpDecay(opt, p=decay[0], weight_decay=decay[1])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=len(recorded))
    for gs in recorded:
        give(params, [g.to(dtype) for g in gs])
        opt.step()
        schedule.step()
    return start, [p.detach().double().numpy() for p in params], [opt.state[p] for p in params]


def recorded_gradients():
    """With entries that dominate, which is what AGR is about."""
    torch.manual_seed(1)
    return [[torch.randn(s, dtype=torch.float32).double() ** 3 for s in SHAPES] for _ in range(STEPS)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("with_agr", "decay"), ADDONS, ids=str)
@pytest.mark.parametrize(
    ("make", "update", "lr"),
    [
        (lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0), rules.adamw(), 0.05),
        (lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9), rules.sgd(0.9), 0.02),
        (lambda ps: Adan(ps, lr=0.05), rules.adan(), 0.05),
    ],
    ids=["AdamW", "SGD", "Adan"],
)
def test_fifty_steps(make, update, lr, with_agr, decay, dtype, tolerance):
    recorded = recorded_gradients()
    start, found, states = trained(make, dtype, recorded, with_agr, decay)
    arrays = [[g.numpy() for g in gs] for gs in recorded]
    expected, kept = rules.walk(update, start, arrays, lr, with_agr, decay)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())
    assert min(np.abs(b - w).max() for b, w in zip(expected, start, strict=True) if w.ndim >= 2) > 0.1  # it moved
    if "previous" in kept[0]:  # Adan's is the regularized one
        for s, k in zip(states, kept, strict=True):
            np.testing.assert_allclose(s["previous"].double().numpy(), k["previous"], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("with_agr", "decay"), ADDONS, ids=str)
@pytest.mark.parametrize(("cls", "update"), [(normopt.AdamW, rules.adamw()), (normopt.Adan, rules.adan())])
def test_fifty_steps_of_our_own(cls, update, with_agr, decay, dtype, tolerance):
    """The same rules by settings of the engine, without add-ons."""
    p, weight_decay = decay or (1.0, 0.0)
    settings = dict(lr=0.05, agr=with_agr, weight_decay=weight_decay)
    settings |= dict(decay="lp", decay_p=p) if decay else {}
    recorded = recorded_gradients()
    start, found, _ = trained(lambda ps: cls(ps, **settings), dtype, recorded, False, None)
    arrays = [[g.numpy() for g in gs] for gs in recorded]
    expected, _ = rules.walk(update, start, arrays, 0.05, with_agr, decay)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


@pytest.mark.parametrize("with_agr", [False, True])
def test_a_third_partys_adan(with_agr):
    """pytorch_optimizer's, where it is installed: it negates its ``.grad`` in place."""
    peer = pytest.importorskip("pytorch_optimizer")
    recorded = recorded_gradients()
    start, found, _ = trained(lambda ps: peer.Adan(ps, lr=0.05), torch.float64, recorded, with_agr, (0.8, 0.02))
    arrays = [[g.numpy() for g in gs] for gs in recorded]
    expected, _ = rules.walk(rules.adan(), start, arrays, 0.05, with_agr, (0.8, 0.02))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay_first", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_with_both(name, with_closure, decay_first):
    """As the optimizer alone, fed with NumPy's gradients and multiplied by NumPy's factor."""
    params, opt = build(name)
    alone_params, alone = build(name)
    for make in (LpDecay, AGR) if decay_first else (AGR, LpDecay):
        make(opt, **dict(p=0.8, weight_decay=0.3) if make is LpDecay else {})
    if with_closure and name == "Retrying":
        opt.fails = alone.fails = False
    for gs in gradients(params, 4):
        old = [w.numpy().copy() for w in copies(alone_params)]
        give(alone_params, [torch.from_numpy(np.asarray(agr(g.numpy()))) for g in gs])
        alone.step()
        with torch.no_grad():
            for p, w in zip(alone_params, old, strict=True):
                if w.ndim >= 2:
                    p.mul_(torch.from_numpy(lp_decay_factor(w, 0.8, opt.param_groups[0]["lr"] * 0.3)))
        if with_closure:
            assert opt.step(lambda gs=gs: give(params, gs) or 1.5) == 1.5
        else:
            give(params, gs)
            opt.step()
        for p, q, g in zip(params, alone_params, gs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize("name", CASES)
def test_either_order_gives_the_same_bits(name):
    ends = []
    for order in ((AGR, LpDecay), (LpDecay, AGR)):
        params, opt = build(name, torch.float32)
        for make in order:
            make(opt)
        for gs in gradients(params, 5):
            give(params, gs)
            opt.step()
        ends.append(copies(params))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)

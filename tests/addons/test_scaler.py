"""GradScaler with add-ons: the scaled run is the unscaled one, and a step that it skips changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from normopt.addons import AGR, LpDecay

OPTIMIZERS = {
    "SGD": lambda ps, fused: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=fused),
    "AdamW": lambda ps, fused: torch.optim.AdamW(ps, lr=0.02, weight_decay=0, fused=fused),
    "Adagrad": lambda ps, fused: torch.optim.Adagrad(ps, lr=0.1, fused=fused),
}
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def run(name, fused, scaler, poison_at=()):
    """Six steps; the weights, and whether each step changed anything."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 3)
    opt = OPTIMIZERS[name](net.parameters(), fused)
    AGR(opt)
    LpDecay(opt, weight_decay=0.3, warmup=3)
    changed = []
    for i in range(6):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(X), Y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if i in poison_at:
            net.weight.grad[0, 0] = math.inf
        grads = [p.grad for p in net.parameters()]
        before = copy.deepcopy((net.state_dict(), opt.state_dict()["state"]))
        if scaler is None:
            if i not in poison_at:
                opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
        after = (net.state_dict(), opt.state_dict()["state"])
        moved = any(not torch.equal(v, after[0][k]) for k, v in before[0].items())
        moved |= any(not torch.equal(v, after[1][j][k]) for j, state in before[1].items() for k, v in state.items())
        changed.append(moved)
        assert not hasattr(opt, "found_inf")
    return [p.detach() for p in net.parameters()], changed, opt.param_groups[0]["lp_step"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scale_is_taken_out(name, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # a power of two scales exactly
    if fused:
        assert OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(1))], True)._step_supports_amp_scaling
    (scaled, _, _), (plain, _, _) = run(name, fused, scaler), run(name, fused, None)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_decays_nothing(name, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled, changed, _ = run(name, fused, scaler, poison_at=(3, 5))  # after the warm-up, which counts calls
    assert changed == [True, True, True, False, True, False]
    plain, _, step = run(name, fused, None, poison_at=(3, 5))
    assert step == 3
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

"""Mixed precision: a step that GradScaler skips changes nothing at all."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import normopt


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_a_step_with_infinite_gradients_changes_nothing(name):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    opt = normopt.get_optimizer(name)(net.parameters(), agr=True, weight_decay=0.1, decay="lp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(poison):
        opt.zero_grad()
        scaler.scale(net(torch.ones(2, 4)).square().mean()).backward()
        if poison is not None:
            net.bias.grad[1] = poison
        scaler.step(opt)
        scaler.update()

    step(None)
    for poison in (math.inf, -math.inf, math.nan):
        before = copy.deepcopy((net.state_dict(), opt.state_dict()))
        scale = scaler.get_scale()
        step(poison)
        assert scaler.get_scale() == scale / 2
        after = (net.state_dict(), opt.state_dict())
        assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
        assert before[1]["param_groups"] == after[1]["param_groups"]
        assert before[1]["state"].keys() == after[1]["state"].keys()
        for i, state in before[1]["state"].items():
            assert all(torch.equal(v, after[1]["state"][i][k]) for k, v in state.items())
    step(None)
    assert not torch.equal(before[0]["weight"], net.weight)


def test_the_scale_is_taken_out_before_the_norm():
    """AGR and the dual norm see the true gradient: the scaled run is the unscaled one."""

    def run(scaler):
        torch.manual_seed(1)
        net = torch.nn.Linear(4, 3)
        opt = normopt.SteepestDescent(net.parameters(), lr=0.1, norm="lp", p=3.0, agr=True, momentum=0.9)
        for _ in range(5):
            opt.zero_grad()
            loss = net(torch.ones(2, 4)).square().mean()
            if scaler is None:
                loss.backward()
                opt.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)
                scaler.step(opt)
                scaler.update()
        return [p.detach() for p in net.parameters()]

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**12))  # a power of two scales exactly
    for a, b in zip(scaled, run(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_p_is_the_schedulers_and_a_skipped_step_does_not_move_it():
    net = torch.nn.Linear(2, 1)
    opt = normopt.LPSGDM(net.parameters(), p=8.0)
    sched = normopt.schedules.CosineP(opt, total_steps=4)
    scaler = torch.amp.GradScaler("cpu")
    for p in net.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.tensor(1.0))
    scaler.step(opt)
    scaler.update()
    assert opt.param_groups[0]["p"] == 8.0
    sched.step()
    assert opt.param_groups[0]["p"] < 8.0


def test_autocast_to_bfloat16_trains():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    opt = normopt.LPSGDM(net.parameters(), lr=0.02, p=4.0)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (net(x)[:, 0] - x.sum(1).sin()).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_scale_and_found_inf_are_brought_to_each_batchs_device():
    """A scaler's numbers are on one device; a group may span several."""

    class Elsewhere:
        """What a scaler sets, on another device."""

        def __init__(self, value: float) -> None:
            self.value = value
            self.asked: list[torch.device] = []

        def __rtruediv__(self, one: float) -> Elsewhere:
            self.inverse = Elsewhere(one / self.value)
            return self.inverse

        def to(self, device: torch.device, non_blocking: bool) -> torch.Tensor:
            self.asked.append(device)
            return torch.tensor([self.value])

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 8.0)
    opt = normopt.SGD([p], lr=0.5, fused=True)
    opt.grad_scale, opt.found_inf = Elsewhere(4.0), Elsewhere(0.0)
    opt.step()
    assert opt.grad_scale.inverse.asked == opt.found_inf.asked == [torch.device("cpu")]
    assert torch.equal(p, torch.zeros(3))  # 1 − 0.5·8/4
    opt.found_inf = Elsewhere(1.0)
    opt.step()
    assert torch.equal(p, torch.zeros(3))


def test_on_cuda_stochastic_rounding_draws_its_seed_on_the_device():
    """A captured graph would hold a number of the host for ever; a draw of the device's generator it makes anew."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from normopt.kernels.fused import _seed

    with FakeTensorMode():
        seed = _seed(torch.device("cuda", 0))
    assert isinstance(seed, torch.Tensor)
    assert seed.device == torch.device("cuda", 0)
    torch.manual_seed(3)
    first = _seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert isinstance(first, int)
    assert _seed(torch.device("cpu")) == first

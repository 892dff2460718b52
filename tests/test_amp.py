"""Mixed precision: a step that GradScaler skips changes nothing at all."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import normopt
from normopt.norms import Mixed, Schatten, TensorNorm, register
from normopt.norms.base import without_autocast

MEMBERS = [
    *((name, {}) for name in normopt.list_optimizers()),
    ("muon", dict(dtype="float32")),
    ("muon", dict(method="svd")),
    ("freon", dict(c=0.3)),
    ("nucgd", dict(method="svd")),
    ("spectralsgd", dict(scope="group", agr=True, weight_decay=0.1, decay="lp")),
]


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


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "settings", "path"),
    [
        *((*member, dict(foreach=foreach)) for member in MEMBERS for foreach in (False, True)),
        *((name, {}, dict(fused=True)) for name in ("sgd", "normalizedsgd", "lion", "lpsgd", "lpsgdm")),
    ],
    ids=str,
)
def test_a_step_inside_autocast_is_the_step_outside(name, settings, path, low):
    def run(dtype, inside):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((20, 30), (30, 20), (20, 30), (7,))]
        opt = normopt.get_optimizer(name)(params, lr=0.1, **settings, **path)

        def closure():
            assert torch.is_autocast_enabled("cpu") == inside
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (low if inside else torch.float32)
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            return 0.0

        with torch.autocast("cpu", dtype=low, enabled=inside):
            for _ in range(3):
                opt.step(closure)
                assert torch.is_autocast_enabled("cpu") == inside
        return params

    for dtype in (torch.float32, torch.bfloat16, *([] if "fused" in path else [torch.float64])):
        for a, b in zip(run(dtype, True), run(dtype, False), strict=True):
            assert torch.equal(a, b)


def test_a_norm_of_the_users_is_stepped_outside_autocast_too():
    @register("by-products")
    class Products(TensorNorm):
        def dual_norm(self, x):
            return (x.reshape(1, -1) @ x.reshape(-1, 1)).sqrt().reshape(())

        def dual_map(self, x):
            return x / self.dual_norm(x)

    w = torch.nn.Parameter(torch.zeros(300, dtype=torch.float32))
    w.grad = torch.linspace(-1, 1, 300)
    opt = normopt.SteepestDescent([w], lr=1.0, norm="by-products", scale="unit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step()
    torch.testing.assert_close(-w.detach(), w.grad / w.grad.norm())


@pytest.mark.parametrize(
    "norm",
    [
        *(Schatten(p) for p in (1.0, 2.0, 3.0, math.inf)),
        Schatten(math.inf, method="newton-schulz"),
        Schatten(math.inf, method="polar-express"),
        Schatten(1.0, method="lanczos", steps=8),
        Schatten(math.inf, exponent=0.3),
        Mixed(2.0, 3.0),
    ],
    ids=repr,
)
def test_the_methods_of_a_norm_give_inside_autocast_what_they_give_outside(norm):
    def found():
        x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        made = [norm.dual_map(x), norm.dual_norm(x), norm.norm(x), *norm.scaled([x], 1, False)[0], norm.measure([x])]
        return made + (norm.power([x]) if norm.power_exponent is not None else [])

    outside = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = found()
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_switched_off_on_every_type_of_device():
    def states():
        return [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]

    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu"):
            assert without_autocast(["cpu", "cuda", "meta"], states) == [False, False]
            assert without_autocast(["cuda"], states) == [True, False]
            assert states() == [True, True]
    finally:
        torch.set_autocast_enabled("cuda", False)

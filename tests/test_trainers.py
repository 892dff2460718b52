"""What training loops do to optimizers: LR schedulers, averaging, accumulation, freezing, sharding of state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import normopt

NAMES = normopt.list_optimizers()

SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 3, cycle_momentum=o.defaults["momentum"] != 0),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=o.defaults["momentum"] != 0),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)]),
}


def make_net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def backward(net, seed):
    torch.manual_seed(seed)
    net(torch.randn(6, 4)).square().mean().backward()


def test_every_family_of_torch_is_here():
    families = {n for n, c in vars(lrs).items() if isinstance(c, type) and issubclass(c, lrs.LRScheduler)}
    assert families - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS) | {"SWALR"}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", NAMES)
def test_lr_schedulers_drive_the_step(name, scheduler, tensor_lr):
    """Under each scheduler the run is the one in which lr and momentum are written into the group by hand."""
    if tensor_lr and scheduler in ("OneCycleLR", "CyclicLR", "SWALR"):
        lr = 0.02  # these write numbers of their own
    else:
        lr = torch.tensor(0.02, dtype=torch.float64) if tensor_lr else 0.02
    net = make_net().double()
    opt = normopt.get_optimizer(name)(net.parameters(), lr=lr)
    sched = SCHEDULERS[scheduler](opt)
    twin = make_net().double()
    by_hand = normopt.get_optimizer(name)(twin.parameters(), lr=0.02)
    rates = []
    for i in range(9):
        for n, o in ((net, opt), (twin, by_hand)):
            o.zero_grad()
            torch.manual_seed(i)
            n(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
        group = opt.param_groups[0]
        rates.append((float(group["lr"]), group["momentum"]))
        by_hand.param_groups[0].update(lr=rates[-1][0], momentum=rates[-1][1])
        opt.step()
        by_hand.step()
        sched.step(1.0) if scheduler == "ReduceLROnPlateau" else sched.step()
    assert len(set(rates)) > 1
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if scheduler == "OneCycleLR" and opt.defaults["momentum"] != 0:
        assert len({m for _, m in rates}) > 1


def test_lr_and_p_schedules_together():
    net = make_net()
    opt = normopt.LPSGDM(net.parameters(), lr=0.1, p=8.0)
    lr_sched, p_sched = lrs.CosineAnnealingLR(opt, 10), normopt.schedules.CosineP(opt, total_steps=11)
    for i in range(10):
        opt.zero_grad()
        backward(net, i)
        opt.step()
        lr_sched.step()
        p_sched.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0)
    assert opt.param_groups[0]["p"] == 2.0


@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_averaged_models(averaging):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    opt = normopt.LPSGDM(net.parameters(), lr=0.05, agr=True, weight_decay=1e-3, decay="lp")
    averaged = AveragedModel(net, **({} if averaging == "swa" else dict(multi_avg_fn=get_ema_multi_avg_fn(0.9))))
    history = []
    for i in range(6):
        opt.zero_grad()
        backward(net, i)
        opt.step()
        averaged.update_parameters(net)
        history.append(net[0].weight.detach().clone())
    expected = history[0]
    for i, w in enumerate(history[1:], start=2):
        expected = expected + (w - expected) / i if averaging == "swa" else 0.9 * expected + 0.1 * w
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    update_bn([torch.randn(16, 4)], averaged)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation_equals_the_large_batch(name):
    whole, parts = make_net().double(), make_net().double()
    opts = [normopt.get_optimizer(name)(n.parameters(), lr=0.01) for n in (whole, parts)]
    for i in range(4):
        torch.manual_seed(i)
        x = torch.randn(8, 4, dtype=torch.float64)
        for opt in opts:
            opt.zero_grad()
        whole(x).square().mean().backward()
        for chunk in x.chunk(4):
            (parts(chunk).square().mean() / 4).backward()
        for opt in opts:
            opt.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_freeze_unfreeze_and_never_used(name):
    net = make_net()
    unused = torch.nn.Parameter(torch.ones(3))
    opt = normopt.get_optimizer(name)([*net.parameters(), unused], lr=0.01, weight_decay=0.1)
    frozen = net[0]

    def step(i):
        opt.zero_grad()
        backward(net, i)
        opt.step()

    step(0)
    state = copy.deepcopy(opt.state[frozen.weight])
    frozen.requires_grad_(False)
    before = frozen.weight.detach().clone()
    for i in range(1, 4):
        step(i)
    assert torch.equal(frozen.weight, before)
    assert opt.state[frozen.weight].keys() == state.keys()
    assert all(torch.equal(opt.state[frozen.weight][k], v) for k, v in state.items())
    frozen.requires_grad_(True)
    step(4)
    assert not torch.equal(frozen.weight, before)
    assert torch.equal(unused.detach(), torch.ones(3))
    assert unused not in opt.state


def test_zero_redundancy_optimizer(tmp_path):
    """torch's ZeRO-1 wrapper takes third-party optimizers; on one process it must be the plain run."""
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain, sharded = make_net(), make_net()
        opt = normopt.LPSGDM(plain.parameters(), lr=0.01, agr=True)
        zero = ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=normopt.LPSGDM, lr=0.01, agr=True)
        for i in range(4):
            for net, o in ((plain, opt), (sharded, zero)):
                o.zero_grad()
                backward(net, i)
                o.step()
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(a, b)
        zero.consolidate_state_dict()
        assert len(zero.state_dict()["state"]) == len(opt.state_dict()["state"])
    finally:
        dist.destroy_process_group()

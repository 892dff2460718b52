"""The step by which torch.distributed.checkpoint creates an optimizer's state: for whatever watches it, it is none."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import normopt
from normopt import GeometryMonitor, TrajectoryMonitor
from normopt.addons import AGR, LpDecay

STEPS = 4
OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0),
    "AdamW tensor lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), weight_decay=0, foreach=False),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01),
    "SGD tensor lr": lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.01)),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    "for-loop": lambda ps: normopt.LPSGD(ps, lr=0.01, p=3.0, foreach=False),
    "foreach": lambda ps: normopt.LPSGD(ps, lr=0.01, p=3.0, foreach=True),
    "fused": lambda ps: normopt.LPSGD(ps, lr=0.01, p=3.0, fused=True),
    "tensor lr": lambda ps: normopt.LPSGD(ps, lr=torch.tensor(0.01), p=3.0),
    "momentum": lambda ps: normopt.LPSGDM(ps, lr=0.01, p=3.0),
}

TORCHS = ("AdamW", "AdamW tensor lr", "SGD", "SGD tensor lr", "SGD momentum")
WATCHERS = ("geometry", "sketch", "may_skip", "directory", "decay")
PAIRS = [(name, watcher) for name in OPTIMIZERS for watcher in (*WATCHERS, "agr" if name in TORCHS else "schedule")]


def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    return model


def backward(model, step):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


class Watched:
    """A training with one observer, and what that has seen."""

    def __init__(self, make, watcher, directory):
        self.model = network()
        self.opt = make(self.model.parameters())
        ours = isinstance(self.opt, normopt.SteepestDescent)
        self.watcher = watcher
        if watcher == "geometry":
            self.seen = GeometryMonitor(self.opt, every=1)
        elif watcher in ("sketch", "may_skip", "directory"):
            folder = directory if watcher == "directory" else None
            self.seen = TrajectoryMonitor(self.opt, sketch=64, may_skip=watcher == "may_skip", directory=folder)
        elif watcher == "agr":
            self.seen = AGR(self.opt)
        elif watcher == "decay":
            self.seen = LpDecay(self.opt, weight_decay=0.1, warmup=3, over="rows" if ours else "entries")
        else:
            self.seen = normopt.schedules.AdaptiveP(self.opt)

    def step(self, i):
        loss = backward(self.model, i)
        if isinstance(self.seen, TrajectoryMonitor):
            self.seen.record(loss)
        self.opt.step()
        if self.watcher == "schedule":
            self.seen.step()

    def state(self):
        """All that the observer holds, what it has put into the groups, and the weights."""
        seen = self.seen
        if isinstance(seen, GeometryMonitor):
            held = [seen.steps, seen._snapshots, seen.rows.tobytes()]
        elif isinstance(seen, TrajectoryMonitor):
            state = seen.state_dict()
            store = {k: v.tolist() if isinstance(v, torch.Tensor) else str(v) for k, v in state.pop("store").items()}
            held = [str(state), str(store)]
        elif isinstance(seen, normopt.schedules.AdaptiveP):
            held = [str(seen.state_dict())]
        else:
            held = [len(seen._swapped if isinstance(seen, AGR) else seen._pending)]
        groups = [{k: str(v) for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        weights = [p.tolist() for p in self.model.parameters()]
        entered = seen._outermost._frame if hasattr(seen, "_outermost") else None
        return held, groups, weights, [p.grad is None for p in self.model.parameters()], entered


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("loading", [False, True], ids=["saved", "loaded"])
@pytest.mark.parametrize(("name", "watcher"), PAIRS)
def test_the_step_that_creates_state_is_seen_by_none(name, watcher, loading, at, tmp_path):
    trainings = [Watched(OPTIMIZERS[name], watcher, tmp_path / part) for part in ("with", "without", "saved")]
    for training in trainings:
        for i in range(at):
            training.step(i)
        training.opt.zero_grad()
    with_one, without, saved = trainings
    before = with_one.state()
    if loading:
        set_optimizer_state_dict(with_one.model, with_one.opt, get_optimizer_state_dict(saved.model, saved.opt))
    else:
        get_optimizer_state_dict(with_one.model, with_one.opt)
    assert with_one.state() == before
    for i in range(at, STEPS):
        with_one.step(i)
        without.step(i)
    found, expected = with_one.state(), without.state()
    if name.startswith("AdamW") and at == 0:  # whose own count of steps it is part of
        found, expected = found[1], expected[1]
    assert found == expected
    if watcher == "geometry":
        assert with_one.seen.rows["step"].tolist() == list(range(STEPS))
    elif watcher in ("sketch", "may_skip", "directory"):
        assert with_one.seen.result().lr.tolist() == pytest.approx([0.01] * STEPS)
    elif watcher == "decay":
        assert with_one.opt.param_groups[0]["lp_step"] == 3


def test_under_accelerate_which_hands_none_on_by_position():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01))
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, may_skip=True)
    LpDecay(opt, warmup=2)
    get_optimizer_state_dict(model, Accelerator(cpu=True).prepare(opt))
    assert geometry.steps == trajectory._stepped == opt.param_groups[0]["lp_step"] == 0


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("how", [((None,), {}), ((), {"closure": None})], ids=["position", "keyword"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("value", [1.0, 1e-30, float("nan")])
def test_a_warm_up_that_begins_at_0_is_counted(value, make, how, lr):
    params = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))]
    opt = make(params, lr=lr, weight_decay=0, foreach=False)
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, sketch=64)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[-1].grad[-1] = value
    args, kwargs = how
    opt.step(*args, **kwargs)
    assert geometry.steps == trajectory._stepped == 1


@pytest.mark.parametrize("case", ["lr", "one group's lr", "state", "no gradient", "closure", "no argument"])
def test_a_step_that_may_move_something_is_counted(case):
    params = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))]
    opt = torch.optim.AdamW([{"params": [p]} for p in params], lr=0.0)
    if case == "lr":
        opt = torch.optim.SGD(params, lr=0.1)
    elif case == "one group's lr":
        opt.param_groups[1]["lr"] = 0.1
    for p in params:
        p.grad = torch.zeros_like(p)
    if case == "state":
        opt.step()
    elif case == "no gradient":
        params[1].grad = None
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, sketch=64)
    if case == "closure":
        opt.step(closure=lambda: 0.0)
    elif case == "no argument":
        opt.step()
    else:
        opt.step(closure=None)
    assert geometry.steps == trajectory._stepped == 1

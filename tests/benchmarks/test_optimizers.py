from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normopt
from benchmarks import optimizers
from benchmarks.control import LengthOfLPSGDM
from benchmarks.optimizers import OPTIMIZERS, check, described, find, make_optimizer
from benchmarks.study.presets import LEARNING_RATES
from benchmarks.study.spec import PSchedule, RunSpec
from benchmarks.tasks import TASKS
from normopt.schedules import CosineP, LinearP


def spec(optimizer: str, settings: dict[str, Any], **changes: Any) -> RunSpec:
    plain: dict[str, Any] = dict(task="digits", optimizer=optimizer, settings=settings, seed=1)
    return RunSpec.model_validate(plain | dict(epochs=4, batch_size=64) | changes)


def made(optimizer: str, model: nn.Module | None = None, **settings: Any) -> torch.optim.Optimizer:
    model = TASKS["digits"].build() if model is None else model
    return make_optimizer(spec(optimizer, {"lr": 0.01} | settings), model, TASKS["digits"])[0]


class Mine(torch.optim.Optimizer):
    """A newcomer's own: half of plain SGD."""

    def __init__(self, params: Any, lr: float, share: float = 0.5) -> None:
        super().__init__(params, dict(lr=lr, share=share))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["share"])


def test_every_optimizer_of_the_zoo_is_there_and_every_one_has_a_rule():
    assert set(normopt.list_optimizers()) <= set(OPTIMIZERS)
    assert {"adamw", "sgd-torch", "signum", "sgd-ema", "lpsgdm-lr-matched"} <= set(OPTIMIZERS)
    assert all(entry.rule and "\n" not in entry.rule for entry in OPTIMIZERS.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_the_digits(name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = TASKS["digits"]
    model = task.build()
    lr = LEARNING_RATES.get(name)
    rate = math.sqrt(lr.low * lr.high) / 3 if lr else 0.01
    optimizer = made(name, model, lr=rate)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    x, y = (part[:64] for part in task.load().train)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "task", ["digits-mix", "digits-noise", "breast-cancer", "diabetes-sparse", "bytes", "quadratic"]
)
def test_every_optimizer_can_step_on_every_kind_of_model(task):
    torch.set_num_threads(1)
    chosen = TASKS[task]
    x, y = (part[:8] for part in chosen.load().train)
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model = chosen.build()
        optimizer, _ = make_optimizer(spec(name, {"lr": 1e-3}, task=task), model, chosen)
        chosen.loss(model(x), y).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters()), name


def test_length_of_lpsgdm_agrees_with_numpy():
    draws = np.random.default_rng(0)
    for p in (1.5, 2.0, 3.0, 8.0, math.inf):
        w = draws.standard_normal((5, 7))
        param = nn.Parameter(torch.from_numpy(w.copy()))
        optimizer = LengthOfLPSGDM([param], lr=0.1, p=p, momentum=0.8)
        m = np.zeros_like(w)
        for step in range(4):
            g = draws.standard_normal(w.shape) * 10.0 ** (-3 * step)
            g[0] = 0
            param.grad = torch.from_numpy(g.copy())
            optimizer.step()
            m = 0.8 * m + 0.2 * g
            u = np.sign(m) * np.abs(m) ** (1 / (p - 1))
            w = w - 0.1 * m * np.sqrt((u**2).mean()) / np.sqrt((m**2).mean())
            np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-12, atol=1e-12)


def test_length_of_lpsgdm_is_sgd_at_two_and_as_long_as_lpsgdm_at_any_p():
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 5), [torch.randn(6, 5) * 1e-6 for _ in range(3)]

    def walk(make: Any, **settings: Any) -> list[torch.Tensor]:
        w = nn.Parameter(torch.zeros(6, 5))
        optimizer, seen = make([w], lr=0.5, **settings), []
        for g in gradients:
            before, w.grad = w.detach().clone(), g.clone()
            optimizer.step()
            seen.append(w.detach() - before)
        return seen

    ema = dict(norm="l2", momentum=0.9, momentum_rule="ema")
    for ours, theirs in zip(walk(LengthOfLPSGDM, p=2.0), walk(normopt.SteepestDescent, **ema), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    pairs = zip(walk(LengthOfLPSGDM, p=8.0), walk(normopt.LPSGDM, p=8.0, eps=0.0), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-5, atol=0)
    assert start.isfinite().all()


def test_length_of_lpsgdm_decays_the_weights_as_lpsgdm_does():
    moved = []
    for make in (LengthOfLPSGDM, normopt.LPSGDM):
        w = nn.Parameter(torch.full((4,), 2.0))
        w.grad = torch.zeros(4)
        make([w], lr=0.5, p=6.0, weight_decay=0.1).step()
        moved.append(w.detach().clone())
    torch.testing.assert_close(moved[0], torch.full((4,), 1.9))
    torch.testing.assert_close(moved[0], moved[1])


def test_length_of_lpsgdm_stands_still_without_a_gradient_and_refuses_what_is_out_of_range():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    LengthOfLPSGDM([w], p=math.inf).step()
    assert torch.equal(w.detach(), torch.ones(3))
    for wrong in (dict(p=1.0), dict(lr=-1.0), dict(momentum=1.0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be in"):
            LengthOfLPSGDM([w], **wrong)


def test_settings_reach_the_optimizer():
    group = made("lpsgdm", p="inf", agr=True, decay="lp", decay_p=0.8, weight_decay=0.2).param_groups[0]
    picked = {key: group[key] for key in ("p", "agr", "decay", "decay_p", "weight_decay", "lr")}
    assert picked == dict(p=math.inf, agr=True, decay="lp", decay_p=0.8, weight_decay=0.2, lr=0.01)
    assert made("sgd").param_groups[0]["momentum"] == 0.9
    assert made("sgd", momentum=0.0).param_groups[0]["momentum"] == 0.0
    assert made("adamw", beta1=0.8).param_groups[0]["betas"] == (0.8, 0.999)
    assert made("steepestdescent", norm="schatten", p=3.0, scale="unit").param_groups[0]["norm"] == "schatten"


def test_the_decay_of_one_step_is_divided_by_the_learning_rate():
    assert made("lpsgdm", decay="lp", decay_p=0.8, decay_step=3e-4).param_groups[0]["weight_decay"] == 3e-4 / 0.01
    assert made("adamw", decay_step=3e-4).param_groups[0]["weight_decay"] == 3e-4 / 0.01
    with pytest.raises(ValueError, match="set one of the two"):
        made("sgd", decay_step=1e-4, weight_decay=0.1)


def test_a_preset_gives_every_layer_its_norm():
    assert {g["norm"] for g in made("muon").param_groups} == {"spectral", "linf"}
    assert {g["norm"] for g in made("muon", preset="none").param_groups} == {"spectral"}
    assert {g["norm"] for g in made("sgd", preset="scale").param_groups} == {"row", "linf"}
    torch.manual_seed(0)
    deep = TASKS["bytes"].build()
    kinds = {g["kind"] for g in make_optimizer(spec("modular", {"lr": 0.1}), deep, TASKS["bytes"])[0].param_groups}
    assert kinds == {"embedding", "linear", "qkv", "output", "norm", "bias"}
    with pytest.raises(ValueError, match="preset must be one of muon"):
        made("sgd", preset="layers")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lpsgd", {"beta": 0.9}, r"lpsgd has no setting 'beta'.*it has .*\bagr\b.*\blr\b"),
        ("adamw", {"p": 3.0}, "adamw has no setting 'p'.*beta1"),
        ("sgd-ema", {"norm": "linf"}, "norm is what makes sgd-ema what it is, 'l2'"),
        ("lpsgm", {}, "unknown optimizer 'lpsgm'; did you mean 'lpsgdm'"),
        ("nowhere_at_all:Mine", {}, "cannot be imported: No module named"),
        ("math:sqrt", {}, "is no torch.optim.Optimizer"),
        ("math:root", {}, "cannot be imported"),
        ("adamw", {"decay": "coupled"}, 'decay can only be "lp"'),
        ("adamw", {"decay_p": 0.8}, 'decay can only be "lp"'),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_allowed(name, settings, message):
    with pytest.raises(ValueError, match=message):
        made(name, **settings)


def test_an_optimizer_of_ones_own_joins_by_its_module_and_name():
    name = f"{__name__}:Mine"
    assert find(name).rule == f"Mine of {__name__}"
    check(name, {"lr": 0.1, "share": 0.2})
    assert made(name, share=0.2).param_groups[0]["share"] == 0.2
    with pytest.raises(ValueError, match="has no setting 'shares'; did you mean 'share'"):
        check(name, {"shares": 0.1})


@pytest.mark.parametrize(("kind", "cls"), [("cosine", CosineP), ("linear", LinearP)])
def test_a_schedule_of_p_moves_from_the_optimizers_own(kind, cls):
    s = spec("lpsgdm", {"lr": 0.01, "p": 6.0}, p_schedule=PSchedule(kind=kind, p_end=3.0))
    optimizer, schedule = make_optimizer(s, TASKS["digits"].build(), TASKS["digits"])
    assert isinstance(schedule, cls)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["p"])
        schedule.step()
    assert (seen[0], seen[-1]) == (6.0, 3.0)


def test_an_adaptive_schedule_reads_the_gradients():
    s = spec("lpsgdm", {"lr": 0.01}, p_schedule=PSchedule(kind="adaptive"))
    task, model = TASKS["digits"], TASKS["digits"].build()
    optimizer, schedule = make_optimizer(s, model, task)
    x, y = task.load().train
    task.loss(model(x), y).backward()
    optimizer.step()
    schedule.step()
    assert 2 <= optimizer.param_groups[0]["p"] <= 8


def test_a_schedule_by_curvature_moves_p_by_the_anisotropy(monkeypatch):
    class Found:
        size, anisotropy = 10_000, 100.0

    seen = []
    monkeypatch.setattr(optimizers, "hessian_spectrum", lambda *args, **kwargs: seen.append(args) or Found)
    s = spec("lpsgdm", {"lr": 0.01, "p": 6.0}, p_schedule=PSchedule(kind="curvature", p_end=2.0))
    task, model = TASKS["digits"], TASKS["digits"].build()
    optimizer, schedule = make_optimizer(s, model, task)
    group = optimizer.param_groups[0]
    assert 1 / (group["p"] - 1) == pytest.approx((1 + 1 / 5) / 2)  # half of the way, as 100² is 10,000
    for anisotropy, p in ((1.0, 2.0), (10_000.0, 6.0)):
        Found.anisotropy = anisotropy
        schedule.step()
        assert group["p"] == pytest.approx(p)
    assert [args[0] for args in seen] == [model] * 3
    monkeypatch.undo()
    schedule.step()
    assert 2 < group["p"] < 6
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    schedule.step()
    assert group["p"] == 2


@pytest.mark.parametrize("name", ["adamw", "sgd-torch", "lpsgdm-lr-matched"])
def test_regularizers_on_optimizers_of_others_are_normopts_add_ons(name):
    torch.manual_seed(0)
    group = made(name, agr=True, decay="lp", decay_p=0.8, decay_step=3e-4).param_groups[0]
    assert group["agr"] is True
    assert (group["lp_decay"], group["lp_p"]) == (3e-4 / 0.01, 0.8)
    assert group.get("weight_decay", 0.0) == 0.0


def test_sgd_with_add_ons_is_sgd_with_the_settings_of_the_engine():
    task = TASKS["digits"]
    x, y = (part[:64] for part in task.load().train)
    ends = []
    for name in ("sgd", "sgd-torch"):
        torch.manual_seed(0)
        model = task.build()
        optimizer = made(name, model, lr=0.1, agr=True, decay="lp", decay_p=0.8, weight_decay=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_is_not_here_is_called_by_its_name():
    assert described("nowhere:Optimizer").rule == "nowhere:Optimizer, which is not to be found here"
    assert described("sgd") == find("sgd")

"""Other people's trainers: the examples run as they stand, and the calls of those that are not installed."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch

import normopt
from normopt.integrations import timm as timm_integration
from tests.patience import patience

NAMES = normopt.list_optimizers()
ROOT = Path(__file__).parent.parent


def run_example(name: str) -> str:
    code = (
        "from benchmarks.vision import allow_torchvision_import as allow; allow(); import runpy; "
        f"runpy.run_path('examples/{name}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_sharded_example(tmp_path):
    """Two ranks, stopped, and four that go on to what two would have come to."""

    def run(ranks, folder, *words):
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *module, "examples/sharded_digits.py", "--folder", str(tmp_path / folder), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60), env=environment)
        assert done.returncode == 0, done.stderr
        return re.findall(r"(\d) ranks, from epoch (\d+).*\nepoch (\d+): test accuracy (\S+) %", done.stdout)[0]

    *_, straight = run(2, "straight", "--epochs", "4")
    assert run(2, "moved", "--epochs", "4", "--stop-after", "2")[:3] == ("2", "0", "2")
    assert run(4, "moved", "--epochs", "4") == ("4", "2", "4", straight)
    assert float(straight) > 80
    assert run(2, "muon", "--epochs", "1", "--optimizer", "muon")[:3] == ("2", "0", "1")


def test_lightning_example():
    """Trains, stops, resumes; both schedules have run to their ends."""
    out = run_example("lightning_digits.py")
    accuracy, p, lr = map(float, re.search(r"accuracy (\S+), p has gone from 8 to (\S+), lr to (\S+)", out).groups())
    assert accuracy > 0.95
    assert p == 2
    assert lr == 0


@pytest.mark.exhaustive
def test_accelerate_example():
    out = run_example("accelerate_digits.py")
    accuracy, zeros, p = re.search(r"accuracy (\S+), (\S+)% of the weights are zero, p = (\S+)", out).groups()
    assert float(accuracy) > 0.9
    assert float(zeros) > 20
    assert float(p) == 2


def decay_groups(net):
    """Hugging Face Trainer's two groups: everything that decays, and biases and norms, which do not."""
    decays = [p for p in net.parameters() if p.dim() >= 2]
    spared = [p for p in net.parameters() if p.dim() < 2]
    return [{"params": decays, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]


@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_trainers_optimizer_cls_and_kwargs(name):
    """``Trainer(optimizer_cls_and_kwargs=(cls, kwargs))`` calls ``cls(groups, **kwargs)``."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    optimizer_cls, optimizer_kwargs = normopt.get_optimizer(name), {"lr": 0.01, "agr": True}
    opt = optimizer_cls(decay_groups(net), **optimizer_kwargs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.0, 1 - step / 10))
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        net(torch.randn(5, 4)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        net.zero_grad()
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.007)
    assert any(not torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_skorchs_call_pattern(name):
    """skorch builds ``cls(groups, **kwargs)`` from ``optimizer__*``, steps with a closure, and sets lr by group."""
    net = torch.nn.Linear(4, 2)
    cls = normopt.get_optimizer(name)
    unit = 1 / cls([torch.nn.Parameter(torch.zeros(1))]).defaults["radius"]  # Scion's radius is 50
    opt = cls([{"params": [net.weight], "lr": 0.02 * unit}, {"params": [net.bias]}], lr=0.01 * unit)
    x = torch.randn(6, 4)

    def step_fn():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    losses = [opt.step(step_fn).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    for group in opt.param_groups:  # net.set_params(optimizer__lr=0)
        group["lr"] = 0.0
    before = net.weight.detach().clone()
    opt.step(step_fn)
    assert torch.equal(net.weight, before) or name == "stacey"  # whose coupling is not multiplied by lr


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_told_once(name):
    """jsonargparse reads the signature, and unpacks the type hint of ``**settings`` if there is one."""
    made = next(c for c in normopt.get_optimizer(name).__mro__ if "__init__" in vars(c)).__init__
    assert typing.get_type_hints(made)["settings"] is typing.Any
    assert "maximize" in inspect.signature(made).parameters


@pytest.fixture
def timm_stub(monkeypatch):
    """The part of timm 1.0.31's optimizer factory that registration touches."""

    @dataclasses.dataclass(frozen=True)
    class OptimInfo:
        name: str
        opt_class: type
        description: str = ""
        has_eps: bool = True
        has_momentum: bool = False
        has_betas: bool = False

    known = {"sgd": OptimInfo("sgd", torch.optim.SGD), "lion": OptimInfo("lion", torch.optim.SGD)}
    registry = types.SimpleNamespace(
        register=lambda info: known.update({info.name: info}), get_optimizer_info=known.__getitem__
    )
    package, optim, factory = (types.ModuleType(n) for n in ("timm", "timm.optim", "timm.optim._optim_factory"))
    optim.OptimInfo, optim.list_optimizers, factory.default_registry = OptimInfo, lambda: sorted(known), registry
    for module in (package, optim, factory):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return known


def test_timm_registration(timm_stub):
    names = timm_integration.register()
    assert set(names.values()) == {normopt.get_optimizer(n) for n in NAMES}
    assert names["lpsgdm"] is names["normoptlpsgdm"] is normopt.LPSGDM
    assert names["normoptsgd"] is normopt.SGD
    assert "sgd" not in names
    assert timm_stub["sgd"].opt_class is torch.optim.SGD
    assert timm_integration.register() == names
    for name, info in timm_stub.items():
        if name in names:
            # What timm's factory passes: weight_decay always, momentum and eps as the info says.
            kwargs = {"weight_decay": 0.01, "lr": 0.1}
            kwargs |= {"momentum": 0.9} if info.has_momentum else {}
            kwargs |= {"eps": 1e-8} if info.has_eps else {}
            info.opt_class([torch.nn.Parameter(torch.ones(2))], **kwargs)
            assert "_" not in name


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ImportError, match="pip install timm"):
        timm_integration.register()

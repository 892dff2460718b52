"""lr, p and weight_decay as tensors: a compiled step is one graph, and changing them compiles nothing anew."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import normopt
from normopt.stages import momentum

MORE = [
    ("lpsgdm", dict(agr=True, decay="lp", decay_p=0.8)),
    ("lpsgdm", dict(scale="matched")),
    ("lpsgdm", dict(scale="dual", foreach=True)),
    ("lpsgdm", dict(scale="dual", metric="diagonal", bias_correction=True)),
    ("sgd", dict(decay="lp", momentum=0.9, nesterov=True, maximize=True)),
    ("lpsgdm", dict(scale="relative", decay="cautious-lp", bias_correction=True, difference_beta=0.9, coupling=0.1)),
    ("muon", dict(row_beta=0.9, constraint="sphere", decay="lp", agr=True, agr_scope="group")),
]
EVERY_CASE = [*((name, {}) for name in normopt.list_optimizers()), *MORE]
KINDS = ("lion", "lpsgdm", "muon", "nucgd", "rownormsgd", "sgd")  # one of every norm, scale and momentum
CASES = [
    pytest.param(*case, marks=[] if case in MORE or case[0] in KINDS else pytest.mark.exhaustive) for case in EVERY_CASE
]


def make(name, settings, p):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((5, 4), (4,), ())]
    opt = normopt.get_optimizer(name)(params, lr=torch.tensor(0.1), weight_decay=torch.tensor(0.01), **settings)
    for group in opt.param_groups:
        if group["p"] is not None:  # LPSGD and its kin
            group["p"] = torch.tensor(p)
    return params, opt


def set_grads(params, seed):
    torch.manual_seed(seed)
    for w in params:
        g = torch.randn_like(w)
        w.grad = g if w.grad is None else w.grad.copy_(g)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_one_graph_that_schedules_do_not_recompile(name, settings):
    torch._dynamo.reset()
    eager_params, eager = make(name, settings, 8.0)
    params, opt = make(name, settings, 8.0)
    for ps, o in ((eager_params, eager), (params, opt)):
        set_grads(ps, 0)
        o.step()  # the first step makes the buffers
    counter = CompileCounter()
    compiled = torch.compile(opt.step, backend=counter, fullgraph=True)
    for i, p in enumerate((8.0, 5.0, 3.0, 2.0, math.inf), start=1):
        for ps, o in ((eager_params, eager), (params, opt)):
            set_grads(ps, i)
            group = o.param_groups[0]
            group["lr"].fill_(0.1 / i)
            group["weight_decay"].fill_(0.01 * i)
            if isinstance(group["p"], torch.Tensor):
                group["p"].fill_(p)
        eager.step()
        compiled()
    assert counter.frame_count == 1
    for a, b in zip(eager_params, params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_numbers_that_change_leave_one_graph():
    """A second optimizer with other numbers, and an lr that changes: Dynamo then takes them as unknown floats."""
    torch._dynamo.reset()
    for lr, mu in ((0.1, 0.9), (0.2, 0.8)):
        (eager_p, p), how = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)), dict(p=3.0, momentum=mu)
        eager, opt = (normopt.LPSGDM([x], lr=lr, weight_decay=0.1, **how) for x in (eager_p, p))
        compiled = torch.compile(opt.step, backend="eager", fullgraph=True)
        for i in range(3):
            for x, o in ((eager_p, eager), (p, opt)):
                set_grads([x], i)
                o.param_groups[0]["lr"] = lr / (1 + i)
            eager.step()
            compiled()
        torch.testing.assert_close(p, eager_p, rtol=1e-6, atol=1e-7)


def test_a_step_compiled_inside_autocast_is_one_graph_and_the_step_outside():
    torch._dynamo.reset()
    (eager_params, eager), (params, opt) = (make("spectralsgd", {}, 8.0) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(opt.step, backend=counter, fullgraph=True)
    for i in range(3):
        for ps in (eager_params, params):
            set_grads(ps, i)
        eager.step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled()
    assert counter.frame_count == 1
    for a, b in zip(eager_params, params, strict=True):
        assert torch.equal(a, b)


# That a step under a compiler takes no kernels is decided for all norms in one place; of those that have none,
# test_one_graph_that_schedules_do_not_recompile tests the same graph.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "lpsgdm" else pytest.mark.exhaustive) for n in KINDS]
)
def test_more_entries_than_are_tiny_are_one_graph(name):
    """Uncompiled, these would be stepped by kernels where there are any."""
    torch._dynamo.reset()
    (eager_p, p) = (torch.nn.Parameter(torch.ones(200, 200)) for _ in range(2))
    eager, opt = (normopt.get_optimizer(name)([x], lr=0.1, fused=how) for x, how in ((eager_p, False), (p, None)))
    compiled = torch.compile(opt.step, backend="eager", fullgraph=True)
    for i in range(2):
        set_grads([eager_p, p], 2 * i)
        p.grad.copy_(eager_p.grad)
        eager.step()
        compiled()
    torch.testing.assert_close(p, eager_p, rtol=1e-5, atol=1e-6)


def test_tensor_settings_equal_numbers():
    def run(wrap):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        opt = normopt.LPSGDM([w], lr=wrap(0.1), p=wrap(8.0), weight_decay=wrap(0.01), agr=True, decay="lp")
        sched = normopt.schedules.CosineP(opt, total_steps=8)
        for i in range(10):
            set_grads([w], i)
            opt.step()
            sched.step()
        return w.detach(), opt

    by_number, _ = run(float)
    by_tensor, opt = run(lambda x: torch.tensor(x, dtype=torch.float64))
    assert float(opt.param_groups[0]["p"]) == 2.0
    torch.testing.assert_close(by_tensor, by_number, rtol=1e-12, atol=0)


class NoReading(TorchDispatchMode):
    """Fails on the one operator through which every value goes that is read on the host, from C++ too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "settings"), EVERY_CASE, ids=str)
def test_no_tensor_is_read_on_the_host(name, settings, monkeypatch):
    """Reading a device value on the host would stall every step on a GPU."""
    monkeypatch.setattr(momentum, "on_host", lambda xs: False)  # as if the counts of steps were on a device
    params, opt = make(name, settings, 8.0)
    for seed in range(2):
        set_grads(params, seed)
        # A sphere reads at its first step whether a tensor is zero.
        with nullcontext() if seed == 0 and "constraint" in settings else NoReading():
            opt.step()
    with pytest.raises(AssertionError, match="read on the host"), NoReading():
        float(params[2].detach())

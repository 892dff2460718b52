"""Attaching, detaching, saving and restoring, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import normopt
from normopt.addons import AGR, LpDecay
from tests.addons.optimizers import CASES, build, copies, give, gradients, same

# The first step of Retrying is its own story.
NAMES = [name for name in CASES if name != "Retrying"]


def attach(kind, opt, **settings):
    return kind(opt, **dict(p=0.8, weight_decay=0.1) | settings) if kind is LpDecay else kind(opt)


def train(params, opt, recorded):
    for gs in recorded:
        give(params, gs)
        opt.step()
    return copies(params)


@pytest.mark.parametrize("name", NAMES)
def test_attached_and_detached_it_never_was(name):
    params, opt = build(name, torch.float32)
    plain_params, plain = build(name, torch.float32)
    recorded = gradients(params, 4)
    train(params, opt, recorded[:2])
    kept = copy.deepcopy(opt.state_dict()["param_groups"])
    agr, decay = AGR(opt), LpDecay(opt)
    assert opt.state_dict()["param_groups"] != kept
    decay.detach()
    agr.detach()
    agr.detach()  # once is enough
    assert type(opt) is type(plain)
    train(params, opt, recorded[2:])
    train(plain_params, plain, recorded)
    assert same(params, plain_params)
    assert opt.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    for hooks in (opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks):
        assert not hooks
    AGR(opt)  # and again


@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_twice_is_refused(kind):
    _, opt = build("SGD")
    first = attach(kind, opt)
    with pytest.raises(ValueError, match="already"):
        attach(kind, opt)
    first.detach()
    attach(kind, opt)
    _, other = build("SGD")
    attach(kind, other)


@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_what_it_cannot_hang_on(kind):
    ws = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, but was given a Linear"):
        kind(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LBFGS"):
        kind(torch.optim.LBFGS(ws))
    with pytest.raises(ValueError, match="differentiable"):
        kind(torch.optim.SGD(ws, lr=0.1, differentiable=True))
    setting = "agr=True" if kind is AGR else r'decay="lp", weight_decay=…, decay_p=…'
    with pytest.raises(ValueError, match=setting):
        kind(normopt.LPSGDM(ws))

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.optimizer = inner

        param_groups = property(lambda self: self.optimizer.param_groups)

    with pytest.raises(TypeError, match="before you wrap it"):  # accelerate's is one such
        kind(Wrapper(torch.optim.SGD(ws)))

    class HasItsOwn(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params)
            self.defaults |= {"agr": 1, "lp_p": 1}

    with pytest.raises(ValueError, match="of its own"):
        kind(HasItsOwn(ws))


@pytest.mark.parametrize("kind", [AGR, LpDecay])
@pytest.mark.parametrize("cls", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_are_refused_before_anything_is_written(kind, cls):
    table = torch.nn.Embedding(4, 2, sparse=True)
    opt = cls(table.parameters(), lr=0.1)
    addon = kind(opt)
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    gradient = table.weight.grad
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(table.weight, before)
    assert table.weight.grad is gradient
    addon.detach()
    opt.step()
    assert not torch.equal(table.weight, before)


def test_a_refusal_leaves_no_trace():
    w, v = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    opt = torch.optim.SGD([{"params": [w]}, {"params": [v], "agr": 1, "lp_p": -1.0}], lr=0.1)
    before = copy.deepcopy([{k: x for k, x in group.items() if k != "params"} for group in opt.param_groups])
    for kind, error in ((AGR, TypeError), (LpDecay, ValueError)):
        with pytest.raises(error, match="group 1"):
            kind(opt)
    assert [{k: x for k, x in group.items() if k != "params"} for group in opt.param_groups] == before
    assert not opt._optimizer_step_pre_hooks


def test_groups_have_settings_of_their_own():
    ws = [torch.nn.Parameter(torch.full((2, 2), 0.5)) for _ in range(3)]
    opt = torch.optim.SGD(
        [
            {"params": [ws[0]], "lp_decay": 0.0, "agr": False},
            {"params": [ws[1]], "lp_decay": 0.3, "lp_p": 2.0, "lr": 1.0},
            {"params": [ws[2]]},
        ],
        lr=0.5,
    )
    AGR(opt)
    LpDecay(opt, p=1.0, weight_decay=0.1)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.full((2, 2), 0.5))]})
    ws.append(opt.param_groups[3]["params"][0])
    assert "lp_p" not in opt.param_groups[3]
    g = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    give(ws, [g] * 4)
    opt.step()
    u = g * (1 - g)
    assert torch.allclose(ws[0], 0.5 - 0.5 * g)
    assert torch.allclose(ws[1], (0.5 - u) / (1 + 2 * 0.3))
    for w in ws[2:]:
        assert torch.allclose(w, (0.5 - 0.5 * u) * 0.5 / (0.5 + 0.5 * 0.1))
    assert opt.param_groups[3]["lp_p"] == 1.0
    # A schedule writes them, and the next step reads them.
    opt.param_groups[2]["lp_decay"], opt.param_groups[2]["agr"] = torch.tensor(0.2), False
    old = ws[2].detach().clone()
    opt.step()
    assert torch.allclose(ws[2], (old - 0.5 * g) * old / (old + 0.5 * 0.2))
    opt.param_groups[2]["lp_p"] = 0.0
    with pytest.raises(ValueError, match="lp_p of group 2"):
        opt.step()


@pytest.mark.parametrize("name", ["AdamW", "SGD foreach", "Adan"])
def test_saved_and_restored_it_goes_on_with_the_same_bits(name):
    params, opt = build(name, torch.float32)
    recorded = gradients(params, 6)
    AGR(opt)
    LpDecay(opt, p=0.7, weight_decay=0.2, warmup=5, over="rows")
    train(params, opt, recorded[:3])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    here = copies(params)
    end = train(params, opt, recorded[3:])

    for attached_first in (True, False):
        new_params, new = build(name, torch.float32)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if attached_first:
            AGR(new)
            LpDecay(new, p=2.0, weight_decay=0.3)
        new.load_state_dict(saved)
        if not attached_first:  # the settings are there already
            AGR(new)
            with pytest.warns(UserWarning, match="lp_p = 0.7"):
                LpDecay(new, p=2.0, weight_decay=0.3)
        assert [new.param_groups[0][k] for k in ("agr", "lp_p", "lp_over", "lp_step")] == [True, 0.7, "rows", 3]
        with torch.no_grad():
            for p, w in zip(new_params, here, strict=True):
                p.copy_(w)
        assert same(train(new_params, new, recorded[3:]), end)


def test_a_checkpoint_from_before_leaves_the_settings():
    params, opt = build("AdamW", torch.float32)
    recorded = gradients(params, 2)
    train(params, opt, recorded)
    saved = copy.deepcopy(opt.state_dict())
    _, new = build("AdamW", torch.float32)
    AGR(new)
    LpDecay(new, p=0.7, weight_decay=0.2)
    new.param_groups[0]["agr"] = False
    new.load_state_dict(saved)
    assert [new.param_groups[0][k] for k in ("agr", "lp_p", "lp_decay")] == [False, 0.7, 0.2]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        new.load_state_dict({"state": {}, "param_groups": []})
    # And one with the settings is nothing to an optimizer without the add-ons.
    plain_params, plain = build("AdamW", torch.float32)
    plain.load_state_dict(new.state_dict())
    train(plain_params, plain, recorded)


def test_a_group_keeps_all_that_it_had_and_a_warning_says_so():
    ws = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    opt = torch.optim.SGD([{"params": [ws[0]]}, {"params": [ws[1]], "lp_decay": 0.0}, {"params": [ws[2]]}], lr=0.1)
    opt.param_groups[2]["lp_decay"] = torch.tensor(0.2)
    LpDecay(opt, p=0.7, weight_decay=0.2)  # settings of a group's own are no surprise
    twin = copy.deepcopy(opt)
    twin.param_groups[0]["lp_step"] = 3
    with pytest.warns(UserWarning, match="as from") as told:
        LpDecay(twin, weight_decay=0.2, warmup=4)
    (first, second, third) = (str(w.message) for w in told)
    assert "group 0" in first
    assert "keeps lp_p = 0.7, lp_warmup = 0 instead of the arguments' p = 0.8, warmup = 4" in first
    assert "optimizer.param_groups[0]['lp_p'] = 0.8" in first
    assert "keeps lp_decay = 0.0, lp_p" in second
    assert "keeps lp_p" in third  # a tensor is not read
    assert told[0].filename == __file__
    assert [group["lp_p"] for group in twin.param_groups] == [0.7] * 3
    LpDecay(copy.deepcopy(opt), p=0.7, weight_decay=torch.tensor(0.2))


def test_a_misspelt_setting_of_a_group_is_refused():
    w = torch.nn.Parameter(torch.ones(2, 2))
    opt = torch.optim.SGD([{"params": [w], "lp_decy": 0.0}], lr=0.1)
    with pytest.raises(ValueError, match="group 0 has an unknown setting 'lp_decy'; did you mean 'lp_decay'"):
        LpDecay(opt)
    assert "lp_p" not in opt.param_groups[0]
    assert not opt._optimizer_step_pre_hooks


def test_the_authors_name_of_the_decay_is_not_passed_over():
    w = torch.nn.Parameter(torch.ones(2, 2))
    opt = torch.optim.SGD([{"params": [w], "lambda_p": 0.0}], lr=0.1)
    with pytest.raises(ValueError, match=r"group 0 has lambda_p, the authors' name .* here it is lp_decay"):
        LpDecay(opt)
    with pytest.raises(ValueError, match="'lambda_p', which is not a setting: λ of ℓp decay is weight_decay"):
        normopt.SGD([{"params": [w], "lambda_p": 0.0}], weight_decay=0.1, decay="lp")


def test_how_it_is_shown():
    ws = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    opt = torch.optim.SGD([{"params": [ws[0]]}, {"params": [ws[1]], "lp_decay": 0.0}], lr=0.1)
    agr, decay = AGR(opt), LpDecay(opt, over="rows", weight_decay=1.0)
    assert repr(agr) == "AGR(SGD, agr=True, agr_scope='tensor', attached)"
    assert repr(decay) == (
        "LpDecay(SGD, lp_decay=[1.0, 0.0], lp_p=0.8, lp_over='rows', lp_heads=None, lp_warmup=0, lp_elastic=False, "
        "lp_step=0, attached)"
    )
    decay.detach()
    assert repr(decay) == "LpDecay(SGD, detached)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_settings_and_not_the_hooks(copied):
    params, opt = build("AdamW", torch.float32)
    AGR(opt)
    LpDecay(opt, p=0.7, weight_decay=0.2)
    recorded = gradients(params, 3)
    train(params, opt, recorded[:1])
    twin = copied(opt)
    assert not twin._optimizer_step_pre_hooks
    twins = twin.param_groups[0]["params"]
    AGR(twin)
    LpDecay(twin, p=0.7, weight_decay=0.2)
    assert same(train(twins, twin, recorded[1:]), train(params, opt, recorded[1:]))


def test_it_keeps_no_optimizer_alive():
    _, opt = build("SGD")
    AGR(opt)
    LpDecay(opt)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_a_scheduler_attached_before_or_after():
    ends = []
    for scheduler_first in (True, False):
        params, opt = build("SGD")
        schedules = []
        for what in (0, 1) if scheduler_first else (1, 0):
            if what == 0:
                schedules.append(torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=6))
            else:
                AGR(opt)
                LpDecay(opt)
        for gs in gradients(params, 5):
            give(params, gs)
            opt.step()
            schedules[0].step()
        ends.append(copies(params))
    assert same(*ends)


def test_a_step_that_raised_is_over():
    """Its hooks after the step never ran; neither the next step nor a step within one may take it for running."""

    class Fails(torch.optim.AdamW):
        fails = True

        @torch.no_grad()
        def step(self, closure=None):
            if self.fails:
                raise ArithmeticError
            return super().step(closure)  # so the hooks run twice

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 2))]
    opt = Fails(params, lr=0.1, weight_decay=0)
    twin_params = copies(params)
    twin = torch.optim.AdamW(twin_params, lr=0.1, weight_decay=0)
    for o in (opt, twin):
        AGR(o)
        LpDecay(o, weight_decay=0.3)
    first, second = gradients(params, 2)
    give(params, first)
    with pytest.raises(ArithmeticError) as kept:  # and its frames with it, as a notebook does
        opt.step()
    opt.fails = False
    for gs in (first, second):
        give(params, gs)
        opt.step()
        give(twin_params, gs)
        twin.step()
    assert same(params, twin_params)
    assert kept.value is not None


def test_a_step_that_a_compiler_has_cut_in_two():
    """Its second half runs in a frame of its own, within the first's."""
    params, opt = build("SGD")
    LpDecay(opt, weight_decay=0.5)
    before = copies(params)
    give(params, gradients(params, 1)[0])
    source = "def first(): pre(opt, (opt,), {}); second()\ndef second(): post(opt, (opt,), {})"
    (pre,), (post,) = opt._optimizer_step_pre_hooks.values(), opt._optimizer_step_post_hooks.values()
    scope = dict(pre=pre, post=post, opt=opt)
    exec(compile(source, torch.optim.Optimizer.profile_hook_step.__code__.co_filename, "exec"), scope)
    scope["first"]()
    assert not torch.equal(params[0], before[0])


def test_a_compiled_step_is_compiled_around_the_hooks():
    torch._dynamo.reset()
    counter = CompileCounter()
    ends = []
    for compiled in (False, True):
        params, opt = build("SGD foreach", lr=torch.tensor(0.05, dtype=torch.float64))
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        AGR(opt)
        LpDecay(opt, weight_decay=0.3, warmup=4)
        step = torch.compile(opt.step, backend=counter) if compiled else opt.step
        frames = []
        for gs in gradients(params, 6):
            give(params, gs)
            step()
            schedule.step()
            frames.append(counter.frame_count)
            assert same([p.grad for p in params], gs)
        assert opt.param_groups[0]["lp_step"] == 4
        ends.append(copies(params))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert frames[-1] == frames[1] > 0, frames  # the first makes the buffers; the lr and the warm-up compile nothing

"""What PyTorch's own test-suite asks of its optimizers, asked of every zoo member, over every kind of input.

The inputs come from ``torch.testing._internal.common_optimizers`` (see infos.py). torch ships that
generator, but not the tests that it drives, so the questions are put here.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.conformance.infos import INFOS

CASES = [
    pytest.param(info, inputs, id=f"{info.name}-{inputs.desc.replace(' ', '_')}")
    for info in INFOS
    for inputs in info.optim_inputs_func(device="cpu")
]
every_input = pytest.mark.parametrize(("info", "inputs"), CASES)
every_optimizer = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def kwargs_of(inputs, **more):
    """The input's settings, tensors copied, so that no test shares a tensor lr with another."""
    return {**copy.deepcopy(inputs.kwargs), **more}


def make_params(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 5), (5,), (2, 3, 2), (), (1,))]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def steps(params, opt, seeds):
    for seed in seeds:
        set_grads(params, seed)
        opt.step()


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


class Regression:
    """A convex problem with a closure, on which every optimizer must go downhill (or up, if asked to)."""

    def __init__(self):
        torch.manual_seed(3)
        self.weight = Parameter(torch.randn(10, 5))
        self.bias = Parameter(torch.randn(10))
        self.x = torch.randn(5)

    def loss(self):
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def closure(self, opt):
        opt.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


@every_input
@pytest.mark.parametrize("with_schedulers", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_goes_the_right_way(info, inputs, with_schedulers, foreach):
    for constructors in info.scheduler_inputs if with_schedulers else [[]]:
        task = Regression()
        opt = info.optim_cls([task.weight, task.bias], **kwargs_of(inputs, foreach=foreach))
        schedulers = [make(opt) for make in constructors]
        start = task.loss().item()
        for _ in range(60):
            loss = opt.step(lambda: task.closure(opt))  # noqa: B023
            for scheduler in schedulers:
                scheduler.step(loss.detach()) if "Plateau" in type(scheduler).__name__ else scheduler.step()
        end = task.loss().item()
        assert end > start if inputs.kwargs.get("maximize") else end < start


@every_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_foreach_equals_for_loop(info, inputs, dtype):
    runs = []
    for foreach in (False, True):
        params = make_params(dtype=dtype)
        opt = info.optim_cls(params, **kwargs_of(inputs, foreach=foreach))
        steps(params, opt, range(5))
        runs.append((params, opt))
    for a, b in zip(*(params for params, _ in runs), strict=True):
        tol = dict(rtol=2**-8, atol=1e-6) if dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a, b, **tol)
    assert [sorted(s) for s in runs[0][1].state.values()] == [sorted(s) for s in runs[1][1].state.values()]


@every_optimizer
@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_lr_of_any_shape(info, foreach):
    for inputs in info.optim_inputs_func(device="cpu"):
        if "lr" not in inputs.kwargs or inputs.desc == "tensor lr":
            continue
        lr = inputs.kwargs["lr"]
        expected = make_params(dtype=torch.float64)
        steps(expected, info.optim_cls(expected, **kwargs_of(inputs, foreach=foreach)), range(4))
        for shape in ((), (1,), (1, 1)):
            params = make_params(dtype=torch.float64)
            tensor = torch.full(shape, lr, dtype=torch.float64)
            opt = info.optim_cls(params, **kwargs_of(inputs, lr=tensor, foreach=foreach))
            steps(params, opt, range(4))
            kept = opt.param_groups[0]["lr"]  # the group's own copy, which a schedule writes into
            assert kept is not tensor
            assert torch.equal(kept, tensor)
            for a, b in zip(params, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every_input
def test_named_parameters(info, inputs):
    plain, named = make_params(), make_params()
    opts = [
        info.optim_cls(plain, **kwargs_of(inputs)),
        info.optim_cls([(f"layer{i}", p) for i, p in enumerate(named)], **kwargs_of(inputs)),
    ]
    for params, opt in zip((plain, named), opts, strict=True):
        steps(params, opt, range(3))
    assert_same(plain, named)
    assert opts[1].state_dict()["param_groups"][0]["param_names"] == [f"layer{i}" for i in range(5)]
    again = info.optim_cls([(f"other{i}", p) for i, p in enumerate(make_params())], **kwargs_of(inputs))
    again.load_state_dict(opts[1].state_dict())


@every_input
def test_complex_parameters_are_pairs_of_reals_or_refused(info, inputs):
    torch.manual_seed(0)
    z = Parameter(torch.randn(3, 4, 2, dtype=torch.complex64))
    if not info.supports_complex:  # a complex matrix is not a real one of pairs: its singular values are others
        with pytest.raises(ValueError, match="real matrices"):
            info.optim_cls([z], **kwargs_of(inputs))
        return
    x = Parameter(torch.view_as_real(z.detach()).clone())
    opts = [info.optim_cls([w], **kwargs_of(inputs)) for w in (z, x)]
    for seed in range(4):
        torch.manual_seed(seed)
        z.grad = torch.randn_like(z)
        x.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())
    loaded = info.optim_cls([z], **kwargs_of(inputs))
    loaded.load_state_dict(opts[0].state_dict())
    for state in loaded.state.values():
        assert all(x.is_complex() for x in state.values() if x.dim())


@every_optimizer
def test_sparse_gradients_are_refused_before_anything_is_written(info):
    dense, sparse = (Parameter(torch.ones(4, 2)) for _ in range(2))
    dense.grad, sparse.grad = torch.ones(4, 2), torch.eye(4, 2).to_sparse()
    opt = info.optim_cls([dense, sparse])
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(dense.detach(), torch.ones(4, 2))
    assert not opt.state


@every_optimizer
def test_hooks(info):
    seen = []
    params = make_params()
    opt = info.optim_cls(params)
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("step pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("step post"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("state pre"))
    opt.register_state_dict_post_hook(lambda o, state: seen.append("state post"))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    global_hook = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    set_grads(params, 0)
    opt.step()
    global_hook.remove()
    opt.load_state_dict(opt.state_dict())
    assert seen == ["step pre", "step post", "global", "state pre", "state post", "load pre", "load post"]
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 1


@every_input
def test_a_pre_hook_may_rewrite_what_is_loaded(info, inputs):
    params = make_params()
    # Of the group, where it may be idle: some have no momentum.
    opt = info.optim_cls([{"params": params, "state_dtype": "float64"}], **kwargs_of(inputs))
    steps(params, opt, range(2))

    def zeroed(_, state_dict):
        state = {i: {k: torch.zeros_like(v) for k, v in s.items()} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other = info.optim_cls(make_params(), **kwargs_of(inputs))
    other.register_load_state_dict_pre_hook(zeroed)
    other.load_state_dict(opt.state_dict())
    for state in other.state.values():
        for key, value in state.items():
            assert value.dtype == (torch.float64 if key == "momentum_buffer" else torch.float32)
            assert not value.any()


@every_input
@pytest.mark.parametrize("foreach", [False, True])
def test_save_and_load_with_weights_only(info, inputs, foreach):
    params = make_params()
    opt = info.optim_cls(params, **kwargs_of(inputs, foreach=foreach))
    steps(params, opt, range(3))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other_params = [Parameter(p.detach().clone()) for p in params]
    other = info.optim_cls(other_params, **kwargs_of(inputs, lr=0.123))
    other.load_state_dict(torch.load(file, weights_only=True))
    for ps, o in ((params, opt), (other_params, other)):
        steps(ps, o, range(10, 13))
    assert_same(params, other_params)


@every_input
def test_older_state_dicts_without_newer_keys(info, inputs):
    params = make_params()
    opt = info.optim_cls(params, **kwargs_of(inputs))
    steps(params, opt, range(2))
    old = copy.deepcopy(opt.state_dict())
    for flag in (*info.not_og_supported_flags, "foreach", "differentiable"):
        del old["param_groups"][0][flag]
    other_params = [Parameter(p.detach().clone()) for p in params]
    other = info.optim_cls(other_params, **kwargs_of(inputs))
    other.load_state_dict(old)
    for ps, o in ((params, opt), (other_params, other)):
        steps(ps, o, range(10, 12))
    assert_same(params, other_params)


@every_input
def test_state_dicts_are_deterministic(info, inputs):
    """The same run gives the same dict in the same order, and params in another order the same steps."""
    dicts = []
    for order in (range(5), range(5), reversed(range(5))):
        params = make_params()
        opt = info.optim_cls([params[i] for i in order], **kwargs_of(inputs))
        steps(params, opt, range(3))
        dicts.append((params, opt.state_dict()))
    assert repr(dicts[0][1]) == repr(dicts[1][1])  # keys, their order, and values
    assert_same(dicts[0][0], dicts[2][0])


@every_input
@pytest.mark.parametrize("foreach", [False, True])
def test_zero_gradients_move_nothing_and_absent_ones_do_nothing(info, inputs, foreach):
    """Nothing but the decoupled weight decay, which some have by default."""
    if "weight_decay" not in inputs.kwargs:
        params = make_params()
        opt = info.optim_cls(params, **kwargs_of(inputs, foreach=foreach))
        lr, weight_decay = (float(opt.param_groups[0][key]) for key in ("lr", "weight_decay"))
        if opt.param_groups[0]["scale"] == "relative" and weight_decay:  # LAMB's decay is as long as the weights
            weight_decay = 1.0
        decayed = [p.detach() * (1 - lr * weight_decay) for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        for p, expected in zip(params, decayed, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6 if weight_decay else 0, atol=0)
    params = make_params()
    before = copy.deepcopy(params)
    opt = info.optim_cls(params, **kwargs_of(inputs, foreach=foreach))
    opt.step()
    assert_same(params, before)
    assert not opt.state


@every_input
def test_lr_zero_moves_nothing(info, inputs):
    """torch.distributed.checkpoint makes the state of a fresh optimizer with such a step."""
    for lr in (0.0, torch.tensor(0.0)):
        params = make_params()
        before = copy.deepcopy(params)
        opt = info.optim_cls(params, **kwargs_of(inputs, lr=lr))
        for seed in (None, 1) if info.name != "Stacey" else (None,):  # its coupling is not multiplied by lr
            if seed is None:
                for p in params:
                    p.grad = torch.zeros_like(p)
            else:
                set_grads(params, seed)
            opt.step()
            assert_same(params, before)


@every_optimizer
def test_each_group_has_its_own_lr_and_weight_decay(info):
    overrides = {"lr": 0.05, "weight_decay": 0.3}
    first, second, alone = make_params(1), make_params(2), make_params(2)
    both = info.optim_cls([{"params": first}, {"params": second, **overrides}], lr=0.01)
    single = info.optim_cls(alone, **overrides)
    for seed in range(3):
        for params in (first, second, alone):
            set_grads(params, seed)
        both.step()
        single.step()
    assert_same(second, alone)


@every_optimizer
def test_error_inputs(info):
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        inputs = error.optimizer_error_input
        params = [Parameter(torch.randn(2, 2))] if inputs.params is None else inputs.params
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                info.optim_cls(params, **inputs.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(params, **inputs.kwargs)


@every_input
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_identically(info, inputs, how):
    params = make_params()
    opt = info.optim_cls(params, **kwargs_of(inputs))
    steps(params, opt, range(2))
    pair = (params, opt)
    other_params, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(other) is info.optim_cls
    for ps, o in ((params, opt), (other_params, other)):
        steps(ps, o, range(10, 13))
    assert_same(params, other_params)
    assert other.backend() == opt.backend()


@every_input
def test_add_param_group(info, inputs):
    together, apart = make_params(), make_params()
    first = info.optim_cls(together, **kwargs_of(inputs))
    second = info.optim_cls(apart[:2], **kwargs_of(inputs))
    second.add_param_group({"params": apart[2:]})
    steps(together, first, range(3))
    steps(apart, second, range(3))
    assert_same(together, apart)
    with pytest.raises(ValueError, match="more than one parameter group"):
        second.add_param_group({"params": apart[:1]})
    with pytest.raises(TypeError):
        second.add_param_group([apart[0]])
    assert len(second.param_groups) == 2


@every_optimizer
def test_closures(info):
    task = Regression()
    opt = info.optim_cls([task.weight, task.bias])
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(task.closure(opt))
        return calls[-1]

    with torch.no_grad():
        loss = opt.step(closure)
    assert len(calls) == 1
    assert loss is calls[0]
    assert opt.step() is None


@every_input
@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_never_written(info, inputs, foreach):
    params = make_params()
    opt = info.optim_cls(params, **kwargs_of(inputs, foreach=foreach))
    for seed in range(3):
        set_grads(params, seed)
        before = [p.grad.clone() for p in params]
        opt.step()
        assert_same([p.grad for p in params], before)


@every_optimizer
def test_state_is_cast_to_the_parameters_on_load(info):
    params = make_params(dtype=torch.float64)
    opt = info.optim_cls(params)
    steps(params, opt, range(2))
    halves = make_params(dtype=torch.bfloat16)
    other = info.optim_cls(halves)
    other.load_state_dict(opt.state_dict())
    for state in other.state.values():  # second moments and counts are float32
        assert all((x.dtype == torch.bfloat16) == (key == "momentum_buffer") for key, x in state.items())
    steps(halves, other, range(1))


@every_optimizer
def test_the_profiler_sees_the_step(info):
    params = make_params()
    opt = info.optim_cls(params)
    set_grads(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{info.name}.step" in names
    assert f"Optimizer.zero_grad#{info.name}.zero_grad" in names


@every_optimizer
def test_it_is_an_ordinary_torch_optimizer(info):
    opt = info.optim_cls(make_params())
    assert isinstance(opt, Optimizer)
    assert info.name in repr(opt)
    assert "lr: " in repr(opt)
    assert isinstance(opt.state_dict()["state"], (dict, OrderedDict))
    opt.zero_grad(set_to_none=False)

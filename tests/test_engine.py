"""The engine around the mathematics: groups, state, backends, and everything it must refuse."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch

import normopt
from normopt import SteepestDescent

NAMES = normopt.list_optimizers()
# No derivative of a decomposition is promised.
MATRIX_NAMES = {"freon", "muon", "normuon", "nucgd", "scion", "spectralsgd"}
REGULARIZERS = [
    dict(),
    dict(agr=True),
    dict(agr=True, weight_decay=0.01, decay="lp", decay_p=0.8),
    dict(weight_decay=0.01, decay="coupled"),
    dict(weight_decay=0.01, decay="decoupled"),
]


def make_params(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = [(6, 5), (4, 2, 3, 3), (5,), (1,), (), (0, 3)]
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    params.append(torch.nn.Parameter(torch.randn(5, 6, dtype=dtype).t()))
    params.append(torch.nn.Parameter(torch.randn(2, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)))
    return params


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(make, dtype=torch.float32, steps=5):
    params = make_params(dtype)
    opt = make(params)
    for i in range(steps):
        set_grads(params, i)
        opt.step()
    return params, opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_for_loop_and_foreach_agree(name, dtype):
    for settings in REGULARIZERS:
        cls = normopt.get_optimizer(name)
        iterates = "dtype" in inspect.signature(cls).parameters
        if iterates:  # products of one matrix and of a stack are rounded otherwise
            settings = settings | {"dtype": "float32"}
        loop, _ = run(lambda ps: cls(ps, foreach=False, **settings), dtype)  # noqa: B023
        many, _ = run(lambda ps: cls(ps, foreach=True, **settings), dtype)  # noqa: B023
        tight = dict(rtol=0, atol=0) if name in ("signsgd", "signum", "lion") else dict(rtol=1e-6, atol=1e-8)
        tight = dict(rtol=1e-4, atol=1e-6) if iterates else tight
        for a, b in zip(loop, many, strict=True):
            torch.testing.assert_close(a, b, **(tight if dtype != torch.bfloat16 else dict(rtol=2**-8, atol=1e-8)))


@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0, math.inf])
def test_nothing_moves_without_a_reason(p, scale):
    """On fresh state, lr = 0 moves nothing whatever the gradient; zero gradients move nothing without decay."""
    if p == 1 and scale == "power":
        return
    for rule, regularizer in itertools.product(("heavy", "ema", "lion"), REGULARIZERS):
        for lr, grads in ((0.0, "random"), (torch.tensor(0.0), "random"), (0.0, "zero"), (0.1, "zero")):
            if lr == 0.1 and "weight_decay" in regularizer:
                continue
            params = make_params()
            before = [p.detach().clone() for p in params]
            opt = SteepestDescent(
                params, lr, norm="lp", p=p, scale=scale, momentum=0.9, momentum_rule=rule, **regularizer
            )
            set_grads(params, 1)
            if grads == "zero":
                for w in params:
                    w.grad.zero_()
            opt.step()
            for w, old in zip(params, before, strict=True):
                assert torch.equal(w, old)
            for state in opt.state.values():
                assert state["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "stacey"])  # whose coupling is not multiplied by lr
def test_a_first_step_at_lr_zero_changes_no_bit(name, dtype, foreach):
    for settings in REGULARIZERS:
        params = make_params(dtype)
        before = [p.detach().clone() for p in params]
        set_grads(params, 1)
        normopt.get_optimizer(name)(params, lr=0.0, foreach=foreach, **settings).step()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, old)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_never_written(name):
    for settings in REGULARIZERS:
        params = make_params()
        opt = normopt.get_optimizer(name)(params, maximize=True, **settings)
        for i in range(3):
            set_grads(params, i)
            before = [(p.grad, p.grad.clone()) for p in params]
            opt.step()
            for p, (grad, value) in zip(params, before, strict=True):
                assert p.grad is grad
                assert torch.equal(grad, value)
        for p in params:
            buffer = opt.state[p].get("momentum_buffer")
            if buffer is not None and buffer.numel():
                assert buffer.data_ptr() != p.grad.data_ptr()


def test_every_setting_can_differ_by_group():
    overrides = dict(
        lr=0.5,
        p=4.0,
        scale="unit",
        scope="group",
        radius=3.0,
        momentum=0.5,
        momentum_rule="ema",
        nesterov=True,
        agr=True,
        weight_decay=0.1,
        decay="lp",
        decay_p=0.5,
        maximize=True,
        foreach=True,
        beta2=0.5,
        state_dtype="float64",
        rounding="kahan",
    )
    more = dict(norm="l1", momentum=0.9, dampening=0.5), dict(p=4.0, scale="power", eps=1e-3)
    for overridden in ({}, overrides, *more):
        first, second, alone = make_params(seed=0), make_params(seed=1), make_params(seed=1)
        both = SteepestDescent([{"params": first}, {"params": second, **overridden}], norm="lp", p=3.0)
        default = {"norm": "lp", "p": 3.0} if "norm" not in overridden else {}
        single = SteepestDescent([{"params": alone, **default, **overridden}])
        for i in range(3):
            set_grads(first, i)
            set_grads(second, i)
            set_grads(alone, i)
            both.step()
            single.step()
        for a, b in zip(second, alone, strict=True):
            assert torch.equal(a, b)


def test_an_alias_in_a_group_overrides_the_default_p():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = SteepestDescent([{"params": [a]}, {"params": [b], "norm": "linf"}], norm="lp", p=3.0)
    assert [(g["norm"], g["p"]) for g in opt.param_groups] == [("lp", 3.0), ("linf", None)]
    assert "Lp(p=inf)" in opt.backend()


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_primitives_and_survive_a_safe_load(name, tmp_path):
    _, opt = run(lambda ps: normopt.get_optimizer(name)(ps, agr=True))
    for group in opt.param_groups:
        for key, value in group.items():
            assert key == "params" or value is None or isinstance(value, (bool, int, float, str)), key
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    state = torch.load(tmp_path / "opt.pt", weights_only=True)
    params = make_params()
    other = normopt.get_optimizer(name)(params, lr=9.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_identically(name):
    params, opt = run(lambda ps: normopt.get_optimizer(name)(ps, agr=True))
    params2, opt2 = copy.deepcopy((params, opt))
    for ps, o in ((params, opt), (params2, opt2)):
        set_grads(ps, 77)
        o.step()
    for a, b in zip(params, params2, strict=True):
        assert torch.equal(a, b)


def test_older_and_torch_checkpoints_are_completed():
    ours, theirs = make_params(), make_params()
    torch_opt = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    set_grads(theirs, 0)
    torch_opt.step()
    opt = normopt.SGD(ours, lr=9.0)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    opt.load_state_dict(copy.deepcopy(torch_opt.state_dict()))  # state_dict() shares its tensors
    for i in range(1, 4):
        set_grads(ours, i)
        set_grads(theirs, i)
        opt.step()
        torch_opt.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_state_is_lazy_and_only_for_what_has_a_gradient():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = normopt.LPSGDM([a, b])
    assert not opt.state
    a.grad = torch.ones(2)
    opt.step()
    assert list(opt.state) == [a]
    stateless = normopt.SignSGD([a])
    stateless.step()
    assert not stateless.state


def test_closure():
    w = torch.nn.Parameter(torch.tensor([3.0]))
    opt = normopt.SGD([w], lr=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert opt.step(closure) == 9.0
    assert len(calls) == 1
    assert w.item() == pytest.approx(2.4)
    assert opt.step() is None


def test_complex_parameters_are_pairs_of_reals():
    torch.manual_seed(3)
    z = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
    x = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    settings = dict(norm="lp", p=3.0, scale="dual", momentum=0.9, agr=True, maximize=True)
    opts = [SteepestDescent([w], **settings) for w in (z, x)]
    for i in range(4):
        torch.manual_seed(i)
        z.grad = torch.randn_like(z)
        x.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())
    assert opts[0].state[z]["momentum_buffer"].is_complex()


def test_a_complex_parameter_that_changes_its_dtype_keeps_its_momentum():
    for first, second in ((torch.complex64, torch.complex128), (torch.complex128, torch.complex64)):
        z = torch.nn.Parameter(torch.zeros(1, dtype=first))
        opt = normopt.SGD([z], lr=0.1, momentum=0.9, state_dtype="bfloat16")
        for i in range(6):
            if i == 1:
                z.grad, z.data = None, z.data.to(second)
            z.grad = torch.ones_like(z)
            opt.step()
        buffer = opt.state[z]["momentum_buffer"]
        assert buffer.dtype == second
        assert complex(buffer[0]) == pytest.approx(sum(0.9**i for i in range(6)))


def test_a_tensor_p_is_each_groups_own():
    p = torch.tensor(8.0)
    opt = normopt.LPSGDM([torch.nn.Parameter(torch.ones(2))], p=p)
    sched = normopt.schedules.CosineP(opt, total_steps=3)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    sched.step()
    sched.step()
    assert [float(g["p"]) for g in opt.param_groups] == [2.0, 8.0]
    assert float(opt.defaults["p"]) == float(p) == 8.0


def test_a_group_that_fails_for_any_reason_leaves_no_trace():
    @normopt.norms.register("never satisfied")
    class Never(normopt.norms.TensorNorm):
        def __init__(self):
            raise AssertionError("never")

    opt = normopt.SGD([torch.nn.Parameter(torch.ones(2))])
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    for group, error in (
        ({"norm": "never satisfied"}, AssertionError),
        (dict(weight_decay=0.1, decay="lp"), UserWarning),
    ):
        with pytest.raises(error):  # warnings are errors in this suite
            opt.add_param_group({"params": [zero], **group})
        assert len(opt.param_groups) == 1
    normopt.SGD([torch.nn.Parameter(torch.zeros(2, 2, device="meta"))], weight_decay=0.1, decay="lp")


def test_post_hooks_see_and_may_change_what_is_loaded():
    def make():
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        w.grad = torch.full_like(w, 0.333)
        return w, normopt.SGD([w], momentum=0.9, state_dtype="float32")

    _w, opt = make()
    opt.step()
    other_w, other = make()
    seen = []

    def hook(o):
        seen.append(o.state[other_w]["momentum_buffer"].dtype)
        o.state[other_w]["momentum_buffer"].zero_()

    other.register_load_state_dict_post_hook(hook)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert seen == [torch.float32]
    assert not other.state[other_w]["momentum_buffer"].any()


def test_a_checkpoint_that_lacks_a_setting_leaves_the_groups_own():
    """torch.optim.SGD's has no agr: the group that asked for it keeps it."""
    theirs = torch.optim.SGD(make_params(), lr=0.5)
    ours = normopt.SGD([{"params": make_params(), "agr": True}])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["agr"] is True
    assert ours.param_groups[0]["lr"] == 0.5
    bad = copy.deepcopy(normopt.SGD(make_params()).state_dict())
    bad["param_groups"][0]["state_dtype"] = "int8"
    with pytest.raises(ValueError, match="state_dtype"):
        ours.load_state_dict(bad)
    assert ours.param_groups[0]["lr"] == 0.5


def test_what_an_older_version_pickled_gets_the_newer_settings():
    params, opt = run(lambda ps: normopt.LPSGDM(ps))
    for settings in (opt.defaults, *opt.param_groups):
        for newer in ("rounding", "state_dtype", "beta2"):
            del settings[newer]
    params, opt = pickle.loads(pickle.dumps((params, opt)))
    set_grads(params, 9)
    opt.step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_in_float32(dtype):
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=dtype))
    w.grad = torch.tensor([[1e-4, 2e-4], [-3e-4, 1e-4]], dtype=dtype)
    exact = torch.nn.Parameter(w.detach().float())
    exact.grad = w.grad.float()
    for p in (w, exact):
        SteepestDescent([p], lr=0.3, norm="lp", p=3.0, scale="unit", agr=True, weight_decay=0.1).step()
    assert torch.equal(w.detach(), exact.detach().to(dtype))


def test_tensor_lr_of_every_shape_equals_the_float():
    expected, _ = run(lambda ps: normopt.LPSGDM(ps, lr=0.03, weight_decay=0.1, decay="lp"), torch.float64)
    for shape in ((), (1,), (1, 1)):
        lr = torch.full(shape, 0.03, dtype=torch.float64)
        actual, _ = run(lambda ps: normopt.LPSGDM(ps, lr=lr, weight_decay=0.1, decay="lp"), torch.float64)  # noqa: B023
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("rule", ["heavy", "ema", "lion"])
def test_differentiable_steps_have_the_values_of_plain_ones(rule):
    found = []
    for differentiable in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 4))
        opt = SteepestDescent([p], lr=0.1, momentum=0.9, momentum_rule=rule, differentiable=differentiable)
        opt.param_groups[0]["params"][0] = w = p.detach().clone()
        for _ in range(4):
            w.grad = torch.randn(3, 4)
            opt.step()
        found.append((w, opt.state[w]["momentum_buffer"]))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["heavy", "ema", "lion"])
@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
@pytest.mark.parametrize("tensor", [False, True])
def test_differentiable_through_three_steps(rule, scale, tensor):
    for regularizer in REGULARIZERS:
        for nesterov in (False, True) if rule != "lion" else (False,):

            def steps(start, g1, g2, g3, lr):
                w = start.clone()
                opt = SteepestDescent(
                    [torch.nn.Parameter(torch.ones_like(w))],
                    lr=lr if tensor else 0.1,
                    norm="lp",
                    p=3.0,
                    scale=scale,
                    momentum=0.9,
                    momentum_rule=rule,
                    nesterov=nesterov,  # noqa: B023
                    differentiable=True,
                    **regularizer,  # noqa: B023
                )
                opt.param_groups[0]["params"][0] = w
                for g in (g1, g2, g3):
                    w.grad = g
                    opt.step()
                return w

            torch.manual_seed(0)
            inputs = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
            inputs.append(torch.tensor(0.1, dtype=torch.float64, requires_grad=tensor))
            assert torch.autograd.gradcheck(steps, inputs)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in MATRIX_NAMES])
def test_differentiable_as_it_comes(name):
    """Each optimizer's own defaults, its coupled decay among them, over two steps."""

    def two_steps(start, g1, g2):
        w = start.clone()
        opt = normopt.get_optimizer(name)(
            [torch.nn.Parameter(torch.ones_like(w))], weight_decay=0.1, differentiable=True
        )
        opt.param_groups[0]["params"][0] = w
        for g in (g1, g2):
            w.grad = g
            opt.step()
        return w

    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(two_steps, inputs)


@pytest.mark.parametrize("name", sorted(MATRIX_NAMES))
def test_no_derivative_is_promised_where_there_is_none(name):
    with pytest.raises(ValueError, match="no derivative"):
        normopt.get_optimizer(name)(make_params(), differentiable=True)


def test_backend_says_what_runs_and_why():
    opt = SteepestDescent(
        make_params(), norm="lp", p=3.0, momentum=0.9, agr=True, weight_decay=1e-3, decay="lp", decay_p=0.8
    )
    said = opt.backend()
    for word in (
        "group 0",
        "AGR",
        "heavy momentum 0.9",
        "Lp(p=3) dual",
        "ℓp decay λ = 0.001, p = 0.8",
        "foreach (small",
    ):
        assert word in said
    assert "foreach=True" in normopt.SGD(make_params(), foreach=True).backend()


def test_names():
    assert normopt.list_optimizers("*sgd*") == [
        *("lpsgd", "lpsgdm", "normalizedsgd", "rownormsgd", "sgd", "signsgd", "spectralsgd")
    ]
    assert normopt.get_optimizer("LpSgdM") is normopt.LPSGDM
    with pytest.raises(ValueError, match="did you mean 'lpsgdm'"):
        normopt.get_optimizer("lpsgdmm")
    with pytest.raises(TypeError, match="must be a string"):
        normopt.get_optimizer(3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(lr=-1.0), ValueError, "lr must be in"),
        (dict(lr=math.nan), ValueError, "lr"),
        (dict(lr="0.1"), TypeError, "lr must be a number"),
        (dict(lr=torch.ones(2)), ValueError, "1-element"),
        (dict(norm="lp"), ValueError, "needs p"),
        (dict(norm="lp", p=0.5), ValueError, "p must be in"),
        (dict(norm="lp", p="3"), TypeError, "p must be a number"),
        (dict(norm="nuclera"), ValueError, "unknown norm"),
        (dict(scale="dualnorm"), ValueError, "scale must be one of"),
        (dict(scope="model"), ValueError, "scope must be one of"),
        (dict(radius=0.0), ValueError, "radius must be in"),
        (dict(lr_ratio=0.0), ValueError, "lr_ratio must be in"),
        (dict(radius=-1.0), ValueError, "radius must be in"),
        (dict(radius=math.inf), ValueError, "radius must be in"),
        (dict(radius=math.nan), ValueError, "radius must be in"),
        (dict(radius="50"), TypeError, "radius must be a number"),
        (dict(radius=torch.tensor(50.0)), TypeError, "radius must be a number"),
        (dict(norm="l1", scale="power"), ValueError, "not defined for"),
        (dict(eps=1e-8), ValueError, "eps"),
        (dict(norm="lp", p=3.0, scale="power", eps=-1e-8), ValueError, "eps"),
        (dict(scale="matched", scope="group"), ValueError, "scope"),
        (dict(norm="lp", p=3.0, scale="power", scope="group"), ValueError, "scope"),
        (dict(momentum=-0.1), ValueError, "momentum"),
        (dict(momentum=1.0, momentum_rule="ema"), ValueError, "momentum"),
        (dict(momentum=True), TypeError, "momentum"),
        (dict(momentum_rule="adam"), ValueError, "momentum_rule must be one of"),
        (dict(momentum=0.9, momentum_rule="ema", dampening=0.1), ValueError, "dampening"),
        (dict(nesterov=True), ValueError, "nesterov"),
        (dict(momentum=0.9, momentum_rule="lion", nesterov=True), ValueError, "nesterov"),
        (dict(beta2=1.0), ValueError, "beta2"),
        (dict(agr=1), TypeError, "agr must be True or False"),
        (dict(weight_decay=-1e-4), ValueError, "weight_decay"),
        (dict(weight_decay=math.inf), ValueError, "weight_decay"),
        (dict(decay="l1"), ValueError, "decay must be one of"),
        (dict(decay_p=0.0), ValueError, "decay_p"),
        (dict(decay_p=math.inf), ValueError, "decay_p"),
        (dict(foreach="yes"), TypeError, "foreach"),
        (dict(foreach=True, differentiable=True), ValueError, "foreach"),
        (dict(rounding="stochastic", differentiable=True), ValueError, "no derivative"),
        (dict(norm="lp", p=3.0, scale="power", eps=1e-39), ValueError, "eps"),
        (dict(dampening=math.inf), ValueError, "dampening"),
        (dict(weight_deacy=0.1), (TypeError, ValueError), "did you mean 'weight_decay'"),
        (dict(betas=(0.9, 0.99)), (TypeError, ValueError), "beta2"),
        (dict(norm="linf", p=3.0), ValueError, "does not take p"),
        (dict(norm=normopt.norms.Lp), TypeError, "make one"),
    ],
    ids=str,
)
def test_bad_input_is_refused_at_construction_and_in_groups(settings, error, message):
    params = make_params()
    with pytest.raises(error, match=message):
        SteepestDescent(params, **settings)
    opt = SteepestDescent(params[:1])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params[1:], **settings})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda ps: normopt.SGD(ps, decay_p=0.8), ValueError, 'decay="lp"'),
        (lambda ps: SteepestDescent(ps, beta2=0.9), ValueError, 'momentum_rule="lion"'),
        (lambda ps: normopt.LPSGDM(ps, norm="l2"), TypeError, "LPSGDM fixes norm = 'lp'"),
        (lambda ps: normopt.Lion(ps, betas=(0.9, 0.99)), TypeError, "Lion got an unexpected .* beta2"),
        (lambda ps: normopt.LPSGDM(ps, momentun=0.5), TypeError, "LPSGDM got .* did you mean 'momentum'"),
        (lambda ps: normopt.Muon(ps, step=3), TypeError, "Muon got .* did you mean 'steps'"),
        (lambda ps: normopt.Muon(ps, ns_steps=3), TypeError, "is steps, in a group norm_steps"),
        (lambda ps: normopt.Muon(ps, adjust_lr_fn="original"), TypeError, "is aspect, in a group norm_aspect"),
        (lambda ps: normopt.SGD([{"params": ps, "p": 4.0}]), ValueError, "does not take p"),
        (lambda ps: SteepestDescent(ps, norm_axis=3), TypeError, "norm_axis"),
        (lambda ps: normopt.SGD(ps).add_param_group([ps]), TypeError, "must be a dict"),
    ],
)
def test_idle_fixed_and_unknown_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(make_params())


def test_keys_of_other_tools_pass_in_a_group():
    opt = SteepestDescent([{"params": make_params(), "name": "all", "initial_lr": 0.1, "lr_scale": 0.5}])
    assert opt.param_groups[0]["lr_scale"] == 0.5


def test_a_checkpoint_of_another_shape_is_refused():
    lion = normopt.Lion(make_params())
    set_grads(lion.param_groups[0]["params"], 0)
    lion.step()
    other = normopt.Lion(make_params()[::-1])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="has the shape"):
        other.load_state_dict(lion.state_dict())
    assert other.state_dict() == before


def test_a_bad_setting_made_later_is_refused_before_anything_is_written():
    params = make_params()
    set_grads(params, 0)
    opt = SteepestDescent([{"params": params[:2]}, {"params": params[2:]}], norm="lp", p=3.0, momentum=0.9)
    opt.param_groups[1]["p"] = 0.5
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="p must be in"):
        opt.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not opt.state


def test_sparse_gradients_are_refused_before_anything_is_written():
    dense, sparse = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    dense.grad = torch.ones(3, 2)
    sparse.grad = torch.eye(3, 2).to_sparse()
    opt = normopt.LPSGDM([dense, sparse])
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(dense.detach(), torch.ones(3, 2))
    assert not opt.state


PS = [1.0, 1.5, 2.0, 2.7, 3.0, math.inf]


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
def test_a_changed_number_is_that_of_a_new_optimizer(scale, how):
    """A group's recipe is kept from step to step; what it may keep depends on what has changed."""
    if "fused" in how:
        pytest.importorskip("numba")
    orders = [2.0, 2.7] if "fused" in how else PS  # each needs kernels of its own
    changes = [({"p": a}, {"p": b}) for a in orders for b in orders if a != b]
    changes += [({key: a}, {key: b}) for key in ("momentum",) for a in (0.0, 0.5) for b in (0.0, 0.7)]
    decays = [dict(weight_decay=a, decay="decoupled", decay_p=1.0) for a in (0.0, 0.5)]
    changes += [(a, b) for a in decays for b in decays]
    changes += [({"lr": 0.1}, {"lr": 0.0}), ({"radius": 1.0}, {"radius": 2.0}), ({"lr_ratio": 1.0}, {"lr_ratio": 0.5})]
    changes += [({"decay_p": 1.0}, {"decay_p": 2.0})]
    changes += [
        ({"decay": "lp"}, {"decay": "coupled"}),
        ({"beta2": 0.99}, {"beta2": 0.5}),
        ({"agr": True}, {"agr": False}),
    ]
    for before, after in changes:
        settings = dict(lr=0.1, norm="lp", p=3.0, momentum=0.9, momentum_rule="lion", weight_decay=0.1, decay="lp")
        if scale == "power" and 1.0 in (before.get("p"), after.get("p")):
            continue
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in [(3, 4), (7,)]]
        opt = normopt.SteepestDescent(params, **(settings | before), scale=scale, **how)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for key, value in after.items():
            opt.param_groups[0][key] = value
        fresh = normopt.SteepestDescent(copies, **(settings | after), scale=scale, **how)
        for p, q in zip(params, copies, strict=True):
            fresh.state[q] = {key: x.clone() for key, x in opt.state[p].items()}
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step()
        fresh.step()
        assert opt.backend() == fresh.backend()
        for p, q in zip(params, copies, strict=True):
            # A kernel's last bit may depend on where the tensors are.
            rounding = 1e-6 if "fused" in how else 0.0
            torch.testing.assert_close(p, q, rtol=rounding, atol=rounding, msg=f"{before} → {after}")


@pytest.mark.parametrize("foreach", [False, True])
def test_an_lr_ratio_is_a_learning_rate_of_ones_own(foreach):
    """In the step and in every kind of decay: the same bits as with that learning rate, also where it is a tensor."""
    cases = [dict(decay=kind) for kind in ("coupled", "decoupled", "lp", "proximal", "inside", "cautious")]
    cases += [dict(constraint="sphere", weight_decay=0.0), dict(coupling=0.1, momentum=0.9, momentum_rule="ema")]
    for case in cases:
        for number in (float, torch.tensor):
            w, w2 = (torch.nn.Parameter(torch.linspace(-2, 1, 12).reshape(3, 4)) for _ in range(2))
            settings = dict(norm="lp", p=3.0, weight_decay=0.3, radius=3.0, foreach=foreach) | case
            own = normopt.SteepestDescent([w2], lr=number(0.05), **settings)
            opt = normopt.SteepestDescent([w], lr=number(0.2), lr_ratio=0.25, **settings)
            for _ in range(2):
                w.grad = w2.grad = torch.linspace(1, -0.3, 12).reshape(3, 4)
                opt.step()
                own.step()
            assert torch.equal(w, w2), case
            assert "at 0.25 lr" in opt.backend()


def one_step(**settings):
    p = torch.nn.Parameter(torch.arange(1.0, 13.0).reshape(3, 4))
    opt = normopt.SteepestDescent([p], **settings)
    p.grad = torch.linspace(-1, 2, 12).reshape(3, 4)
    opt.step()
    return p, opt, opt.param_groups[0]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (dict(weight_decay=0.1, momentum=0.9), dict(weight_decay=5.0, momentum=math.nan)),
        (dict(lr=0.1, radius=1.0), dict(lr=7.0, radius=-1.0)),
        (dict(momentum=0.9, momentum_rule="ema"), dict(momentum=1.5)),
        (dict(momentum=0.9, dampening=0.3), dict(momentum_rule="ema")),
        (dict(momentum=0.9, dampening=0.0), dict(nesterov=True, dampening=0.3)),
    ],
    ids=str,
)
def test_a_step_that_was_refused_leaves_nothing_of_its_settings(good, bad):
    settings = dict(lr=0.1) | good
    p, opt, group = one_step(**settings)
    q, twin, _ = one_step(**settings)
    before = dict(group)
    group.update(bad)
    with pytest.raises(ValueError, match=r"momentum|radius|dampening"):
        opt.step()
    group.update({key: before[key] for key in bad})
    opt.step()
    twin.step()
    assert torch.equal(p, q)


def test_a_key_that_enters_or_leaves_a_group_is_seen():
    p, opt, group = one_step(lr=0.1)
    lr = group.pop("lr")
    with pytest.raises(ValueError, match="no 'lr' any more"):
        opt.step()
    group["lr"] = 5 * lr
    before = p.detach().clone()
    opt.step()
    torch.testing.assert_close(p, before - 0.5 * p.grad)
    group["norm"] = "spectral"
    opt.step()
    group.update(norm_method="newton-schulz", norm_steps=1)
    opt.step()
    assert "method=newton-schulz" in opt.backend()
    q, twin, _ = one_step(lr=0.5, norm="spectral", norm_method="newton-schulz", norm_steps=1)
    with torch.no_grad():
        q.copy_(p)
    opt.step()
    twin.step()
    assert torch.equal(p, q)


def test_the_old_names_of_a_recipe_warn():
    import normopt.plan

    with pytest.warns(DeprecationWarning, match=r"normopt.plan.make_plan is now normopt.recipe.make_recipe"):
        make = normopt.plan.make_plan
    opt = normopt.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert str(make(opt.param_groups[0], opt.param_groups[0]["params"])) in opt.backend()
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        normopt.plan.plans  # noqa: B018


@pytest.mark.parametrize("name", ["muon", "normuon", "spectralsgd"])
def test_matrices_go_in_pieces(name, monkeypatch):
    """Of at most a sixth of the entries, tensors of one shape together; the results are those of one piece."""
    shapes = [(40, 30), (30, 40), (7,), (40, 30), (30, 40), (40, 30), (60, 60)]
    cls = normopt.get_optimizer(name)
    more = {"dtype": "float32"} if "dtype" in inspect.signature(cls).parameters else {}
    found = []
    for piece in (1 << 20, 1):
        monkeypatch.setattr(normopt.params, "PIECE", piece)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        opt = cls(params, foreach=True, **more)
        for i in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            opt.step()
        _, batches = opt._ready(0, opt.param_groups[0])
        found.append((params, opt.norm_pairs()[0], [[tuple(p.shape) for p in batch] for batch in batches]))
    (whole, pair, one), (cut, other, several) = found
    assert one == [shapes]
    assert several == [[(40, 30)], [(40, 30)], [(40, 30)], [(30, 40)], [(30, 40), (7,)], [(60, 60)]]
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (pair is None) == (other is None)
    if pair is not None:
        torch.testing.assert_close(pair.dual, other.dual, rtol=1e-5, atol=0)


def test_a_step_of_matrices_takes_less_memory_than_the_weights():
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((256, 256),) * 24 + ((128, 512),) * 48]
    opt = normopt.Muon(params)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        opt.step()
    events = seen.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    assert 0 < max(itertools.accumulate(changes)) <= sum(4 * p.numel() for p in params)


@pytest.mark.parametrize("cls", [normopt.LPSGD, normopt.LPSGDM])
def test_the_papers_eps_is_a_default_of_the_power_scale_alone(cls):
    def of(**settings):
        return [group["eps"] for group in cls([torch.nn.Parameter(torch.ones(2))], **settings).param_groups]

    assert of() == of(p=4.0) == of(p=2.0) == of(eps=1e-8) == [1e-8]
    assert of(eps=0.0) == of(scale="matched") == of(scale="dual") == of(scale="matched", eps=1e-8) == [0.0]
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = cls([{"params": [first]}, {"params": [second], "scale": "matched"}]).param_groups
    assert [group["eps"] for group in groups] == [1e-8, 0.0]
    with pytest.raises(ValueError, match='belongs to scale="power"'):
        cls([{"params": [first], "scale": "matched", "eps": 1e-8}])
    with pytest.raises(ValueError, match="does nothing without scale"):
        cls([first], scale="matched", eps=1e-3)

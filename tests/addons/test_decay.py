"""ℓp decay: of which weights, with which factor, over which groups; warm-up, elastic, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import normopt
from normopt.addons import LpDecay
from tests.addons.optimizers import CASES, build, copies, give, gradients, same
from tests.addons.rules import group_factor
from tests.oracle import lp_decay_factor


def one_step(w, g, opt_class=torch.optim.SGD, lr=0.1, **wanted):
    """The weight after a step of SGD with ℓp decay."""
    p = torch.nn.Parameter(w.clone())
    opt = opt_class([p], lr=lr)
    LpDecay(opt, **wanted)
    p.grad = g.clone()
    opt.step()
    return p.detach()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(4, 3), (6, 1), (2, 3, 2, 2), (1, 5)]),
    p=st.sampled_from([0.5, 0.8, 1.0, 1.5, 2.0, 3.0]),
    over=st.sampled_from(["entries", "rows", "columns", "heads"]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e3]),
    weight_decay=st.sampled_from([1e-6, 0.01, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_the_factor(shape, p, over, size, weight_decay, dtype, seed):
    torch.manual_seed(seed)
    w = torch.randn(shape, dtype=torch.float64) * size
    w.reshape(-1)[0] = 0
    heads = math.gcd(shape[0], 2) if over == "heads" else None
    w, g = w.to(dtype), (torch.randn(shape, dtype=torch.float64) * size).to(dtype)
    found = one_step(w, g, p=p, weight_decay=weight_decay, over=over, heads=heads)
    old = w.double().numpy()
    if over == "entries":
        factor = lp_decay_factor(old, p, 0.1 * weight_decay)
    else:
        factor = group_factor(old, over, p, 0.1 * weight_decay, heads or 1)
    expected = (old - 0.1 * g.double().numpy()) * factor
    eps = torch.finfo(dtype).eps
    # The step itself is rounded at the size of what it adds up.
    slack = 8 * eps * (np.abs(old) + 0.1 * np.abs(g.double().numpy())) * factor + 1e-45
    assert (np.abs(found.double().numpy() - expected) <= slack).all()


def test_groups_that_are_one_entry_or_one_row():
    torch.manual_seed(0)
    w, g = torch.randn(4, 3), torch.randn(4, 3)
    rows = one_step(w, g, over="rows", weight_decay=0.5)
    assert torch.equal(one_step(w, g, over="heads", heads=4, weight_decay=0.5), rows)
    torch.testing.assert_close(one_step(w.T, g.T, over="columns", weight_decay=0.5), rows.T)
    w, g = w.reshape(12, 1), g.reshape(12, 1)
    torch.testing.assert_close(
        one_step(w, g, over="rows", weight_decay=0.5), one_step(w, g, over="entries", weight_decay=0.5)
    )


def test_rows_of_tiny_and_of_huge_entries():
    """Their squares are beyond float32."""
    w = torch.tensor([[1e-30, 1e-30], [1e30, -1e30], [math.inf, 1.0]])
    found = one_step(w, torch.zeros(3, 2), over="rows", p=1.99, weight_decay=0.1)
    x = (math.sqrt(2) * 1e-30) ** 0.01
    torch.testing.assert_close(found[0], torch.full((2,), 1e-30 * x / (x + 0.0199)), rtol=1e-5, atol=0)
    assert torch.isfinite(found[1]).all()
    assert found[2, 0] == math.inf


def test_group_lasso_to_first_order():
    """p = 1: the proximal step of λΣ‖w_G‖ is the factor 1 − ηλ/‖w_G‖; the error falls as η²."""
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.float64)
    errors = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        found = one_step(w, torch.zeros_like(w), lr=lr, over="rows", p=1.0, weight_decay=0.5)
        errors.append(float((found - w * (1 - lr * 0.5 / w.norm(dim=1, keepdim=True))).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("over", ["entries", "rows"])
def test_complex_weights_decay_as_pairs_of_reals(over):
    torch.manual_seed(0)
    w, g = torch.randn(3, 2, dtype=torch.complex128), torch.randn(3, 2, dtype=torch.complex128)
    found = torch.view_as_real(one_step(w, g, over=over, weight_decay=0.5))
    pairs = one_step(torch.view_as_real(w), torch.view_as_real(g), over=over, weight_decay=0.5)
    torch.testing.assert_close(found, pairs)


@pytest.mark.parametrize("over", ["entries", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype, over):
    torch.manual_seed(0)
    w = torch.randn(8, 6).to(dtype)
    found = one_step(w, torch.zeros_like(w), over=over, weight_decay=0.5)
    old = w.double().numpy()
    factor = lp_decay_factor(old, 0.8, 0.05) if over == "entries" else group_factor(old, over, 0.8, 0.05)
    exact = torch.from_numpy(old * factor)
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * 0.51 * exact.abs().max()
    assert found.dtype == dtype
    changed = (found != w).float().mean()
    assert changed > 0.9


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("over", ["entries", "columns"])
def test_no_learning_rate_changes_no_bit(lr, over):
    w = torch.tensor([[0.0, -0.0], [1e-38, 3.0], [-1e-45, 7e37]])
    for p in (0.5, 2.0, 3.0):
        found = one_step(w, torch.zeros_like(w), lr=lr, p=p, over=over, weight_decay=0.5)
        assert torch.equal(found.view(torch.int32), w.view(torch.int32))


def test_only_wide_tensors_that_have_a_gradient():
    torch.manual_seed(0)
    wide, frozen, bias, empty = (torch.nn.Parameter(torch.randn(s)) for s in ((3, 2), (3, 2), (4,), (0, 2)))
    ws = [wide, frozen, bias, empty]
    before = copies(ws)
    opt = torch.optim.SGD(ws, lr=0.1)
    LpDecay(opt, weight_decay=0.5)

    def backward():
        (0 * (wide.sum() + bias.sum() + empty.sum())).backward()

    backward()
    opt.step()
    assert [torch.equal(a, b) for a, b in zip(ws, before, strict=True)] == [False, True, True, True]
    # Under a closure nobody knows beforehand who will have one.
    before = copies(ws)
    opt.zero_grad()
    opt.step(backward)
    assert [torch.equal(a, b) for a, b in zip(ws, before, strict=True)] == [False, True, True, True]


def test_numbers_as_tensors_are_not_read():
    """The meta device has no values: whoever asks for one fails."""
    w = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    w.grad = torch.empty_like(w)
    for over in ("entries", "rows", "columns", "heads"):
        opt = torch.optim.SGD([w], lr=0.1)
        opt.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")  # which SGD's own constructor reads
        decay = LpDecay(
            opt,
            weight_decay=torch.tensor(0.1, device="meta"),
            over=over,
            heads=3 if over == "heads" else None,
        )
        opt.found_inf = torch.zeros((), device="meta")
        decay._pre_step(None)
        decay._post_step(None)


def test_the_lr_is_the_one_of_this_step_and_a_tensor_is_followed():
    ends = []
    for lr in (0.1, torch.tensor(0.1)):
        params, opt = build("SGD", torch.float32, lr=lr, foreach=False)
        LpDecay(opt, weight_decay=0.5 if isinstance(lr, float) else torch.tensor(0.5))
        schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
        for gs in gradients(params, 4):
            give(params, gs)
            opt.step()
            schedule.step()
        ends.append(copies(params))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


# Warm-up


def test_warmup_walks_from_two_to_p():
    torch.manual_seed(0)
    start = torch.randn(4, 3, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    opt = torch.optim.SGD([w], lr=0.1)
    LpDecay(opt, p=0.8, weight_decay=0.5, warmup=4)
    expected = start.numpy()
    for s in range(7):
        w.grad = torch.zeros_like(w)
        p = 2 + (0.8 - 2) * min(s, 4) / 4
        assert opt.param_groups[0]["lp_step"] == min(s, 4)
        opt.step()
        expected = expected * lp_decay_factor(expected, p, 0.05)
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12)


def zero_head(**wanted):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    torch.nn.init.zeros_(net[2].weight)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(i / 3, 1))  # starts at 0
    LpDecay(opt, p=0.8, weight_decay=1e-3, **wanted)
    x = torch.randn(32, 4)
    y = (x[:, 0] > 0).long()
    for _ in range(30):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        schedule.step()
    return net[2].weight.detach(), loss.item()


def test_a_zero_initialised_layer_learns_with_a_warmup_and_not_without():
    with pytest.warns(UserWarning, match=r"lp_decay=0 in a param group of their own, or a warmup") as warned:
        weight, loss = zero_head()
    assert warned[0].filename == __file__
    assert not weight.any()
    warm, warm_loss = zero_head(warmup=10)
    assert (warm != 0).all()
    assert warm_loss < loss - 0.1


def test_a_group_added_later_is_warned_of_once():
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    LpDecay(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))]})
    with pytest.warns(UserWarning, match="holds a zero weight"):
        opt.step()
    opt.step()
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    LpDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2)), frozen]))
    for allowed in (dict(p=2.0), dict(weight_decay=0.0), dict(warmup=1)):
        LpDecay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))]), **allowed)


# Elastic


@pytest.mark.parametrize("p", [0.8, 1.5])
def test_elastic_differs_from_the_authors_factor_at_the_second_order(p):
    """Theirs: (w − ηu)·X/(X(1 + ηλ₂) + ηpλ). Ours is lower by η²λ₂·(u + λ₂w + pλ·sign(w)|w|^(p−1)) + O(η³)."""
    torch.manual_seed(0)
    w = torch.randn(5, 4, dtype=torch.float64)
    w = w.sign() * (w.abs() + 0.5)
    u, l2, lp = torch.randn_like(w), 0.7, 0.3
    remainders = []
    for lr in (4e-3, 2e-3, 1e-3):

        def sgd(params, lr):  # under zero momentum SGD's coupled decay is the decoupled one
            return torch.optim.SGD(params, lr=lr, weight_decay=l2)

        ours = one_step(w, u, sgd, lr=lr, p=p, weight_decay=lp, elastic=True)
        x = w.abs() ** (2 - p)
        theirs = (w - lr * u) * x / (x * (1 + lr * l2) + lr * p * lp)
        second = l2 * (u + l2 * w + p * lp * w.sign() * w.abs() ** (p - 1))
        assert float((theirs - ours).abs().max()) < 20 * lr**2
        remainders.append(float((theirs - ours - lr**2 * second).abs().max()))
    assert remainders[0] / remainders[1] == pytest.approx(8, rel=0.1)
    assert remainders[1] / remainders[2] == pytest.approx(8, rel=0.1)


def test_two_decays_only_if_asked_for():
    ws = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=r"weight_decay = 0\.01 of its own"):
        LpDecay(torch.optim.AdamW(ws))
    with pytest.raises(ValueError, match="elastic=True"):
        LpDecay(torch.optim.AdamW(ws, weight_decay=torch.tensor(0.0)))
    LpDecay(torch.optim.AdamW(ws), elastic=True)
    opt = torch.optim.AdamW(ws, weight_decay=0)
    LpDecay(opt)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="of its own"):
        opt.step()
    # A group that ℓp decay leaves alone may have its own.
    LpDecay(torch.optim.AdamW([{"params": ws, "lp_decay": 0.0}]))


# On normopt's own optimizers


@pytest.mark.parametrize("fused", [False, True])
def test_groups_on_normopts_own(fused):
    if fused:
        pytest.importorskip("numba")
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3))
    opt = normopt.SignSGD([w], lr=0.1, fused=fused)
    LpDecay(opt, over="rows", weight_decay=0.5, warmup=2)
    for s, p in enumerate((2.0, 1.4, 0.8, 0.8)):
        old = w.detach().double().numpy()
        g = torch.randn(4, 3)
        w.grad = g
        opt.step()
        expected = (old - 0.1 * np.sign(g.numpy())) * group_factor(old, "rows", p, 0.05)
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=str(s))


def test_refused_on_normopts_own():
    ws = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match=r'decay="lp", weight_decay=…, decay_p=…'):
        LpDecay(normopt.SGD(ws))
    with pytest.raises(ValueError, match="is a setting of normopt's own optimizers"):
        LpDecay(normopt.AdamW(ws, decay="lp"))
    with pytest.raises(ValueError, match="of its own"):
        LpDecay(normopt.SGD(ws, weight_decay=0.1), over="rows")
    with pytest.raises(ValueError, match="kahan"):
        LpDecay(normopt.SGD(ws, rounding="kahan"), over="rows")
    LpDecay(normopt.SGD(ws, rounding="stochastic"), over="rows")


# What it is for


def fit_digits(**wanted):
    """64 hidden units for the digits, 400 steps on batches of 200; the first layer's weights and the accuracy."""
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    opt = torch.optim.AdamW(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lp_decay": 0.0}], lr=1e-2, weight_decay=0
    )
    LpDecay(opt, **wanted)
    for _ in range(400):
        batch = torch.randint(1200, (200,))
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        opt.step()
    right = (net(x[1200:]).argmax(1) == y[1200:]).float().mean().item()
    return net[0].weight.detach(), right


def test_rows_go_to_exact_zeros_as_a_whole():
    weight, right = fit_digits(over="rows", weight_decay=0.3)
    dead = (weight == 0).all(1)
    assert 10 <= int(dead.sum()) < 64
    assert right > 0.85
    used = x_is_ever_on()
    assert (weight[~dead][:, used] != 0).float().mean() > 0.99  # the others live as a whole
    entries, right = fit_digits(over="entries", weight_decay=0.03)
    assert (entries == 0).float().mean() > 0.3
    assert right > 0.85


def x_is_ever_on():
    return torch.tensor(load_digits().data[:1200]).any(0)


@pytest.mark.parametrize("name", CASES)
def test_it_detaches_in_the_middle(name):
    params, opt = build(name, torch.float32)
    decay = LpDecay(opt, over="columns", weight_decay=0.0)  # λ = 0 is no decay
    plain_params, plain = build(name, torch.float32)
    for i, gs in enumerate(gradients(params, 4)):
        if i == 2:
            decay.detach()
        for ps, o in ((params, opt), (plain_params, plain)):
            give(ps, gs)
            o.step()
    assert same(params, plain_params)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (dict(p=0), ValueError, "^p must be in"),
        (dict(p="1"), TypeError, "^p must be a number"),
        (dict(p=math.inf), ValueError, "^p must be in"),
        (dict(weight_decay=-1), ValueError, "^weight_decay must be in"),
        (dict(weight_decay=torch.ones(2)), ValueError, "1-element"),
        (dict(over="row"), ValueError, "did you mean 'rows'"),
        (dict(over="heads"), ValueError, "give heads"),
        (dict(over="heads", heads=3), ValueError, "which 3 heads do not divide"),
        (dict(over="heads", heads=0), ValueError, "^heads must be in"),
        (dict(heads=2), ValueError, 'over="heads"'),
        (dict(warmup=1.5), TypeError, "^warmup must be an integer"),
        (dict(warmup=-1), ValueError, "^warmup must be in"),
        (dict(decay_p=0.8), TypeError, "LpDecay got .* 'decay_p'; it takes optimizer, p, weight_decay,"),
        (dict(elastic=1), TypeError, "^elastic must be True or False"),
    ],
)
def test_bad_input(wanted, error, message):
    with pytest.raises(error, match=message):
        LpDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(4, 3))]), **wanted)


def test_a_group_without_a_learning_rate():
    class NoLr(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    ws = [torch.nn.Parameter(torch.ones(4, 3))]
    with pytest.raises(ValueError, match="has no lr"):
        LpDecay(NoLr(ws))
    opt = NoLr([{"params": ws, "lp_decay": 0.0}])
    LpDecay(opt, warmup=2)
    opt.step()


def test_a_closure_that_makes_sparse_gradients():
    table = torch.nn.Embedding(4, 2, sparse=True)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    LpDecay(opt)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step(lambda: table(torch.tensor([1])).sum().backward())
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("p", [0.8, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("over", ["entries", "rows"])
@pytest.mark.parametrize("lr", [0.0, 1e-30, 1e-38, 1e-43, torch.tensor(1e-30), torch.tensor(1e-38)])
def test_a_decay_that_the_dtype_does_not_have_keeps_zeros(lr, over, p):
    """As schedules of lr end: pηλ is 0 in float32, where |w|^(2−p) of a zero weight is too."""
    values = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1e-30, 3.0]])

    def left(make):
        w = torch.nn.Parameter(values.clone())
        w.grad = torch.zeros_like(w)
        make(w).step()
        return w.detach()

    def added(w):
        opt = torch.optim.SGD([w], lr=lr)
        normopt.LpDecay(opt, p=p, weight_decay=1e-20, over=over)
        return opt

    assert torch.equal(left(added), values)
    if over == "entries":
        for fused in (False, True):
            own = dict(lr=float(lr), decay="lp", decay_p=p, weight_decay=1e-20, fused=fused)
            assert torch.equal(left(lambda w, own=own: normopt.SGD([w], **own)), values)

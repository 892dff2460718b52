"""16-bit weights: what each rounding keeps, what dtype the state has, and that loading changes neither."""

from __future__ import annotations

import copy

import pytest
import torch

import normopt
from normopt.stages.write import kahan_, nearest_, stochastic_


def hundred_small_steps(dtype, rounding, **settings):
    """100 steps of 1e-3 down from 1.0, of 4096 weights."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    opt = normopt.SignSGD([w], lr=1e-3, rounding=rounding, **settings)
    for _ in range(100):
        w.grad = torch.ones_like(w)
        opt.step()
    return w.detach().double(), opt


def test_nearest_loses_small_steps_and_the_others_keep_them():
    expected, _ = hundred_small_steps(torch.float32, "nearest")
    assert torch.all(hundred_small_steps(torch.bfloat16, "nearest")[0] == 1)
    stochastic, _ = hundred_small_steps(torch.bfloat16, "stochastic")
    assert float(stochastic.mean()) == pytest.approx(float(expected.mean()), rel=0.01)
    for dtype in (torch.bfloat16, torch.float16):
        kahan, opt = hundred_small_steps(dtype, "kahan")
        torch.testing.assert_close(kahan, expected, rtol=0.01, atol=0)
        (state,) = opt.state.values()
        assert state["kahan_compensation"].dtype == dtype
        exact = kahan + state["kahan_compensation"].double()
        torch.testing.assert_close(exact, expected, rtol=1e-4, atol=0)


def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour():
    torch.manual_seed(1)
    x = torch.tensor([1 + 3 / 1024, -1 - 3 / 1024, 3.14159, 1e-30, -1e-40]).repeat(20000, 1)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    stochastic_([out], [x])
    for column, exact in zip(out.double().T, x[0].double(), strict=True):
        gap = column.max() - column.min()
        assert column.unique().numel() == 2
        assert column.min() <= exact <= column.max()
        assert abs(column.mean() - exact) < 5 * gap * 0.5 / 20000**0.5


def test_what_is_exact_or_not_finite_stays():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, 0.0])
    x.view(torch.int32)[7] = 0x7FFFFFFF  # a NaN whose lower half is full, and would carry into the sign
    for _ in range(20):
        out = torch.empty(8, dtype=torch.bfloat16)
        stochastic_([out], [x])
        assert torch.equal(out[:6].float(), x[:6])
        assert out[6:].isnan().all()
    lost = torch.ones(8, dtype=torch.bfloat16)
    (lost,) = kahan_([out], [x])
    assert not lost.any()


def test_32_bit_weights_are_untouched_by_rounding():
    for rounding in ("stochastic", "kahan"):
        a, opt = hundred_small_steps(torch.float32, rounding)
        assert torch.equal(a, hundred_small_steps(torch.float32, "nearest")[0])
        assert not opt.state
    w = torch.ones(3)
    nearest_([w], [w])
    assert torch.equal(w, torch.ones(3))


def test_stochastic_repeats_from_the_same_seed():
    assert torch.equal(*(hundred_small_steps(torch.bfloat16, "stochastic")[0] for _ in range(2)))


STATELESS = {name for name in normopt.list_optimizers() if normopt.get_optimizer(name)._no_momentum}


@pytest.mark.parametrize(("before", "after"), [(None, "bfloat16"), ("bfloat16", None), (None, "float64")])
def test_state_follows_a_state_dtype_that_changes(before, after):
    for foreach in (False, True):
        p = torch.nn.Parameter(torch.randn(6, 5))
        opt = normopt.SGD([p], lr=0.1, momentum=0.9, state_dtype=before, foreach=foreach)
        for state_dtype in (before, before, after, after):
            opt.param_groups[0]["state_dtype"] = state_dtype
            p.grad = torch.randn_like(p)
            opt.step()
            assert opt.state[p]["momentum_buffer"].dtype == (getattr(torch, state_dtype) if state_dtype else p.dtype)


@pytest.mark.parametrize(
    ("name", "state_dtype"),
    [
        (name, state_dtype)
        for name in normopt.list_optimizers()
        for state_dtype in ([None] if name in STATELESS else [None, "float32", torch.bfloat16])
    ],
)
def test_state_dtype_is_kept_by_load_state_dict(name, state_dtype, tmp_path):
    def make():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4, 3, dtype=d)) for d in (torch.bfloat16, torch.float32)]
        settings = dict(rounding="kahan", weight_decay=0.1, decay="lp", agr=True)
        group = {} if name in STATELESS else dict(momentum=0.9, state_dtype=state_dtype)
        opt = normopt.get_optimizer(name)([{"params": params, **group}], lr=0.1, **settings)
        return params, opt

    def step(params, opt, seed):
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()

    params, opt = make()
    step(params, opt, 1)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    loaded_params, loaded = make()
    with torch.no_grad():
        for a, b in zip(loaded_params, params, strict=True):
            a.copy_(b)
    loaded.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for p, q in zip(params, loaded_params, strict=True):
        assert opt.state[p].keys() == loaded.state[q].keys()
        for key, value in opt.state[p].items():
            assert loaded.state[q][key].dtype == value.dtype
            assert torch.equal(loaded.state[q][key], value)
        if "momentum_buffer" in opt.state[p]:
            expected = {None: p.dtype, "float32": torch.float32, torch.bfloat16: torch.bfloat16}[state_dtype]
            assert opt.state[p]["momentum_buffer"].dtype == expected
    step(params, opt, 2)
    step(loaded_params, loaded, 2)
    for a, b in zip(params, loaded_params, strict=True):
        assert torch.equal(a, b)


def test_a_float32_momentum_is_better_than_a_16_bit_one():
    """The buffer of many small gradients stalls in bfloat16 and does not in float32."""
    buffers = []
    for state_dtype in (None, "float32"):
        w = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        opt = normopt.SGD([w], lr=0.0, momentum=0.999, state_dtype=state_dtype)
        for _ in range(1000):
            w.grad = torch.ones_like(w)
            opt.step()
        buffers.append(opt.state[w]["momentum_buffer"].double())
    exact = (1 - 0.999**1000) / (1 - 0.999)
    assert abs(buffers[1] - exact).max() < 1e-3 * exact
    assert abs(buffers[0] - exact).min() > 0.1 * exact


def test_a_model_that_changes_its_dtype_goes_on():
    net = torch.nn.Linear(3, 2)
    opt = normopt.LPSGDM(net.parameters(), agr=True, weight_decay=0.1, decay="lp", rounding="kahan")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net.to(dtype)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert all(p.dtype == dtype and p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(state_dtype="int8"), "state_dtype"),
        (dict(state_dtype=torch.complex64), "state_dtype"),
        (dict(rounding="up"), "rounding"),
        (dict(rounding="stochastic"), "bfloat16"),
    ],
)
def test_bad_input(settings, message):
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=message):
        normopt.SGD([w], **settings)
    opt = normopt.SGD([torch.nn.Parameter(torch.ones(3))])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [w], **settings})
    assert opt.state_dict() == before

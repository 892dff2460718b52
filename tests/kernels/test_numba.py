"""The fused step on a CPU, against the NumPy oracle and against the engine's for-loop."""

from __future__ import annotations

import copy
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import normopt
from normopt.kernels import cpu
from normopt.kernels.cpu import exponent_of
from normopt.kernels.numba import exponent_at, pow_f32
from normopt.kernels.tables import CHUNK, Chunks
from tests.oracle import Rule, agr, direction, lp_decay_factor
from tests.patience import patience
from tests.test_oracle import FIXED, MOMENTA, PS, REGULARIZERS, SCALES, check, recorded  # noqa: F401 (a fixture)

BUFFER = "momentum_buffer"

NAMES = sorted(MOMENTA)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [*(p for p in PS if p > 1), 2.7])
def test_every_scale_and_p(p, scale, recorded):  # noqa: F811
    rule = dict(p=p, scale=scale, momentum=0.9, momentum_rule="ema")
    left_out, total = check(
        normopt.SteepestDescent, dict(norm="lp", fused=True, **rule), Rule(**rule), recorded, torch.float32
    )
    assert left_out < 1e-3 * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_wears_every_regularizer(name, regularizer, dtype, recorded):  # noqa: F811
    cls = normopt.get_optimizer(name)
    fresh = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    settings = {**MOMENTA[name], **REGULARIZERS[regularizer]}
    rule = Rule(p=FIXED.get(fresh["norm"], fresh["p"]), scale=fresh["scale"], eps=fresh["eps"], **settings)
    left_out, total = check(cls, settings | {"fused": True}, rule, recorded, dtype)
    assert left_out < 1e-3 * total


@pytest.mark.parametrize(
    "settings",
    [
        dict(momentum=0.9, momentum_rule="heavy", nesterov=True),
        dict(momentum=0.9, momentum_rule="heavy", dampening=0.5),
        dict(momentum=0.9, momentum_rule="ema", nesterov=True),
        dict(momentum=0.5, momentum_rule="lion", beta2=0.9, maximize=True),
        dict(weight_decay=0.1, decay="lp", decay_p=1.5),
        dict(momentum=0.9, maximize=True, agr=True, weight_decay=0.1, decay="coupled"),
        dict(weight_decay=0.1, decay="lp", decay_p=2.0),
        dict(weight_decay=0.1, decay="lp", decay_p=4.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("p", "scale"), [(3.0, "power"), (2.7, "dual"), (math.inf, "matched")])
def test_momenta_and_decays(p, scale, settings, recorded):  # noqa: F811
    own = dict(p=p, scale=scale, **settings)
    check(normopt.SteepestDescent, dict(norm="lp", fused=True, **own), Rule(**own), recorded, torch.float32)


@pytest.mark.parametrize("p", [1.5, 2.0, 2.7, 3.0, math.inf])
def test_eps(p, recorded):  # noqa: F811
    own = dict(p=p, scale="power", eps=1e-3)
    check(normopt.SteepestDescent, dict(norm="lp", fused=True, **own), Rule(**own), recorded, torch.float32)


SHAPES = [(), (1,), (7,), (3, 0), (0,), (15, 17), (4097,), (3, 4096), (16385,)]


def twins(shapes, dtype=torch.float32, lr=0.01, **settings):
    """The same optimizer twice, fused and for-loop, with equal parameters and gradients."""
    torch.manual_seed(0)
    both = []
    for how in ({"fused": True}, {"foreach": False}):
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        both.append(normopt.SteepestDescent(params, lr=lr, **how, **settings))
    align(*both)
    return both


def weights(opt):
    return opt.param_groups[0]["params"]


def align(ours, theirs):
    """The first gets the weights and the state of the second, and both the same new gradients."""
    with torch.no_grad():
        for p, q in zip(weights(ours), weights(theirs), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
            p.copy_(q)
            for key, value in theirs.state.get(q, {}).items():
                ours.state[p][key].copy_(value)


def test_odd_sizes_empty_and_scalar_tensors_in_one_group():
    for settings in (dict(norm="linf", scale="unit"), dict(norm="lp", p=2.7, scale="unit", agr=True)):
        ours, theirs = twins(SHAPES, momentum=0.9, momentum_rule="ema", **settings)
        for _ in range(3):
            before = [q.detach().clone() for q in weights(theirs)]
            ours.step()
            theirs.step()
            for p, q, w in zip(weights(ours), weights(theirs), before, strict=True):
                size = torch.maximum(w.abs(), (q - w).abs().max() if q.numel() else w.abs())
                assert ((p - q).abs() <= 2e-6 * size).all()
            align(ours, theirs)


def test_signs_are_bitwise_the_for_loops():
    ours, theirs = twins(SHAPES, norm="linf", scale="unit", momentum=0.9)
    for _ in range(3):
        ours.step()
        theirs.step()
        for p, q in zip(weights(ours), weights(theirs), strict=True):
            assert torch.equal(p, q)
        align(ours, theirs)


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    """Every normal bfloat16, half and a quarter of a unit in the last place added."""
    w = torch.arange(0x0480, 0x7F00, dtype=torch.int16).view(torch.bfloat16)
    w = torch.cat([w, -w])
    unit = torch.exp2(torch.floor(torch.log2(w.double().abs())) - 7)
    for part in (0.5, 0.25, 0.75, -0.5, -0.75):
        g = (-part * unit).bfloat16()
        p = torch.nn.Parameter(w.clone())
        p.grad = g
        normopt.SteepestDescent([p], lr=1.0, norm="l2", fused=True).step()
        assert torch.equal(p.detach(), (w.double() - g.double()).float().bfloat16())


@pytest.mark.parametrize("state", [None, "float32"])
@pytest.mark.parametrize(
    "settings",
    [dict(norm="l2"), dict(norm="lp", p=2.7, scale="power"), dict(norm="lp", p=3.0, scale="dual")],
    ids=str,
)
def test_bfloat16_differs_by_one_unit_in_the_last_place_at_most(settings, state):
    ours, theirs = twins([(513, 9), (5,)], torch.bfloat16, momentum=0.9, state_dtype=state, **settings)
    for _ in range(3):
        ours.step()
        theirs.step()
        for p, q in zip(weights(ours), weights(theirs), strict=True):
            ulps = (p.detach().view(torch.int16).int() - q.detach().view(torch.int16).int()).abs()
            assert ulps.max() <= 1
            assert (ulps > 0).float().mean() < 0.01
        align(ours, theirs)


def test_kahan_keeps_what_the_weights_lose():
    both = twins([(300,)], torch.bfloat16, lr=1e-3, norm="linf", scale="unit", rounding="kahan")
    for opt in both:
        (p,) = weights(opt)
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
        for _ in range(100):
            opt.step()
        torch.testing.assert_close(p.detach().float(), torch.full((300,), 0.9), rtol=0.01, atol=0)
    (p,), (q,) = map(weights, both)
    assert torch.equal(p, q)
    assert torch.equal(both[0].state[p]["kahan_compensation"], both[1].state[q]["kahan_compensation"])


def test_kahan_keeps_nothing_of_what_overflows():
    both = twins([(3,)], torch.bfloat16, lr=1.0, norm="l2", rounding="kahan")
    for opt in both:
        (p,) = weights(opt)
        p.data.copy_(torch.tensor([3.3e38, -3.3e38, 1.0]))
        for _ in range(2):
            p.grad = torch.tensor([-3e38, 3e38, 1e-3]).bfloat16()
            opt.step()
        assert p.tolist()[:2] == [math.inf, -math.inf]
        assert opt.state[p]["kahan_compensation"].tolist()[:2] == [0, 0]
    assert torch.equal(*(weights(opt)[0] for opt in both))


def test_noise_differs_from_chunk_to_chunk_and_step_to_step():
    p = torch.nn.Parameter(torch.ones(3 * 4096, dtype=torch.bfloat16))
    opt = normopt.SGD([p], lr=2.0**-9, rounding="stochastic", fused=True)
    rounded = []
    for _ in range(2):
        p.data.fill_(1.0)
        p.grad = -torch.ones_like(p)
        opt.step()
        rounded += list((p.detach() > 1).view(3, -1))
    for i, a in enumerate(rounded):
        assert 0.2 < a.float().mean() < 0.3
        for b in rounded[:i]:
            assert 0.55 < (a == b).float().mean() < 0.7  # 5/8, of independent draws


def test_stochastic_rounding_is_right_on_average_and_reproducible():
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        opt = normopt.SignSGD([p], lr=1e-3, rounding="stochastic", fused=True)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            opt.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
    assert ends[0].float().mean().item() == pytest.approx(0.9, rel=1e-3)
    assert len(ends[0].unique()) > 3
    p = torch.nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan, 0.0], dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    normopt.SGD([p], lr=1.0, rounding="stochastic", fused=True).step()
    assert torch.equal(p.detach().nan_to_num(7, 8, 9), torch.tensor([8, 9, 7, 0.0], dtype=torch.bfloat16))


def test_powers_to_six_parts_in_ten_million_over_the_whole_range():
    @numba.njit
    def all_of(x, numbers, above):
        y, e = np.empty_like(x), exponent_at(numbers, 0)
        for i in range(len(x)):
            y[i] = pow_f32(x[i], e, above, False)
        return y

    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-149, 128, 200_000)).astype(np.float32)
    x = x[np.isfinite(x) & (x > 0)]
    for exponent in (1 / 1.7, 1 / 7, 0.999, 1e-3, 1.3, 2.9, -0.7):
        y = all_of(x, np.array(exponent_of(exponent), np.float32), exponent > 1).astype(np.float64)
        z = x.astype(np.float64) ** exponent
        inside = (z > 2e-38) & (z < 3e38)
        assert np.abs(y / z - 1)[inside].max() < 6e-7
        assert np.all(y[z > 4e38] == np.inf)
        assert np.all(y[z < 1e-38] == 0)
    ends = all_of(np.array([0, np.inf, np.nan, 1], np.float32), np.array(exponent_of(0.6), np.float32), False)
    np.testing.assert_allclose(ends, [0, np.inf, np.nan, 1], rtol=6e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scale", SCALES)
def test_nan_and_infinity_are_not_hidden_and_do_not_spread_to_other_tensors(scale, bad):
    ours, theirs = twins([(50,), (60, 2)], norm="lp", p=2.7, scale=scale)
    for opt in (ours, theirs):
        weights(opt)[0].grad[7] = bad
        opt.step()
    for p, q in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not weights(ours)[0].isfinite().all()
    assert weights(ours)[1].isfinite().all()


@pytest.mark.parametrize(
    ("scale", "magnitude"),
    [*((s, m) for s in ("unit", "power") for m in (1e-39, 1e-30, 1e30)), ("power", 1e-44)],
)
def test_tiny_huge_and_denormal_gradients(scale, magnitude):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(5000))
    p.grad = (torch.randn(5000).double() * magnitude).float()
    normopt.SteepestDescent([p], lr=1.0, norm="lp", p=2.7, scale=scale, fused=True).step()
    (u,) = direction([p.grad.double().numpy()], 2.7, scale)
    np.testing.assert_allclose(-p.detach().double().numpy(), u, rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "momentum_rule": "ema"}], ids=["plain", "ema"])
def test_denormals_zeros_and_empty_chunks_beside_ordinary_entries(scale, rule):
    torch.manual_seed(0)
    g = torch.randn(4 * CHUNK)
    g[5], g[CHUNK + 7 :: 11] = 3e-40, 0.0  # one chunk has a denormal, three have zeros
    g[2 * CHUNK : 3 * CHUNK] = 0.0
    g[3 * CHUNK :] *= 1e-25  # whose squares are below the smallest float32
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g / 0.1 if rule else g  # an average that begins at 0 takes in a tenth
    normopt.SteepestDescent([p], lr=1.0, norm="lp", p=2.7, scale=scale, fused=True, **rule).step()
    (u,) = direction([g.double().numpy()], 2.7, scale)
    ours = -p.detach().double().numpy()
    np.testing.assert_allclose(ours, u, rtol=3e-6, atol=0)
    assert ours[5] != 0
    assert (ours[g.numpy() == 0] == 0).all()


def test_agr_where_chunks_have_the_same_largest_entry():
    g = np.full(3 * CHUNK, 1e-3)
    g[[5, CHUNK + 7, CHUNK + 9]] = 1.0, -1.0, 1.0
    p = torch.nn.Parameter(torch.zeros(len(g)))
    p.grad = torch.tensor(g).float()
    normopt.SteepestDescent([p], lr=1.0, norm="l2", agr=True, fused=True).step()
    np.testing.assert_allclose(-p.detach().double().numpy(), agr(p.grad.double().numpy()), rtol=1e-6)


def test_agr_of_a_dominant_entry_does_not_cancel():
    for others in (1e-3, 1e-6, 1e-10):
        g = torch.full((9000,), others / 9000)
        g[4321] = 1.0
        p = torch.nn.Parameter(torch.zeros(9000))
        p.grad = g
        normopt.SGD([p], lr=1.0, agr=True, fused=True).step()
        np.testing.assert_allclose(-p.detach().double().numpy(), agr(g.double().numpy()), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 8).t(),
        lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(40)[::2],
    ],
)
def test_tensors_that_do_not_lie_contiguously(make):
    torch.manual_seed(0)
    p = torch.nn.Parameter(make())
    q = torch.nn.Parameter(p.detach().clone())
    ours = normopt.LPSGDM([p], lr=0.1, p=3.0, fused=True)
    theirs = normopt.LPSGDM([q], lr=0.1, p=3.0, foreach=False)
    for _ in range(3):
        q.grad = make()
        p.grad = q.grad.clone(memory_format=torch.contiguous_format)
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_bit_identical_from_run_to_run_and_with_any_number_of_threads():
    threads = torch.get_num_threads()
    ends = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(s)) for s in [(300, 700), (12345,), (5,)]]
            opt = normopt.SteepestDescent(
                params, lr=0.1, norm="lp", p=2.7, scale="matched", momentum=0.9, agr=True, fused=True
            )
            for _ in range(4):
                for p in params:
                    p.grad = torch.randn_like(p)
                opt.step()
            ends.append(torch.cat([p.detach().flatten() for p in params]))
    finally:
        torch.set_num_threads(threads)
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_norm_pairs_are_the_for_loops(scale):
    ours, theirs = twins([(30, 20), (7,)], norm="lp", p=2.7, scale=scale, radius=3.0, lr_ratio=0.3)
    ours.step()
    theirs.step()
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)
    (a,), (b,) = ours.norm_pairs(), theirs.norm_pairs()
    assert float(a.dual) == pytest.approx(float(b.dual), rel=1e-5)
    assert float(a.update) == pytest.approx(float(b.update), rel=1e-5)


def test_state_is_saved_loaded_and_copied():
    ours, theirs = twins([(30, 20), (7,)], norm="lp", p=3.0, scale="power", momentum=0.9, momentum_rule="ema")
    ours.step()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(weights(ours), weights(theirs), strict=True):
            q.copy_(p)
    copied = copy.deepcopy(ours)
    for opt in (ours, theirs, copied):
        for p in weights(opt):
            p.grad = torch.ones_like(p)
        opt.step()
        opt.step()
    for p, q, r in zip(weights(ours), weights(theirs), weights(copied), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert torch.equal(ours.state[p][BUFFER], copied.state[r][BUFFER])


def test_schedules_and_tensors_as_numbers():
    ours, theirs = twins([(40, 30)], norm="lp", p=8.0, scale="power", momentum=0.9)
    theirs.param_groups[0]["lr"] = 0.02
    ours.param_groups[0] |= {"lr": torch.tensor(0.02), "p": torch.tensor(8.0)}
    schedules = [normopt.schedules.CosineP(opt, total_steps=4) for opt in (ours, theirs)]
    for _ in range(5):
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        (p,), (q,) = weights(ours), weights(theirs)
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)
        align(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(norm="spectral", scale="unit"), "does not work entry by entry"),
        (dict(norm="l1", scale="unit"), "at p = 1 a single entry"),
        (dict(differentiable=True), "no derivative"),
        (dict(foreach=True), "two ways of running a step"),
        (dict(state_dtype="float64"), "momentum in float32, bfloat16"),
    ],
)
def test_what_cannot_be_fused_says_why(settings, message):
    with pytest.raises(ValueError, match=message):
        normopt.SteepestDescent([torch.nn.Parameter(torch.zeros(2, 2))], fused=True, **settings)


def test_parameters_that_cannot_be_fused_say_why():
    with pytest.raises(ValueError, match="some are float64"):
        normopt.SGD([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))], fused=True)
    with pytest.raises(ValueError, match="no kernels for meta"):
        normopt.SGD([torch.nn.Parameter(torch.zeros(2, device="meta"))], fused=True)
    p = [torch.nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(TypeError, match="fused must be True or False"):
        normopt.SGD(p, fused=1)
    assert "on fused (fused=True)" in normopt.SGD(p, fused=True).backend()
    assert "on foreach (small tensors on a CPU)" in normopt.SGD(p).backend()
    large = [torch.nn.Parameter(torch.zeros(200, 200))]
    assert "on fused (Numba is installed)" in normopt.SGD(large).backend()
    assert "on for-loop (the default on cpu)" in normopt.SGD(large, fused=False).backend()
    assert "on for-loop (the default on cpu)" in normopt.LPSGDM(large, p=1.0, scale="dual").backend()
    assert "on for-loop (foreach=False)" in normopt.SGD(p, foreach=False).backend()


def test_without_numba_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("normopt.kernels.support._installed", lambda package: False)
    large = [torch.nn.Parameter(torch.zeros(200, 200))]
    assert "on for-loop (the default on cpu)" in normopt.SGD(large).backend()
    with pytest.raises(ValueError, match=r'numba is not installed, which the extra "cpu" brings'):
        normopt.SGD([torch.nn.Parameter(torch.zeros(2))], fused=True)


def test_chunks_cover_every_entry_once():
    shapes = [torch.Size(s) for s in ((1,), (CHUNK,), (CHUNK + 1,), (3, 5000))]
    chunks = Chunks(shapes)
    for t, shape in enumerate(shapes):
        own = chunks.tensor == t
        assert chunks.count[own].sum() == shape.numel()
        assert chunks.first[t] == np.flatnonzero(own)[0]
        assert (chunks.start[own] == np.arange(own.sum()) * CHUNK).all()
    for parts in (1, 2, 3, 100):
        assert [i for a, b in chunks.shared(parts, 0, len(chunks)) for i in range(a, b)] == list(range(len(chunks)))


@pytest.mark.exhaustive
def test_kernels_come_from_the_cache_in_another_process(tmp_path: Path):
    code = (
        "import torch, normopt\n"
        "p = torch.nn.Parameter(torch.ones(100, 100)); p.grad = torch.ones_like(p)\n"
        "normopt.LPSGDM([p], p=2.7, scale='dual', agr=True, fused=True).step()\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(40),
            check=True,
        ).stdout
        for _ in range(2)
    )
    assert first.count("data saved") >= 3
    assert "data saved" not in second
    assert second.count("data loaded") >= 3


@pytest.mark.exhaustive
def test_an_edited_source_is_not_served_from_the_cache(tmp_path: Path):
    """The bits of a momentum rule change their meaning in one file; the kernels that read them are in another."""
    root = Path(normopt.__file__).parents[1]
    shutil.copytree(root / "normopt", tmp_path / "normopt", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import torch, normopt\n"
        "for rule in (dict(momentum_rule='lion'), dict(nesterov=True)):\n"
        "    torch.manual_seed(0)\n"
        "    p = torch.nn.Parameter(torch.randn(30))\n"
        "    opt = normopt.SteepestDescent([p], 0.1, momentum=0.9, fused=True, **rule)\n"
        "    for _ in range(3):\n"
        "        p.grad = torch.randn(30)\n"
        "        opt.step()\n"
        "    print(float(p.double().square().sum()))\n"
        "print(normopt.__file__)\n"
    )
    flags = tmp_path / "normopt/kernels/flags.py"
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patience(60), check=True)
        said.append(done.stdout)
        text = flags.read_text(encoding="utf-8")
        flags.write_text(text.replace("RUNS, OLD, GRADIENT, NEW, SAME", "RUNS, NEW, GRADIENT, OLD, SAME"), "utf-8")
    assert "RUNS, NEW, GRADIENT, OLD, SAME" in flags.read_text(encoding="utf-8")
    assert str(tmp_path) in said[0]
    assert said[0] == said[1]


@pytest.mark.exhaustive
def test_processes_that_compile_at_once_take_turns(tmp_path):
    """Four fill a cache at once in which an older source's files lie, and Numba is slow to overwrite them."""
    code = """
import sys, time, torch
from numba.core import caching

source, turn = map(int, sys.argv[1:])
save = caching.IndexDataCacheFile._save_data
caching.IndexDataCacheFile._save_data = lambda *args: (time.sleep(0.1), save(*args))
caching._SourceFileBackedLocatorMixin.get_source_stamp = lambda self: source

import normopt

torch.manual_seed(0)
ways = [(2.7, "dual"), (3.0, "matched"), (1.5, "unit"), (8.0, "power")]
for p, scale in ways[turn:] + ways[:turn]:
    plain, fused = ([torch.nn.Parameter(torch.linspace(-1, 1, 500))] for _ in range(2))
    for params, how in ((plain, dict(foreach=False)), (fused, dict(fused=True))):
        params[0].grad = torch.linspace(-3, 2, 500)
        normopt.SteepestDescent(params, lr=0.1, norm="lp", p=p, scale=scale, agr=True, **how).step()
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def start(source, turn):
        command = [sys.executable, "-c", code, str(source), str(turn)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    for running in ([start(1, 0)], [start(2, turn) for turn in range(4)]):
        for process in running:
            _, said = process.communicate(timeout=patience(100))
            assert process.returncode == 0, said


def test_a_checkpoint_says_which_backend_made_it_and_a_change_is_logged(caplog):
    def make(**how):
        p = torch.nn.Parameter(torch.ones(100, 100))
        p.grad = torch.ones(100, 100)
        return normopt.SGD([p], lr=0.1, momentum=0.9, **how)

    opt = make()
    opt.step()
    saved = opt.state_dict()
    assert saved["param_groups"][0]["backend"] == "fused"
    caplog.set_level("INFO", logger="normopt")
    other = make(foreach=True)
    other.load_state_dict({**saved, "param_groups": [saved["param_groups"][0] | {"foreach": True}]})
    assert [r.message for r in caplog.records] == [
        "group 0: the checkpoint's steps were made on fused, these are on foreach"
    ]
    assert "backend" not in other.param_groups[0]
    caplog.clear()
    make().load_state_dict(saved)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.3, 0.8, 1.0, 1.5, 2.0, 3.0, 4.5])
def test_factors_of_lp_decay(p, dtype):
    """Of several chunks and tensors, as the definition has them at every size of a weight, and of what is no number."""
    size = torch.logspace(-44, 38, CHUNK + 5, dtype=torch.float64)
    ends = torch.tensor([0.0, -0.0, 1e-45, 3e38, math.inf, math.nan])
    tensors = [torch.stack([size, -size.flip(0)]).to(dtype), ends.to(dtype).reshape(2, 3)]
    for strength in (1e-9, 1e-3, 10.0):
        wide, few = cpu.lp_factors(tensors, p, strength)
        with np.errstate(over="ignore", under="ignore"):
            expected = lp_decay_factor(tensors[0].double().numpy(), p, strength / p)
        assert wide.dtype == torch.float32
        off = np.abs(wide.double().numpy() - expected)
        # float32 has the factor to an eighth of 1e-6, and 1 − factor to 1e-6; a power below its range is 0.
        assert (off <= 1.3e-7 * expected + 1e-6 * (1 - expected) * expected + 2e-38 * max(1, 1 / strength)).all()
        if p < 2:
            assert few.flatten()[[0, 1, 3, 4]].tolist() == [0, 0, 1, 1]
        assert few.isnan().tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lp_decay_on_other_optimizers_is_that_without_kernels(dtype, monkeypatch):
    """Also for weights that kernels do not take, and those whose group lets nothing decay."""
    called = []
    kernel = cpu.lp_factors
    monkeypatch.setattr(
        cpu, "lp_factors", lambda w, *more: called.append([*map(tuple, map(np.shape, w))]) or kernel(w, *more)
    )

    def stepped():
        torch.manual_seed(0)
        shapes = [(100, 90), (5,), (70, 60), (8, 4, 3, 2), (90, 100)]
        params = [torch.nn.Parameter((torch.randn(s) * 0.01).to(dtype)) for s in shapes]
        params[3] = torch.nn.Parameter(params[3].data.to(memory_format=torch.channels_last))
        params[4] = torch.nn.Parameter(params[4].data.double())
        opt = torch.optim.SGD(
            [{"params": params}, {"params": [torch.nn.Parameter(torch.ones(99, 99))], "lr": 0.0}], 0.1
        )
        normopt.LpDecay(opt, p=0.8, weight_decay=0.3)
        for _ in range(3):
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            opt.step()
        return [p.detach() for group in opt.param_groups for p in group["params"]]

    fast = stepped()
    assert called == [[(100, 90), (70, 60)]] * 3
    monkeypatch.setattr(normopt.addons.decay, "TINY", math.inf)
    for a, b in zip(fast, stepped(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-38)
    assert len(called) == 3
    assert torch.equal(fast[-1], torch.ones(99, 99))


COUNTS = {
    "as they are": lambda state: None,
    "filled": lambda state: state["step"].fill_(40.0),
    "of other memory": lambda state: setattr(state["step"], "data", torch.tensor(7.0)),
    "replaced": lambda state: state.update(step=torch.tensor(9.0)),
}


@pytest.mark.parametrize("change", COUNTS)
@pytest.mark.parametrize("of", ["all", "one"])
def test_steps_that_are_changed_by_hand(change, of):
    """The kernels' shares follow the counts in the state, also where these differ between parameters."""

    def run(fused):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(30, 20)) for _ in range(3)]
        opt = normopt.AdamW(params, lr=0.01, fused=fused)
        for i in range(9):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
            if i in (4, 6):
                for p in params if of == "all" else params[1:2]:
                    COUNTS[change](opt.state[p])
        return params, [float(opt.state[p]["step"]) for p in params]

    params, counts = run(True)
    others, expected = run(False)
    assert counts == expected
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_a_step_that_a_scaler_skips_is_not_counted():
    p = torch.nn.Parameter(torch.ones(100, 100))
    opt = normopt.AdamW([p], lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for size in (1.0, 1.0, math.inf, 1.0, math.inf, 1.0):
        p.grad = torch.full_like(p, size)
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        scaler.update()
        counts.append(float(opt.state[p]["step"]))
    assert counts == [1, 2, 2, 3, 3, 4]

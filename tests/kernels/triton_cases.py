"""What test_triton.py asks of the Triton kernels, in a process of its own: on CUDA, else by Triton's interpreter.

Step by step from the oracle's own state, as in test_oracle.py, and for its reasons.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

import normopt
from normopt.kernels import support
from normopt.kernels import triton as kernels
from normopt.kernels.flags import BUFFERS, NEAREST, Flags
from normopt.kernels.fused import FusedBatch, FusedUpdate
from normopt.kernels.tables import CHUNK, Chunks, Tables
from normopt.recipe import make_recipe
from normopt.sharding.layout import Layout
from tests.oracle import Rule, agr, lp_decay_factor, lp_dual_norm

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what the interpreter computes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(), (1,), (13, 7), (CHUNK + 3,)]
REPEATS = int(os.environ.get("NORMOPT_STEPS", "20"))
STEPS = min(3, REPEATS // 3)  # the first has no momentum yet, the second has
MOMENTA = {
    "none": dict(),
    "heavy": dict(momentum=0.9, momentum_rule="heavy"),
    "dampened": dict(momentum=0.9, momentum_rule="heavy", dampening=0.5),
    "nesterov": dict(momentum=0.9, momentum_rule="heavy", nesterov=True),
    "ema": dict(momentum=0.9, momentum_rule="ema"),
    "ema nesterov": dict(momentum=0.9, momentum_rule="ema", nesterov=True),
    "lion": dict(momentum=0.9, momentum_rule="lion", beta2=0.99),
}
REGULARIZERS = {
    "plain": dict(),
    "maximize": dict(maximize=True),
    "agr": dict(agr=True),
    "coupled": dict(weight_decay=0.03, decay="coupled"),
    "decoupled": dict(weight_decay=0.3, decay="decoupled"),
    "lp0.8": dict(weight_decay=0.03, decay="lp", decay_p=0.8),
    "lp1": dict(weight_decay=0.03, decay="lp", decay_p=1.0),
    "lp1.5": dict(weight_decay=0.03, decay="lp", decay_p=1.5),
    "lp2": dict(weight_decay=0.3, decay="lp", decay_p=2.0),
    "lp3": dict(weight_decay=0.3, decay="lp", decay_p=3.0),
    "lp4": dict(weight_decay=0.3, decay="lp", decay_p=4.0),
    "all": dict(agr=True, maximize=True, weight_decay=0.03, decay="coupled"),
}
WAYS = [(p, "power") for p in (1.5, 2.0, 2.5, 3.0, 8.0, math.inf)]
WAYS += [(p, "unit") for p in (1.2, 1.5, 2.0, 3.0, 8.0)]
WAYS += [(p, "dual") for p in (1.5, 3.0, 8.0, math.inf)]
WAYS += [(p, "matched") for p in (1.5, 3.0, 8.0, math.inf)]


def patch_once():
    """Let Triton's interpreter patch triton.language once, and not at each call of a function, half of all its time."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


if DEVICE == "cpu":
    patch_once()


class Stepped:
    """Parameters stepped by the kernels, laid out as the fused step does it."""

    def __init__(self, ws, dtype=torch.float32, *, gradient=None, state=None, offset=0, **settings):
        self.settings = settings
        self.offset = offset
        self.gradient, self.state = gradient or dtype, state or dtype
        self.weights = [self.placed(w, dtype) for w in ws]
        self.momenta = self.lost = None
        self.kept = {}

    def placed(self, x, dtype):
        """On the device, ``offset`` entries after an address that is a multiple of 16."""
        x = torch.as_tensor(x, device=DEVICE).to(dtype)
        room = torch.empty(x.numel() + self.offset, dtype=dtype, device=DEVICE)[self.offset :]
        return room.copy_(x.reshape(-1)).view(x.shape)

    def step(self, gs, ms=None, **given):
        """One step; ms are the momenta to start from, None those of the step before."""
        step = self.prepared(gs, ms, **given)
        for phase in step.phases():
            assert phase.measure(None) is None
            phase.apply(None, None)
        return step.measured

    def prepared(self, gs, ms=None, **given):
        """The step, whose phases ask other ranks if it has ``layouts``."""
        optimizer = normopt.SteepestDescent(self.weights, foreach=False, norm="lp", **self.settings)
        recipe = make_recipe(optimizer.param_groups[0], self.weights)
        fresh = [self.momenta is None] * len(gs)
        if recipe.momentum.runs() and self.momenta is None:
            self.momenta = [self.placed(torch.zeros(w.shape), self.state) for w in self.weights]
        if ms is not None and ms[0] is not None:
            self.momenta, fresh = [self.placed(m, self.state) for m in ms], [False] * len(gs)
        if recipe.round.rounding == "kahan" and self.lost is None:
            self.lost = [torch.zeros_like(w) for w in self.weights]
        names = [slot.name for slot in recipe.slots if slot.name in BUFFERS]
        buffers = {name: self.kept.setdefault(name, [torch.zeros_like(w) for w in self.weights]) for name in names}
        given["buffers"] = {name: np.array([x.data_ptr() for x in xs]) for name, xs in buffers.items()}
        gs = self.kept["gradients"] = [
            self.placed(g, self.gradient) for g in gs
        ]  # of which the step only has addresses
        chunks = self.kept.setdefault("cut", Chunks([w.shape for w in self.weights]))
        at = (xs and np.array([x.data_ptr() for x in xs]) for xs in (self.weights, gs, self.momenta, self.lost))
        new = {"momentum_buffer": [i for i, made in enumerate(fresh) if made]}
        tables = Tables(chunks, self.weights[0].device, *at, new, self.kept, **given)
        flags, values = recipe.lower()
        dtype = self.weights[0].dtype
        if dtype == torch.float32:
            flags["rounding"] = NEAREST
        kinds = dict(weight=dtype, gradient=self.gradient, state=self.state)
        return kernels.Step(Flags(**flags, **kinds), values, tables)


def numbers(x):
    return x.detach().cpu().double().numpy()


def given_as(xs, dtype):
    return [None if x is None else numbers(torch.as_tensor(x).to(dtype)) for x in xs]


def data(shapes, seed=0):
    """Weights and a gradient a step, of sizes over several decades."""
    rng = np.random.default_rng(seed)

    def draw(scale):
        return [scale * rng.standard_normal(s) * np.exp2(rng.integers(-6, 3, s)) for s in shapes]

    return draw(0.3), [draw(0.1) for _ in range(STEPS)]


def check(
    shapes=SHAPES, dtype=torch.float32, *, gradient=None, state=None, offset=0, lr=1e-2, rounding=None, **settings
):
    """STEPS steps, each from the oracle's state; the largest error relative to max(|w|, η|u|).

    Where c is what is left of larger numbers, it has their roundings, and u may be off by as much: the more it has lost
    beyond a tenth, the more is allowed.
    """
    ws, steps = data(shapes)
    rule = Rule(lr=lr, **settings)
    kinds = dtype, gradient or dtype, state or dtype
    more = {} if rounding is None else {"rounding": rounding}
    ws, ms, worst = given_as(ws, dtype), [None] * len(ws), 0.0
    for gs in steps:
        ws, gs, ms = (given_as(x, d) for x, d in zip((ws, gs, ms), kinds, strict=True))
        run = Stepped(ws, dtype, gradient=gradient, state=state, offset=offset, lr=lr, **settings, **more)
        measured = run.step(gs, ms)
        new_ws, new_ms = rule.step(ws, gs, ms)
        for i, (p, w, new_w) in enumerate(zip(run.weights, ws, new_ws, strict=True)):
            m = np.zeros_like(gs[i]) if ms[i] is None else ms[i]
            parts = (
                rule.momentum * np.abs(m) + np.abs(gs[i]) + rule.weight_decay * (rule.decay == "coupled") * np.abs(w)
            )
            sure = np.abs(rule.c[i]) >= 1e-5 * parts
            lost = np.maximum(0.1 * parts / np.maximum(np.abs(rule.c[i]), 1e-30), 1)
            size = np.maximum(np.maximum(np.abs(w), lr * rule.radius * np.abs(rule.u[i]) * lost), 1e-30)
            error = np.where(sure, np.abs(numbers(p) - new_w) / size, 0).max()
            assert error <= TOLERANCE[dtype], (i, error)
            assert sure.mean() > 0.99
            worst = max(worst, error)
            if new_ms[i] is not None:
                largest = rule.momentum * np.abs(m) + np.abs(gs[i]) + np.abs(w)
                assert np.all(np.abs(numbers(run.momenta[i]) - new_ms[i]) <= TOLERANCE[kinds[2]] * largest)
        if measured is not None:
            duals = [lp_dual_norm(c, rule.p) for c in rule.c]
            np.testing.assert_allclose(numbers(measured[0]), np.array(duals, dtype=float), rtol=1e-6)
        ws, ms = new_ws, new_ms
    return worst


@pytest.mark.parametrize(("p", "scale"), WAYS)
@pytest.mark.parametrize("momentum", ["none", "ema"])
def test_every_way_of_a_direction(p, scale, momentum):
    assert check(p=p, scale=scale, **MOMENTA[momentum]) > 0


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_momentum_with_every_regularizer(momentum, regularizer):
    shapes = [(), (1,), (5, 9)]
    for p, scale in [(2.0, "power"), (3.0, "dual")]:
        check(shapes, p=p, scale=scale, **MOMENTA[momentum], **REGULARIZERS[regularizer])


ADAM = dict(momentum=0.9, momentum_rule="ema", bias_correction=True, metric="diagonal")
COORDINATES = {
    "agr lp": ADAM | REGULARIZERS["lp0.8"] | dict(agr=True),
    "lion signs": ADAM | MOMENTA["lion"] | dict(norm="linf", scale="unit", maximize=True),
    "nesterov p max": ADAM | dict(nesterov=True, norm="lp", p=3.0, scale="power", metric_rule="max"),
    "sum": dict(metric="diagonal", metric_rule="sum", **MOMENTA["heavy"], **REGULARIZERS["coupled"]),
    "smoothed": dict(metric="diagonal", norm="lp", p=1.7, scale="power", eps=1e-3, bias_correction=True),
    "corrected matched": MOMENTA["lion"] | dict(bias_correction=True, norm="lp", p=1.4, scale="matched"),
    "dual max": ADAM | dict(norm="lp", p=1.4, scale="dual", metric_rule="max", agr=True),
    "matched": ADAM | dict(norm="lp", p=2.7, scale="matched") | REGULARIZERS["coupled"],
    "adan": ADAM | dict(difference_beta=0.9, weight_decay=0.1, decay="proximal", agr=True),
    "adan dual": MOMENTA["heavy"] | dict(difference_beta=0.9, metric="diagonal", norm="lp", p=3.0, scale="dual"),
    "stacey": MOMENTA["ema"]
    | dict(coupling=0.1, norm="lp", p=3.0, scale="power", weight_decay=0.1, decay="cautious-lp"),
    "stacey signs": dict(coupling=0.3, coupling_rate=0.1, norm="linf", scale="matched", weight_decay=0.1),
    "cautious": ADAM | dict(weight_decay=torch.tensor(0.5, device=DEVICE), decay="cautious"),
    "lars": dict(scale="relative", momentum=0.9, momentum_rule="ema", weight_decay=0.1, decay="coupled"),
    "lamb": ADAM | dict(scale="relative", weight_decay=0.1, decay="inside"),
    "inside": MOMENTA["heavy"] | dict(norm="lp", p=3.0, scale="power", weight_decay=0.1, decay="inside"),
    "sphere": ADAM | dict(norm="lp", p=3.0, scale="unit", constraint="sphere"),
    "sphere power": dict(norm="lp", p=1.5, scale="power", constraint="sphere", lr=torch.tensor(0.3, device=DEVICE)),
    "unit": dict(metric="diagonal", norm="lp", p=torch.tensor(3.0, device=DEVICE), scale="unit"),
}


@pytest.fixture
def optimizers(monkeypatch):
    """Make two optimizers of equal parameters, one stepped by these kernels wherever they are, one by the for-loop."""
    monkeypatch.setitem(support.KERNELS, DEVICE, support.KERNELS["cuda"])

    def make(shapes, dtype=torch.float32, **settings):
        torch.manual_seed(0)
        ws = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
        hows = dict(fused=True), dict(foreach=False)
        return [normopt.SteepestDescent([w.clone().requires_grad_() for w in ws], **settings, **h) for h in hows]

    return make


def gradients(opt, step):
    torch.manual_seed(1000 + step)
    params = opt.param_groups[0]["params"]
    for p in params:
        p.grad = (10.0 ** -(step % 3) * torch.randn(p.shape)).to(p)
    return params


@pytest.mark.parametrize("rounding", [None, "kahan"])
@pytest.mark.parametrize("how", COORDINATES)
def test_adaptive_coordinates_are_the_for_loops(how, rounding, optimizers):
    """From the for-loop's state at every step, to 2e-6 of max(|w|, η|u|) on either side; and the norms."""
    dtype = torch.float32 if rounding is None else torch.bfloat16
    settings = dict(lr=0.01, rounding=rounding or "nearest") | COORDINATES[how]
    opt, other = optimizers([(3, CHUNK // 3 + 2), (5,)], dtype, **settings)
    for step in range(STEPS):
        ours, theirs = gradients(opt, step), gradients(other, step)
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q.data)
            for key, x in opt.state[p].items():
                x.copy_(other.state[q][key])
        before = [whole(other, q) for q in theirs]
        opt.step()
        other.step()
        for found, expected in zip(opt.norm_pairs(), other.norm_pairs(), strict=True):
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=2e-6, atol=0, check_dtype=False)
        for p, q, w in zip(ours, theirs, before, strict=True):
            a, b = whole(opt, p), whole(other, q)
            assert float(((a - b).abs() / torch.maximum(w.abs(), (b - w).abs())).max()) <= (
                2**-14 if rounding else 4e-6
            )
            assert opt.state[p].keys() == other.state[q].keys()
            for key in {*opt.state[p]} - {"kahan_compensation"}:
                x, y = opt.state[p][key], other.state[q][key]
                torch.testing.assert_close(x, y, rtol=max(2e-6, TOLERANCE[x.dtype]), atol=1e-7 * float(y.abs().max()))


def whole(opt, p):
    return p.detach().double() + opt.state[p].get("kahan_compensation", 0)


def test_a_skipped_step_is_not_counted(optimizers):
    """The first, which makes the state, neither."""
    opt, _ = optimizers([(4, 3), (0,), ()], lr=0.1, **ADAM)
    params = opt.param_groups[0]["params"]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for i, factor in enumerate((math.inf, 1.0, 1.0, math.nan, 1.0)):
        before = [p.detach().clone() for p in params]
        opt.zero_grad()
        scaler.scale(sum((factor * p).sum() for p in params)).backward()
        scaler.step(opt)
        scaler.update()
        for p, w in zip(params, before, strict=True):  # of a constant gradient every step is lr long
            torch.testing.assert_close(w - p.detach(), torch.full_like(w, 0.1 * math.isfinite(factor)))
            assert opt.state[p]["step"] == (0, 1, 2, 2, 3)[i]
            assert opt.state[p]["step"].dtype == torch.float32


@pytest.mark.parametrize("t", [0, 999, 200_000])
def test_steps_are_counted_where_nothing_can_be_read(t):
    """On the meta device, where a tensor has no value; and there and elsewhere what is counted is exact to 1e-7."""
    settings = ADAM | dict(momentum_rule="lion", beta2=0.9999, metric_beta=0.999)
    found = {}
    for device in ("meta", DEVICE):
        params = [torch.nn.Parameter(torch.zeros(3, device=device)) for _ in range(2)]
        opt = normopt.SteepestDescent(params, foreach=True, **settings)
        opt.state |= {p: {"step": torch.tensor(float(t), device=device)} for p in params}
        batch = FusedBatch(make_recipe(opt.param_groups[0], params), params, opt.state, FusedUpdate(), None, None)
        batch.found_inf = torch.zeros(1, device=device)
        found[device] = FusedUpdate()._shares(batch)
    assert found["meta"].shape == (2, 3)
    t = np.float64(t + 1)
    c, v = 0.9 * -np.expm1((t - 1) * np.log(0.9999)) + (1 - 0.9), -np.expm1(t * np.log(0.999))
    np.testing.assert_allclose(numbers(found[DEVICE]), [[1 / c, v**-0.5, 1]] * 2, rtol=1e-12)


@pytest.mark.parametrize("weight", TOLERANCE, ids=str)
@pytest.mark.parametrize("state", TOLERANCE, ids=str)
def test_every_dtype(state, weight):
    for settings in (
        dict(p=3.0, scale="power", weight_decay=0.1, decay="coupled"),
        dict(p=8.0, scale="unit", agr=True, **MOMENTA["heavy"]),
    ):
        check([(3, 5), (CHUNK + 1,)], weight, state=state, **settings)
    check([(3, 5)], weight, gradient=torch.float32, p=2.0, scale="power", **MOMENTA["ema"])


@pytest.mark.filterwarnings("ignore:eps = 0.001 does nothing at p = 2:UserWarning")
def test_the_radius_and_eps():
    check(p=3.0, scale="dual", radius=0.3, weight_decay=0.3)
    for p in (1.5, 2.0, 3.0, math.inf):
        check(p=p, scale="power", eps=1e-3)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks_odd_ends_and_unaligned_tensors(dtype, offset):
    shapes = [(2, CHUNK), (CHUNK - 1,), (1, 1, 2 * CHUNK + 5), ()]
    settings = dict(p=8.0, scale="unit", agr=True, weight_decay=0.1, decay="lp", **MOMENTA["ema"])
    check(shapes, dtype, offset=offset, **settings)


@pytest.mark.parametrize("p", [1.2, 1.7, 2.3, 5.0, 64.0])
def test_the_power_map_from_denormals_to_the_largest(p):
    """From w = 0 with lr 1 the new weight IS −u."""
    g = np.float32(
        [1e-45, 3e-42, 1e-30, 1e-10, 0.1, 0.7071, 0.7072, 1 - 6e-8, 1, 1 + 2e-7, 3, 1e5, 1e20, 3.4e38, 0, -2]
    )
    g = np.concatenate([g, np.random.default_rng(0).lognormal(0, 20, 4000).clip(1e-37, 1e37).astype(np.float32)])
    run = Stepped([np.zeros(g.shape)], lr=1.0, p=p, scale="power")
    run.step([g])
    u = np.sign(g) * np.abs(g).astype(np.longdouble) ** (np.longdouble(1) / np.longdouble(p - 1))
    inside = (np.abs(u) < 3e38) & (np.abs(u) > 1.2e-38)
    found = -numbers(run.weights[0])
    np.testing.assert_allclose(found[inside], u[inside].astype(float), rtol=2e-7 if p >= 2 else 5e-7)
    assert np.all(np.isinf(found[np.abs(u) > 3.5e38]))
    assert np.all(np.abs(found[np.abs(u) < 1e-38]) < 1.2e-38)


def test_signs_are_those_of_the_for_loop_bit_by_bit():
    w, (g, *_) = data([(CHUNK + 5,), (3, 3)])
    g[0][:4] = 0, math.nan, math.inf, -0.0
    for settings in (dict(), dict(maximize=True)):
        run = Stepped(w, lr=0.3, p=math.inf, scale="power", **settings)
        run.step(g)
        params = [torch.nn.Parameter(torch.tensor(x).float()) for x in w]
        for p, x in zip(params, g, strict=True):
            p.grad = torch.tensor(x).float()
        normopt.SteepestDescent(params, lr=0.3, norm="linf", scale="power", foreach=False, **settings).step()
        for x, p in zip(run.weights, params, strict=True):
            assert torch.equal(x.cpu().nan_to_num(7.0), p.detach().nan_to_num(7.0))


@pytest.mark.parametrize("scale", ["power", "unit", "dual", "matched"])
@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, 8.0, math.inf])
def test_a_tensor_p_and_lr_and_decay(p, scale):
    """The same step as with floats, up to roundoff; but for that of "matched", bit by bit where p is 2 or ∞."""
    ws, (g, *_) = data([(3, 50), (), (CHUNK + 1,)])
    floats = dict(lr=0.125, weight_decay=0.25, p=p)
    for dtype in (torch.float32, torch.float64):
        tensors = {k: torch.tensor([v], device=DEVICE, dtype=dtype) for k, v in floats.items()}
        one, other = Stepped(ws, scale=scale, **floats), Stepped(ws, scale=scale, **tensors)
        one.step(g)
        other.step(g)
        for a, b, w in zip(one.weights, other.weights, ws, strict=True):
            if (p == math.inf and scale != "matched") or (p == 2 and scale in ("power", "dual")):
                assert torch.equal(a, b)
            w, a, b = 0.97 * w, numbers(a), numbers(b)
            assert np.all(np.abs(a - b) <= 2e-6 * np.maximum(np.abs(w), np.abs(a - w)))


def test_a_p_that_is_nan_is_not_hidden():
    for scale in ("power", "unit"):
        run = Stepped([np.ones(5)], lr=0.1, p=torch.tensor(math.nan, device=DEVICE), scale=scale)
        run.step([np.ones(5)])
        assert run.weights[0].isnan().all()


def test_a_changed_number_recompiles_nothing_and_is_heeded():
    w, (g, *_) = data([(5,)])
    run = Stepped(w, p=3.0, scale="power", lr=0.5)
    run.step(g)
    between = [x.clone() for x in run.weights]
    run.settings["lr"] = 0.0
    run.step(g)
    assert all(map(torch.equal, between, run.weights))
    if DEVICE == "cuda":
        compiled = len(kernels.step_kernel.device_caches[torch.cuda.current_device()][0])
        for lr in (0.1, 1, 0.3):
            run.settings["lr"] = lr
            run.step(g)
        assert len(kernels.step_kernel.device_caches[torch.cuda.current_device()][0]) == compiled


def test_found_inf_writes_nothing_and_unscale_multiplies():
    w, (g, *_) = data([(4, 4), (CHUNK + 3,)])
    for settings in (
        dict(p=2.0, scale="power", **MOMENTA["heavy"]),
        dict(p=3.0, scale="dual", agr=True, weight_decay=0.1, **MOMENTA["ema"]),
    ):
        for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "kahan")):
            plain, scaled = (Stepped(w, dtype, lr=0.1, rounding=rounding, **settings) for _ in range(2))
            plain.step(g)
            zero, half = torch.zeros(1, device=DEVICE), torch.tensor(0.5, device=DEVICE)
            scaled.step([2 * x for x in g], found_inf=zero, unscale=half)
            for a, b in ((plain.weights, scaled.weights), (plain.momenta, scaled.momenta), (plain.lost, scaled.lost)):
                assert all(map(torch.equal, a or (), b or ()))
            kept = [x.clone() for x in (*scaled.weights, *scaled.momenta, *(scaled.lost or ()))]
            g[0][0, 0] = math.inf
            scaled.step(g, found_inf=torch.ones((), device=DEVICE), unscale=half)
            assert all(map(torch.equal, kept, (*scaled.weights, *scaled.momenta, *(scaled.lost or ()))))
            g[0][0, 0] = 1.0


def test_a_skipped_step_keeps_all_state_and_measures_the_radius():
    """The launch for the norm stores state, and it reads all of a weight: its length is that of the sphere."""
    w, (g, *_) = data([(4, 4), (CHUNK + 3,)])
    radii = torch.full([2], math.nan, dtype=torch.float64, device=DEVICE)
    settings = MOMENTA["ema"] | dict(metric="diagonal", metric_rule="max", difference_beta=0.9, constraint="sphere")
    run = Stepped(w, lr=0.1, p=3.0, scale="unit", **settings)
    run.step(g, found_inf=torch.ones(1, device=DEVICE), radii=radii)
    buffers = [x for name in BUFFERS for x in run.kept.get(name, [])]
    assert len(buffers) == 8
    assert not any(x.any() for x in (*run.momenta, *buffers))
    np.testing.assert_allclose(numbers(radii), [np.linalg.norm(numbers(x)) for x in run.weights], rtol=1e-6)


@pytest.mark.parametrize(("p", "scale"), [(2.0, "power"), (3.0, "unit"), (8.0, "dual"), (math.inf, "matched")])
def test_zero_nan_and_infinity(p, scale):
    w, _ = data([(2, 3), (CHUNK + 2,), ()])
    zeros = [np.zeros(x.shape) for x in w]
    for settings in (dict(), dict(agr=True), dict(p=torch.tensor(p, device=DEVICE))):
        run = Stepped(w, lr=0.1, scale=scale, **{"p": p, **settings})
        before = [x.clone() for x in run.weights]
        run.step(zeros)
        assert all(map(torch.equal, before, run.weights))
        for bad in (math.nan, math.inf):
            run = Stepped(w, lr=0.1, scale=scale, **{"p": p, **settings})
            g = [np.ones(x.shape) for x in w]
            g[1][CHUNK] = bad
            run.step(g)
            assert not run.weights[1][CHUNK].isfinite()
            assert run.weights[0].isfinite().all()
            if math.isnan(bad) and scale != "power":
                assert run.weights[1].isnan().all()


@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
@pytest.mark.parametrize("p", [1.005, 2.7, math.inf])
def test_the_for_loop_entry_by_entry_at_the_ends(p, scale):
    """Which entries are ∞, −∞ and NaN, and the value of all others: beside ∞, NaN, huge and denormal ones."""

    def class_of(x):
        return x.isnan() * 3 + (x == math.inf) * 1 + (x == -math.inf) * 2

    torch.manual_seed(0)
    odds = [math.inf], [math.inf, -math.inf], [math.inf, math.nan], [3e38], [3e38, 3e38], [1e-42], [0.0] * 49
    ws, gs = ([*map(torch.randn, [(50,)] * len(odds)), torch.randn(20, 2)] for _ in range(2))
    for g, odd in zip(gs, odds, strict=False):  # all but the last, a tensor of ordinary entries
        g[1 : 1 + len(odd)] = torch.tensor(odd)
    for regularized in (False, True):
        run = Stepped(ws, lr=0.01, p=p, scale=scale, agr=regularized)
        run.step(gs)
        params = [torch.nn.Parameter(w.clone()) for w in ws]
        for q, g in zip(params, gs, strict=True):
            q.grad = g.clone()
        normopt.SteepestDescent(params, lr=0.01, norm="lp", p=p, scale=scale, agr=regularized, foreach=False).step()
        for ours, theirs in zip(run.weights, params, strict=True):
            a, b = ours.cpu(), theirs.detach()
            assert torch.equal(class_of(a), class_of(b))
            fine = b.isfinite()
            if fine.any():
                assert ((a - b).abs() <= 2e-4 * torch.maximum(b.abs(), b[fine].abs().max() * 1e-3))[fine].all()


def test_agr_where_chunks_have_the_same_largest_entry():
    g = np.full(3 * CHUNK, 1e-3)
    g[[5, CHUNK + 7, CHUNK + 9]] = 1.0, -1.0, 1.0
    run = Stepped([np.zeros(g.shape)], lr=1.0, p=2.0, scale="power", agr=True)
    run.step([g])
    np.testing.assert_allclose(-numbers(run.weights[0]), agr(g.astype(np.float32).astype(float)), rtol=1e-6)


def test_infinite_weights_under_every_lp_decay():
    w = torch.tensor([[1e25, -3e38, math.inf, -math.inf, math.nan, 1.0]])
    for p in (0.3, 1.0, 1.5, 2.0, 3.0, 4.0):
        settings = dict(lr=0.01, scale="unit", weight_decay=0.1, decay="lp", decay_p=p)
        run = Stepped([w], p=math.inf, **settings)
        run.step([torch.ones_like(w)])
        q = torch.nn.Parameter(w.clone())
        q.grad = torch.ones_like(w)
        normopt.SteepestDescent([q], norm="linf", foreach=False, **settings).step()
        torch.testing.assert_close(run.weights[0].cpu(), q.detach(), equal_nan=True, rtol=2e-6, atol=0)


def test_a_weight_of_zero_under_every_lp_decay():
    for p in (0.8, 1.0, 2.0, 3.0):
        run = Stepped([np.zeros((2, 2))], lr=0.1, p=2.0, scale="power", weight_decay=0.5, decay="lp", decay_p=p)
        run.step([np.ones((2, 2))])
        expected = -0.1 * lp_decay_factor(np.zeros((2, 2)), p, 0.05)
        np.testing.assert_allclose(numbers(run.weights[0]), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_agr_where_one_entry_dominates(size):
    g = np.full(CHUNK + 7, 1e-4)
    g[5] = 1e4
    g = numbers(torch.tensor(g * size).float())
    run = Stepped([np.zeros(g.shape)], lr=1.0, p=2.0, scale="power", agr=True)
    run.step([g])
    np.testing.assert_allclose(-numbers(run.weights[0]), agr(g), rtol=1e-6)
    alone = np.zeros(5)
    alone[2] = size
    for x, left in ((alone, 0 * alone), (np.full(1, size), np.full(1, size))):
        run = Stepped([np.zeros(x.shape)], lr=1.0, p=2.0, scale="power", agr=True)
        run.step([x])
        np.testing.assert_allclose(-numbers(run.weights[0]), left, rtol=1e-6)


def test_norms_from_tiny_to_huge_over_chunks_of_unlike_sizes():
    rng = np.random.default_rng(1)
    g = rng.standard_normal(3 * CHUNK)
    for low, high in ((1e-36, 1e-33), (1e-15, 1e15), (1e30, 1e33)):
        x = g * np.repeat([low, high, 0.0], CHUNK)
        x = numbers(torch.tensor(x).float())
        for p, scale in ((3.0, "unit"), (8.0, "matched"), (1.5, "unit")):
            run = Stepped([np.zeros(x.shape)], lr=1.0, p=p, scale=scale)
            dual, _ = run.step([x])
            rule = Rule(p=p, scale=scale, lr=1.0)
            rule.step([np.zeros(x.shape)], [x], [None])
            assert float(dual) == pytest.approx(float(lp_dual_norm(x, p)), rel=1e-6)
            np.testing.assert_allclose(-numbers(run.weights[0]), rule.u[0], rtol=3e-6, atol=1.2e-38)


@pytest.mark.skipif(DEVICE == "cuda", reason="a constant of a compiled kernel cannot be changed")
def test_sums_over_more_chunks_than_are_added_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "SUMMED", triton.language.constexpr(2))
    check([(4, CHUNK), (2 * CHUNK + 3,)], p=3.0, scale="unit", agr=True)
    check([(9, CHUNK), (2 * CHUNK + 3,)], p=8.0, scale="matched", agr=True)  # nor are the groups


@pytest.mark.parametrize("largest", [1e-40, 1.0, 1e36, 3e38])
def test_sums_of_gradients_to_1e_6(largest):
    """Of a chunk, in float32 though they are: equal terms, whose roundings are alike, and unlike ones."""
    rng = np.random.default_rng(0)
    for g in (np.full(CHUNK, 0.1), rng.random(CHUNK + 1), rng.lognormal(0, 3, CHUNK), rng.standard_normal(CHUNK - 3)):
        g = numbers(torch.tensor(g / np.abs(g).max() * largest).float())
        run = Stepped([np.zeros(g.shape)], lr=1.0, p=2.0, scale="power", agr=True)
        step = run.prepared([g])
        step.phases()[0].measure(None)
        for (top, others), start in zip(step.sums.tolist(), range(0, g.size, CHUNK), strict=True):
            a = np.sort(np.abs(g[start : start + CHUNK]))
            assert top == a[-1]
            assert others == pytest.approx(math.fsum(a[:-1]), rel=1e-6, abs=0)


def test_a_wrong_rule_is_caught(monkeypatch):
    """The comparison itself can fail."""
    right = dict(p=3.0, scale="dual", agr=True, weight_decay=0.1, decay="lp", **MOMENTA["ema"])
    check(**right)
    step = Stepped.step
    for wrong in (dict(p=3.01), dict(weight_decay=0.09), dict(agr=False), dict(momentum=0.91), dict(radius=0.99)):

        def other(run, *args, wrong=wrong):
            run.settings |= wrong
            return step(run, *args)

        monkeypatch.setattr(Stepped, "step", other)
        with pytest.raises(AssertionError):
            check(**right)


def test_stochastic_rounding_is_right_on_average_and_new_with_every_seed():
    w = np.full((4, CHUNK), 1.0)
    run = [Stepped(w, torch.bfloat16, gradient=torch.float32, lr=0.1, p=2.0, scale="power", rounding="stochastic")]
    seeds = (3, 4, torch.tensor(3, device=DEVICE))
    runs = run + [Stepped(w, torch.bfloat16, gradient=torch.float32, **run[0].settings) for _ in seeds[1:]]
    for r, seed in zip(runs, seeds, strict=True):
        r.step([np.full(row.shape, -0.01) for row in w], seed=seed)
    a, b, c = (torch.stack(r.weights).double() for r in runs)
    assert set(a.unique().tolist()) == {1.0, 1.0078125}
    assert float(a.mean()) == pytest.approx(1.001, abs=5 * 0.0078125 * math.sqrt(0.11 / a.numel()))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    up = a > 1  # independent of the neighbour, of the lane of the same draw, and of the chunk after
    for other in (up.roll(1, 1), up.roll(8, 1), up.roll(1, 0), b > 1):
        assert float((up & other).double().mean()) == pytest.approx(0.128**2, abs=0.008)
    bad = Stepped([np.array([math.inf, math.nan])], torch.bfloat16, **run[0].settings)
    bad.step([np.zeros(2)])
    assert bad.weights[0].isinf().tolist() == [True, False]
    assert bad.weights[0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_keeps_what_rounding_loses(dtype):
    w = [np.array([1.0, 2.0, -3.0, math.inf]), np.ones((2, 3))]
    steps = 5 * REPEATS
    run = Stepped(w, dtype, lr=1e-3 / steps, p=2.0, scale="power", rounding="kahan")
    for _ in range(steps):
        run.step([np.ones(x.shape) for x in w])
    total = run.weights[0].double() + run.lost[0].double()
    np.testing.assert_allclose(numbers(total)[:3], w[0][:3] - 1e-3, atol=1e-4)
    assert float(run.lost[0][3]) == 0
    check([(3, 5), (CHUNK + 1,)], dtype, rounding="kahan", p=3.0, scale="power", **MOMENTA["ema"])


def test_bit_by_bit_the_same_again_and_wherever_gradients_lie():
    ws, steps = data([(3, CHUNK), (77,), ()])

    def trajectory(offset):
        settings = dict(p=3.0, scale="matched", agr=True, weight_decay=0.1, decay="lp", **MOMENTA["heavy"])
        run = Stepped(ws, lr=0.1, offset=offset, **settings)
        hold = []
        for gs in steps:
            hold.append([run.placed(g, torch.float32) for g in gs])  # so that the next lie elsewhere
            run.step(gs)
        return run.weights

    first, again, elsewhere = trajectory(0), trajectory(0), trajectory(1)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, elsewhere))


def test_tables_are_sent_anew_only_when_they_change_and_never_written_over():
    tables = kernels.Kept({}, torch.device(DEVICE))
    rows, values = np.arange(9).reshape(3, 3), np.array([1 / 3, math.inf, 5e-324, math.nan])
    first = tables.changing([rows, values])
    assert tables.changing([rows.copy(), values.copy()]) is first
    second = tables.changing([rows, values + 1])
    for found, kept in ((first, values), (second, values + 1)):
        assert found[0].tolist() == rows.tolist()
        np.testing.assert_array_equal(found[1].cpu(), kept)
        assert all(x.data_ptr() % 16 == 0 for x in found)
    assert len({x.untyped_storage().data_ptr() for x in (*first, *second)}) == 2  # one copy each
    tables.capturing = True
    huge = np.array([[2**62 + 1, 3, -1]])
    captured = tables.changing([huge, values])
    assert captured[0].tolist() == huge.tolist()
    np.testing.assert_array_equal(captured[1].cpu(), values)
    assert tables.kept["captured"][0] is captured


@pytest.mark.parametrize(
    ("settings", "launches", "large"),
    [
        (dict(p=2.0, scale="power"), 1, 1),
        (dict(p=3.0, scale="power", weight_decay=0.1, decay="lp", **MOMENTA["lion"]), 1, 1),
        (dict(p=3.0, scale="power", agr=True), 3, 4),
        (dict(p=3.0, scale="matched"), 3, 4),
        (dict(p=3.0, scale="unit", agr=True), 5, 7),
    ],
    ids=str,
)
def test_launches_of_a_step(settings, launches, large, monkeypatch):
    seen = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append(self.name)
            return self.kernel[grid]

    for name in ("step_kernel", "gradient_sums", "merge_gradients", "regularizer", "merge_norms", "measure"):
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    w, (g, *_) = data([(3, 4), (CHUNK + 5,)])
    Stepped(w, lr=0.1, **settings).step(g)
    assert len(seen) == launches
    if DEVICE == "cpu":  # a constant of a compiled kernel cannot be changed
        monkeypatch.setattr(kernels, "SUMMED", triton.language.constexpr(1))
        Stepped(w, lr=0.1, **settings).step(g)
        assert len(seen) == launches + large


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no CUDA graph without CUDA")
def test_a_captured_step_is_replayed_with_a_new_lr_and_survives_steps_between():
    w, (g, *_) = data([(3, 4), (CHUNK + 5,)])
    lr = torch.tensor(0.1, device=DEVICE)
    run = Stepped(w, lr=lr, p=3.0, scale="dual", agr=True, **MOMENTA["heavy"])
    run.step(g)
    static = [run.placed(x, torch.float32) for x in g]
    run.placed = lambda x, dtype: x
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step(static)
    before = [x.clone() for x in run.weights]
    lr.zero_()
    graph.replay()
    assert all(map(torch.equal, before, run.weights))
    lr.fill_(0.1)
    run.step([x.clone() for x in static])
    graph.replay()
    other = Stepped(w, lr=lr, p=3.0, scale="dual", agr=True, **MOMENTA["heavy"])
    for _ in range(2):
        other.step(g)
    lr.zero_()
    other.step(g)
    lr.fill_(0.1)
    for _ in range(2):
        other.step(g)
    assert all(map(torch.equal, other.weights, run.weights))


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no CUDA graph without CUDA")
def test_a_replayed_step_is_counted(optimizers):
    opt, other = optimizers([(3, 4), (CHUNK + 5,)], lr=0.1, **ADAM)
    for _ in range(2):
        gradients(opt, 0)
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        gradients(other, 0)
        other.step()
    for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert opt.state[p]["step"] == other.state[q]["step"] == 5
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_interpreter_is_what_runs_without_cuda():
    assert DEVICE == "cuda" or not isinstance(kernels.step_kernel, triton.runtime.jit.JITFunction)


@pytest.mark.parametrize("more", [dict(), dict(agr=True, metric="diagonal")])
@pytest.mark.parametrize(
    ("p", "scale"), [(1.5, "power"), (3.0, "unit"), (2.7, "dual"), (math.inf, "dual"), (8.0, "matched")]
)
def test_parts_on_several_ranks_are_stepped_as_whole_tensors(p, scale, more):
    """Even, uneven and empty parts, and chunks of several tensors on one rank only."""
    shapes, ranks = [(4, 7), (2 * CHUNK + 9,), (1, 5), (3, 3)], 2
    settings = dict(p=p, scale=scale, momentum=0.9, weight_decay=0.03, lr=0.1, **more)
    ws, steps = data(shapes)
    layouts = [[Layout(None, ranks, r, 0, torch.Size(s)) for s in shapes] for r in range(ranks)]

    def part(xs, r):
        return [torch.as_tensor(x).split(lay.lengths())[r] for x, lay in zip(xs, layouts[r], strict=True)]

    whole, parts = Stepped(ws, **settings), [Stepped(part(ws, r), **settings) for r in range(ranks)]
    for gs in steps:
        before = [w.clone() for w in whole.weights]
        expected = whole.step(gs)
        ranked = [parts[r].prepared(part(gs, r), layouts=layouts[r]) for r in range(ranks)]
        for phases in zip(*(step.phases() for step in ranked), strict=True):
            asked = [phase.measure(None) for phase in phases]
            answer = None if asked[0] is None else phases[0].reduce(torch.stack(asked, 1))
            for phase in phases:
                phase.apply(None, answer)
        found = [step.measured for step in ranked]
        for i, w in enumerate(whole.weights):
            longest = float((w - before[i]).abs().max())
            torch.testing.assert_close(torch.cat([p.weights[i] for p in parts]), w, rtol=2e-6, atol=2e-6 * longest)
        for result in found:
            assert (result is None) == (expected is None)
            if result is not None:
                torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)

"""What docs/theory says is so: its main claims on random inputs, in float64, through the public API."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import normopt
from normopt.norms import Lp, Mixed, Norm, Schatten

DOCS = Path(__file__).parents[1] / "docs"
PS = [1.0, 1.5, 2.0, 3.0, 8.0, math.inf]
NORMS: list[Norm] = [Lp(p) for p in PS] + [Schatten(p) for p in PS]
NORMS += [Mixed(2.0, math.inf), Mixed(1.0, math.inf), Mixed(2.0, 3.0, lines="columns")]
NORMS += [Schatten(math.inf, aspect="rms")]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(values: Tensor, grad: Tensor) -> torch.nn.Parameter:
    w = torch.nn.Parameter(values.clone())
    w.grad = grad.clone()
    return w


def agr(g: Tensor) -> Tensor:
    w = parameter(torch.zeros_like(g), g)
    normopt.SGD([w], lr=1.0, agr=True).step()
    return 0 - w.detach()


# Norms and duals, dual maps


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_no_point_of_the_ball_does_better_than_the_dual_map(norm: Norm) -> None:
    g = gaussian(4, 3)
    d, dual = norm.dual_map(g), norm.dual_norm(g)
    torch.testing.assert_close(norm.norm(d), torch.ones_like(dual))
    torch.testing.assert_close((g * d).sum(), dual)
    for seed in range(300):  # far away, and close by
        step = gaussian(4, 3, seed=seed + 1)
        for x in (step, d + 0.01 * step):
            assert (g * x).sum() / norm.norm(x) <= dual * (1 + 1e-12)


def test_the_ends_are_limits_but_for_ties_at_one() -> None:
    g = torch.tensor([4.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(Lp(1e9).dual_map(g), Lp(math.inf).dual_map(g), rtol=0, atol=1e-8)
    torch.testing.assert_close(Lp(1.001).dual_map(g), Lp(1).dual_map(g), rtol=0, atol=1e-8)
    tie = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64)
    assert Lp(1).dual_map(tie).tolist() == [1, 0, 0]
    torch.testing.assert_close(Lp(1.001).dual_map(tie), tie.new_tensor([0.5, -0.5, 0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_the_rms_operator_norm(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    rows, columns = shape
    v = torch.linalg.svd(x)[2][0]  # the input that is lengthened the most
    longest = (x @ v).square().mean().sqrt() / v.square().mean().sqrt()
    expected = math.sqrt(columns / rows) * torch.linalg.svdvals(x)[0]
    torch.testing.assert_close(longest, expected)
    torch.testing.assert_close(Schatten(math.inf, aspect="rms").norm(x), expected)


def test_over_tensors_the_dual_norms_add_and_a_long_vector_is_one() -> None:
    gs = [gaussian(3, seed=1), gaussian(2, 2, seed=2)]
    long = torch.cat([g.reshape(-1) for g in gs])
    for scope in ("tensor", "group"):
        ws = [parameter(torch.zeros_like(g), g) for g in gs]
        opt = normopt.SteepestDescent(ws, lr=1.0, norm="lp", p=3.0, scale="unit", scope=scope)
        opt.step()
        u = torch.cat([-w.detach().reshape(-1) for w in ws])
        dual = opt.norm_pairs()[0].dual
        if scope == "group":
            torch.testing.assert_close(u, Lp(3.0).dual_map(long))
            torch.testing.assert_close(dual, Lp(3.0).dual_norm(long))
        else:
            torch.testing.assert_close(u, torch.cat([Lp(3.0).dual_map(g).reshape(-1) for g in gs]))
            torch.testing.assert_close(dual, sum(Lp(3.0).dual_norm(g) for g in gs))


# Scales


@pytest.mark.parametrize("p", [2.0, 3.0, 8.0, math.inf])
def test_the_descent_lemma_of_every_scale(p: float) -> None:
    """On ½Σhw², whose smoothness in ℓp is the ℓ_{p/(p−2)} norm of h."""
    h = gaussian(20).abs() ** 3
    r = math.inf if p == 2 else (1.0 if p == math.inf else p / (p - 2))
    smoothness = Lp(r).norm(h).item()
    for seed in range(100):  # no d does worse than L
        d = gaussian(20, seed=seed + 1)
        assert (h * d * d).sum() <= smoothness * Lp(p).norm(d) ** 2 * (1 + 1e-12)
    worst = (h ** (1 / (p - 2))) if p not in (2, math.inf) else (h == h.max()).double() if p == 2 else torch.ones(20)
    torch.testing.assert_close((h * worst * worst).sum().item(), smoothness * Lp(p).norm(worst.double()).item() ** 2)
    kappas = {"unit": 0.0, "dual": 1.0, "power": 1 / (p - 1)}
    for scale, kappa in kappas.items():
        for eta in (0.3 / smoothness, 1 / smoothness, 1.9 / smoothness):
            w0 = gaussian(20, seed=99)
            g = h * w0
            w = parameter(w0, g)
            normopt.SteepestDescent([w], lr=eta, norm="lp", p=p, scale=scale).step()
            dual = Lp(p).dual_norm(g)
            before, after = (h * w0 * w0).sum() / 2, (h * w.detach() ** 2).sum() / 2
            bound = before - eta * dual ** (1 + kappa) + smoothness * eta**2 / 2 * dual ** (2 * kappa)
            assert after <= bound + 1e-12 * before
            if scale == "dual" and eta == 1 / smoothness:
                assert before - after >= dual**2 / (2 * smoothness) * (1 - 1e-12)


def test_scales_have_their_lengths_and_their_homogeneity() -> None:
    c = 1e-3 * gaussian(50)

    def update(c: Tensor, scale: str) -> Tensor:
        w = parameter(torch.zeros_like(c), c)
        normopt.SteepestDescent([w], lr=1.0, norm="lp", p=5.0, scale=scale).step()
        return -w.detach()

    torch.testing.assert_close(update(c, "power"), c.sign() * c.abs() ** 0.25)
    torch.testing.assert_close(update(c, "matched").norm(), c.norm())
    for scale, kappa in {"unit": 0.0, "dual": 1.0, "power": 0.25, "matched": 1.0}.items():
        torch.testing.assert_close(update(10 * c, scale), 10**kappa * update(c, scale))
        if scale != "matched":
            torch.testing.assert_close(Lp(5.0).norm(update(c, scale)), Lp(5.0).dual_norm(c) ** kappa)


@pytest.mark.parametrize("norm", ["l2", "linf", "spectral"])
def test_unit_steps_with_decoupled_decay_stay_in_the_ball(norm: str) -> None:
    w = parameter(gaussian(5, 4), gaussian(5, 4))
    opt = normopt.SteepestDescent([w], lr=0.2, norm=norm, scale="unit", weight_decay=2.0, decay="decoupled")
    size = {"l2": Lp(2), "linf": Lp(math.inf), "spectral": Schatten(math.inf)}[norm].norm
    for seed in range(60):
        before = size(w.detach())
        w.grad = gaussian(5, 4, seed=seed)
        opt.step()
        assert size(w.detach()) <= 0.6 * before + 0.4 * 0.5 + 1e-12
    assert size(w.detach()) <= 0.5 + 1e-9


# Annealing


@pytest.mark.parametrize(("p", "h", "lr"), [(3.0, 1.0, 0.1), (4.0, 0.5, 0.2), (8.0, 2.0, 0.05)])
def test_a_constant_p_ends_in_a_cycle_and_an_annealed_one_at_rest(p: float, h: float, lr: float) -> None:
    kappa = 1 / (p - 1)
    amplitude = (lr * h**kappa / 2) ** (1 / (1 - kappa))
    for annealed in (False, True):
        w = parameter(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        opt = normopt.LPSGD([w], lr=lr, p=p, eps=0.0)
        schedule = normopt.schedules.CosineP(opt, total_steps=1000) if annealed else None
        for _ in range(3000):
            w.grad = h * w.detach()
            before = w.item()
            opt.step()
            if schedule is not None:
                schedule.step()
        if annealed:
            assert abs(w.item()) < 1e-6 * amplitude
        else:
            assert abs(w.item()) == pytest.approx(amplitude, rel=1e-6)
            assert w.item() == pytest.approx(-before, rel=1e-6)


def test_guarantees_relative_to_p_2() -> None:
    """R_p: at most 1 where the curvature is even, at least 1 at p = ∞ where g = h."""

    def guarantee(h: Tensor, g: Tensor, p: float) -> float:
        r = math.inf if p == 2 else (1.0 if p == math.inf else p / (p - 2))
        return (Lp(p).dual_norm(g) ** 2 / Lp(r).norm(h)).item()

    for seed in range(50):
        g, h = gaussian(30, seed=seed), gaussian(30, seed=seed + 100).abs() ** 3
        for p in (3.0, 8.0, math.inf):
            assert guarantee(torch.ones_like(g), g, p) <= guarantee(torch.ones_like(g), g, 2) * (1 + 1e-12)
        assert guarantee(h, h, math.inf) >= guarantee(h, h, 2) * (1 - 1e-12)


def test_the_exponent_passes_a_half_late() -> None:
    opt = normopt.LPSGD([torch.nn.Parameter(torch.ones(1))], p=8.0)
    schedule = normopt.schedules.CosineP(opt, total_steps=1001)
    below = 0
    for _ in range(1001):
        below += opt.param_groups[0]["p"] > 3
        opt.step()
        schedule.step()
    assert below / 1001 == pytest.approx(math.acos(-2 / 3) / math.pi, abs=2e-3)
    assert round(100 * below / 1001) == 73


# ℓp decay


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 1.5])
def test_time_to_zero(p: float) -> None:
    lr, decay, start = 1e-2, 0.1, 0.5
    w = parameter(torch.full((1, 2), start, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    opt = normopt.SGD([w], lr=lr, weight_decay=decay, decay="lp", decay_p=p)
    predicted = start ** (2 - p) / ((2 - p) * p * lr * decay)
    steps = 0
    while w.detach().any():
        opt.step()
        steps += 1
    assert predicted <= steps <= 1.05 * predicted + 10
    w.grad = -torch.ones_like(w)
    opt.step()
    assert not w.detach().any(), "zero is absorbing, whatever the gradient"


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 1.5, 2.0])
def test_no_step_raises_the_penalised_loss(p: float) -> None:
    h, target, decay = gaussian(1, 20).abs(), gaussian(1, 20, seed=1), 0.1

    def objective(w: Tensor) -> float:
        return ((h * (w - target) ** 2).sum() / 2 + decay * (w.abs() ** p).sum()).item()

    w = parameter(gaussian(1, 20, seed=2), torch.zeros(1, 20, dtype=torch.float64))
    opt = normopt.SGD([w], lr=1 / h.max().item(), weight_decay=decay, decay="lp", decay_p=p)
    last = objective(w.detach())
    for _ in range(300):
        w.grad = h * (w.detach() - target)
        opt.step()
        now = objective(w.detach())
        assert now <= last + 1e-12
        last = now
    alive = w.detach().abs() > 1e-3
    slope = h * (w.detach() - target) + p * decay * w.detach().sign() * w.detach().abs() ** (p - 1)
    if p >= 1:  # below, some are still on their way
        assert slope[alive].abs().max() < 1e-2


def test_whom_zero_draws_in() -> None:
    lr, decay = 0.01, 0.1

    def settle(p: float, pull: float, start: float) -> float:
        w = parameter(torch.full((1, 2), start, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
        opt = normopt.SGD([w], lr=lr, weight_decay=decay, decay="lp", decay_p=p)
        for _ in range(4_000):  # exp(-40) is left of the start
            w.grad = w.detach() - pull
            opt.step()
        return w[0, 0].item()

    border = (0.8 * decay / 0.5) ** (1 / (1 - 0.8))
    assert settle(0.8, 0.5, border / 2) < 1e-13
    assert settle(0.8, 0.5, border * 2) > 0.1
    assert settle(1.0, 0.9 * decay, 1.0) < 1e-13
    assert settle(1.0, 1.1 * decay, 1.0) == pytest.approx(0.1 * decay, rel=1e-3)
    alive = settle(1.5, 0.05, 1.0)
    assert 0.05 - alive == pytest.approx(1.5 * decay * alive**0.5, rel=1e-6)


# AGR


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_agr_is_a_soft_cap(n: int) -> None:
    for seed in range(10):
        g = gaussian(n, seed=seed) ** 5
        x, total = g.abs(), g.abs().sum()
        out = agr(g)
        cap = torch.stack([torch.cat([x[:i], x[i + 1 :]]).sum() for i in range(n)])  # total − x cancels
        torch.testing.assert_close(out.abs(), x * cap / total, rtol=1e-9, atol=0)
        assert (out.abs() <= torch.minimum(x, cap) * (1 + 1e-9)).all()
        assert (out.sign() == g.sign()).all()
        assert (out.abs()[x.argsort()].diff() >= -1e-12 * total).all(), "order stays"
        torch.testing.assert_close(agr(7 * g), 7 * out)
        assert (g * out).sum() > 0
        density = total**2 / (x * x).sum()
        torch.testing.assert_close(out.abs().sum(), total * (1 - 1 / density))
    lone = torch.zeros(n, dtype=torch.float64)
    lone[0] = 3.0
    assert not agr(lone).any()


def test_the_slopes_of_agr() -> None:
    g = gaussian(5)
    share = g.abs() / g.abs().sum()
    expected = share[:, None] ** 2 * g.sign()[:, None] * g.sign()
    expected.diagonal().copy_((1 - share) ** 2)
    tiny = 1e-6 * torch.eye(5, dtype=torch.float64)
    slopes = torch.stack([(agr(g + t) - agr(g - t)) / 2e-6 for t in tiny], dim=1)
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-8)


def test_agr_holds_one_sharp_coordinate_and_not_many() -> None:
    def ends_at(h: Tensor, lr: float, regularize: bool) -> float:
        w = parameter(torch.ones_like(h), torch.zeros_like(h))
        opt = normopt.SGD([w], lr=lr, agr=regularize)
        for _ in range(200):
            w.grad = h * w.detach()
            opt.step()
        return w.detach().abs().max().item()

    one = torch.tensor([10.0, 1.0, 0.9, 0.8], dtype=torch.float64)
    assert ends_at(one, 0.3, False) > 1e30
    assert ends_at(one, 0.3, True) < 1e-6
    many = torch.full((100,), 10.0, dtype=torch.float64)
    assert ends_at(many, 0.3, True) > 1e30
    assert ends_at(many, 0.19, True) < 1e-6


# What the pages quote


def test_the_formulas_are_where_the_overview_says() -> None:
    page = (DOCS / "theory/index.md").read_text(encoding="utf-8")
    table = re.findall(r"\| ((?:`\w+`(?:, | and )?)+) in `(normopt/\S+)`", page)
    assert len(table) >= 8
    for names, path in table:
        code = (DOCS.parent / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def |class )?{name}\b", code, re.MULTILINE), f"{path} has no {name}"


def test_the_counts_are_those_of_the_results() -> None:
    results = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    page = (DOCS / "theory/annealing-p.md").read_text(encoding="utf-8")
    rivals = {"SGD with the same": "SGD-EMA", "constant p": "LPSGDM constant p", '"matched"': "LPSGDM matched"}
    rivals['"twin"'] = "SGD-EMA at LPSGDM's length"
    for row, arm in rivals.items():
        (quoted,) = re.findall(rf"^\| {row}.* \| (\d) \| (\d) \| (\d) \|$", page, re.MULTILINE)
        (said,) = re.findall(rf"LPSGDM against {arm} \([^)]*\): (.*?)\. ", re.sub(r"(\d)\.(\d)", r"\1,\2", results))
        counts = []
        for verdict in ("better on", "worse on"):
            found = re.search(rf"{verdict} ([^;]*)", said)
            tasks = re.sub(r" \([^)]*\)", "", found[1]) if found else ""
            counts.append(len(re.split(r", | and ", tasks)) if tasks else 0)
        ties = re.search(r"a tie on (\d|every) tasks?", said)
        assert ties is not None
        assert list(map(int, quoted)) == [*counts, 7 if ties[1] == "every" else int(ties[1])], row
    assert "Of 14 comparisons, 3 are significant (2 better, 1 worse) and 11 are ties" in results


def test_the_measured_curvature_is_that_of_the_data() -> None:
    data = json.loads((DOCS / "data/best_norm.json").read_text(encoding="utf-8"))
    page = (DOCS / "theory/annealing-p.md").read_text(encoding="utf-8")
    changes = {(c["task"], c["what"], c["gradient"], c["by"]): c for c in data["changes"] if not c["adaptive"]}

    def cell(key: tuple[str, str, str, str], shown: Callable[[float], str]) -> str:
        c = changes[key]
        return f"{shown(c['early'][0])} → {shown(c['late'][0])}" + ("" if c["p_value"] < 0.05 else " (n.s.)")

    for task in data["setting"]["plans"]:
        cells = [cell((task, "anisotropy", "large", "best"), lambda x: f"{2**x:.0f}")]
        cells += [
            cell((task, "ℓ6/ℓ2", *kind), lambda x: f"{100 * (2**x - 1):+.0f} %".replace("-", "−"))
            for kind in (("large", "best"), ("large", "held"), ("batch", "held"))
        ]
        assert f"| {task} | {' | '.join(cells)} |" in page

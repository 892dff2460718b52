"""The geometry monitor: every metric against NumPy, and an optimizer that does not feel it."""

from __future__ import annotations

import copy
import csv
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import normopt
from normopt.diagnostics.geometry import GeometryMonitor
from normopt.diagnostics.measures import BUCKET_SIZE
from normopt.diagnostics.rows import METRICS
from normopt.norms import Lp
from tests.oracle import conjugate, lp_dual_norm, lp_norm

SHAPES = ((4, 3), (5,), (2, 3, 2))


def weights(dtype=torch.float32, shapes=SHAPES, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(params, seed=1, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng, dtype=torch.float64) * scale).to(p.dtype)
        p.grad.view(-1)[:1] = 0


def arrays(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def oracle(g, before, after, p, whole=False):
    """The docstring's formulas, in float64, of the ℓp norm."""
    q = conjugate(p)
    vector, old = np.concatenate([x.ravel() for x in g]), np.concatenate([x.ravel() for x in before])
    new = np.concatenate([x.ravel() for x in after])
    change = [b - a for a, b in zip(before, after, strict=True)]
    d, l2 = vector.size, np.sqrt((vector**2).sum())
    return {
        "grad_dual": lp_dual_norm(vector, p) if whole else sum(lp_dual_norm(x, p) for x in g),
        "grad_l2": l2,
        "density": np.abs(vector).sum() ** 2 / (d * l2**2),
        "density_q": lp_norm(vector, q) ** 2 / (d ** (2 / q - 1) * l2**2) if q < 2 else math.nan,
        "anisotropy": np.abs(vector).max() / np.sqrt((vector**2).mean()),
        "update_norm": lp_norm(new - old, p) if whole else max(lp_norm(x, p) for x in change),
        "update_ratio": np.sqrt(((new - old) ** 2).sum()) / np.sqrt((old**2).sum()),
        "zeros": (new == 0).mean(),
    }


def check(row, expected, rtol=2e-6):
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], float(value), rtol=rtol, err_msg=name)


def one_step(make, params, **monitor):
    """A monitored step: its rows and the oracle's arrays."""
    opt = make(params)
    with GeometryMonitor(opt, **monitor) as watch:
        g, before = arrays([p.grad for p in params]), arrays(params)
        opt.step()
        return watch.rows, (g, before, arrays(params))


@pytest.mark.parametrize("p", [1.0, 1.25, 1.5, 2.0, 3.0, 8.0, math.inf])
@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_metrics_in_the_optimizers_own_norm(p, scope):
    params = weights()
    gradients(params)
    make = lambda ps: normopt.SteepestDescent(  # noqa: E731
        ps, lr=0.2, lr_ratio=0.5, norm="lp", p=p, scale="unit", scope=scope, radius=0.5, weight_decay=0.1
    )
    (row,), seen = one_step(make, params)
    check(row, oracle(*seen, p, scope == "group"))
    assert (row["lr"], row["p"], row["step"], row["group"]) == (0.1, p, 0, 0)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, math.inf])
def test_metrics_of_a_tensor_p(p):
    params = weights()
    gradients(params)
    (row,), seen = one_step(lambda ps: normopt.LPSGDM(ps, lr=torch.tensor(0.25), p=torch.tensor(p)), params)
    check(row, oracle(*seen, p))
    assert (row["lr"], row["p"]) == (0.25, p)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
        lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
        lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), fused=True),
        lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    ],
)
@pytest.mark.parametrize(("norm", "p"), [(None, 2.0), ("linf", math.inf), (Lp(3.0), 3.0), ("l1", 1.0)])
def test_metrics_of_other_optimizers(make, norm, p):
    params = weights()
    gradients(params)
    (row,), seen = one_step(make, params, norm=norm)
    check(row, oracle(*seen, p))
    assert math.isnan(row["p"])


@pytest.mark.parametrize("path", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_and_16_bits(path, dtype):
    pytest.importorskip("numba")
    params = weights(dtype)
    gradients(params)
    (row,), seen = one_step(lambda ps: normopt.LPSGDM(ps, lr=0.1, p=4.0, **path), params)
    check(row, oracle(*seen, 4.0))


def test_torchs_muon():
    params = weights(shapes=((8, 6), (6, 8)))
    gradients(params)
    (row,), seen = one_step(lambda ps: torch.optim.Muon(ps, lr=0.1), params)
    check(row, oracle(*seen, 2.0))
    params = weights(shapes=((8, 6), (6, 8)))
    gradients(params)
    (row,), (g, before, after) = one_step(lambda ps: torch.optim.Muon(ps, lr=0.1), params, norm="spectral")
    spectra = [np.linalg.svd(b - a, compute_uv=False) for a, b in zip(before, after, strict=True)]
    assert row["update_norm"] == pytest.approx(max(s.max() for s in spectra), rel=1e-5)
    assert row["grad_dual"] == pytest.approx(sum(np.linalg.svd(x, compute_uv=False).sum() for x in g), rel=1e-5)
    assert math.isnan(row["density_q"])


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_the_norms_are_those_of_norm_pairs_where_there_is_neither_momentum_nor_decay(scope):
    for norm, p in (("lp", 1.5), ("lp", 3.0), ("spectral", None), ("row", None)):
        params = weights(torch.float64, shapes=((4, 6), (3, 2)))
        gradients(params)
        opt = normopt.SteepestDescent(params, lr=0.25, norm=norm, p=p, scale="dual", scope=scope, radius=2.0)
        with GeometryMonitor(opt) as watch:
            opt.step()
        (pair,), (row,) = opt.norm_pairs(), watch.rows
        assert row["grad_dual"] == pytest.approx(float(pair.dual), rel=1e-10)
        assert row["update_norm"] == pytest.approx(0.25 * float(pair.update), rel=1e-10)


def test_a_norm_of_ones_own_without_a_primal_norm():
    @normopt.norms.register("no primal norm, a test's")
    class Half(normopt.norms.TensorNorm):
        def dual_norm(self, x):
            return x.norm()

        def dual_map(self, x):
            return x / x.norm()

    params = weights()
    gradients(params)
    (row,), (g, *_) = one_step(lambda ps: normopt.SteepestDescent(ps, norm=Half()), params)
    assert row["grad_dual"] == pytest.approx(sum(float(np.sqrt((x**2).sum())) for x in g), rel=1e-6)
    assert math.isnan(row["update_norm"])


def test_several_groups_each_in_its_own_norm():
    a, b = weights()[:2], weights(seed=5)[1:]
    gradients(a)
    gradients(b, seed=2)
    opt = normopt.SteepestDescent(
        [{"params": a, "norm": "lp", "p": 3.0}, {"params": b, "norm": "linf", "lr": 0.5}], lr=0.1
    )
    with GeometryMonitor(opt) as watch:
        seen = [[arrays([p.grad for p in ps]), arrays(ps)] for ps in (a, b)]
        opt.step()
        opt.add_param_group({"params": (c := weights(seed=7))})
        gradients(c)
        watch.every = 1
        opt.step()
    assert watch.rows["group"].tolist() == [0, 1, 0, 1, 2]
    assert watch.rows["step"].tolist() == [0, 0, 1, 1, 1]
    assert watch.rows["lr"].tolist() == [0.1, 0.5, 0.1, 0.5, 0.1]
    for row, (g, before), p in zip(watch.rows, seen, (3.0, math.inf), strict=False):
        check(row, {k: v for k, v in oracle(g, before, before, p).items() if not k.startswith("update")})
        assert row["update_norm"] > 0


def test_tensors_too_large_to_go_together():
    params = weights(shapes=((BUCKET_SIZE // 2 + 1,), (3,), (BUCKET_SIZE // 2,), (BUCKET_SIZE + 7,)))
    gradients(params)
    params[1].grad *= 1e3
    for p in (1.5, 3.0):
        (row,), seen = one_step(lambda ps, p=p: normopt.SteepestDescent(ps, lr=0.1, norm="lp", p=p), params)
        check(row, oracle(*seen, p), rtol=1e-5)
    (row,), seen = one_step(lambda ps: torch.optim.SGD([*ps], lr=0.1), params)
    check(row, oracle(*seen, 2.0), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25])
def test_gradients_whose_squares_float32_has_not(scale):
    params = weights()
    gradients(params, scale=scale)
    g = arrays([p.grad for p in params])
    for p in (1.5, 3.0, math.inf):
        (row,), (_, before, after) = one_step(
            lambda ps, p=p: normopt.SteepestDescent(ps, lr=0.1, norm="lp", p=p, scale="unit"), params
        )
        check(row, {k: v for k, v in oracle(g, before, after, p).items() if not k.startswith("update")}, rtol=1e-5)


def test_what_is_undefined_is_nan():
    params = weights()
    for p in params:
        p.grad = torch.zeros_like(p)
    (row,), _ = one_step(lambda ps: torch.optim.SGD(ps, lr=0.1), params, norm="linf")
    for name, value in dict(grad_dual=0, grad_l2=0, update_norm=0, update_ratio=0, zeros=0).items():
        assert row[name] == value
    assert all(math.isnan(row[name]) for name in ("density", "density_q", "anisotropy"))

    params = [torch.nn.Parameter(torch.zeros(3))]  # no gradient, and 0/0
    (row,), _ = one_step_without_gradients(params)
    assert all(math.isnan(row[n]) for n in ("grad_dual", "grad_l2", "density", "anisotropy", "update_ratio"))
    assert (row["update_norm"], row["zeros"]) == (0, 1)

    params[0].grad = torch.ones(3)
    (row,), _ = one_step(lambda ps: torch.optim.SGD(ps, lr=0.1), params)
    assert row["update_ratio"] == math.inf

    for empty in ([], [torch.nn.Parameter(torch.empty(0, 3))]):
        kept = weights()
        gradients(kept)
        opt = torch.optim.SGD([{"params": empty, "lr": 0.5}, {"params": kept}], lr=0.1)
        with GeometryMonitor(opt) as watch:
            opt.step()
        assert watch.rows["lr"].tolist() == [0.5, 0.1]
        assert all(math.isnan(watch.rows[0][name]) for name in METRICS[2:])


def one_step_without_gradients(params):
    opt = torch.optim.SGD(params, lr=0.1)
    with GeometryMonitor(opt) as watch:
        opt.step()
    return watch.rows, None


def test_parameters_without_a_gradient_are_no_part_of_it():
    params = weights()
    gradients(params)
    params[1].grad = None
    opt = torch.optim.SGD(params, lr=0.1)
    with GeometryMonitor(opt) as watch:
        g, before = arrays([p.grad for p in params if p.grad is not None]), arrays(params)
        opt.step()
    (row,) = watch.rows
    assert row["density"] == pytest.approx(oracle(g, g, g, 2.0)["density"], rel=1e-6)
    assert row["update_ratio"] == pytest.approx(oracle(g, before, arrays(params), 2.0)["update_ratio"], rel=1e-6)


def test_zeros_are_counted():
    params = [torch.nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 2.0]))]
    params[0].grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    (row,), _ = one_step(lambda ps: torch.optim.SGD(ps, lr=1.0), params)
    assert row["zeros"] == 0.75


def test_complex_weights_are_pairs_of_reals_and_sparse_gradients_dense_ones():
    params = [torch.nn.Parameter(torch.complex(*torch.randn(2, 4)))]
    params[0].grad = torch.complex(*torch.randn(2, 4))
    opt = torch.optim.SGD(params, lr=0.1)
    with GeometryMonitor(opt) as watch:
        g, before = (arrays([torch.view_as_real(x.detach())]) for x in (params[0].grad, params[0]))
        opt.step()
    check(watch.rows[0], oracle(g, before, arrays([torch.view_as_real(params[0].detach())]), 2.0))

    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).square().sum().backward()
    dense = arrays([table.weight.grad.to_dense()])
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    with GeometryMonitor(opt) as watch:
        before = arrays([table.weight])
        opt.step()
    check(watch.rows[0], oracle(dense, before, arrays([table.weight]), 2.0))


def test_the_gradients_of_a_closure():
    params = weights()
    gradients(params, seed=9)  # stale when step() is called

    def closure():
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for make in (lambda ps: torch.optim.SGD(ps, lr=0.1), lambda ps: torch.optim.LBFGS(ps, max_iter=1)):
        opt = make(params)
        for positional, named in (((closure,), {}), ((), {"closure": closure})):
            with GeometryMonitor(opt) as watch:
                before = arrays(params)
                opt.step(*positional, **named)
            fresh = [2 * x for x in before]
            check(watch.rows[0], oracle(fresh, before, arrays(params), 2.0))


def test_a_gradient_is_read_before_a_step_that_writes_into_it():
    class Writes(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.zero_()

    params = weights()
    gradients(params)
    (row,), seen = one_step(lambda ps: Writes(ps, lr=0.1), params)
    assert row["grad_l2"] == pytest.approx(oracle(*seen, 2.0)["grad_l2"], rel=1e-6)


def test_a_step_inside_a_step_is_one_and_one_that_raises_is_none():
    class Outer(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1.0)
            if self.fails:
                raise RuntimeError("as told")
            return super().step(closure)

    params = weights()
    gradients(params)
    opt = Outer(params, lr=0.1)
    with GeometryMonitor(opt, every=1) as watch:
        for fails in (False, True, False):
            opt.fails = fails
            before, g = arrays(params), arrays([p.grad for p in params])
            if fails:
                with pytest.raises(RuntimeError, match="as told"):
                    opt.step()
            else:
                opt.step()
    assert watch.rows["step"].tolist() == [0, 1]
    check(watch.rows[-1], oracle(g, before, arrays(params), 2.0), rtol=1e-5)


@pytest.mark.parametrize("make", [lambda ps: normopt.LPSGDM(ps, lr=0.1, fused=True), lambda ps: adamw(ps)])
def test_scaled_gradients_are_measured_unscaled(make):
    pytest.importorskip("numba")
    params = weights()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = sum(p.square().sum() for p in params)
    opt = make(params)
    with GeometryMonitor(opt) as watch:
        scaler.scale(loss).backward()
        g, before = [2 * x for x in arrays(params)], arrays(params)
        scaler.step(opt)
    expected = oracle(g, before, arrays(params), 6.0 if isinstance(opt, normopt.LPSGDM) else 2.0)
    check(watch.rows[0], expected, rtol=1e-5)


def adamw(params):
    return torch.optim.AdamW(params, fused=True)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name.rstrip("_") not in self.waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: normopt.LPSGDM(ps, lr=torch.tensor(0.1), p=torch.tensor(3.0)),
        lambda ps: normopt.LPSGDM(ps, lr=0.1, p=3.0, foreach=True),
        lambda ps: normopt.SteepestDescent(ps, norm="lp", p=1.5, scope="group"),
        lambda ps: normopt.Muon(ps[:1]),
        lambda ps: torch.optim.SGD(ps, lr=0.1),
    ],
)
def test_no_step_waits_for_the_device(make, monkeypatch):
    def waits(*_):
        raise AssertionError("a tensor was read on the host")

    params = weights()
    gradients(params)
    opt = make(params)
    watch = GeometryMonitor(opt, every=1, capacity=2)
    with monkeypatch.context() as patch, NoSync():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, waits)
        for _ in range(3):
            opt.step()
    assert watch.steps == 3


def test_the_guard_against_syncs_sees_them():
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        torch.ones(1).item()


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: normopt.LPSGDM(ps, lr=0.1),
        lambda ps: normopt.LPSGDM(ps, lr=0.1, rounding="stochastic"),
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    ],
)
def test_the_optimizer_goes_on_bit_for_bit(make):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        params = weights(torch.bfloat16)
        opt = make(params)
        watch = GeometryMonitor(opt, every=2) if watched else None
        for step in range(8):
            if step == 5 and watch is not None:
                watch.close()
            gradients(params, seed=step)
            kept = copy.deepcopy([p.grad for p in params])
            opt.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))
        ends.append((params, opt.state_dict()))
    for a, b in zip(*(params for params, _ in ends), strict=True):
        assert torch.equal(a, b)
    for i, state in ends[0][1]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ends[1][1]["state"][i][key]))
    assert watch is not None
    assert watch.rows["step"].tolist() == [0, 2, 4]
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks
    watch.close()


def run(steps, flush_at=(), **kwargs):
    params = weights()
    opt = torch.optim.SGD(params, lr=0.0)
    watch = GeometryMonitor(opt, **kwargs)
    for step in range(1, steps + 1):
        gradients(params, seed=step)
        opt.step()
        if step in flush_at:
            watch.flush()
    return watch


def test_a_full_ring_loses_the_oldest_and_says_so():
    watch = run(11, every=2, capacity=3)  # rows at 0, 2, 4, 6, 8, 10
    with pytest.warns(UserWarning, match="3 rows were overwritten"):
        new = watch.flush()
    assert new["step"].tolist() == watch.rows["step"].tolist() == [6, 8, 10]
    assert watch.lost == 3
    whole = run(11, every=1)
    for row in watch.rows:
        np.testing.assert_array_equal(list(row), list(whole.rows[whole.rows["step"] == row["step"]][0]))


def test_steps_are_right_across_flushes():
    watch = run(11, every=2, capacity=3, flush_at=(1, 2, 6, 7))
    assert watch.flush()["step"].tolist() == [8, 10]
    assert watch.flush().tolist() == []
    assert watch.rows["step"].tolist() == [0, 2, 4, 6, 8, 10]
    assert watch.lost == 0
    assert run(0).rows.shape == (0,)


def test_csv(tmp_path):
    watch = run(3, every=1)
    watch.to_csv(tmp_path / "geometry.csv")
    with open(tmp_path / "geometry.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["step", "group", *METRICS]
    assert len(lines) == 3
    for line, row in zip(lines, watch.rows, strict=True):
        for name, value in line.items():
            np.testing.assert_equal(float(value), float(row[name]))


def test_tensorboard_gets_every_number_once():
    class Writer:
        def __init__(self):
            self.got = {}

        def add_scalar(self, tag, value, step):
            assert (tag, step) not in self.got
            self.got[tag, step] = value

    params = weights()
    opt = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    watch, writer = GeometryMonitor(opt, every=1), Writer()
    for step in range(4):
        gradients(params, seed=step)
        opt.step()
        if step == 1:
            watch.to_tensorboard(writer)
    watch.to_tensorboard(writer)
    finite = [m for m in METRICS if m not in ("p", "density_q")]
    assert writer.got == {
        (f"geometry/{m}/group {row['group']}", row["step"]): row[m] for row in watch.rows for m in finite
    }


def test_the_plot_draws_what_is_there(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "switch_backend", plt.switch_backend)
    plt.switch_backend("agg")
    figure = run(5, every=1).plot()
    drawn = [ax for ax in figure.axes if ax.lines]
    assert len(drawn) == len(METRICS) - 2  # neither p nor density_q
    for ax in drawn:
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 1, 2, 3, 4])
    plt.close(figure)
    plt.close(run(0).plot())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"normopt\[plots\]"):
        run(1).plot()


def with_addons(order, over, with_closure):
    """Six steps under AGR and decay, watched by both monitors, made in the given order: what they saw, the last Δw."""
    params = weights()
    opt = torch.optim.AdamW(params, lr=0.1, weight_decay=0)
    makers = {
        "agr": lambda: normopt.AGR(opt),
        "decay": lambda: normopt.LpDecay(opt, over=over, weight_decay=2.0),
        "geometry": lambda: GeometryMonitor(opt, every=1),
        "trajectory": lambda: normopt.TrajectoryMonitor(opt, sketch=64),
    }
    made = {name: makers[name]() for name in order}
    for step in range(6):
        before = arrays(params)
        if with_closure:
            opt.step(lambda step=step: gradients(params, seed=step))
        else:
            gradients(params, seed=step)
            opt.step()
        made["trajectory"].record(1.0)
    change = [new - old for new, old in zip(arrays(params), before, strict=True)]
    return made["geometry"].rows, made["trajectory"].result(), params, change


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("over", ["entries", "rows"])
def test_what_add_ons_do_is_seen_whatever_was_attached_first(over, with_closure):
    names = ("agr", "decay", "geometry", "trajectory")
    rows, found, params, change = with_addons(names, over, with_closure)
    for order in (names[::-1], ("geometry", "decay", "trajectory", "agr")):
        others, other, *_ = with_addons(order, over, with_closure)
        for name in rows.dtype.names:
            np.testing.assert_array_equal(others[name], rows[name], err_msg=name)
        np.testing.assert_array_equal(other.update_l2, found.update_l2)
    # The last step's gradients are back, and are not what the monitor saw; the decay is in what it saw.
    regularized = [g * (1 - np.abs(g) / np.abs(g).sum()) for g in arrays([p.grad for p in params])]
    assert rows["grad_l2"][-1] == pytest.approx(math.sqrt(sum((g**2).sum() for g in regularized)), rel=1e-6)
    lengths = [math.sqrt((x**2).sum()) for x in change]
    assert rows["update_norm"][-1] == pytest.approx(max(lengths), rel=1e-6)
    assert found.update_l2[-1] == pytest.approx(math.hypot(*lengths), rel=1e-6)


def test_how_it_is_shown():
    opt = torch.optim.SGD(weights(), lr=0.1)
    watch = GeometryMonitor(opt, every=2)
    trajectory = normopt.TrajectoryMonitor(opt, sketch=64)
    opt.step()
    assert repr(watch) == "GeometryMonitor(SGD, every=2, capacity=1000, norm=None, 1 steps, attached)"
    assert repr(trajectory) == "TrajectoryMonitor(SGD, sketch=64, seed=0, may_skip=False, 1 steps, attached)"
    watch.close()
    trajectory.close()
    assert repr(watch).endswith(", closed)")
    assert repr(trajectory).endswith(", closed)")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda opt: GeometryMonitor(object()), TypeError, "Optimizer"),
        (lambda opt: GeometryMonitor(opt, every=0), ValueError, "every"),
        (lambda opt: GeometryMonitor(opt, every=2.5), TypeError, "every"),
        (lambda opt: GeometryMonitor(opt, capacity=0), ValueError, "capacity"),
        (lambda opt: GeometryMonitor(opt, norm="l3"), ValueError, "unknown norm"),
        (lambda opt: GeometryMonitor(opt, norm="lp"), ValueError, r"Lp\(3.0\)"),
        (lambda opt: GeometryMonitor(opt, norm=3.0), TypeError, "norm"),
        (lambda opt: GeometryMonitor(opt, norm=normopt.norms.Schatten(3.0, blocks=3)), ValueError, "blocks"),
    ],
)
def test_bad_input(make, error, message):
    opt = torch.optim.SGD(weights(), lr=0.1)
    with pytest.raises(error, match=message):
        make(opt)
    assert not opt._optimizer_step_pre_hooks

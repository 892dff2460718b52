"""The spectrum of a Hessian, against the exact one: of small networks, and of matrices that are hard on purpose."""

from __future__ import annotations

import copy
import csv
import functools
import math
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import normopt
from normopt.diagnostics import CurvatureMonitor, hessian_spectrum
from normopt.diagnostics.curvature import estimate
from normopt.diagnostics.products import Products
from tests.diagnostics.trainings import digits

pytestmark = pytest.mark.usefixtures("one_thread")
cross_entropy = nn.functional.cross_entropy


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.into, self.mix = nn.Linear(8, size), nn.MultiheadAttention(size, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x):
        h = self.into(x.view(-1, 8, 8))
        return self.out(self.norm(h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


# About 500 parameters at k = 8, 1,400 at 16. Smooth, so that differences of gradients have no kinks.
NETWORKS = {
    "mlp": lambda k: nn.Sequential(nn.Linear(64, k), nn.Tanh(), nn.Linear(k, 10)),
    "conv": lambda k: nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, k // 2, 3, 2, bias=False), nn.BatchNorm2d(k // 2), nn.GELU()),
        *(nn.Conv2d(k // 2, k, 3), nn.BatchNorm2d(k), nn.Tanh(), nn.Flatten(), nn.Linear(k, 10)),
    ),
    "attention": Attention,
}


@functools.cache
def trained(name, steps, k=8):
    """A network after some steps of AdamW, in eval mode, and the batch of which all here is measured."""
    torch.manual_seed(0)
    model = NETWORKS[name](k)
    x, y = digits()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        opt.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        opt.step()
    return model.eval(), (x[:48], y[:48])


def differences(model, x, y, directions, h=1e-5, train=False):
    """Central differences of the gradient along directions [k, n], in float64: no second derivative is taken."""
    model, x = copy.deepcopy(model).double().train(train), x.double()
    for module in model.modules():  # whose buffers vmap cannot write
        module.track_running_stats = module.__dict__.get("track_running_stats", False) and not train
    names, params = zip(*model.named_parameters(), strict=True)
    start, sizes = nn.utils.parameters_to_vector(params).detach(), [p.numel() for p in params]

    def loss(theta):
        pieces = (t.view_as(p) for t, p in zip(theta.split(sizes), params, strict=True))
        return cross_entropy(torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss), chunk_size=64)
    directions = h * directions.double()
    with sdpa_kernel(SDPBackend.MATH):
        return (gradients(start + directions) - gradients(start - directions)) / (2 * h)


@functools.cache
def exact(name, steps, k=8):
    """The Hessian and its eigenvalues."""
    model, (x, y) = trained(name, steps, k)
    h = differences(model, x, y, torch.eye(sum(p.numel() for p in model.parameters())))
    h = (h + h.mT) / 2
    return h, torch.linalg.eigvalsh(h).numpy()


class Given:
    """Products with a matrix that is given."""

    def __init__(self, h, seed=0, dtype=torch.float32):
        self.h, self.seed, self.dtype, self.size = h.to(dtype), seed, dtype, len(h)
        self.device, self.matrix = torch.device("cpu"), "hessian"

    @contextmanager
    def product(self):
        yield lambda v: (self.h @ v).double()


def check(found, eigenvalues, probes=10):
    """The bar for one estimate, but for the trace's interval and the share, which are statistics.

    Returns:
        The error of the share of |λ| > λmax/100.
    """
    scale, n = np.abs(eigenvalues).max(), len(eigenvalues)
    assert found.largest == pytest.approx(eigenvalues[-1], abs=1e-4 * scale)
    assert found.smallest == pytest.approx(eigenvalues[0], abs=1e-4 * scale)
    assert 0 <= found.trace_half <= 3 * math.sqrt(2 * (eigenvalues**2).sum() / probes)
    assert found.weights.sum() == pytest.approx(1)
    far = wasserstein_distance(found.nodes, eigenvalues, found.weights)
    assert far <= 0.1 * np.abs(eigenvalues).mean()
    assert found.effective_rank == pytest.approx(np.abs(eigenvalues).sum() / scale, rel=0.1)
    assert found.anisotropy == pytest.approx(n / found.effective_rank)
    part = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
    assert found.negative == pytest.approx(part, abs=0.05)
    return abs(found.share(found.largest / 100) - np.count_nonzero(np.abs(eigenvalues) > eigenvalues[-1] / 100) / n)


CASES = [pytest.param(name, steps, id=f"{name}-{steps}") for steps in (30, 0) for name in NETWORKS]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_the_spectrum_of_a_network_is_the_exact_one(name, steps):
    model, batch = trained(name, steps)
    found = hessian_spectrum(model, cross_entropy, [batch])
    eigenvalues = exact(name, steps)[1]
    # Of n eigenvalues, a share s has the standard deviation √(2s(1 − s)/(n·probes)): .012 at most.
    assert check(found, eigenvalues) <= 0.03
    assert found.products == 64 + 10 * 48 + 2 <= 10 * 80
    # Some eigenvalue is within the bound of each end, but for the roundoff of float32.
    for value, error in ((found.largest, found.largest_error), (found.smallest, found.smallest_error)):
        assert np.abs(eigenvalues - value).min() <= error + 1e-5 * found.scale
    top = eigenvalues[np.argsort(-np.abs(eigenvalues))][:16]
    np.testing.assert_allclose(found.outliers[:4], top[:4], atol=1e-4 * found.scale)


@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.exhaustive
def test_many_seeds(name, steps):
    """The whole bar over 100 seeds, with products of the exact Hessian, in float32."""
    h, eigenvalues = exact(name, steps, k=16)
    found = [estimate(Given(h, seed), 64, 10) for seed in range(100)]
    # The share's standard deviation is .007 at most.
    assert np.count_nonzero([check(f, eigenvalues) <= 0.02 for f in found]) >= 97
    assert np.count_nonzero([abs(f.trace - eigenvalues.sum()) <= f.trace_half for f in found]) >= 90


@pytest.mark.parametrize("probes", [1, 4])
def test_the_interval_of_the_trace_covers_it(probes):
    """A spectrum that deflation does not help, small so that it is quick."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    h = q @ torch.diag(values) @ q.T
    found = [estimate(Given(h, seed), 8, probes) for seed in range(100)]
    assert sum(abs(f.trace - float(values.sum())) <= f.trace_half for f in found) >= 90
    assert max(f.trace_half for f in found) <= 3 * math.sqrt(2 * float((values**2).sum()) / probes)


def matrices():
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))[0]
    for name, values in {
        "a multiple of the identity": torch.full((200,), 3.0),
        "zero": torch.zeros(200),
        "of rank 3, two values equal": torch.tensor([5.0, 5.0, -2.0] + 197 * [0.0]),
        "negative": -torch.linspace(1, 2, 200),
        "many equal outliers": torch.tensor(40 * [1.0] + 160 * [0.01]),
        "tiny": 1e-25 * torch.linspace(-1, 2, 200),
        "smaller than the steps": torch.linspace(-1, 2, 40),
        "one parameter": torch.tensor([-2.0]),
    }.items():
        n = len(values)
        yield pytest.param(q[:n, :n] if n == 200 else torch.linalg.qr(q[:n, :n])[0], values.double(), id=name)


@pytest.mark.parametrize(("q", "values"), [*matrices()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_that_are_hard(q, values, dtype):
    found = estimate(Given(q @ torch.diag(values) @ q.T, dtype=dtype), 64, 8)
    eigenvalues = np.sort(values.numpy())
    scale = np.abs(eigenvalues).max()
    assert found.largest == pytest.approx(eigenvalues[-1], abs=1e-5 * scale)
    assert found.smallest == pytest.approx(eigenvalues[0], abs=1e-5 * scale)
    assert found.weights.sum() == pytest.approx(1)
    far = wasserstein_distance(found.nodes, eigenvalues, found.weights)
    assert far <= 0.1 * np.abs(eigenvalues).mean() + 1e-6 * scale
    assert abs(found.trace - eigenvalues.sum()) <= found.trace_half + 1e-5 * scale * len(values)
    if len(values) <= 64:
        np.testing.assert_allclose(np.sort(found.outliers), eigenvalues, atol=1e-5 * scale)
        assert found.trace_half == 0
    if not scale:
        assert all(map(math.isnan, (found.anisotropy, found.effective_rank, found.negative)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("train", [False, True])
def test_products_are_those_of_differences(name, train):
    model, (x, y) = trained(name, 30)
    model = copy.deepcopy(model).double().train(not train)
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0)).double()
    before = copy.deepcopy(model.state_dict())
    parts = [(x[:12].double(), y[:12]), (x[12:].double(), y[12:])]
    with Products(model, cross_entropy, parts, "hessian", train, 0).product() as product:
        found = product(v)
    sums = (len(b) / len(y) * differences(model, a, b, v[None], train=train)[0] for a, b in parts)
    torch.testing.assert_close(found, sum(sums), rtol=1e-6, atol=1e-7 * float(found.abs().max()))
    assert model.training is not train
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_is_that_of_the_jacobian(name):
    model, (x, y) = trained(name, 30)
    model, x, y = copy.deepcopy(model).double(), x[:8].double(), y[:8]
    params = tuple(model.parameters())
    z = model(x)
    rows = [nn.utils.parameters_to_vector(torch.autograd.grad(e, params, retain_graph=True)) for e in z.flatten()]
    jacobian, p = torch.stack(rows), z.detach().softmax(1)
    curved = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p)) / len(p)
    h = jacobian.T @ curved @ jacobian
    v = torch.randn(len(h), generator=torch.Generator().manual_seed(0)).double()
    with Products(model, cross_entropy, [(x, y)], "gauss-newton", False, 0).product() as product:
        torch.testing.assert_close(product(v), h @ v)
    found = hessian_spectrum(model, cross_entropy, [(x, y)], matrix="gauss-newton", probes=2)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]))
    assert found.smallest >= -1e-9
    assert found.matrix == "gauss-newton"


def test_equal_seeds_give_equal_results_and_leave_no_trace():
    model, batch = trained("mlp", 0)
    model = nn.Sequential(*copy.deepcopy(model), nn.Dropout(0.3))
    model[1].eval()  # modes are kept module by module
    torch.manual_seed(5)
    states = torch.get_rng_state()

    def measure(seed):
        return hessian_spectrum(model, cross_entropy, [batch], steps=16, probes=2, train=True, seed=seed)

    first, again, other = measure(0), measure(0), measure(1)
    assert torch.equal(torch.get_rng_state(), states)
    np.testing.assert_array_equal(first.nodes, again.nodes)
    assert first.trace == again.trace
    assert first.trace != other.trace
    assert [m.training for m in model] == [False, False, False, True]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(measure(0).nodes, first.nodes)


def test_progress_and_frozen_parameters():
    model, batch = trained("mlp", 0)
    model = copy.deepcopy(model)
    model[0].requires_grad_(False)
    seen = []
    found = hessian_spectrum(
        model, cross_entropy, [batch], steps=8, probes=3, progress=lambda *numbers: seen.append(numbers)
    )
    assert seen == [(i + 1, 8 + 3 * 6 + 2) for i in range(28)]
    assert found.size == 90
    assert found.products == 28


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Half(torch.autograd.Function):
    """The product of two tensors, whose second gradient is right, but not as a function of the first tensor."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.x = x.detach()
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], g * ctx.x


class Squares(nn.Module):
    def __init__(self, square):
        super().__init__()
        self.inside, self.square, self.out = nn.Linear(4, 4), square, nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.square(self.inside(x)))

    def extra_repr(self):
        return str(self.square)  # by which the sample of `make test` tells cases apart


class Noise(nn.Module):
    """Noise of a generator that seeds do not reach."""

    generator = torch.Generator()

    def forward(self, x):
        return (x * torch.randn(x.shape, generator=self.generator)).square()


LINEAR, X, Y = nn.Linear(4, 4), torch.ones(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.sin}, TypeError, "Module"),
        ({"loss": 3}, TypeError, "callable"),
        ({"batches": (X, Y)}, TypeError, "pair"),
        ({"batches": []}, ValueError, "no batch"),
        ({"model": nn.ReLU()}, ValueError, "no parameter"),
        ({"model": nn.LazyLinear(3)}, TypeError, "lazy"),
        ({"model": copy.deepcopy(LINEAR).bfloat16()}, TypeError, r"weight is torch.bfloat16.*float\(\)"),
        ({"model": nn.Linear(4, 4, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"loss": lambda z, y: z}, ValueError, r"one element, but is of shape \(3, 4\)"),
        ({"loss": lambda z, y: 1.0}, ValueError, "is a float"),
        ({"loss": lambda z, y: z.detach().sum()}, ValueError, "detached"),
        ({"loss": lambda z, y: z.sum() * math.inf}, ValueError, "loss is (inf|nan|-inf)"),
        ({"loss": lambda z, y: z.sum()}, ValueError, "does not depend on the parameters: the matrix is zero"),
        ({"loss": lambda z, y: z.sum(), "matrix": "gauss-newton"}, ValueError, "depend on the outputs"),
        ({"model": Squares(lambda x: Half.apply(x, x.flip(-1)))}, ValueError, "not symmetric"),
        ({"model": nn.Sequential(LINEAR, Noise()), "batches": [(X, Y), (X, Y)]}, ValueError, "not symmetric"),
        ({"model": Squares(Once.apply)}, RuntimeError, "once_differentiable"),
        ({"model": nn.LSTM(4, 4), "loss": lambda z, y: z[0].sum(), "matrix": "gauss-newton"}, TypeError, "one tensor"),
        ({"matrix": "fisher"}, ValueError, "matrix"),
        ({"steps": 7}, ValueError, "steps"),
        ({"probes": 0}, ValueError, "probes"),
        ({"seed": -1}, ValueError, "seed"),
        ({"train": 1}, TypeError, "train"),
        ({"progress": True}, TypeError, "progress"),
    ],
)
def test_bad_input(changes, error, message):
    given = {"model": LINEAR, "loss": cross_entropy, "batches": [(X, Y)], **changes}
    with pytest.raises(error, match=message):
        hessian_spectrum(**given)
    if changes.get("model") is None and not changes.keys() & {"progress"}:
        batches = list(given.pop("batches"))
        if len(batches) == 1:
            with pytest.raises(error, match=message):
                CurvatureMonitor(given.pop("model"), given.pop("loss"), batches[0], **given).step()


def test_a_product_that_overflows_is_refused():
    model = nn.Linear(1, 1)
    for p in model.parameters():
        nn.init.zeros_(p)
    with pytest.raises(ValueError, match="not finite"):
        hessian_spectrum(model, lambda z, y: z.pow(1.5).sum(), [(torch.ones(1, 1), Y)])


def test_density_and_quantiles():
    model, batch = trained("mlp", 0)
    found = hessian_spectrum(model, cross_entropy, [batch], steps=16, probes=1)
    at = np.linspace(2 * found.smallest - found.largest, 2 * found.largest - found.smallest, 20001)
    assert np.trapezoid(found.density(at, found.scale / 50), at) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="width"):
        found.density(at, 0)
    assert found.quantile([0, 1]) == pytest.approx([found.nodes.min(), found.nodes.max()])
    below = found.weights[found.nodes < found.quantile(0.3)].sum()
    assert below <= 0.3 <= below + found.weights.max() + 1e-12


def train(monitor, model, steps, opt, generator):
    x, y = digits()
    for _ in range(steps):
        if monitor is not None:
            monitor.step()
        chosen = torch.randint(len(x), (32,), generator=generator)
        opt.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        opt.step()


def watched(steps, every=3, watch=True, **kwargs):
    model, batch = trained("conv", 0)
    model = copy.deepcopy(model).train()
    opt, generator = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(0)
    monitor = CurvatureMonitor(model, cross_entropy, batch, every=every, steps=16, **kwargs) if watch else None
    train(monitor, model, steps, opt, generator)
    return monitor, model, opt, generator


def test_a_monitor_measures_what_the_function_does_and_changes_nothing():
    monitor, model, *_ = watched(7)
    _, free, *_ = watched(7, watch=False)
    for a, b in zip(model.state_dict().values(), free.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert monitor.rows["step"].tolist() == [0, 3, 6]
    assert monitor.calls == 7
    monitor, model, *_ = watched(4)
    _, before, *_ = watched(3, watch=False)
    _, batch = trained("conv", 0)
    found = hessian_spectrum(before, cross_entropy, [batch], steps=16, probes=2)
    row = monitor.rows[-1]
    for name in ("largest", "smallest_error", "trace", "trace_half", "anisotropy", "effective_rank", "negative"):
        assert row[name] == getattr(found, name)
    before.eval().zero_grad()
    loss = cross_entropy(before(batch[0]), batch[1])
    loss.backward()
    g = torch.cat([p.grad.flatten() for p in before.parameters()]).double()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_l2"] == pytest.approx(float(g.norm()), rel=1e-6)
    assert row["density"] == pytest.approx(float(g.abs().sum() ** 2 / (len(g) * g.square().sum())), rel=1e-6)


def test_a_monitor_is_saved_and_resumed(tmp_path):
    whole, *_ = watched(9)
    monitor, model, opt, generator = watched(5)
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    _, batch = trained("conv", 0)
    resumed = CurvatureMonitor(model, cross_entropy, batch, every=3, steps=16)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, model, 4, opt, generator)
    np.testing.assert_array_equal(resumed.rows, whole.rows)
    for a, b in zip(resumed.spectra, whole.spectra, strict=True):
        np.testing.assert_array_equal(a.nodes, b.nodes)
        assert (a.trace, a.matrix, a.size) == (b.trace, b.matrix, b.size)
    for other in (
        CurvatureMonitor(LINEAR, cross_entropy, (X, Y)),
        CurvatureMonitor(model, cross_entropy, batch, matrix="gauss-newton"),
    ):
        with pytest.raises(ValueError, match="parameters, matrix"):
            other.load_state_dict(monitor.state_dict())
    fresh = CurvatureMonitor(model, cross_entropy, batch)
    fresh.load_state_dict(CurvatureMonitor(model, cross_entropy, batch).state_dict())
    assert len(fresh.rows) == 0
    assert repr(resumed) == (
        "CurvatureMonitor(Sequential, every=3, matrix='hessian', steps=16, probes=2, 3 measurements in 9 steps)"
    )


def test_a_monitor_of_a_zero_gradient():
    monitor = CurvatureMonitor(LINEAR, lambda z, y: (z - z.detach()).square().mean(), (X, Y))
    monitor.step()
    assert math.isnan(monitor.rows["density"][0])
    assert monitor.rows["largest"][0] > 0


def test_csv_and_plots(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "switch_backend", plt.switch_backend)
    plt.switch_backend("agg")
    monitor, *_ = watched(4)
    monitor.to_csv(tmp_path / "curvature.csv")
    with open(tmp_path / "curvature.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(monitor.rows.dtype.names)
    for line, row in zip(lines, monitor.rows, strict=True):
        assert [float(x) for x in line.values()] == [float(x) for x in row]
    figure = monitor.plot()
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), monitor.rows["largest"])
    (line, ticks) = monitor.spectra[0].plot().axes[0].lines
    np.testing.assert_array_equal(ticks.get_xdata(), monitor.spectra[0].outliers)
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=1e-3)
    watched(0)[0].plot()
    hessian_spectrum(LINEAR, cross_entropy, [(X, Y)]).plot()
    plt.close("all")


@pytest.mark.exhaustive
def test_ten_million_parameters_fit():
    """3.5 GB for the whole process, and at most 80 products a probe."""
    code = (
        "import resource, torch, normopt\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2000, 3000), torch.nn.Tanh(), torch.nn.Linear(3000, 1334))\n"
        "batch = (torch.randn(16, 2000), torch.randint(1334, (16,)))\n"
        "s = normopt.hessian_spectrum(model, torch.nn.functional.cross_entropy, [batch], probes=2)\n"
        "print(s.size, s.products, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, products, gigabytes = map(float, done.stdout.split())
    assert size >= 10_000_000
    assert products <= 2 * 80 + 2
    assert gigabytes <= 3.5


def test_the_names_are_normopts():
    assert normopt.hessian_spectrum is hessian_spectrum
    assert normopt.CurvatureMonitor is CurvatureMonitor

"""Sketches against exact values. The seeds are fixed, so that a test either always passes or never.

An interval is 2.25 standard deviations to each side: it holds 97.6 % of a Gaussian error. Of 200 independent seeds, 5
are then expected to miss, and more than 10 do for one set of seeds in 100. A test asks for at most 10 (95 %), at three
steps and of four intervals: with other seeds it could fail once in ten times. Intervals that held only 90 % would pass
one such question in 100.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

import normopt
from normopt.diagnostics import TrajectoryMonitor
from normopt.diagnostics.sketch import Sketch, cosine_half, distance_half, product_half
from tests.diagnostics.trainings import network, oracle, train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SEEDS = 200


def matrix(sketch, sizes):
    rows = torch.eye(sum(sizes), dtype=torch.float64)
    return torch.stack([sketch(row.split(sizes)) for row in rows], dim=1)


def test_it_is_the_stated_matrix():
    n, k = 320, 64
    sketch = Sketch([n], k, seed=3, devices=[CPU])
    s = matrix(sketch, [n])
    # Undone the mixing, each coordinate is in one bucket, with a sign.
    rotation = torch.from_numpy(np.kron(hadamard(64), np.eye(n // 64))) / 8
    signs = [sketch.mixed(row)[0] for row in torch.eye(64)]
    delta = torch.sign(torch.stack(signs)).double().repeat_interleave(n // 64)
    count = s @ (rotation * delta).T
    torch.testing.assert_close(count, count.round())
    assert (count.abs().sum(0).round() == 1).all()
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketch([x]), s @ x)


def test_pieces_are_one_vector_and_equal_seeds_are_equal_sketches():
    x = torch.randn(150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = [64, 86]  # the second is filled up
    first, again, other = (Sketch(sizes, 64, seed, [CPU, CPU])(x.split(sizes)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, matrix(Sketch(sizes, 64, 3, [CPU, CPU]), sizes) @ x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Sketch(sizes, 64, 3, [CPU, CPU])(x.split(sizes)), first)


def test_mean_and_variance_of_an_inner_product():
    rng = np.random.default_rng(0)
    k, n, seeds = 64, 192, 4000
    x = rng.standard_normal(n) * 3.0 ** rng.integers(-2, 3, n)
    y = x + rng.standard_normal(n)
    found, kept = [], []
    for seed in range(seeds):
        sketch = Sketch([n], k, seed, [CPU])
        found.append(float(sketch([torch.tensor(x)]) @ sketch([torch.tensor(y)])))
        mixed_x, mixed_y = (sketch.mixed(torch.tensor(v)).numpy() for v in (x, y))
        kept.append((mixed_x**2 * mixed_y**2).sum())
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * np.mean(kept)) / k
    # Four standard errors of the mean; the variance's own depends on a kurtosis, and 10 % is three of them here.
    assert abs(np.mean(found) - x @ y) < 4 * math.sqrt(variance / seeds)
    assert np.var(found) == pytest.approx(variance, rel=0.1)


def test_the_default_is_as_narrow_as_promised():
    assert distance_half(2048) < 0.036
    assert cosine_half(2048, np.array([0.0])) < 0.05
    assert cosine_half(2048, np.array([1.0])) == 0
    # By the deviations in the docstring.
    assert product_half(512, np.array([1.0])) == pytest.approx(2.25 / math.sqrt(1024))


def check(found, iterates, losses, lrs, at):
    """How often the intervals hold at each of some steps: 95 % of the seeds; and the promise of the default size."""
    distance, norm, cosine, consecutive, gamma = oracle(iterates, losses, lrs)
    for result in found:
        np.testing.assert_allclose(result.update_l2, norm, rtol=1e-6)
        assert result.cosine[-1] == pytest.approx(1, abs=1e-6)
    for t in at:
        errors = np.array(
            [
                (
                    abs(r.distance[t] / distance[t] - 1),
                    abs(r.cosine[t] - cosine[t]),
                    abs(r.consecutive_cosine[t] - consecutive[t]),
                    abs(r.gamma[t] - gamma[t]),
                )
                for r in found
            ]
        )
        halves = np.array([(r.distance_half, r.cosine_half[t], r.consecutive_half[t], r.gamma_half[t]) for r in found])
        slack = 1e-6 * np.array([1, 1, 1, abs(gamma[t])])  # float32's, where the sketch errs by nothing
        covered = (errors <= halves + slack).mean(0)
        assert (covered >= 0.95).all(), (t, covered)
        assert (errors[:, 0] <= 0.05).mean() >= 0.95
        assert (errors[:, 1] <= 0.05).mean() >= 0.95


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "lpsgdm": lambda p: normopt.LPSGDM(p, lr=0.003, p=8.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_intervals_hold_on_the_digits(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    monitors = [TrajectoryMonitor(optimizer, seed=seed) for seed in range(SEEDS)]
    iterates, losses, lrs = train(model, optimizer, 40, monitors)
    check([m.result() for m in monitors], iterates, losses, lrs, at=(0, 10, 30))


def one_hot(steps, n, rng):
    updates = np.zeros((steps, n))
    updates[np.arange(steps), rng.permutation(n)[:steps]] = 1
    return updates


HARD = {
    "one-hot updates": one_hot,
    "equal entries": lambda steps, n, rng: rng.choice([-1.0, 1.0], (steps, n)),
    "equal entries, 16 of them": lambda steps, n, rng: rng.choice([-1.0, 1.0], (steps, n)) * (np.arange(n) < 16),
    "heavy tails": lambda steps, n, rng: rng.standard_t(1, (steps, n)),
    "all but straight": lambda steps, n, rng: np.ones((steps, n)) + 0.1 * rng.standard_normal((steps, n)),
    "there and back": lambda steps, n, rng: np.ones((steps, n)) * (-1.0) ** np.arange(steps)[:, None],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", HARD)
def test_intervals_hold_on_hard_vectors(name):
    steps, n = 41, 500
    updates = HARD[name](steps, n, np.random.default_rng(0))
    p = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=1.0)
    monitors = [TrajectoryMonitor(optimizer, seed=seed) for seed in range(SEEDS)]
    iterates = [np.zeros(n)]
    for update in updates:
        p.grad = -torch.from_numpy(update)
        optimizer.step()
        for monitor in monitors:
            monitor.record(1.0)
        iterates.append(p.detach().numpy().copy())
    check([m.result() for m in monitors], np.stack(iterates), np.ones(steps), np.ones(steps), at=(0, 20, 30))

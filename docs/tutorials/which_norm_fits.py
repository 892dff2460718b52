# %% [markdown]
# # Which norm fits now?
#
# A norm sets the direction of a step. Which one decreases the loss most depends on the curvature, and the curvature
# changes during training. This page measures both on one small network:
#
# - [`CurvatureMonitor`][normopt.CurvatureMonitor] follows the eigenvalues of the Hessian;
# - at the same moments, the best step under each ℓp norm is found by a line search.
#
# [`hessian_spectrum`][normopt.hessian_spectrum] is the function that the monitor calls. You can call it yourself, on
# any model.

# %%
import copy
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digit)
probe, held_out = (x[:512], y[:512]), (x[512:1024], y[512:1024])
x, y = x[1024:], y[1024:]
loss = nn.functional.cross_entropy


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


# %% [markdown]
# ## One spectrum
#
# At the start, the eigenvalues are nearly symmetric about 0, except for a few large ones. The ticks are the 16
# eigenvalues of largest magnitude, computed individually; the curve is the smoothed density of all eigenvalues.

# %%
steps, probes = (8, 1) if FAST else (64, 10)
model = network()
found = normopt.hessian_spectrum(model, loss, [probe], steps=steps, probes=probes)
print(f"{found.size} parameters, {found.products} Hessian-vector products")
print(f"largest eigenvalue   {found.largest:8.4f} ± {found.largest_error:.1g}")
print(f"smallest eigenvalue  {found.smallest:8.4f} ± {found.smallest_error:.1g}")
print(f"trace                {found.trace:8.4f} ± {found.trace_half:.1g}")
print(f"effective rank       {found.effective_rank:8.1f}")
fig = found.plot()
fig.alt = "Density of the eigenvalues at the start of the training on a logarithmic scale, with a tick for each outlier"

# %% [markdown]
# ## The curvature during training
#
# The monitor needs one call per step. It measures one fixed batch that is not used for training, and does not change
# the training. The weights at each measurement are kept for the next section.

# %%
EVERY, STEPS = (4, 9) if FAST else (40, 401)
opt = normopt.LPSGDM(model.parameters(), lr=0.3, p=6.0, scale="matched")
monitor = normopt.CurvatureMonitor(
    model, loss, probe, every=EVERY, steps=steps, probes=min(probes, 4)
)
kept = []
for step in range(STEPS):
    monitor.step()
    if step % EVERY == 0:
        kept.append(copy.deepcopy(model))
    batch = torch.randint(len(x), (64,))
    opt.zero_grad()
    loss(model(x[batch]), y[batch]).backward()
    opt.step()

fig = monitor.plot()
fig.alt = "Over the steps: eigenvalues of the Hessian, its trace, the effective rank, and the negative part with the density of the gradient"

print(" step   loss  largest  smallest  negative  effective rank  density of g")
for row in monitor.rows:
    print(
        f"{row['step']:5} {row['loss']:6.3f} {row['largest']:8.3f} {row['smallest']:9.3f}"
        f" {row['negative']:9.3f} {row['effective_rank']:15.1f} {row['density']:13.3f}"
    )

# %% [markdown]
# ## The best step under each norm
#
# The steepest direction under ℓp is sign(g)·|g|^(1/(p−1)): the gradient at p = 2, its sign at p = ∞. Each direction is
# scaled to unit Euclidean length, and a line search finds the length with the lowest loss on the batch of the gradient.
# So only directions are compared, each at its best length.

# %%
ORDERS = [1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, math.inf]
LENGTHS = np.geomspace(1e-3, 10, 5 if FAST else 60)


@torch.no_grad()
def at(model, start, direction, length, batch):
    """The loss after a step of a length along minus the direction."""
    moved = start - length * direction
    nn.utils.vector_to_parameters(moved, model.parameters())
    return loss(model(batch[0]), batch[1]).item()


def best_decreases(model):
    """For each p, the decrease of the loss at the best length: on the probe, and on held-out data."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    start = nn.utils.parameters_to_vector(params).detach()
    g = nn.utils.parameters_to_vector(
        torch.autograd.grad(loss(model(probe[0]), probe[1]), params)
    )
    before = [at(model, start, g, 0.0, batch) for batch in (probe, held_out)]
    decreases = []
    for p in ORDERS:
        d = g.sign() * (g.abs() / g.abs().max()) ** (1 / (p - 1))
        d /= d.norm()
        length = min(LENGTHS, key=lambda t: at(model, start, d, t, probe))
        decreases.append(
            [
                was - at(model, start, d, length, batch)
                for was, batch in zip(before, (probe, held_out), strict=True)
            ]
        )
    return np.array(decreases)


decreases = np.stack([best_decreases(model) for model in kept])  # [time, p, batch]
names = ["∞" if p == math.inf else f"{p:g}" for p in ORDERS]
print("decrease relative to the best p, on the probe")
print(
    " step "
    + "".join(f"{'p=' + name:>8}" for name in names)
    + "   best p: probe, held out"
)
for row, found in zip(monitor.rows, decreases, strict=True):
    relative = found[:, 0] / found[:, 0].max()
    best = [names[i] for i in found.argmax(axis=0)]
    print(
        f"{row['step']:5} "
        + "".join(f"{r:8.2f}" for r in relative)
        + f"   {best[0]:>6}, {best[1]}"
    )

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
for i in (0, len(kept) // 4, len(kept) - 1):
    relative = decreases[i, :, 0] / decreases[i, :, 0].max()
    left.plot(
        range(len(ORDERS)),
        relative,
        marker="o",
        markersize=3,
        label=f"step {i * EVERY}",
    )
left.set_xticks(range(len(ORDERS)), names)
left.set(xlabel="p", ylabel="decrease, relative to the best", ylim=(0, 1.05))
left.legend()
for j, (label, style) in enumerate((("probe", "-"), ("held out", ":"))):
    best = decreases[:, :, j].argmax(axis=1)
    right.plot(
        monitor.rows["step"], best, style, marker="o", markersize=4, label=label
    )
right.set_yticks(range(len(ORDERS)), names)
right.set(xlabel="step", ylabel="best p")
right.legend()
fig.alt = "Left: decrease of the loss at the best length against p, at three moments. Right: the best p over the steps, on the probe and on held-out data"


# %%
def holds(claim: str, true: bool) -> None:
    print(f"{'holds' if true else 'does not hold'}: {claim}")


orders = np.array(ORDERS)[decreases[:, :, 0].argmax(axis=1)]
rank = monitor.rows["effective_rank"]
holds("the Hessian is most anisotropic at the start", rank.argmin() == 0)
holds("the best p on the probe is largest at the start", orders.argmax() == 0)
holds(
    "at the lowest effective rank, the best p is above that at the highest",
    orders[rank.argmin()] > orders[rank.argmax()],
)

# %% [markdown]
# On this network the premise of [arXiv:2606.02078](https://arxiv.org/abs/2606.02078), that curvature is anisotropic
# early and flatter late, is reversed: the effective rank is highest at the start, and falls to about a tenth of that.
# The relation between anisotropy and p agrees with the paper: while the effective rank is high, p = 2 or 2.5 decreases
# the loss most, and once it is low, the sign does. On held-out data there is no such order: the best p varies from one
# measurement to the next.
#
# This is one network, one seed, and the gradient of a large batch. [The best norm over a training](best_norm.md) has
# four networks, eight seeds and mini-batches. And the best single step need not give the best training. The
# [playground](../playground.md#which-norm-fits-now) shows the same comparison in two dimensions.

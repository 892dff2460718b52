# %% [markdown]
# # Steepest descent in pictures
#
# Of all steps of a given length, steepest descent takes the one that decreases the loss most, to first order. "Length"
# means a norm, and every norm gives an optimizer. This page shows it in pictures: one gradient on a ball, four lengths
# of a step, paths in a valley, a logistic regression whose features differ in scale by five orders of magnitude, and a
# matrix.
#
# For a norm \(\|\cdot\|\), the **dual map** of a gradient g is the step no longer than 1 that goes furthest along it,
# and the **dual norm** is how far that is:
#
# \[
# D(g) = \operatorname*{argmax}_{\|d\| \le 1} \langle g, d\rangle,
# \qquad
# \|g\|_\star = \max_{\|d\| \le 1} \langle g, d\rangle .
# \]
#
# The framework is that of Bernstein and Newhouse ([arXiv:2409.20325](https://arxiv.org/abs/2409.20325)). The package's
# own norms and optimizers draw every figure below when the page is built.

# %%
import math
import os
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"
GREY, INF = "#808894", math.inf


def named(p):
    return f"p = {p:g}".replace("inf", "∞")


# %% [markdown]
# ## One gradient on a ball
#
# For every point d on the boundary of each unit ball, the curve shows ⟨g, d⟩. Its highest point is the dual map, and
# its height is the dual norm. The dots are not found from the curve: they are what [`Lp`][normopt.norms.Lp] returns.

# %%
g = torch.tensor([2.0, 1.0])
angles = torch.linspace(-math.pi, math.pi, 2001)
circle = torch.stack([angles.cos(), angles.sin()])
ORDERS = (1.0, 1.5, 2.0, 4.0, INF)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(1, 1.5))
for i, p in enumerate(ORDERS):
    norm = normopt.norms.Lp(p)
    edge = circle / torch.linalg.vector_norm(circle, p, dim=0)
    d = norm.dual_map([g])[0]
    height = norm.dual_norm([g])[0].item()
    along = g @ edge
    left.plot(*edge, color=f"C{i}", linewidth=1)
    left.plot(*d, "o", color=f"C{i}")
    right.plot(torch.rad2deg(angles), along, color=f"C{i}", linewidth=1)
    where = math.degrees(math.atan2(d[1], d[0]))
    right.plot(where, height, "o", color=f"C{i}", label=named(p))
    print(
        f"{named(p):7}  D(g) = ({d[0]:.3f}, {d[1]:.3f})   dual norm {height:.3f},"
        f"  highest point of the curve {along.max():.3f}"
    )
left.annotate("", g / 2, (0, 0), arrowprops={"arrowstyle": "->", "color": GREY})
left.text(1.08, 0.5, "g/2")
left.set(aspect="equal", xlim=(-1.15, 1.35), xlabel="first entry", ylabel="second")
right.set(xlim=(-60, 120), ylim=(0, 3.3), xlabel="direction of d (degrees)")
right.set(ylabel="⟨g, d⟩")
fig.legend(loc="outside upper center", ncols=5)
fig.alt = "Left: five unit balls and on each the dual map of one gradient. Right: how far along the gradient each point of the balls' edges lies; the dual maps sit on the highest points"

# %% [markdown]
# At p = 1 the ball is a diamond, and its furthest point is a corner: the step moves the largest entry alone. At p = ∞
# it is a square, and all entries move by the same amount. In between, the dual map turns smoothly:
#
# \[
# D(g)_i = \operatorname{sign}(g_i) \left(\frac{|g_i|}{\|g\|_q}\right)^{q-1},
# \qquad \frac1p + \frac1q = 1 .
# \]
#
# The angle of D(g) against 1/p, from signs on the left to a single coordinate on the right:

# %%
fig, ax = plt.subplots(figsize=(7, 3.2))
inverse = torch.linspace(0, 1, 101)
for slope in (0.05, 0.25, 0.5, 0.9):
    tilted = torch.tensor([1.0, slope])
    turned = []
    for x in inverse.tolist():
        d = normopt.norms.Lp(1 / x if x else INF).dual_map([tilted])[0]
        turned.append(math.degrees(math.atan2(d[1], d[0])))
    line = ax.plot(inverse, turned, label=f"g = (1, {slope:g})")[0]
    own = math.degrees(math.atan(slope))
    ax.plot(0.5, own, "o", color=line.get_color())
    share = (45 - turned[25]) / (45 - own)  # 25 is where 1/p is ¼
    print(
        f"g = (1, {slope:4g}): {100 * share:.0f} % of the turn from signs to g is done at p = 4"
    )
ax.set(xlabel="1/p", ylabel="angle of D(g) (degrees)")
ax.set(xticks=[0, 0.125, 0.25, 0.5, 2 / 3, 1])
ax.set(xticklabels=["0\np = ∞", "⅛\n8", "¼\n4", "½\n2", "⅔\n1.5", "1\n1"])
fig.legend(loc="outside upper center", ncols=4)
fig.alt = "The angle of the dual map over 1/p for four gradients: 45 degrees at p = ∞, the gradient's own angle at p = 2 (dots), 0 at p = 1"

# %% [markdown]
# All curves begin at 45°, the sign vector's angle, pass through the gradient's own angle at p = 2 (the dots), and end
# on the axis. The more the entries differ, the more of the turn from signs to the gradient happens at large p.
#
# ## Four lengths
#
# The dual map gives the direction; `scale` gives the length. The figure shows the length of one step at learning rate 1
# for a gradient of 1000 Gaussian entries: on the left at p = 4, as the gradient shrinks; on the right for a gradient of
# RMS 0.001, as p grows.

# %%
torch.manual_seed(0)
gaussian = torch.randn(1000)
gaussian /= gaussian.square().mean().sqrt()
SCALES = ("unit", "dual", "power", "matched")


def step_length(scale, p, size):
    """RMS of one step of the engine at learning rate 1."""
    w = nn.Parameter(torch.zeros(1000))
    w.grad = size * gaussian
    normopt.SteepestDescent([w], lr=1.0, norm="lp", p=p, scale=scale).step()
    return w.detach().square().mean().sqrt().item()


sizes, orders = [10.0**k for k in range(-6, 1)], [2.0, 2.5, 3, 4, 6, 8, 16, 64]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
print("p = 4, RMS(g):" + "".join(f"{s:>11.0e}" for s in sizes[::2]))
for scale in SCALES:
    by_size = [step_length(scale, 4.0, size) for size in sizes]
    left.plot(sizes, by_size, "o-", ms=4, label=scale)
    right.plot(orders, [step_length(scale, p, 1e-3) for p in orders], "o-", ms=4)
    print(f"{scale:14}" + "".join(f"{length:11.1e}" for length in by_size[::2]))
left.set(xscale="log", yscale="log", xlabel="RMS(g)", ylabel="RMS of the step")
right.set(xscale="log", xlabel="p", xticks=[2, 4, 8, 16, 64])
right.set(xticklabels=["2", "4", "8", "16", "64"])
right.minorticks_off()
fig.legend(loc="outside upper center", ncols=4)
fig.alt = "Length of one step against the size of the gradient at p = 4, and against p at one size, for the four scales"

# %% [markdown]
# - **unit** has a constant length: near a minimum it oscillates, and the learning rate has to fall.
# - **dual** is proportional to the gradient: its norm is \(\|g\|_\star\). It grows with p.
# - **power** is proportional to the (p−1)-th root of the gradient's size. Its length changes with p by orders of
#   magnitude: annealing p also anneals the learning rate.
# - **matched** is exactly as long as SGD's step, at every p.
#
# ## A valley, along the axes and across
#
# Under "dual", a step of \(1/L\) is safe, where L is the curvature that the norm sees: if
# \(d^\top H d \le L\,\|d\|^2\) for every d, then
#
# \[
# f(x - \tfrac1L \|g\|_\star D(g)) \;\le\; f(x) - \frac{\|g\|_\star^2}{2L} .
# \]
#
# So what counts is \(\|g\|_\star^2/L\): as p grows, \(\|g\|_\star\) grows, but so does L. Two valleys have the same
# curvatures, 1 and 30; one is aligned with the axes, the other, with its start, is turned by 35°. Every norm has its
# own learning rate 1/L; L is found on a fine mesh of the boundary of its ball.


# %%
def valley(degrees):
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    h = turn @ torch.diag(torch.tensor([1.0, 30.0])) @ turn.T
    return h, turn @ torch.tensor([-3.0, 1.0])


def curvature(h, p):
    edge = circle / torch.linalg.vector_norm(circle, p, dim=0)
    return ((h @ edge) * edge).sum(0).max().item()


def path(h, start, p, steps):
    x = nn.Parameter(start.clone())
    lr = 1 / curvature(h, p)
    opt = normopt.SteepestDescent([x], lr=lr, norm="lp", p=p, scale="dual")
    points, kept = [x.detach().clone()], True
    for _ in range(steps):
        loss = 0.5 * x @ h @ x
        opt.zero_grad()
        loss.backward()
        dual = normopt.norms.Lp(p).dual_norm([x.grad])[0]
        opt.step()
        after = 0.5 * x.detach() @ h @ x.detach()
        promised = loss.detach() - lr * dual.square() / 2
        kept &= bool(after <= promised * (1 + 1e-4) + 1e-6)
        points.append(x.detach().clone())
    return torch.stack(points), kept


fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
across = torch.linspace(-3.6, 3.6, 200)
xs, ys = torch.meshgrid(across, across / 2, indexing="xy")
promise = True
print(f"{'':18}" + "".join(f"{named(p):>10}" for p in (1.0, 2.0, INF)))
for ax, degrees in zip(axes, (0, 35), strict=True):
    h, start = valley(degrees)
    z = 0.5 * (h[0, 0] * xs**2 + 2 * h[0, 1] * xs * ys + h[1, 1] * ys**2)
    levels = [0.3, 1, 3, 10, 30, 100]
    ax.contour(xs, ys, z, levels=levels, colors=GREY, linewidths=0.5)
    losses = []
    for p in (1.0, 2.0, INF):
        points, kept = path(h, start, p, 20)
        promise &= kept
        ax.plot(*points.T, ".-", linewidth=1, label=named(p))
        losses.append((0.5 * points[-1] @ h @ points[-1]).item())
    ax.set(title="along the axes" if degrees == 0 else f"turned by {degrees}°")
    ax.set(xlim=(-3.6, 1.4), ylim=(-2.0, 1.6), aspect="equal")
    row = f"turned by {degrees:2}°: L "
    print(
        row.ljust(18) + "".join(f"{curvature(h, p):10.1f}" for p in (1.0, 2.0, INF))
    )
    print("after 20 steps".ljust(18) + "".join(f"{v:10.4f}" for v in losses))
fig.legend(
    *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3
)
fig.alt = "Paths of steepest descent under ℓ1, ℓ2 and ℓ∞ in two valleys: steps along one axis, along the gradient, and along diagonals"
print(
    f"\n{'holds' if promise else 'does not hold'}: every step went down by at least its bound"
)

# %% [markdown]
# ℓ1 steps along one axis at a time: it is greedy coordinate descent. ℓ2 steps along the gradient, and ℓ∞ only along
# diagonals. In the turned valley ℓ2's path is the same path, turned; the paths of ℓ1 and ℓ∞ change, and so does their
# L. An ℓp norm with p ≠ 2 depends on the axes, which can help if the axes have a meaning. Which norm is better also
# depends on the start: do not read a ranking from these paths.
#
# ## Scaling features is choosing a norm
#
# The features of scikit-learn's breast-cancer table are lengths, areas and ratios of different scales: their standard
# deviations differ by a factor of two hundred thousand. A feature with small values needs a large weight, but its
# gradient is small. The usual remedy is to standardise the features. Another is to keep the features, and to scale each
# weight in the norm by the standard deviation s of its feature:
#
# \[
# \|d\| = \|s \odot d\|_p,
# \qquad \|g\|_\star = \|g / s\|_q,
# \qquad D(g) = D_p(g / s) / s .
# \]
#
# That is a custom norm of a few lines:

# %%
features, labels = load_breast_cancer(return_X_y=True)
table, y = torch.tensor(features), torch.tensor(labels, dtype=torch.float64)
table = table - table.mean(0)
table /= table.std(
    0
).max()  # one number for all, so that learning rates are readable
SPREAD = table.std(0)
print(f"standard deviations from {SPREAD.min():.1e} to {SPREAD.max():.1e}")


@normopt.norms.register("by-feature")
@dataclass(frozen=True)
class ByFeature(normopt.norms.TensorNorm):
    p: float

    def dual_norm(self, x):
        return normopt.norms.Lp(self.p).dual_norm([x / SPREAD])[0]

    def dual_map(self, x):
        return normopt.norms.Lp(self.p).dual_map([x / SPREAD])[0] / SPREAD


# %% [markdown]
# This is full-batch logistic regression on the table as it is, with unit steps and a learning rate that falls linearly
# to zero. Each curve has the best of the learning rates that were tried, by final training loss.

# %%
STEPS = 20 if FAST else 120
RATES = [10.0 ** (k / 2) for k in ((0, 3) if FAST else range(-3, 5))]


def regress(x, norm, p, lr):
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=torch.float64))
    b = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    groups = [{"params": [w], "norm": norm, "p": p}, {"params": [b], "norm": "l2"}]
    opt = normopt.SteepestDescent(groups, lr=lr, scale="unit")
    fall = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.binary_cross_entropy_with_logits(x @ w + b, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        fall.step()
        losses.append(loss.item())
    return losses


TITLES = {"lp": "each weight by itself", "by-feature": "each weight by its feature"}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
print(f"{'':30}{'best rate':>10}{'final loss':>12}")
for ax, (norm, title) in zip(axes, TITLES.items(), strict=True):
    for p in (1.0, 2.0, 4.0, INF):
        tried = {lr: regress(table, norm, p, lr) for lr in RATES}
        best = min(RATES, key=lambda lr: tried[lr][-1])
        star = "*" if best in (RATES[0], RATES[-1]) else " "
        ax.plot(tried[best], linewidth=1, label=named(p))
        print(
            f"{title + ', ' + named(p):34}{best:6.3g}{star}{tried[best][-1]:11.4f}"
        )
    ax.set(xlabel="steps", title=title, yscale="log")
axes[0].set(ylabel="training loss", ylim=(0.03, 2))
fig.legend(
    *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
)
fig.alt = "Training loss of logistic regression over the steps, under ℓ1, ℓ2, ℓ4 and ℓ∞ of the weights as they are and of the weights times their features' spread, each at its best learning rate"

# %%
ours = torch.tensor(regress(table, "by-feature", 2.0, 1.0))
theirs = torch.tensor(regress(table / SPREAD, "lp", 2.0, 1.0))
gap = (ours - theirs).abs().max().item()
print(
    f"{'holds' if gap < 1e-6 else 'does not hold'}: ℓ2 by features on the table as it is"
    " has the losses of plain ℓ2 on the standardised table"
)

# %% [markdown]
# On the left a larger p reaches a lower loss, but no p corrects the scales: signs move all weights by the same amount,
# while the weights need very different amounts. On the right the data are the same. To standardise features *is* to
# choose a norm. (A star marks a best learning rate at an end of those tried. This is training loss, on one table.)
#
# ## A matrix is not a long vector
#
# A linear layer's weight is a linear map, and norms of its singular values treat it as one. With \(G = U \Sigma
# V^\top\), the dual map of the spectral norm is the **polar factor** \(UV^\top\), the step of [`Muon`][normopt.Muon]
# and [`Scion`][normopt.Scion]: all singular directions move by the same amount. The polar factor does to the singular
# values what the sign does to the entries, and the nuclear norm's dual map, \(u_1 v_1^\top\), corresponds to a single
# coordinate.

# %%
torch.manual_seed(0)
u, v = (torch.linalg.qr(torch.randn(n, 16))[0] for n in (16, 24))
sigma = 2.0 ** -torch.arange(16)
G = u @ torch.diag(sigma) @ v.T
NORMS = {
    "ℓ2: G": normopt.norms.Lp(2.0),
    "nuclear: u₁v₁ᵀ": normopt.norms.Schatten(1.0, method="svd"),
    "ℓ∞: sign(G)": normopt.norms.Lp(INF),
    "spectral: UVᵀ": normopt.norms.Schatten(INF),
}
fig = plt.figure(figsize=(9, 4.6))
top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.4))
ax = bottom.subplots()
print(f"{'':16}{'⟨G, D⟩':>8}{'‖G‖⋆':>9}{'singular values of D':>26}{'rank':>6}")
for i, (tile, (name, norm)) in enumerate(
    zip(top.subplots(1, 4), NORMS.items(), strict=True)
):
    D = norm.dual_map([G])[0]
    edge = 1.5 * D.abs().max().item()
    tile.imshow(D.numpy(), cmap="RdBu", clim=(-edge, edge))
    tile.set(title=name, xticks=[], yticks=[])
    values = torch.linalg.svdvals(D)
    rank = int((values > 1e-5 * values[0]).sum())
    shown = values.where(values > 1e-5 * values[0], torch.nan)
    ax.plot(range(1, 17), shown, "o-", ms=4, color=f"C{i}", label=name)
    print(
        f"{name:16}{(G * D).sum():8.3f}{norm.dual_norm([G])[0]:9.3f}"
        f"{f'{values[0]:.2g} … {values[rank - 1]:.2g}':>26}{rank:6}"
    )
ax.set(yscale="log", xlabel="singular value, largest first", ylabel="size")
ax.legend(loc="lower left")
fig.alt = "The dual maps of one matrix under four norms, as pictures, and their singular values: falling, a single one, uneven, all equal to 1"

# %% [markdown]
# In each row ⟨G, D⟩ equals the dual norm, as it must. Each singular value of the gradient is half of the one before.
# SGD's step has the same ratios, so it hardly moves the directions with small singular values. The sign equalises the
# *entries*, but not the singular values; the polar factor sets every singular value to 1.
#
# Next: [move p and the gradient yourself](../playground.md), [train with a schedule of p](lp_schedule_on_digits.md), or
# [give each layer its norm](norms_by_layer.md). The mathematics is in [Norms and duals](../theory/norms-and-duals.md).

# %% [markdown]
# # Steepest descent in pictures
#
# "Downhill" means nothing until you say how long a step is. This page draws what a norm does to one step, and then to
# a whole walk. Nothing in it is a network; [the ℓp schedule on digits](lp_schedule_on_digits.md) has one.
#
# ## The same gradient, turned by p
#
# Of all steps of size 1 by the norm, the dual map \( D(g) \) goes furthest along the gradient. For ℓp,
#
# \[
# D(g) = \operatorname{sign}(g) \left( \frac{|g|}{\|g\|_q} \right)^{q-1}, \qquad \frac1p + \frac1q = 1 .
# \]

# %%
import math

import matplotlib.pyplot as plt
import torch

import normopt

g = torch.tensor([1.0, 0.2], dtype=torch.float64)
orders = [1.05, 1.5, 2.0, 3.0, 8.0, math.inf]
for p in orders:
    norm = normopt.norms.Lp(p)
    x, y = norm.dual_map(g).tolist()
    print(
        f"p = {p:4}: D(g) = ({x:.3f}, {y:.3f}), dual norm {norm.dual_norm(g):.3f}"
    )

# %% [markdown]
# At p near 1 the step is the largest entry alone; at p = 2 it is the gradient's direction; at p = ∞ every entry counts
# the same. The inner product with g is the dual norm, always.

# %%
fig, ax = plt.subplots(figsize=(5, 4.4))
angle = torch.linspace(0, math.pi / 2, 200, dtype=torch.float64)
circle = torch.stack([angle.cos(), angle.sin()])
for p in orders:
    norm = normopt.norms.Lp(p)
    ball = circle / torch.stack([norm.norm(c) for c in circle.T])
    (line,) = ax.plot(
        *ball, lw=1.4, label="p = ∞" if p == math.inf else f"p = {p:g}"
    )
    ax.plot(*norm.dual_map(g).numpy(), "o", color=line.get_color())
ax.plot([0, 1.15], [0, 0.23], color="#808894", lw=1.2, ls="--")
ax.text(1.12, 0.26, "g", color="#808894")
ax.set(
    xlim=(0, 1.25),
    ylim=(0, 1.1),
    aspect="equal",
    xlabel="first weight",
    ylabel="second weight",
)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
fig.alt = "A quarter of six unit balls; the dual map of one gradient climbs from the axis to the corner as p grows"

# %% [markdown]
# ## How long the step is
#
# The scale decides. Shrink the gradient a thousandfold: under "unit" the step stays, under "dual" it shrinks with the
# gradient, and "power" is between them.


# %%
def update(g, p, scale):
    """The direction u of one step from 0, by the engine itself."""
    w = torch.nn.Parameter(torch.zeros_like(g))
    w.grad = g.clone()
    normopt.SteepestDescent([w], lr=1.0, norm="lp", p=p, scale=scale).step()
    return -w.detach()


sizes = torch.logspace(-3, 0, 30, dtype=torch.float64)
fig, ax = plt.subplots(figsize=(6, 3.4))
for scale in ("unit", "dual", "power", "matched"):
    ax.loglog(
        sizes,
        [update(s * g, 4.0, scale).norm() for s in sizes],
        label=scale,
        ls="--" if scale == "matched" else "-",
    )
ax.set(xlabel="size of the gradient", ylabel="length of the step (ℓ2)")
ax.legend(title="p = 4", loc="lower right")
fig.alt = "Length of a step against the gradient's size: flat for unit, slope one for dual and matched, between for power"

# %% [markdown]
# ## Walks
#
# A quadratic whose axes are curved 1 : 50, along the axes and turned by 45°. Each optimizer has its own learning rate,
# the best of a small grid for the loss after 60 steps, so that the directions are compared and not the rates.

# %%
curvature = torch.diag(torch.tensor([1.0, 50.0], dtype=torch.float64))
turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
rates = torch.logspace(-4, 0, 25).tolist()
methods = {
    "SGD": lambda w, lr: normopt.SGD(w, lr=lr),
    "signSGD": lambda w, lr: normopt.SignSGD(w, lr=lr),
    "p = 4, matched": lambda w, lr: normopt.SteepestDescent(
        w, lr=lr, norm="lp", p=4.0, scale="matched"
    ),
}


def walk(make, lr, matrix, steps=60):
    """The points of a walk from (−1.03, 0.57), turned with the valley."""
    start = torch.tensor([-1.03, 0.57], dtype=torch.float64)
    w = torch.nn.Parameter(turn @ start if matrix is turned else start)
    opt, points = make([w], lr), [w.detach().clone()]
    for _ in range(steps):
        opt.zero_grad()
        (w @ matrix @ w / 2).backward()
        opt.step()
        points.append(w.detach().clone())
    return torch.stack(points)


def loss(points, matrix):
    return ((points @ matrix) * points).sum(-1) / 2


turned = turn @ curvature @ turn.T
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8))
for ax, matrix, title in zip(
    axes, (curvature, turned), ("along the axes", "turned by 45°"), strict=True
):
    for name, make in methods.items():
        walks = [(walk(make, lr, matrix), lr) for lr in rates]
        points, lr = min(
            walks, key=lambda found: loss(found[0][-1], matrix).nan_to_num(math.inf)
        )
        ax.plot(*points.T.numpy(), marker=".", ms=4, lw=1, label=name)
        print(
            f"{title}: {name:15} best rate {lr:.3g}, loss after 60 steps {loss(points[-1], matrix):.2g}"
        )
    ax.set(title=title, aspect="equal")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
fig.alt = (
    "Walks of SGD, signSGD and ℓ4 on a narrow valley, along the axes and turned"
)

# %% [markdown]
# SGD does not see the turn: ℓ2 is the same from every side. The others do, because a coordinate means something to
# them, as it does in a network, whose coordinates are weights and not an arbitrary basis. SignSGD's last step is as long
# as its first, so it ends in a circle about the minimum that only a falling learning rate closes.
#
# ## A matrix
#
# Under the spectral norm a step is the polar factor \( UV^\top \) of \( G = U \Sigma V^\top \): the same directions, all
# singular values made 1.

# %%
torch.manual_seed(0)
G = torch.randn(12, 4, dtype=torch.float64) @ torch.randn(
    4, 12, dtype=torch.float64
)
G = G + 0.1 * torch.randn(12, 12, dtype=torch.float64)
polar = normopt.norms.Schatten(math.inf).dual_map(G)
fig, axes = plt.subplots(1, 3, figsize=(9, 3))
for ax, matrix, title in zip(axes, (G, polar), ("G", "D(G)"), strict=False):
    ax.imshow(
        matrix,
        cmap="RdBu",
        vmin=-float(matrix.abs().max()),
        vmax=float(matrix.abs().max()),
    )
    ax.set(title=title, xticks=[], yticks=[])
axes[2].plot(
    (torch.linalg.svdvals(G) / torch.linalg.svdvals(G)[0]).numpy(),
    "o-",
    label="G, over its largest",
)
axes[2].plot(torch.linalg.svdvals(polar).numpy(), "o-", label="D(G)")
axes[2].set(title="singular values", xlabel="index", ylim=(0, 1.1))
axes[2].legend()
fig.alt = "A matrix of nearly rank four, its polar factor, and both spectra: the polar factor's is flat at 1"

# %% [markdown]
# What was small in G is as large as the rest in D(G), noise included. That is Muon's bet: that the small directions
# matter. [The theory](../theory/dual-maps.md) derives it, and [the playground](../playground.md) lets you drag it.

# %% [markdown]
# # ℓp decay and AGR on the optimizer you already have
#
# [`LpDecay`][normopt.LpDecay] and [`AGR`][normopt.AGR] attach to any `torch.optim.Optimizer`, which stays the same
# object. ℓp decay makes weights, or whole neurons, exactly zero. This page applies it to a network that AdamW trains on
# the digits, and measures the cost in accuracy.

# %%
import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digit)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200], y[1200:]


def mlp(width=128):
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def train(model, opt, steps, after_step=lambda: None):
    """Batches of 64 under a cosine learning rate; the test accuracy in per cent, and the test loss."""
    steps = 20 if FAST else steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
        schedule.step()
        after_step()
    with torch.no_grad():
        out = model(x_test)
        right = 100 * (out.argmax(1) == y_test).float().mean().item()
        return right, nn.functional.cross_entropy(out, y_test).item()


# %% [markdown]
# ## From dense to sparse
#
# Two things to note. AdamW has its own weight decay, 0.01 by default; `LpDecay` raises an error if it is not 0, unless
# you pass `elastic=True`. And λ acts only through η·λ, so the learning-rate schedule is also a schedule of the decay.


# %%
def zeros(model):
    """Exact zeros, in per cent: nothing is thresholded."""
    total = normopt.sparsity.report(model).total
    return 100 * total.zeros / total.entries


torch.manual_seed(0)
model = mlp()
opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
decay = normopt.LpDecay(opt, p=0.8, weight_decay=0.1)
layers = (model[0], model[2], model[4])
history = []
right, _ = train(
    model, opt, 600, lambda: history.append([zeros(layer) for layer in layers])
)
print(f"test accuracy {right:.1f} %\n")
print(normopt.sparsity.report(model))

fig, ax = plt.subplots(figsize=(7, 3))
for values, name in zip(
    zip(*history, strict=True), ("64 → 128", "128 → 128", "128 → 10"), strict=True
):
    ax.plot(values, label=name)
ax.set(xlabel="steps", ylabel="exact zeros, %", ylim=(0, 100))
ax.legend(title="layer")
fig.alt = "Exact zeros of each layer over the steps, under AdamW with ℓp decay"

# %% [markdown]
# Its settings are in the param groups: a group can have its own, a schedule can change them, and `state_dict()` saves
# them. `detach()` removes the add-on and its settings.

# %%
print({k: v for k, v in opt.param_groups[0].items() if k.startswith("lp_")})
decay.detach()
print({k: v for k, v in opt.param_groups[0].items() if k.startswith("lp_")})

# %% [markdown]
# ## What sparsity costs
#
# Exact zeros against accuracy, for several p and λ; each point is the mean of two seeds.

# %%
LAMBDAS = (0.05,) if FAST else (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
SEEDS = (0,) if FAST else (0, 1)


def run(seed, with_agr=False, **settings):
    torch.manual_seed(seed)
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    if with_agr:
        normopt.AGR(opt)
    if settings:
        normopt.LpDecay(opt, **settings)
    right, loss = train(model, opt, 600)
    return zeros(model), right, loss


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


dense = mean([run(seed) for seed in SEEDS])
print(f"no decay: test accuracy {dense[1]:.1f} %\n")
print("exact zeros → test accuracy, in per cent")
print("  λ     " + "".join(f"{f'p = {p:g}':>17}" for p in (0.5, 0.8, 1.0, 1.5)))
table = {
    (p, lam): mean([run(seed, p=p, weight_decay=lam) for seed in SEEDS])
    for p in (0.5, 0.8, 1.0, 1.5)
    for lam in LAMBDAS
}
for lam in LAMBDAS:
    cells = (
        f"{table[p, lam][0]:8.1f} → {table[p, lam][1]:4.1f}"
        for p in (0.5, 0.8, 1.0, 1.5)
    )
    print(f"{lam:<8g}" + "  ".join(cells))

fig, ax = plt.subplots(figsize=(7, 3.4))
for p in (0.5, 0.8, 1.0, 1.5):
    ax.plot(
        *zip(*(table[p, lam][:2] for lam in LAMBDAS), strict=True), "o-", label=p
    )
ax.axhline(dense[1], linestyle=":", color="#808894")
ax.annotate(
    "no decay",
    (100, dense[1]),
    xytext=(0, 4),
    textcoords="offset points",
    horizontalalignment="right",
)
ax.set(xlabel="exact zeros, %", ylabel="test accuracy, %", xlim=(0, 100))
if not FAST:
    ax.set(ylim=(87, 94))  # the dead network lies below
ax.legend(title="p", loc="lower left")
fig.alt = (
    "Test accuracy against exact zeros: one curve for each p, one point for each λ"
)

# %% [markdown]
# With p below 1 most of the weights become zero before the accuracy falls; at p = 1.5 few reach zero, and at p = 2,
# which is plain weight decay, none would. With two seeds and no tuning, differences of half a per cent mean nothing. If
# λ is too large, all weights become zero without an error, as at the largest λ with p = 0.5: count the zeros as you
# increase λ.
#
# ## And AGR
#
# AGR can be attached before or after LpDecay. Its effect depends on the share of the largest entries in the ℓ1 norm of
# a gradient. In a tensor of thousands of entries that share is small, so AGR hardly changes the gradient; and AdamW's
# normalisation cancels any factor of an entry that is constant over time. On this network the loss changes little.
# AGR's authors report gains on larger networks.

# %%
print("mean of the seeds           exact zeros   test accuracy   test loss")
for name, settings in (
    ("AdamW", {}),
    ("AdamW + AGR", {"with_agr": True}),
    ("AdamW + decay", {"weight_decay": 0.1}),
    ("AdamW + AGR + decay", {"with_agr": True, "weight_decay": 0.1}),
):
    found, right, loss = mean([run(seed, **settings) for seed in SEEDS])
    print(f"{name:25} {found:11.1f} % {right:13.1f} % {loss:11.3f}")

# %% [markdown]
# ## Whole neurons
#
# Scattered zeros make a file smaller, but not a network faster. `over="rows"` gives all incoming weights of a unit one
# common factor, by their norm, so the unit disappears as a whole. The output layer's rows are the classes, so its group
# has `lp_decay=0`. Rows have larger norms than entries, so they need a larger λ or more steps: here they get more steps
# and a larger learning rate.
#
# The fair comparison is between a wide network that is thinned and a narrow network with as many weights. A unit is
# left if its row is not all zero; the weights left are those between such units.


# %%
def thinned(seed, lam):
    torch.manual_seed(seed)
    model = mlp()
    groups = [
        {"params": model[:4].parameters()},
        {"params": model[4].parameters(), "lp_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0)
    normopt.LpDecay(opt, p=0.5, weight_decay=lam, over="rows")
    right, _ = train(model, opt, 1500)
    counts = normopt.sparsity.report(model).weights
    a, b = (count.rows - count.dead_rows for count in counts[:2])
    return a, b, 64 * a + a * b + 10 * b, right


def narrow(seed, width):
    torch.manual_seed(seed)
    model = mlp(width)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    right, _ = train(model, opt, 1500)
    return width, width, 64 * width + width**2 + 10 * width, right


print(
    "trained wide, decayed over rows     units left   weights left   test accuracy"
)
wide = []
for lam in (0.5,) if FAST else (0.3, 0.6, 1.0, 2.0, 3.0):
    a, b, left, right = mean([thinned(seed, lam) for seed in SEEDS])
    wide.append((left, right))
    print(f"λ = {lam:<30} {a:6.1f} + {b:5.1f} {left:12.0f} {right:13.1f} %")
print("trained narrow")
small = []
for width in (8,) if FAST else (64, 32, 16, 8):
    a, b, left, right = mean([narrow(seed, width) for seed in SEEDS])
    small.append((left, right))
    print(f"width {width:<28} {a:6.0f} + {b:5.0f} {left:12.0f} {right:13.1f} %")

fig, ax = plt.subplots(figsize=(7, 3))
for points, name in ((wide, "wide, decayed over rows"), (small, "narrow")):
    ax.plot(*zip(*points, strict=True), "o-", label=name)
ax.set(xlabel="weights left", ylabel="test accuracy, %", xscale="log")
ax.legend()
fig.alt = "Test accuracy against the weights left, for networks thinned by decay over rows and for narrow ones"

# %% [markdown]
# Here thinned networks are better if few weights are left: training decides how many units each layer keeps, and which.
# Dead units cost time until they are removed. The bias of a dead unit does not decay, so its output is a constant, not
# always zero. [Sparsity that pays](sparsity_that_pays.md) removes dead units, with their constants, and measures the
# gain in speed.

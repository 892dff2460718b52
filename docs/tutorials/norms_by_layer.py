# %% [markdown]
# # A norm for each layer
#
# An embedding is a table of vectors, a linear layer a map, a bias a vector. A *short* step means something different
# for each, so each should have its own norm. [`param_groups`][normopt.param_groups] gives every layer of a model its
# norm, by the preset of a method. This page shows which layer gets which norm, reads the norms of a step, and measures
# whether the best learning rate of a small model is good for a large one.

# %%
import json
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

# %% [markdown]
# ## Which layer gets which norm
#
# The model is a network with one layer of every kind, for the digits as pixels of 17 grey levels.


# %%
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.Embedding(17, 8)
        self.conv = nn.Conv2d(8, 16, 3)
        self.norm = nn.GroupNorm(4, 16)
        self.hidden = nn.Linear(16 * 36, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels):
        x = self.levels(pixels).permute(0, 3, 1, 2)
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


for preset in ("muon", "scion-cnn", "scale", "modular"):
    print(normopt.param_groups(Net(), preset), "\n")

# %% [markdown]
# A parameter that belongs to no known layer is an error, not a guess. An override sets its kind, or its settings; later
# overrides replace earlier ones.


# %%
class WithToken(Net):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8))


try:
    normopt.param_groups(WithToken(), "muon")
except ValueError as error:
    print(error, "\n")

groups = normopt.param_groups(
    WithToken(),
    "muon",
    overrides={"token": {"kind": "embedding"}, nn.Conv2d: {"lr": 0.01}},
)
print(groups)

# %% [markdown]
# ## Training with them
#
# Pass the groups to the optimizer that the preset is named after, which has the momentum, decay and default learning
# rate. "modular" works with any. After a step, [`norm_pairs`][normopt.SteepestDescent.norm_pairs] has the norm of every
# group's update and the dual norm of its momentum, which the step has computed anyway. It is None for a group whose
# step needs neither, such as signs. The last run prints them.

# %%
pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.long).reshape(-1, 8, 8), torch.tensor(digit)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200], y[1200:]

RUNS = {
    "muon": lambda groups: normopt.Muon(groups, lr=0.05),
    "scion-cnn": lambda groups: normopt.Scion(groups, lr=2**-9),
    "scale": lambda groups: normopt.SCALE(groups, lr=0.003),
    "modular": lambda groups: normopt.SteepestDescent(
        groups, lr=0.3, momentum=0.9, momentum_rule="ema"
    ),
}
fig, ax = plt.subplots(figsize=(7, 3.2))
for preset, make in RUNS.items():
    torch.manual_seed(0)
    model = Net()
    opt = make(normopt.param_groups(model, preset))
    steps = 10 if FAST else 150
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, steps)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        decay.step()
        losses.append(loss.item())
    right = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"{preset:10} test accuracy {100 * right:.1f} %")
    ax.plot(losses, label=preset, linewidth=1)
ax.set(xlabel="steps", ylabel="training loss", yscale="log")
fig.legend(loc="outside upper center", ncols=4)
fig.alt = "Training loss of the digits under four presets, one batch a step"

print("\nthe last step of the modular run:")
for group, pair in zip(opt.param_groups, opt.norm_pairs(), strict=True):
    print(
        f"{group['kind']:10} update {pair.update.item():.3f}   dual norm {pair.dual.item():.4f}"
    )

# %% [markdown]
# The learning rates above are not tuned, and there is one seed, so this is not a comparison. For one, run `python -m
# benchmarks run norms-by-layer`, on the digits and on a byte-level GPT.
#
# ## Does one learning rate fit every size?
#
# The modular norm ([arXiv:2405.14813](https://arxiv.org/abs/2405.14813)) guarantees that a step with learning rate η
# moves the model's output by at most about η, however wide and deep the model is. It assumes that the norm of every
# weight and the RMS of every layer's input are at most 1. Nothing here enforces that: if a weight's norm is 2, the
# steps of all layers before it can move the output twice as far. (With `weight_decay` equal to the group's radius,
# norms that start at or below 1 stay there.) If this guarantee decides the best learning rate, then the best rate of a
# small model is also the best of a large one.
#
# The measurement below is stored in this repository; `python -m benchmarks transfer` repeats it. Two models, an MLP on
# the digits and a byte-level GPT on Python's standard library, grow in width by 8 and in depth by 4. Each is trained at
# ten learning rates, a factor of 2 apart, with two optimizers:
#
# - **Modular**: unit steps of the averaged momentum 0.9 under `preset="modular"`;
# - **AdamW**: `torch.optim.AdamW` at its defaults, in the standard parametrization.
#
# Both start from PyTorch's own initial weights, so only the steps differ. The modular norm's authors initialise
# orthogonally and damp each residual branch, which an ordinary GPT does not.

# %%
measured = json.loads(Path("docs/data/transfer.json").read_text(encoding="utf-8"))
points = measured["points"]


def mean(losses):
    return math.inf if None in losses else sum(losses) / len(losses)


def curve(model, axis, optimizer, size):
    """Learning rates and mean losses of one size."""
    found = [
        (p["lr"], mean(p["losses"]))
        for p in points
        if (p["size"]["model"], p["size"]["axis"], p["optimizer"])
        == (model, axis, optimizer)
        and p["size"][axis] == size
    ]
    return sorted(found)


def sizes(model, axis):
    return sorted(
        {
            p["size"][axis]
            for p in points
            if (p["size"]["model"], p["size"]["axis"]) == (model, axis)
        }
    )


for model in ("MLP", "GPT"):
    fig, axes = plt.subplots(2, 2, figsize=(7, 5.6), sharey=True)
    for row, optimizer in zip(axes, ("Modular", "AdamW"), strict=True):
        for ax, axis in zip(row, ("width", "depth"), strict=True):
            for size in sizes(model, axis):
                lrs, losses = zip(*curve(model, axis, optimizer, size), strict=True)
                finite = [v if math.isfinite(v) else math.nan for v in losses]
                ax.plot(lrs, finite, marker=".", label=f"{axis} {size}")
                best = min(range(len(lrs)), key=lambda i: losses[i])
                ax.plot(
                    lrs[best],
                    losses[best],
                    "o",
                    mfc="none",
                    ms=9,
                    color=ax.lines[-1].get_color(),
                )
            ax.set(xscale="log", yscale="log", title=optimizer)
            ax.set(xlabel="learning rate")
            if axis == "width":
                ax.set(ylabel=f"{model}: validation loss")
            ax.legend(fontsize=8)
    fig.alt = f"{model}: validation loss against the learning rate, for each width and depth, under the modular norm and AdamW; the best rates are ringed"

# %% [markdown]
# The table answers two questions. *Moves*: by what factor does the best learning rate move from the smallest to the
# largest model? (The best is taken between the grid's points, from a parabola through the three lowest neighbours.)
# *Costs*: if the largest model is trained at the best rate of the smallest, how much higher is its loss than at its
# own best?


# %%
def best(points_of):
    """log2 of the best learning rate, between the grid's points, and whether it lies inside the grid."""
    logs = [math.log2(lr) for lr, _ in points_of]
    losses = [math.log(v) if math.isfinite(v) else math.inf for _, v in points_of]
    i = min(range(len(logs)), key=lambda k: losses[k])
    if i in (0, len(logs) - 1) or math.inf in losses[i - 1 : i + 2]:
        return logs[i]
    left, here, right = losses[i - 1 : i + 2]
    return logs[i] + 0.5 * (left - right) / (left - 2 * here + right)


print(f"{'':20} {'smallest':>10} {'largest':>10}   moves    costs")
moves = {}
for model in ("MLP", "GPT"):
    for axis in ("width", "depth"):
        small, *_, large = sizes(model, axis)
        for optimizer in ("Modular", "AdamW"):
            a, b = (curve(model, axis, optimizer, size) for size in (small, large))
            moved = best(b) - best(a)
            moves[model, axis, optimizer] = abs(moved)
            picked = min(a, key=lambda point: point[1])[0]
            there = dict(b)[picked]
            cost = there / min(v for _, v in b) - 1
            edge = [
                "*" if best(c) in (math.log2(c[0][0]), math.log2(c[-1][0])) else " "
                for c in (a, b)
            ]
            print(
                f"{model} {axis:6} {optimizer:8} {2 ** best(a):9.4f}{edge[0]} {2 ** best(b):9.4f}{edge[1]}"
                f"   ×{2**moved:4.2f}   {f'{100 * cost:5.1f} %' if math.isfinite(cost) else 'diverges'}"
            )

print()
for model in ("MLP", "GPT"):
    for axis in ("width", "depth"):
        ours, theirs = moves[model, axis, "Modular"], moves[model, axis, "AdamW"]
        verdict = "less" if ours < theirs else "more"
        print(
            f"{model}, {axis}: the best rate moves {verdict} under the modular norm than under AdamW"
            f" (by 2^{ours:.1f} against 2^{theirs:.1f})"
        )

# %% [markdown]
# A star marks a best rate at an end of the grid: the true one may lie beyond, and move more. A point is the mean of
# three seeds for the MLP and of two for the GPT, so differences well below a factor of 2 mean nothing. The MLP's losses
# are so small that a cost of a few per cent means little.

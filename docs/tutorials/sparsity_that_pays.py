# %% [markdown]
# # Sparsity that pays
#
# ℓp decay ([arXiv:2404.10824](https://arxiv.org/abs/2404.10824)) takes weights to exactly zero. That makes a network
# neither smaller nor faster: a matrix with zeros in it costs what it did. What does pay is a whole unit that is dead,
# because it can be taken out. This page trains a network whose units die, looks at what is zero, takes the dead units
# out with a proof that nothing changed, and then draws a measurement of what that costs and what it is worth.

# %%
import json
import os
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from normopt import sparsity
from normopt.addons import LpDecay

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

# %% [markdown]
# ## A network to make smaller
#
# The digits, with three training labels in ten drawn at random: something to overfit. The network is a stack of
# convolutions with batch norm. [`LpDecay`][normopt.LpDecay] hangs on AdamW; with `over="rows"` it decays the norm of
# everything that comes into a channel, so that a channel disappears as one.

# %%
pixels, digit = load_digits(return_X_y=True)
x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
y = torch.tensor(digit)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200].clone(), y[1200:]
torch.manual_seed(0)
wrong = torch.rand(len(y)) < 0.3
y[wrong] = torch.randint(10, (int(wrong.sum()),))


def block(ins, outs):
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(),
    )


def train(weight_decay):
    torch.manual_seed(1)
    model = nn.Sequential(
        block(1, 16),
        block(16, 32),
        nn.MaxPool2d(2),
        block(32, 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    if weight_decay:
        LpDecay(opt, p=1.0, weight_decay=weight_decay, over="rows")
    epochs = 1 if FAST else 40
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs * 19)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
            sched.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return (model(x_test).argmax(1) == y_test).float().mean().item()


plain, model = train(weight_decay=0), train(weight_decay=3)
print(f"test accuracy without decay: {accuracy(plain):.1%}")
print(f"with ℓ1 decay of rows:       {accuracy(model):.1%}")

# %% [markdown]
# ## What is zero
#
# [`report`][normopt.sparsity.report] counts zeros, and rows and columns of which nothing is left. Rows are what comes
# into an output channel, columns what goes out of an input channel.

# %%
counts = sparsity.report(model)
print(counts)
fig = counts.figure()
fig.alt = "For each weight of the network the percentages of zeros, dead rows and dead columns"

# %% [markdown]
# ## Take it out
#
# A channel of which nothing comes in puts out a constant, which batch norm and ReLU make another constant of. Where
# that is zero, [`shrink`][normopt.sparsity.shrink] takes the channel out; where it is not, the next convolution's
# border of zeros keeps it from being a bias, and one channel stays for all of them. The result is an ordinary, smaller
# network. It has been run beside the old one, in float64, and compared.

# %%
shrunk = sparsity.shrink(model, x_test)
print(shrunk)
print(f"\ntest accuracy of the small network: {accuracy(shrunk.model):.1%}")

# %% [markdown]
# The equality is that of eval mode: in training mode, batch norm takes its statistics from the batch, and a constant
# channel gives other values there than its running statistics do. The small network can be trained on all the same.
#
# Is it faster? The two in turns, one thread:


# %%
@torch.inference_mode()
def speedup(full, small, inputs, rounds=5 if FAST else 60):
    ratios = []
    for r in range(rounds):
        seconds = {}
        for net in (full, small) if r % 2 else (small, full):
            began = perf_counter()
            net(inputs)
            seconds[net] = perf_counter() - began
        ratios.append(seconds[full] / seconds[small])
    return median(ratios)


for size in (1, 256):
    print(
        f"batch of {size:3}: {speedup(model, shrunk.model, x_test[:size]):.2f} times as fast"
    )

# %% [markdown]
# ## What it costs and what it is worth
#
# One seed and one λ prove nothing. What follows draws a measurement that is kept in this repository;
# `python -m benchmarks sparsity` makes it anew. On the digits with true labels an MLP 64-128-128-10, on those with
# noise the convolutions from above, both under AdamW: without decay, with AdamW's own, and with ℓp decay of entries
# and of rows, at a few p and a grid of λ, three seeds each. Whatever is dead is taken out. A point is the
# mean over the seeds; down and left is smaller and worse. Ringed is what one would choose on the validation set: of all
# λ whose accuracy is within a hundredth of that without decay, the one that leaves the smallest network. The accuracies
# here are those of the test set, which has chosen nothing.

# %%
root = next(
    p
    for p in (Path.cwd(), *Path.cwd().parents)
    if (p / "docs/data/sparsity.json").exists()
)
measured = json.loads(
    (root / "docs/data/sparsity.json").read_text(encoding="utf-8")
)
TITLES = {"digits": "MLP, true labels", "digits-cnn": "CNN, noisy labels"}
ARMS = list(dict.fromkeys(c["arm"] for c in measured["chosen"]))
MARKS = dict(zip(ARMS, "x+sDo^v", strict=True))


def point(task, arm, weight_decay):
    """Means over the seeds of one setting: share of parameters left, test accuracy, share of zeros."""
    runs = [
        r
        for r in measured["runs"]
        if (r["task"], r["arm"], r["weight_decay"]) == (task, arm, weight_decay)
    ]
    return (
        mean(r["shrunk"] / r["parameters"] for r in runs),
        mean(r["test"] for r in runs),
        mean(r["zeros"] for r in runs),
    )


def points(task, arm):
    decays = {
        r["weight_decay"]
        for r in measured["runs"]
        if (r["task"], r["arm"]) == (task, arm)
    }
    return [point(task, arm, decay) for decay in sorted(decays)]


chosen = {(c["task"], c["arm"]): c for c in measured["chosen"]}

fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.2))
for ax, task in zip(axes, TITLES, strict=True):
    for arm in ARMS:
        found = points(task, arm)
        (line,) = ax.plot(
            [100 * size for size, _, _ in found],
            [100 * test for _, test, _ in found],
            MARKS[arm] + ("-" if len(found) > 1 else ""),
            ms=5 if len(found) > 1 else 8,
            lw=1,
            label=arm,
        )
        size, test, _ = point(task, arm, chosen[task, arm]["weight_decay"])
        if chosen[task, arm]["keeps"]:
            ax.plot(
                100 * size,
                100 * test,
                "o",
                mfc="none",
                ms=11,
                color=line.get_color(),
            )
    best = 100 * point(task, "no decay", 0.0)[1]
    ax.axhline(best, lw=0.8, ls=":", color="#808894")
    ax.set(title=TITLES[task], xlabel="parameters left, %", xlim=(-3, 104))
    ax.set_ylim(75, 100)
axes[0].set_ylabel("test accuracy, %")
fig.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    fontsize=8,
)
fig.alt = "Test accuracy against the share of parameters left after shrinking, for each kind of decay, on both tasks"


# %%
def speed(task, arm, batch):
    return [
        t
        for t in measured["networks"]
        if (t["task"], t["arm"], t["batch"]) == (task, arm, batch)
    ]


print(f"{'':32}   λ    test  zeros   size   speed-up, batch of 1   of 256")
for task, title in TITLES.items():
    for arm in ARMS:
        choice = chosen[task, arm]
        size, test, zeros = point(task, arm, choice["weight_decay"])
        one, many = (
            "–".join(f"{s:.2f}" for s in (min(v), max(v)))
            for v in (
                [t["speedup"] for t in speed(task, arm, batch)]
                for batch in (1, 256)
            )
        )
        loses = "" if choice["keeps"] else "  loses accuracy"
        print(
            f"{title:17}  {arm:15} {choice['weight_decay']:4g}  {test:5.1%}  {zeros:5.1%}  {size:5.1%}"
            f"{one:>19} {many:>12}{loses}"
        )
print(
    f"\nthe largest error of any of {len(measured['runs'])} proofs: {max(r['error'] for r in measured['runs']):.1e}"
)

# %% [markdown]
# # Sparsity that pays
#
# ℓp decay ([arXiv:2404.10824](https://arxiv.org/abs/2404.10824)) makes weights exactly zero. Scattered zeros make a
# network neither smaller nor faster: a matrix with zeros costs as much as before. Removing dead units does both. This
# page trains a network whose units die, counts the zeros, removes the dead units with a check that the outputs stay the
# same, and measures the cost in accuracy and the gain in speed.

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
# The data are the digits with three training labels in ten drawn at random, so the network can overfit. The network is
# a stack of convolutions with batch norm. [`LpDecay`][normopt.LpDecay] is attached to AdamW; with `over="rows"` it
# decays the norm of all incoming weights of a channel, so a channel disappears as a whole.

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
# [`report`][normopt.sparsity.report] counts zeros, and rows and columns that are all zero. A row has the incoming
# weights of an output channel, a column the outgoing weights of an input channel.

# %%
counts = sparsity.report(model)
print(counts)
fig = counts.figure()
fig.alt = "For each weight of the network the percentages of zeros, dead rows and dead columns"

# %% [markdown]
# ## Remove dead units
#
# A channel without incoming weights has a constant output, also after batch norm and ReLU. If that constant is zero,
# [`shrink`][normopt.sparsity.shrink] removes the channel. If it is not, it cannot become a bias, because the next
# convolution pads with zeros, so one channel is kept for all such constants. The result is an ordinary, smaller
# network; `shrink` compares the outputs of both in float64.

# %%
shrunk = sparsity.shrink(model, x_test)
print(shrunk)
print(f"\ntest accuracy of the small network: {accuracy(shrunk.model):.1%}")

# %% [markdown]
# The outputs are equal in eval mode. In training mode, batch norm takes its statistics from the batch, and a constant
# channel then has other values than with the running statistics. The small network can still be trained further.
#
# Is it faster? The two networks are timed in turns, on one thread:


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
# One seed and one λ are not enough. The measurement below is stored in this repository; `python -m benchmarks sparsity`
# repeats it. An MLP 64-128-128-10 on the digits with true labels, and the convolutions from above on those with noise,
# both under AdamW: without decay, with AdamW's own, and with ℓp decay of entries and of rows, at a few p and a grid of
# λ, three seeds each. All dead units are removed.
#
# A point is the mean over the seeds at one λ, and a line is one kind of decay: the larger λ, the further to the left.
# The ring marks the choice by the validation set: of all λ whose accuracy is within a hundredth of that without decay,
# the one that leaves the smallest network, and the most accurate one if sizes are equal, as under AdamW's own decay.
# The figure shows the test set, which no choice used. Points below 75 % are not shown: a λ slightly too large leaves no
# weight at all.

# %%
measured = json.loads(Path("docs/data/sparsity.json").read_text(encoding="utf-8"))
TITLES = {"digits": "MLP, true labels", "digits-cnn": "CNN, noisy labels"}
ARMS = list(dict.fromkeys(c["arm"] for c in measured["chosen"]))
MARKS = dict(zip(ARMS, "x+sDo^v", strict=True))
chosen = {(c["task"], c["arm"]): c for c in measured["chosen"]}


def point(task, arm, weight_decay):
    """Means over the seeds: per cent of parameters left, test accuracy, zeros."""
    runs = [
        r
        for r in measured["runs"]
        if (r["task"], r["arm"], r["weight_decay"]) == (task, arm, weight_decay)
    ]
    size = mean(r["shrunk"] / r["parameters"] for r in runs)
    return tuple(
        100 * v
        for v in (
            size,
            mean(r["test"] for r in runs),
            mean(r["zeros"] for r in runs),
        )
    )


def points(task, arm):
    decays = {
        r["weight_decay"]
        for r in measured["runs"]
        if (r["task"], r["arm"]) == (task, arm)
    }
    return [point(task, arm, decay) for decay in sorted(decays)]


fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.2), sharey=True)
for ax, task in zip(axes, TITLES, strict=True):
    for arm in ARMS:
        found = points(task, arm)
        sizes, tests, _ = zip(*found, strict=True)
        style = MARKS[arm] + ("-" if len(found) > 1 else "")
        (line,) = ax.plot(sizes, tests, style, ms=5, lw=1, label=arm)
        choice = chosen[task, arm]
        if choice["keeps"]:
            size, test, _ = point(task, arm, choice["weight_decay"])
            ax.plot(size, test, "o", mfc="none", ms=11, color=line.get_color())
    ax.axhline(point(task, "no decay", 0.0)[1], lw=0.8, ls=":", color="#808894")
    ax.set(title=TITLES[task], xlabel="parameters left, %", xlim=(-3, 106))
    ax.set_ylim(75, 100)
axes[0].set_ylabel("test accuracy, %")
fig.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    fontsize=8,
)
fig.alt = "Test accuracy against the share of parameters that is left, for each kind of decay, on both tasks; the choice of the validation set is ringed"


# %%
def speeds(task, arm, batch):
    """The speed-up of each seed's network, with its interval."""
    return [
        (t["speedup"], *t["interval"])
        for t in measured["networks"]
        if (t["task"], t["arm"], t["batch"]) == (task, arm, batch)
    ]


print(f"{'the ringed ones':49}test   zeros    size   faster, 1 input   256 inputs")
for task, title in TITLES.items():
    for arm in ARMS:
        choice = chosen[task, arm]
        size, test, zeros = point(task, arm, choice["weight_decay"])
        one, many = (
            f"{min(v)[0]:.2f}–{max(v)[0]:.2f}"
            for v in (speeds(task, arm, batch) for batch in (1, 256))
        )
        name = f"{title:17}  {arm:15}  λ = {choice['weight_decay']:g}"
        loses = "" if choice["keeps"] else "  loses accuracy"
        print(
            f"{name:47}{test:5.1f}%  {zeros:5.1f}%  {size:5.1f}%   {one:>15}   {many:>10}{loses}"
        )
worst = max(r["error"] for r in measured["runs"])
print(f"\nlargest error of the {len(measured['runs'])} proofs: {worst:.1e}")

fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
for ax, task in zip(axes, TITLES, strict=True):
    for i, batch in enumerate((1, 256)):
        for row, arm in enumerate(ARMS):
            for seed, (faster, low, high) in enumerate(speeds(task, arm, batch)):
                place = row + 0.36 * i - 0.3 + 0.12 * seed
                label = f"batch of {batch}" if row == seed == 0 else None
                ax.plot(
                    (low, high), (place, place), color=f"C{i}", lw=1.5, alpha=0.7
                )
                ax.plot(faster, place, "o", ms=3, color=f"C{i}", label=label)
    ax.axvline(1, lw=0.8, ls=":", color="#808894")
    ax.set(title=TITLES[task], xscale="log", xlabel="times as fast")
    low, high = ax.get_xlim()
    ticks = [1, 1.5, 2, 3, 4, 5] if high > 3 else [0.9, 1, 1.2, 1.5, 2]
    ax.set_xticks(
        [t for t in ticks if low < t < high],
        [f"{t:g}" for t in ticks if low < t < high],
    )
    ax.xaxis.minorticks_off()
axes[0].set_yticks(range(len(ARMS)), ARMS)
axes[0].invert_yaxis()
fig.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    fontsize=8,
)
fig.alt = "How many times as fast the shrunk networks are as the full ones, with 95 % intervals, for batches of 1 and of 256"

# %% [markdown]
# ## What this shows
#
# The lines that begin with "holds" or "does not hold" are decided by the measurement. One test image in 360 is 0.3 %:
# differences of some tenths of a per cent mean nothing.


# %%
def holds(claim, true):
    print(f"{'holds' if true else 'does not hold'}: {claim}")


def best(task, over):
    """Of the arms whose name ends so: the smallest of the ringed networks."""
    arms = [a for a in ARMS if a.endswith(over) and chosen[task, a]["keeps"]]
    return min((*point(task, a, chosen[task, a]["weight_decay"]), a) for a in arms)


for task, title in TITLES.items():
    base = point(task, "no decay", 0.0)[1]
    rows, entries = best(task, "rows"), best(task, "entries")
    fast = median(s for s, _, _ in speeds(task, rows[3], 256))
    holds(
        f"{title}: rows leave a smaller network than entries", rows[0] < entries[0]
    )
    holds(
        f"{title}: half of the parameters can go at no loss of test accuracy",
        rows[0] < 50 and rows[1] >= base,
    )
    holds(f"{title}: the smallest is twice as fast on 256 inputs", fast >= 2)
    own = max(test for _, test, _ in points(task, "AdamW's own"))
    lp = max(
        test for a in ARMS if a.startswith("ℓ") for _, test, _ in points(task, a)
    )
    holds(
        f"{title}: some ℓp decay is more accurate than any of AdamW's own", lp > own
    )

# %% [markdown]
# - **Zeros do not reduce the size by themselves.** Decay of entries makes about nine in ten weights of the convolutions
#   zero, but scattered, so hardly a channel dies. That helps storage
#   ([`sparse_state_dict`][normopt.sparsity.sparse_state_dict]), but hardly speed.
# - **Rows pay if regularization helps.** With noisy labels, networks with a third to a half of the parameters are more
#   accurate than the full one, and one and a half to three times as fast on 256 inputs. A single input gains little:
#   most of its time is the overhead of calling a dozen modules.
# - **They do not always pay.** On the true labels all ringed networks are slightly less accurate than the full one,
#   within the hundredth that was allowed, and only a quarter of the parameters is removed. Removing a few units can
#   even be *slower*, as with ℓ1 decay of entries there: a width of 128 suits the processor's kernels, and one of 123
#   does not.
# - **Other decay regularizes, too.** For accuracy alone, AdamW's own decay is as good on the noisy labels as any ℓp
#   decay, and its best λ is the largest that was tried. It makes no zeros at all.
# - **λ has a cliff.** On the convolutions, ℓ1 decay of rows leaves two thirds of the parameters at λ = 3, one third at
#   λ = 4, and nothing at λ = 6. Check the report during training.
#
# There are three seeds, two small networks, one learning rate for each task and one processor: the trend is clear, but
# the numbers hold for these networks only.
#
# ## Zeros that are scattered
#
# A linear layer can store and use only its nonzero weights ([`to_sparse`][normopt.sparsity.to_sparse]). Square layers
# with zeros at random places, against the dense layer:

# %%
print(f"{'units':>5}  {'zeros':>5}   times as fast: 1 input   256 inputs")
for units in (128, 512, 2048):
    for zeros in (0.8, 0.95, 0.99):
        one, many = (
            t["speedup"]
            for t in measured["layers"]
            if (t["units"], t["zeros"]) == (units, zeros)
        )
        print(f"{units:5}  {zeros:5.0%}   {one:22.2f}   {many:10.2f}")
print(f"\nmeasured on one thread: {measured['cpu']}, torch {measured['torch']}")

# %% [markdown]
# Large layers with very few nonzero weights gain. Layers of the size on this page do not, or only on large batches.

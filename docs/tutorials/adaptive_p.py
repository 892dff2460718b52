# %% [markdown]
# # Can the gradient choose p?
#
# [`CosineP`][normopt.schedules.CosineP] sets p from the step count. This page measures the gradients of a small network
# during training with [`GeometryMonitor`][normopt.GeometryMonitor], lets [`AdaptiveP`][normopt.schedules.AdaptiveP] set
# p from the measurement, and shows an ablation of whether that is better. It is not.
#
# AdaptiveP uses the density of the gradient,
#
# ```text
# φ = ‖g‖₁²/(d‖g‖₂²)
# ```
#
# It is 1 if all d entries have equal magnitude, 2/π if they are Gaussian, f·2/π if a fraction f of them is Gaussian and
# the rest zero, and 1/d if only one entry is nonzero. signSGD's convergence bound is divided by it
# ([arXiv:1802.04434](https://arxiv.org/abs/1802.04434)): signs are for dense gradients.

# %%
import copy
import inspect
import os
from pathlib import Path
from statistics import mean, median
from time import process_time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt
from normopt.schedules import AdaptiveP

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digit)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200], y[1200:]

# %% [markdown]
# ## Monitor a run
#
# Matrices and biases have separate groups, so each has its own p. `scale="matched"` keeps the length of SGD's step at
# every p: only the direction changes. Step AdaptiveP after the optimizer and before the gradients are cleared. The
# monitor uses the optimizer's hooks, and works with any optimizer; `every=1` records all steps, for the figure.

# %%
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 128),
    nn.ReLU(),
    nn.Linear(128, 128),
    nn.ReLU(),
    nn.Linear(128, 10),
)
groups = [
    {"params": [w for w in model.parameters() if w.dim() >= 2]},
    {"params": [w for w in model.parameters() if w.dim() < 2]},
]
opt = normopt.LPSGDM(groups, lr=3.0, p=8.0, scale="matched")
sched = AdaptiveP(opt)
steps = 10 if FAST else 200
decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

with normopt.GeometryMonitor(opt, every=1) as monitor:
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
        sched.step()
        decay.step()

accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
print(f"test accuracy {100 * accuracy:.1f} %")
rows = monitor.rows
for i, name in enumerate(("matrices", "biases")):
    last = rows[rows["group"] == i][-1]
    print(f"{name:8} density {last['density']:.2f}, p {last['p']:.2f} at the end")

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
for i, name in enumerate(("matrices", "biases")):
    of = rows[rows["group"] == i]
    left.plot(of["step"], of["density"], label=name, linewidth=1)
    right.plot(of["step"], of["p"], label=name, linewidth=1)
left.axhline(2 / torch.pi, color="grey", linewidth=1, linestyle=":")
left.set(xlabel="step", ylabel="density of the gradient", ylim=(0, 0.7))
right.set(xlabel="step", ylabel="p of the step")
right.legend()
fig.alt = "Density of the gradient and the p that follows from it, for matrices and biases, over the steps; the dotted line is the density of Gaussian entries"

# %% [markdown]
# After a ReLU many units are zero, so many rows and columns of the matrices' gradients are zero: their density is far
# below that of Gaussian entries, and p stays near 2. All metrics of the monitor:

# %%
fig = monitor.plot()
fig.alt = "All metrics of the monitor over the steps, for both groups"

# %% [markdown]
# `monitor.rows` is a NumPy structured array with these columns. `to_csv` writes it to a file, and
# `to_tensorboard(writer)` to a `SummaryWriter`.
#
# ## The cost of the monitor
#
# Training steps of this network (forward, backward, optimizer) are timed in turns with and without a monitor, in
# processor time on one thread; the table has medians. The relative cost depends on the machine, and is smaller for
# larger networks.

# %%
EVERY = inspect.signature(normopt.GeometryMonitor).parameters["every"].default
MAKERS = {
    "LPSGDM": lambda params: normopt.LPSGDM(params, lr=1e-4),
    "torch's AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
}


def stepper(make, every):
    """A function that makes as many steps as a whole interval of the monitor has."""
    net = copy.deepcopy(model)
    opt = make(net.parameters())
    if every:
        normopt.GeometryMonitor(opt, every=every)

    def steps():
        for _ in range(EVERY):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x[:64]), y[:64]).backward()
            opt.step()

    steps()
    return steps


def seconds(steps):
    began = process_time()
    steps()
    return process_time() - began


for name, make in MAKERS.items():
    bare, default, each = (stepper(make, every) for every in (None, EVERY, 1))
    rounds = [
        [seconds(f) for f in (bare, default, each)]
        for _ in range(2 if FAST else 40)
    ]
    step = 1e6 * median(r[0] for r in rounds) / EVERY
    print(f"{name:14} {step:5.0f} µs a step", end="")
    for i, every in ((1, EVERY), (2, 1)):
        longer = 100 * (median(r[i] / r[0] for r in rounds) - 1)
        print(f"; every {every:2}: {longer:+5.1f} %", end="")
    print()

# %% [markdown]
# ## Is it any better?
#
# The ablation uses the same digits and four schedules of p, starting at 8: cosine, linear, constant, and from the
# gradient's density. Each has steps as long as SGD's ("matched") and, separately, of the power map's own length. A
# fifth schedule, with matched steps, sets p from the curvature: once an epoch the anisotropy a of the Hessian of n
# weights is measured ([The best norm over a training](best_norm.md) shows it), and 1/(p−1) goes from 1 at a = 1 to 1/7,
# which is p = 8, at a = n, linearly in log a. That is the paper's premise as a rule. SGD with averaged momentum has p =
# 2 throughout, and Signum p = ∞. Each learning rate is tuned with the same budget; the accuracies are on test data,
# over fresh seeds that are the same for all. `python -m benchmarks run adaptive-p` repeats it, with a report, in a
# quarter of an hour.

# %%
from benchmarks.results import collect, test_score
from benchmarks.store import Store

found = collect(Store.from_parquet(Path("docs/data/adaptive-p.parquet")))
(task,) = found.tasks.values()
EPOCHS = len(task.rows[0].runs[0].curve)


def p_of(row):
    """p at the start of each epoch, the mean over the seeds; None where there is none to set."""
    by_epoch = zip(
        *([point.p for point in run.curve] for run in row.runs), strict=True
    )
    return [None if None in ps else mean(ps) for ps in by_epoch]


print(f"{len(found.study.seeds)} seeds, {EPOCHS} epochs\n")
print(
    f"{'':24} {'learning rate':>13}   {'test accuracy':>13}   p in the last epoch"
)
for row in task.rows:
    p = p_of(row)[-1]
    shown = f"{p:.2f}" if p is not None else ""
    if p is None:
        shown = {"SGD-EMA": "2 (SGD)", "Signum": "∞ (signs)"}[row.name]
    edge = "*" if row.at_edge else " "
    print(
        f"{row.name:24} {row.lr:12g}{edge}   {100 * mean(row.values(test_score)):11.2f} %   {shown}"
    )

fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
WAYS = ("", "-linear", "-constant", "-adaptive", "-curvature")
for ax, family in zip(axes, ("LPSGDM-matched", "LPSGDM"), strict=True):
    for suffix in WAYS:
        for row in task.rows:
            if row.name == family + suffix:
                epochs = range(1, EPOCHS + 1)
                ax.plot(epochs, p_of(row), label=suffix[1:] or "cosine")
    ax.set(xlabel="epoch", title=family)
axes[0].set(ylabel="p at the start of the epoch")
fig.legend(
    *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5
)
fig.alt = "p over the epochs under each schedule, mean over the seeds: the adaptive p is near 2 throughout, the p by curvature rises"

# %%
# Each p that is measured, against the same with another schedule or none, and against the ends of p.
arms = [row.name for row in task.rows]
pairs = [
    (arm, other)
    for what in ("-adaptive", "-curvature")
    for arm in arms
    if arm.endswith(what)
    for same in [arm.removesuffix(what)]
    for other in (
        *(same + way for way in WAYS[:3]),
        *("SGD-EMA", "Signum"),
    )
]
comparisons = task.compare(pairs, test_score)

print("test accuracy, paired over the seeds, in points; P-values after Holm\n")
for c in comparisons:
    d = c.difference.interval
    print(
        f"{c.row.name:24} minus {c.against.name:24} {100 * d.mean:+5.2f}"
        f"  ({100 * d.low:+.2f} to {100 * d.high:+.2f})  P-value {c.adjusted:.3f}"
    )
for what in ("adaptive", "curvature"):
    of = [c.verdict for c in comparisons if c.row.name.endswith(what)]
    print(
        f"\nOf {len(of)} comparisons, p by {'density' if what == 'adaptive' else what} is significantly better in"
        f" {of.count(1)} and significantly worse in {of.count(-1)}."
    )
by_curvature = p_of(next(r for r in task.rows if r.name.endswith("-curvature")))
print(
    f"p by curvature begins at {by_curvature[0]:.1f} and is {by_curvature[-1]:.1f} in the last epoch."
)

# %% [markdown]
# On this task all these optimizers, from p = 2 to p = ∞, end at about the same accuracy, so there is little to gain by
# moving p, and the density does not gain it. This is one task and a small network: it does not prove that a measured p
# never helps, but gives no reason to prefer it. Use `CosineP`, the paper's schedule, which needs no measurement and no
# host sync, unless you want to study this question.
#
# The curvature does not gain it either. The anisotropy is low at the start and rises, so p rises too, whereas p falls
# in the paper's schedule. The arm's accuracy is not significantly different from the cosine's, and its mean is lower.
#
# The study did show that under the power map the length of a step depends strongly on p. An earlier version of
# `AdaptiveP` made its first step at p = 8, with a learning rate that suits the p near 2 of all later steps. That step
# was many times too long, and the network did not recover. Now an unmeasured gradient counts as sparse, and the first
# step is made at `p_end`.

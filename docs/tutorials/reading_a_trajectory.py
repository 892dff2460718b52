# %% [markdown]
# # Reading a trajectory
#
# Do the steps of a training point to its final weights? How much longer is the path than the distance?
# [arXiv:2011.06702](https://arxiv.org/abs/2011.06702) finds that in successful trainings the steps do point there, and
# calls such a trajectory regular. [`TrajectoryMonitor`][normopt.TrajectoryMonitor] measures both for any optimizer, in
# one training, without storing all weights. This page shows how to use it, how accurate its sketches are, and whether
# the finding holds on small networks. [`GeometryMonitor`][normopt.GeometryMonitor] measures single steps: see [Can the
# gradient choose p?](adaptive_p.md)

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"
STEPS = 20 if FAST else 300

# %% [markdown]
# ## One training, two optimizers
#
# The monitor uses the optimizer's step hooks; the training loop only adds `record(loss)`, once per step. Here each
# optimizer has two monitors: one with sketches, which is the default, and an exact one, which writes every iterate to
# disk. Neither changes the training by a single bit.

# %%
pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digit)


def watch(make):
    """Train a small network; what the two monitors saw."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = make(model.parameters())
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)]
    if isinstance(opt, normopt.LPSGDM):
        schedules.append(normopt.schedules.CosineP(opt, total_steps=STEPS))
    with tempfile.TemporaryDirectory() as folder:
        sketched = normopt.TrajectoryMonitor(opt)
        exact = normopt.TrajectoryMonitor(opt, directory=Path(folder) / "run")
        for _ in range(STEPS):
            batch = torch.randint(len(x), (64,))
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            opt.step()
            for schedule in schedules:
                schedule.step()
            for monitor in (sketched, exact):
                monitor.record(loss)
        return sketched.result(), exact.result()


seen = {
    "AdamW": watch(lambda params: torch.optim.AdamW(params, lr=0.003)),
    "LPSGDM": watch(lambda params: normopt.LPSGDM(params, lr=0.01, p=8.0)),
}
print(f"{'':18} displacement   path  straightness  median cosine     min γ")
for name, (sketched, exact) in seen.items():
    for kind, found in (("sketched", sketched), ("exact", exact)):
        print(
            f"{name:8} {kind:9} {found.displacement:12.3f} {found.path_length:6.2f} {found.straightness:13.3f}"
            f" {np.median(found.cosine):14.3f} {found.min_gamma:9.2g}"
        )

# %% [markdown]
# [`plot`][normopt.Trajectory.plot] draws all measures, with 95 % intervals shaded. The last cosines are high in any
# training: the last step ends at the final weights, so its cosine is 1.

# %%
fig = seen["AdamW"][0].plot()
fig.alt = "AdamW: loss, distance to the final weights, cosine of each step with the direction to them, and γ, over the steps, sketched"

# %% [markdown]
# The two optimizers on the same batches, sketched (shaded) and exact (lines):

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for name, (sketched, exact) in seen.items():
    steps = np.arange(len(exact.cosine))
    line = left.plot(steps, exact.cosine, linewidth=0.8, label=name)[0]
    half = sketched.cosine_half
    left.fill_between(
        steps,
        sketched.cosine - half,
        sketched.cosine + half,
        alpha=0.25,
        color=line.get_color(),
    )
    steps = np.arange(len(exact.distance))
    right.plot(
        steps, exact.distance, linewidth=1, label=name, color=line.get_color()
    )
    half = sketched.distance_half * sketched.distance
    right.fill_between(
        steps,
        sketched.distance - half,
        sketched.distance + half,
        alpha=0.25,
        color=line.get_color(),
    )
left.set(xlabel="step", ylabel="cosine to the end")
right.set(xlabel="step", ylabel="distance to the end", ylim=(0, None))
right.legend()
fig.alt = "Cosine and distance to the final weights over the steps for AdamW and LPSGDM: exact lines inside the sketches' bands"

for name, (sketched, exact) in seen.items():
    distance = np.abs(sketched.distance[:-1] / exact.distance[:-1] - 1)
    cosine = np.abs(sketched.cosine - exact.cosine)
    gamma = np.abs(sketched.gamma - exact.gamma)[exact.valid]
    print(
        f"{name}: largest error of a distance {100 * distance.max():.1f} %, of a cosine {cosine.max():.3f};"
    )
    print(
        f"  inside their 95 % intervals: {np.mean(distance <= sketched.distance_half):.0%} of the distances, "
        f"{np.mean(cosine <= sketched.cosine_half + 1e-6):.0%} of the cosines, "
        f"{np.mean(gamma <= sketched.gamma_half[exact.valid] * (1 + 1e-6)):.0%} of the γ"
    )

# %% [markdown]
# The errors within one run are correlated, because one sketch makes them all: an interval holds for a single step, not
# for a hundred of them at once. The tests compare the intervals with exact values over two hundred seeds.
#
# A step's γ = (D_t² − D_{t+1}²)/(2η_t(ℓ_t − inf ℓ)) measures something else than its cosine: how much closer the step
# came to the final weights, relative to the loss. If it is negative, the step led away from them: it was too long, or
# in the wrong direction. γ depends on the learning rate, so do not compare it between optimizers.

# %% [markdown]
# Cautions about γ:
#
# - It diverges as the loss approaches its infimum, which is 0 here: steps whose loss is below a thousandth of the first
#   loss are left out, and the minimum over the others is still a single step's value.
# - It is proportional to 1/η: compare it only within an optimizer. The cosine and the straightness do not depend on the
#   learning rate.
# - If the learning rate falls to 0, as here, γ falls with it: the last step's is ‖U‖²/(2η(ℓ − inf ℓ)), where U is the
#   update; it is of the order of η and never negative. So a small positive minimum is that of the last steps.
# - The final weights are where the training stopped, whether or not it had converged.

# %% [markdown]
# ## Do trainings that succeed have regular trajectories?
#
# This section shows [a study that is stored in this repository](../benchmarks/paper-trajectory.md); `python -m
# benchmarks run paper-trajectory` repeats it. A deep, narrow network on Fashion-MNIST, with and without batch norm,
# with and without skip connections, with ReLU or sigmoid, is trained by SGD with momentum and by AdamW: 16 arms, each
# at a learning rate tuned on validation data, with eight seeds.

# %%
from benchmarks.results import collect
from benchmarks.store import Store

study = collect(Store.from_parquet(Path("docs/data/paper-trajectory.parquet")))
runs = [
    (task.name, row.name, run)
    for task in study.tasks.values()
    for row in task.rows
    for run in row.runs
]
optimizers = [arm.name for arm in study.study.arms]

# %% [markdown]
# Every point is a training; successful ones are on the left.

# %%
COLOURS = {
    "batch norm and skips": "tab:blue",
    "batch norm": "tab:orange",
    "skips": "tab:green",
    "neither": "tab:red",
}
MARKERS = {"relu": "o", "sigmoid": "^"}
MEASURES = {
    "median cosine": "median cosine",
    "straightness": "straightness",
    "negative γ": "share of γ < 0",
}


def aids(task):
    kinds = [
        label
        for part, label in (("bn", "batch norm"), ("skip", "skips"))
        if part in task.split("-")
    ]
    return " and ".join(kinds) or "neither"


fig, axes = plt.subplots(
    len(MEASURES),
    len(optimizers),
    figsize=(8, 6.4),
    sharex=True,
    sharey="row",
    layout="constrained",
)
for row, (measure, label) in zip(axes, MEASURES.items(), strict=True):
    for ax, optimizer in zip(row, optimizers, strict=True):
        for task, arm, run in runs:
            if arm == optimizer:
                ax.plot(
                    run.curve[-1].train_loss,
                    run.measures[measure],
                    MARKERS[task.split("-")[-1]],
                    color=COLOURS[aids(task)],
                    markersize=4,
                )
        ax.set(xscale="log")
        ax.set_xticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
        ax.minorticks_off()
        if ax in axes[0]:
            ax.set_title(optimizer, fontsize=9)
        if ax in axes[-1]:
            ax.set(xlabel="final training loss")
    row[0].set(ylabel=label)
handles = [
    plt.Line2D([], [], marker="o", linestyle="", color=colour, label=name)
    for name, colour in COLOURS.items()
]
handles += [
    plt.Line2D([], [], marker=m, linestyle="", color="gray", label=a)
    for a, m in MARKERS.items()
]
fig.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
fig.alt = "Median cosine, straightness and share of negative γ against the final training loss, of eight networks under SGD and AdamW, eight seeds each"

# %% [markdown]
# For each optimizer, the table compares trainings that succeeded, which here means at least 80 % test accuracy, with
# those that did not.

# %%
print(
    f"{'':10} {'runs':>10} {'share of γ < 0':>17} {'median cosine':>15} {'straightness':>15}"
)
print(f"{'':10}   good  bad" + 3 * "      good    bad")
for optimizer in optimizers:
    kinds = [
        [
            run
            for _, arm, run in runs
            if arm == optimizer and (run.test_score >= 0.8) == good
        ]
        for good in (True, False)
    ]
    line = f"{optimizer:10} {len(kinds[0]):6} {len(kinds[1]):4}"
    for measure in ("negative γ", "median cosine", "straightness"):
        means = [np.mean([run.measures[measure] for run in kind]) for kind in kinds]
        line += f"{means[0]:10.3f} {means[1]:6.3f}"
    print(line)
failed = {task for task, _, run in runs if run.test_score < 0.8}
print(f"\nnetworks that failed at least once: {', '.join(sorted(failed))}")

# %% [markdown]
# The failed trainings differ in the sign of γ: more of their steps lead away from the final weights. All are of
# networks with neither batch norm nor skips. In successful trainings γ is almost always positive.
#
# Under SGD, the steps of successful trainings point more towards the final weights. Under AdamW they do not: there the
# failed trainings, with sigmoid, have the highest cosines and the straightest paths. [The study's
# page](../benchmarks/paper-trajectory.md) has the differences with their intervals.
#
# The networks and the data of the paper are larger than these. Here, a straight trajectory by itself does not indicate
# a successful training.

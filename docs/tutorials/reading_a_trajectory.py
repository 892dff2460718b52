# %% [markdown]
# # Reading a trajectory
#
# Did the steps of a training point to its final weights? How much longer was the path than the distance?
# [arXiv:2011.06702](https://arxiv.org/abs/2011.06702) finds that in successful trainings they do, and calls such a
# trajectory regular. [`TrajectoryMonitor`][normopt.TrajectoryMonitor] measures both for any optimizer, in one training,
# without keeping every weight. This page shows how to use it, how exact its sketches are, and whether the finding holds
# for hundreds of small networks.
# [`GeometryMonitor`][normopt.GeometryMonitor] measures single steps: see [Can the gradient choose p?](adaptive_p.md)

# %%
import json
import os
import tempfile
from pathlib import Path
from statistics import median

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
# The monitor uses the hooks of the optimizer's steps; the loop only adds `record(loss)`, once a step. Here each
# optimizer is watched twice: by sketches, which is the default, and exactly, with every iterate on disk. Neither
# changes a bit of what the optimizer does.

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
# [`plot`][normopt.Trajectory.plot] draws what there is; the shades are 95 % intervals. The last cosines are high in
# any training: the last step ends at the end, so its cosine is 1.

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
# The errors of one run go together, because one sketch makes them all: an interval holds for a step, not for a
# hundred of them at once. The tests hold the intervals against exact values over two hundred seeds.
#
# A step's γ = (D_t² − D_{t+1}²)/(2η_t(ℓ_t − inf ℓ)) is something else than its cosine: how much nearer to the final
# weights the step came, relative to the loss. Where it is negative the step led away: it was too long, or in the
# wrong direction. γ depends on the learning rate, so do not compare it between two optimizers.

# %% [markdown]
# ## Do trainings that succeed have regular trajectories?
#
# What follows draws a measurement that is kept in this repository; `python -m benchmarks regularity` makes it anew.
# A network of eight hidden layers on the digits, with and without batch norm, with and without skip connections, with
# three activations, is trained by five optimizers: 60 arms, each at the learning rate that was best on validation data
# in a grid of five, with three seeds, every iterate kept.

# %%
measured = json.loads(Path("docs/data/regularity.json").read_text(encoding="utf-8"))
print(*(f"Beware: {trap}\n" for trap in measured["traps"]), sep="\n")


def middle(point, name):
    """The median over the seeds that did not diverge; None if all did."""
    values = [run[name] for run in point["runs"] if run[name] is not None]
    return median(values) if values else None


points = [p for p in measured["points"] if middle(p, "train_loss") is not None]
optimizers = list(dict.fromkeys(p["cell"]["optimizer"] for p in points))

# %% [markdown]
# Every point is a network under its optimizer, the median of three seeds; those that trained stand to the left.

# %%
COLOURS = {
    (True, True): "tab:blue",
    (True, False): "tab:orange",
    (False, True): "tab:green",
    (False, False): "tab:red",
}
NAMES = {
    (True, True): "batch norm and skips",
    (True, False): "batch norm",
    (False, True): "skips",
    (False, False): "neither",
}
MARKERS = {"relu": "o", "tanh": "s", "sigmoid": "^"}
MEASURES = {
    "median_cosine": "median cosine",
    "straightness": "straightness",
    "negative_gamma": "share of γ < 0",
}
fig, axes = plt.subplots(
    len(MEASURES),
    len(optimizers),
    figsize=(9.5, 6.4),
    sharex=True,
    sharey="row",
    layout="constrained",
)
for row, (measure, label) in zip(axes, MEASURES.items(), strict=True):
    for ax, optimizer in zip(row, optimizers, strict=True):
        for p in points:
            cell = p["cell"]
            if cell["optimizer"] == optimizer:
                ax.plot(
                    middle(p, "train_loss"),
                    middle(p, measure),
                    MARKERS[cell["activation"]],
                    color=COLOURS[cell["batch_norm"], cell["skip"]],
                    markersize=5,
                )
        ax.set(xscale="log")
        if ax in axes[0]:
            ax.set_title(optimizer, fontsize=9)
        if ax in axes[-1]:
            ax.set(xlabel="final training loss")
    row[0].set(ylabel=label)
handles = [
    plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[k], label=NAMES[k])
    for k in COLOURS
]
handles += [
    plt.Line2D([], [], marker=m, linestyle="", color="gray", label=a)
    for a, m in MARKERS.items()
]
fig.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
fig.alt = "Median cosine, straightness and share of negative γ against the final training loss, of twelve networks under each of five optimizers"

# %% [markdown]
# Each optimizer with two kinds of trainings: those that succeeded, which here means 90 % of the test images right, and
# those that did not.


# %%
def runs(optimizer, trained):
    return [
        run
        for p in points
        if p["cell"]["optimizer"] == optimizer
        for run in p["runs"]
        if run["train_loss"] is not None
        and (run["test_accuracy"] >= 0.9) == trained
    ]


print(
    f"{'':18} {'runs':>10} {'share of γ < 0':>17} {'median cosine':>15} {'straightness':>15}"
)
print(f"{'':18}   good  bad" + 3 * "      good    bad")
shares, cosines, every = [], [], []
for optimizer in optimizers:
    kinds = [runs(optimizer, trained) for trained in (True, False)]
    every += kinds[0] + kinds[1]
    line = f"{optimizer:18} {len(kinds[0]):6} {len(kinds[1]):4}"
    for measure in ("negative_gamma", "median_cosine", "straightness"):
        means = [np.mean([run[measure] for run in kind]) for kind in kinds]
        line += f"{means[0]:10.3f} {means[1]:6.3f}"
        {"negative_gamma": shares, "median_cosine": cosines}.get(
            measure, []
        ).append(means)
    print(line)

print(f"\n{'rank correlation with the final training loss':46} {'ρ':>6} {'p':>8}")
for c in measured["correlations"]:
    label = {**MEASURES, "min_gamma": "min γ"}[c["measure"]]
    print(
        f"{c['optimizer'] + ': ' + label:46} {c['rho']:+6.2f} {c['p_value']:8.2g}"
    )


def holds(claim: str, true: bool) -> None:
    print(f"{'holds' if true else 'does not hold'}: {claim}")


print()
holds(
    "under every optimizer, steps with γ < 0 are more frequent in trainings that failed",
    all(failed > trained for trained, failed in shares),
)
holds(
    "under every optimizer, steps point more to the end in trainings that succeeded",
    all(trained > failed for trained, failed in cosines),
)
positive = [run for run in every if run["min_gamma"] > 0]
last = measured["setting"]["steps"] - 10
late = [run for run in positive if run["min_gamma_step"] >= last]
print(
    f"the minimum of γ is positive in {len(positive)} of {len(every)} runs, and lies in the last ten steps in {len(late)} of them"
)

# %% [markdown]
# So the finding holds here in its weaker form. What sets the failed trainings apart is the sign of γ: more of their
# steps lead away from where they end. All of them are networks with neither batch norm nor skips. Among trainings that
# succeed, γ is positive almost throughout, except under the optimizers without momentum, SGD and signSGD. Its minimum
# is then one of the last steps', where the learning rate goes to 0, and it ranks the networks by the loss that
# it is divided by.
#
# In its stronger form, that steps point more to the end the better a training does, it does not hold. The optimizer
# decides more about the cosine than the network does, for steps that are averages point more the same way than single
# gradients or their signs. And networks that never leave the loss of a guess, 2.3, have some of the highest cosines.
#
# The networks and the data of the paper are larger than these: two hundred steps on 1,078 images say nothing about
# those. They say that a straight trajectory, by itself, is no sign of a training that succeeds.

# %% [markdown]
# # AdamW under another norm
#
# AdamW is steepest descent under ℓ2 in adaptive coordinates: every axis is scaled by the square root of P = diag(√v̂ +
# ε), where v̂ averages the squared gradients. Any other norm can be used in these coordinates, as ‖P^½x‖. A step then
# divides the momentum by P^½, applies the norm's dual map, and divides by P^½ again. So each norm gives a variant of
# AdamW with the same state, which this page calls a twin. [The theory](../theory/adaptive-coordinates.md) has the
# formulas.
#
# This page builds AdamW, then its ℓp twins, and shows the result of a study of two tasks: no norm is shown to be better
# than AdamW's.

# %%
import json
import os
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"
STEPS = 10 if FAST else 200

pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digit)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200], y[1200:]


def train(make):
    """Batches of 64 under a cosine learning rate; the model, and the training loss of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    opt = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (64,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


# %% [markdown]
# ## AdamW is the ℓ2 member
#
# [`AdamW`][normopt.AdamW] is a norm, its coordinates and a momentum. It ends at the same weights as torch's, up to
# rounding:

# %%
ours, _ = train(lambda ps: normopt.AdamW(ps, lr=3e-3))
theirs, _ = train(lambda ps: torch.optim.AdamW(ps, lr=3e-3))
far = max(
    (a - b).abs().max().item()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
)
print(f"largest difference of a weight after {STEPS} steps: {far:.0e}")

# %% [markdown]
# ## The twins
#
# [`SteepestDescent`][normopt.SteepestDescent] takes the same settings with any norm. With c the momentum and r = 1/(p −
# 1), the direction under ℓp is, up to its length,
#
# ```text
# u = sign(c)·|c|^r / v^((1+r)/4)
# ```
#
# | p | r | u | |
# |:--|:--|:--|:--|
# | 1.5 | 2 | sign(c)·c²/v^¾ | favours the entries whose gradients agree |
# | 2 | 1 | c/√v | AdamW |
# | 3 | ½ | sign(c)·√\|c\|/v^⅜ | |
# | ∞ | 0 | sign(c)/v^¼ | every sign counts; not Signum, which has no v |
#
# If all gradients of one entry are multiplied by a, its step is multiplied by a^((r−1)/2). So only at p = 2 does the
# step not depend on the size of an entry's gradients: for p > 2 entries with small gradients make longer steps, for p <
# 2 shorter ones.
#
# `scale="matched"` gives the step AdamW's length in every tensor, whatever p is. So AdamW's learning rate is a good
# start, and only the direction differs.

# %%
adamw = dict(
    momentum=0.9,
    momentum_rule="ema",
    bias_correction=True,
    metric="diagonal",
    weight_decay=0.01,
)

runs = {}
for p in (1.5, 2.0, 4.0, float("inf")):
    twin = dict(norm="lp", p=p, scale="matched")
    model, losses = train(
        lambda ps, twin=twin: normopt.SteepestDescent(ps, lr=3e-3, **adamw, **twin)
    )
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"p = {p:<4g} test accuracy {100 * right:.1f} %")
    runs[p] = losses

fig, ax = plt.subplots(figsize=(7, 3))
for p, losses in runs.items():
    name = f"p = {p:g}".replace("inf", "∞")
    smooth = [
        sum(losses[max(0, i - 9) : i + 1]) / min(i + 1, 10)
        for i in range(len(losses))
    ]
    ax.plot(smooth, label=name, linewidth=1)
ax.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
ax.legend()
fig.alt = "Training loss over the steps for four values of p, one seed each at one learning rate"

# %% [markdown]
# One seed and one untuned learning rate show nothing reliable.
#
# ## Is a twin better than AdamW?
#
# The protocol was fixed before the first run. Two tasks: an MLP on the digits, and a byte-level GPT on Python's
# standard library, both small. Every arm has its own tuned learning rate: the lowest validation loss of 12 trials in a
# range of four decades, 8 of them quasi-random and 4 by TPE. Under "matched" the range is AdamW's. Then 10 fresh seeds,
# the same for all arms, are measured on test data. Differences from torch's AdamW are paired by seed, with 95 %
# intervals. P-values are Holm-corrected over the arms of a task. `python -m benchmarks adaptive-norms` repeats the
# study.
#
# Two arms are controls. At p = 2, "matched" is AdamW itself, tuned separately: its difference from AdamW is the luck of
# tuning. "dual" is the scale without matched lengths, where the step depends on the size of the tensor.


# %%
def mean(values):
    return sum(values) / len(values)


def kept(name):
    return json.loads(Path("docs/data", name).read_text(encoding="utf-8"))


def show(study):
    held = {(c["task"], c["by"], c["this"]): c for c in study["comparisons"]}
    width = max(len(arm["arm"]) for arm in study["arms"])
    for task, epochs in study["epochs"].items():
        print(f"{task}: {epochs} epochs, {len(study['seeds'])} seeds")
        print(
            f"{'':{width}}{'lr':>10}{'test loss':>11}{'accuracy':>11}"
            f"{'minus AdamW, points':>25}{'P':>9}"
        )
        for arm in study["arms"]:
            if arm["task"] != task:
                continue
            line = f"{arm['arm']:{width}}{arm['lr']:9g}{'*' if arm['at_edge'] else ' '}"
            line += f"{mean(arm['loss']):11.4f}{100 * mean(arm['score']):9.2f} %"
            if c := held.get((task, "score", arm["arm"])):
                low, middle, high = (100 * c[k] for k in ("low", "mean", "high"))
                said = f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
                p = c["p_value"]
                line += f"{said:>25}{'< 0.001' if p < 0.001 else f'{p:.3f}':>9}"
            print(line)
        print()
    if any(arm["at_edge"] for arm in study["arms"]):
        print("* at an end of the range: a better learning rate may lie beyond\n")
    for task in study["epochs"]:
        for by, sign in (("score", 1), ("loss", -1)):
            family = [c for (t, b, _), c in held.items() if (t, b) == (task, by)]
            sure = [c for c in family if c["p_value"] < 0.05]
            better = [c["this"] for c in sure if sign * c["mean"] > 0]
            worse = [c["this"] for c in sure if sign * c["mean"] < 0]
            print(f"{task}, test {'accuracy' if by == 'score' else by}")
            for how, names in (("better", better), ("worse", worse)):
                said = f"  significantly {how} than AdamW: {'; '.join(names) or 'none'}"
                print(textwrap.fill(said, 84, subsequent_indent=4 * " "))


wide = kept("adaptive_norms.json")
show(wide)

# %% [markdown]
# On the bytes nearly every twin is better than AdamW, but so is the control. ℓ2 "matched" is AdamW with other tuning
# trials: they chose a learning rate of 0.0074 instead of 0.0049, which gains a point of accuracy. So on this task the
# differences in the table are as large as the luck of 12 trials in four decades. The figure shows the trials:

# %%
tasks = list(wide["epochs"])
shown = ["AdamW", "ℓ1.5 matched", "ℓ2 matched", "ℓ4 matched", "ℓ∞ matched"]
fig, axes = plt.subplots(1, len(tasks), figsize=(7.5, 3.2), layout="constrained")
for ax, task in zip(axes, tasks, strict=True):
    for arm in wide["arms"]:
        if arm["task"] == task and arm["arm"] in shown:
            tried = sorted(t for t in arm["tried"] if t[1] is not None)
            ax.plot(*zip(*tried, strict=True), "o-", label=arm["arm"], markersize=3)
    ax.set(xscale="log", xlabel="learning rate", title=task)
axes[0].set(ylabel="validation loss", yscale="log", ylim=(0.06, 3))
axes[1].set(ylim=(2.4, 3.5))
fig.legend(
    *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5
)
fig.alt = "Validation loss of the tuning trials against the learning rate, for AdamW and four twins of its step length"

# %% [markdown]
# ## Again, near the best learning rates
#
# A second study was declared after the first one and before its own first run. It has the twins with the best means,
# each with 8 learning rates evenly spread over the decade that contained the best one, tuned on a separate seed, and 10
# new seeds on test data. ℓ2 "matched" is again the control.
#
# The last two arms were added after the other results were known, and are a separate family of tests. λ acts through
# ηλ, and the learning rate of the "dual" twin is ten to twenty times AdamW's, so at the same λ it decays that much
# more. Therefore each is also run with about the other's ηλ, at its own learning rate.

# %%
near = kept("adaptive_norms_near.json")
show(near)

fig, axes = plt.subplots(
    2, len(tasks), figsize=(7.5, 4.6), sharey=True, layout="constrained"
)
for row, (by, unit) in enumerate((("score", "accuracy, points"), ("loss", "loss"))):
    for ax, task in zip(axes[row], tasks, strict=True):
        cs = [c for c in near["comparisons"] if (c["task"], c["by"]) == (task, by)]
        times = 100 if by == "score" else 1
        for i, c in enumerate(cs):
            ends = [times * c["low"], times * c["high"]]
            ax.plot(ends, [i, i], color="C0", linewidth=2)
            ax.plot(times * c["mean"], i, "o", color="C0", markersize=5)
        ax.axvline(0, color="grey", linewidth=1, linestyle=":")
        ax.set_yticks(range(len(cs)), [c["this"] for c in cs])
        ax.set(xlabel=f"{task}: {unit}")
axes[0, 0].invert_yaxis()
fig.suptitle("minus AdamW, on test data")
fig.alt = "Differences of four twins and of two arms with other decays from AdamW in test accuracy and test loss with 95 % intervals, on both tasks"

# %% [markdown]
# ## Conclusions
#
# No norm is shown to be better than AdamW's.
#
# - In the second study the control agrees with AdamW on both tasks, so the luck of tuning is small there.
# - At AdamW's step length neither ℓ1.5 nor ℓ4 is better. On the bytes ℓ1.5 is worse by 0.6 points, P = 0.024: the first
#   study's result was not reproduced. On the digits ℓ∞ is worse by 1.6 points, in the first study.
# - ℓ1.5 under "dual" is better on the bytes in both studies, by 0.6 points of accuracy in the second, P = 0.028, and
#   has the lower loss on both tasks. More than half of the gain is due to its larger decay: at about AdamW's ηλ the
#   twin is not significantly different from AdamW on either task, and with about the twin's ηλ AdamW itself improves on
#   the bytes, by 0.3 points, P = 0.006.
#
# Two lessons for studies. At the same λ, optimizers with different learning rates decay differently: compare them at
# the same ηλ, or tune both. And a control that is the baseline itself, tuned again, shows how large the luck of tuning
# is.
#
# These are two small tasks, and ten seeds detect only differences of about half a point. Twins that were not in the
# second study, and other tasks, may differ.

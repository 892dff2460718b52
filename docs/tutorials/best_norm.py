# %% [markdown]
# # The best norm over a training
#
# The paper of LPSGD ([arXiv:2606.02078](https://arxiv.org/abs/2606.02078)) starts from a premise: early in a training
# the curvature is anisotropic, which favours a large p; later it is flatter, which favours p → 2. This page tests the
# premise on four small networks. [Which norm fits now?](which_norm_fits.md) shows how to test it on your own.
#
# `python -m benchmarks best-norm` trains each network by AdamW with eight seeds. At seven checkpoints, from the same
# weights and the same gradient, each norm gives its direction:
#
# | norm | direction |
# |:--|:--|
# | ℓp, p from 1 to ∞ | sign(c)·\|c\|^(1/(p−1)), all weights as one vector; the gradient at p = 2, its sign at p = ∞ |
# | spectral | UVᵀ of each matrix, as in Muon |
# | rows | every row of a matrix divided by its length |
# | adaptive | the same in AdamW's coordinates: P^(−½) D(P^(−½) c), P = diag(√v̂ + ε); ℓ2 is then c/(√v̂ + ε) |
#
# A line search finds the largest decrease of the loss along each direction, once on the data of the gradient and once
# on held-out data. So each norm is judged at its best step length, by its direction alone. The gradients are those of
# two mini-batches of the task's batch size, and of one large batch.
#
# Anisotropy is max|λ|/mean|λ| of the Hessian on the large batch ([`hessian_spectrum`][normopt.hessian_spectrum]).

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from scipy.stats import binomtest

root = next(
    p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docs/data").exists()
)
kept = json.loads((root / "docs/data/best_norm.json").read_text(encoding="utf-8"))
norms, tasks = kept["norms"], list(kept["setting"]["plans"])
lp = [i for i, name in enumerate(norms) if name.startswith("ℓ")]
inverse = np.array([0 if norms[i] == "ℓ∞" else 1 / float(norms[i][1:]) for i in lp])
times = kept["setting"]["times"]


def table(task, value):
    """value(checkpoint) of a task [seeds, times]."""
    found = {}
    for c in kept["checkpoints"]:
        if c["task"] == task:
            found.setdefault(c["seed"], []).append(value(c))
    return np.array(list(found.values()))


def decreases(checkpoint, gradient, adaptive, by):
    """The decrease under each norm; 0 where no length decreases the loss."""
    values = np.array(checkpoint[gradient][by])
    return values[len(norms) :] if adaptive else values[: len(norms)]


def best(checkpoint, *kind):
    """1/p of the ℓp norm with the largest decrease; NaN if none decreases the loss."""
    values = decreases(checkpoint, *kind)[lp]
    return inverse[values.argmax()] if values.max() > 0 else np.nan


for task in tasks:
    runs = table(task, lambda c: c["loss"])
    plan = kept["setting"]["plans"][task]
    print(
        f"{task:12} {len(runs)} seeds, {plan['epochs']:2} epochs, loss {np.median(runs[:, 0]):.2f}"
        f" at first and {np.median(runs[:, -1]):.2f} at last; large batch {plan['large']}"
    )
hours = kept["seconds"] / 3600
print(f"{hours:.1f} hours on one core, torch {kept['torch']}")

# %% [markdown]
# ## The best p, beside the anisotropy
#
# Lines are medians over the seeds, bands the range from the first to the third quartile. The vertical axis is linear in
# 1/p, and p grows upwards: the paper's schedule would fall from 6 to 2.


# %%
def draw(adaptive):
    fig, axes = plt.subplots(
        len(tasks), 3, figsize=(8.4, 1.9 * len(tasks)), sharex=True, squeeze=False
    )
    at = np.arange(len(times))
    for row, task in zip(axes, tasks, strict=True):
        lines = [(row[0], "", "C2", table(task, lambda c: c["anisotropy"]))]
        for ax, by in ((row[1], "best"), (row[2], "held")):
            for gradient, colour in (("batch", "C0"), ("large", "C1")):
                kind = (gradient, adaptive, by)
                found = table(task, lambda c, kind=kind: best(c, *kind))
                lines.append((ax, f"{gradient} gradient", colour, found))
        for ax, label, colour, values in lines:
            low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
            ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(at, middle, "o-", color=colour, markersize=3, label=label)
        row[0].set(yscale="log", ylabel=task)
        row[0].yaxis.set_minor_formatter(NullFormatter())
        for ax in row[1:]:
            ax.set_yticks([0, 1 / 6, 1 / 3, 1 / 2, 1], ["∞", "6", "3", "2", "1"])
            ax.set_ylim(1.05, -0.05)
            ax.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    titles = "anisotropy", "best p, same data", "best p, held-out data"
    for ax, last, title in zip(axes[0], axes[-1], titles, strict=True):
        ax.set_title(title, fontsize=10)
        last.set_xticks(at, [f"{100 * t:g}" for t in times])
        last.set_xlabel("part of the training (%)")
    fig.legend(
        *axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=2
    )
    return fig


fig = draw(adaptive=False)
fig.alt = "For each task over the training: anisotropy of the Hessian, best p on the data of the gradient, best p on held-out data; medians and quartiles, for mini-batch and large-batch gradients"

# %% [markdown]
# The same in AdamW's coordinates, where p = 2 is AdamW's own direction without momentum:

# %%
fig = draw(adaptive=True)
fig.alt = "The same in adaptive coordinates"

# %% [markdown]
# ## How much it matters
#
# The figure shows the decrease under each norm divided by that under ℓ2 in the same coordinates, early (up to 10 % of
# the training) and late (from 60 % on), for the large-batch gradient on its own data and for mini-batch gradients on
# held-out data. Points are medians over the seeds of each training's mean. Below the dotted line, a norm is worse than
# ℓ2.


# %%
def relative(task, when, *kind):
    """Median over the seeds of log₂ of the decrease relative to ℓ2's, the mean over the times [norms]."""
    found = np.maximum(table(task, lambda c: decreases(c, *kind)), 0)
    chosen = [i for i, t in enumerate(times) if when(t)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(found / found[..., [norms.index("ℓ2")]])
    ratio = np.clip(np.nan_to_num(ratio, nan=0, posinf=3, neginf=-3), -3, 3)
    return np.median(ratio[:, chosen].mean(axis=1), axis=0)


KINDS = {
    "large gradient, its own data": ("large", False, "best"),
    "batch gradient, held-out data": ("batch", False, "held"),
    "adaptive, large gradient": ("large", True, "best"),
    "adaptive, batch, held-out": ("batch", True, "held"),
}
PERIODS = {
    "early": lambda t: t <= kept["early"],
    "late": lambda t: t >= kept["late"],
}
fig, axes = plt.subplots(
    len(tasks),
    len(KINDS),
    figsize=(9.6, 1.9 * len(tasks)),
    sharex=True,
    sharey=True,
)
for row, task in zip(axes, tasks, strict=True):
    for ax, (title, kind) in zip(row, KINDS.items(), strict=True):
        for (period, when), colour in zip(
            PERIODS.items(), ("C0", "C1"), strict=True
        ):
            values = 2.0 ** relative(task, when, *kind)
            (line,) = ax.plot(
                lp, values[lp], "o-", color=colour, markersize=3, label=period
            )
            rest = [i for i in range(len(norms)) if i not in lp]
            ax.plot(rest, values[rest], "s", color=colour, markersize=4)
        ax.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        ax.set(yscale="log", ylim=(1 / 6, 6))
        ax.set_yticks([1 / 4, 1 / 2, 1, 2, 4], ["¼", "½", "1", "2", "4"])
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(
            range(len(norms)), [n.removeprefix("ℓ") for n in norms], rotation=90
        )
        if task == tasks[0]:
            ax.set_title(title, fontsize=9)
    row[0].set_ylabel(task)
fig.legend(
    *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2
)
fig.alt = "Decrease of the loss under each norm relative to that under ℓ2, early and late, for each task, gradient and kind of coordinates"

# %% [markdown]
# The share of checkpoints, over all tasks, at which each norm is the best:

# %%
print(
    f"{'':30}  period" + "".join(f"{name.removeprefix('ℓ'):>9}" for name in norms)
)
for title, kind in KINDS.items():
    for period, when in PERIODS.items():
        found = [
            decreases(c, *kind) for c in kept["checkpoints"] if when(c["time"])
        ]
        wins = np.bincount(
            [x.argmax() for x in found if x.max() > 0], minlength=len(norms)
        )
        shares = "".join(f"{100 * n / wins.sum():7.0f} %" for n in wins)
        print(f"{title:30}  {period:6}{shares}")

# %% [markdown]
# ## The premise, tested
#
# The premise has four parts, which are tested one by one. Early and late are a training's means over the checkpoints up
# to 10 % and from 60 % of it, with 95 % intervals over the seeds. P is for the change from early to late, by the exact
# paired sign-flip test (the t test with fewer than eight seeds), Holm-corrected over the tasks. Significant means P <
# 0.05.


# %%
def changes(what, gradient="large", adaptive=False, by="best"):
    keys = "what", "gradient", "adaptive", "by"
    wanted = (what, gradient, adaptive, by)
    return [c for c in kept["changes"] if tuple(c[k] for k in keys) == wanted]


def shown(p):
    return f"P = {p:.3f}" if p >= 0.001 else "P < 0.001"


def interval(three, digits):
    mean, low, high = (round(x, digits) + 0.0 for x in three)
    return f"{mean:8.{digits}f} ({low:.{digits}f} to {high:.{digits}f})".ljust(26)


def show(found, sign, unit=lambda x: x, digits=2):
    """Early and late of each task, and whether the change has the sign of the premise's."""
    for c in found:
        early, late = (
            interval([unit(x) for x in c[period]], digits) for period in PERIODS
        )
        verdict = "no significant change"
        if c["p_value"] < 0.05:
            agrees = sign * c["difference"][0] > 0
            verdict = "as the premise has it" if agrees else "the opposite"
        print(f"  {c['task']:12}{early}{late}{shown(c['p_value']):10} {verdict}")


HEAD = f"  {'':12}   {'early':23}   late"
print("1. The anisotropy falls")
print(HEAD)
show(changes("anisotropy"), -1, unit=lambda x: 2**x, digits=0)

print(
    "\n   the trainings in which it is higher at the end than at the start, and than at 3 %"
)
for task in tasks:
    runs = table(task, lambda c: c["anisotropy"])
    line = f"  {task:12}"
    for then in (0.0, 0.03):
        n = (runs[:, -1] > runs[:, times.index(then)]).sum()
        p = binomtest(n, len(runs)).pvalue
        line += f" {n} of {len(runs)} (sign test {shown(p)})  "
    peak = times[int(np.median(runs.argmax(axis=1)))]
    print(f"{line} highest at {100 * peak:g} % (median)")

# %%
print("largest and smallest eigenvalue, medians over the seeds")
print(f"  {'':21}" + "".join(f"{100 * t:7g} %" for t in times))
for task in tasks:
    for end in ("largest", "smallest"):
        middle = np.median(table(task, lambda c, end=end: c[end]), axis=0)
        print(f"  {task:12} {end:8}" + "".join(f"{x:9.2f}" for x in middle))

# %%
print("2. A large p is right early, and p = 2 late:")
print(
    "   the decrease under ℓ6 minus that under ℓ2, in % of the latter (at most 700)"
)
print(HEAD)
for title, kind in KINDS.items():
    print(title)
    show(changes("ℓ6/ℓ2", *kind), -1, unit=lambda x: 100 * (2**x - 1), digits=0)

# %%
print("3. The best p falls: 1/p of the best ℓp rises")
print(HEAD)
for title, kind in KINDS.items():
    print(title)
    show(changes("1/p", *kind), 1)

# %%
print(
    "4. The best p follows the anisotropy: within a training, the rank correlation"
)
print("   of 1/p with the anisotropy is negative")
for title, kind in KINDS.items():
    print(title)
    for c in changes("1/p", *kind):
        _, low, high = c["correlation"]
        verdict = "none shown"
        if low > 0 or high < 0:
            verdict = "as the premise has it" if high < 0 else "the opposite"
        print(f"  {c['task']:12}{interval(c['correlation'], 2)} {verdict}")

# %%
print("In all: as the premise has it, the opposite, none shown")
for part, what, sign in (("2", "ℓ6/ℓ2", -1), ("3", "1/p", 1)):
    found = [c for kind in KINDS.values() for c in changes(what, *kind)]
    sure = [sign * c["difference"][0] for c in found if c["p_value"] < 0.05]
    agree = sum(x > 0 for x in sure)
    print(f"  {part}. {agree:3}{len(sure) - agree:3}{len(found) - len(sure):3}")
low, high = np.array([c["correlation"][1:] for c in found]).T
print(f"  4. {sum(high < 0):3}{sum(low > 0):3}{sum((low <= 0) & (high >= 0)):3}")

# %% [markdown]
# ## Conclusions
#
# - **The anisotropy does not fall from the start.** It is lower at the start than at the end in all trainings. On
#   digits and mnist1d it rises and stays high. On fashion-cnn and bytes it peaks within the first 3 % and then falls,
#   as in the paper's figure, but not to its initial value.
# - **On the data of the gradient, a large p is better throughout.** Late, ℓ6 still decreases the loss more than ℓ2 on
#   three of the four tasks, and on fashion-cnn by more than early. The spectral norm is the best of all.
# - **On held-out data, a large p is better early but not late**, which is what the paper's schedule assumes. With
#   mini-batches, the interval is above 0 on all four tasks early, and on none late. The change itself is significant on
#   digits, and in AdamW's coordinates on digits and bytes; on the other tasks the means change in the same direction.
# - **The best p does not follow the anisotropy**: no rank correlation is shown to be negative, and some are positive.
#
# So the direction of the schedule has some support here, but the reason given for it has none. Noise is another
# possible reason: late in a training, the gradient of a batch says less about other data, and a sign makes full steps
# in coordinates that are pure noise ([arXiv:1802.04434](https://arxiv.org/abs/1802.04434)). This measurement does not
# test that.
#
# Limits: four small networks, trained by AdamW at one learning rate; held-out data of 32 to 360 examples, so late
# ratios have wide intervals; single steps at their best lengths, which a training does not use. [Why p
# anneals](../theory/annealing-p.md) shows what whole trainings gain.

# %% [markdown]
# # The ℓp schedule on digits
#
# [`LPSGDM`][normopt.LPSGDM] with [`CosineP`][normopt.schedules.CosineP] is the method of
# [arXiv:2606.02078](https://arxiv.org/abs/2606.02078): start near signSGD (large p), end as SGD (p = 2). This page
# trains a small network with it on scikit-learn's digits and measures the effect of the schedule.
#
# Three things are easy to get wrong, and each has a section:
#
# - **Constant p is not the paper's method.** You have to add the schedule, and call its `step()`.
# - **The schedule changes two things at once**: the direction of a step and its length. They are separated here.
# - **The best learning rate depends on p.** Comparing two values of p at one learning rate compares step lengths.
#
# Every number and figure below comes from running this page's code when the site was built. The run itself decides
# every line that begins with "holds" or "does not hold".

# %%
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

import normopt

Maker = Callable[[ParamsT, float], Optimizer]

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"
EPOCHS = 2 if FAST else 12
# The first choose the learning rates; the others compare, and choose nothing.
TUNING_SEEDS = [0] if FAST else [0, 1]
SEEDS = [100] if FAST else [100, 101, 102, 103, 104]


def split(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, ...]:
    return train_test_split(x, y, test_size=share, random_state=0, stratify=y)


pixels, digit = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digit)
x, x_test, y, y_test = split(x, y, 0.3)
x, x_val, y, y_val = split(x, y, 0.2)
print(
    f"{len(x)} training, {len(x_val)} validation and {len(x_test)} test images of 8×8 pixels"
)


def holds(claim: str, true: bool) -> None:
    print(f"{'holds' if true else 'does not hold'}: {claim}")


# %% [markdown]
# ## What p does to a gradient
#
# Under `scale="power"`, the paper's, an entry g of the gradient becomes `sign(g)·|g|^(1/(p−1))`. At p = 2 the exponent
# is 1 and the entry does not change; as p grows the exponent tends to 0, and every nonzero entry to ±1. The figure
# shows the gradient of the first layer of an untrained network for four values of p. Each curve is divided by its
# largest entry.


# %%
def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


model = network(0)
nn.functional.cross_entropy(model(x), y).backward()
gradient = model[0].weight.grad


def rms(v: Tensor) -> float:
    return v.square().mean().sqrt().item()


fig, ax = plt.subplots(figsize=(7, 3.2))
print("   p   RMS(u)/RMS(g)   cosine of u and g")
for p in (2.0, 3.0, 8.0, float("inf")):
    u = normopt.norms.Lp(p).power([gradient])[0]
    sizes = u.abs().flatten().sort(descending=True).values
    ax.plot(
        torch.linspace(0, 100, len(sizes)),
        sizes / sizes[0],
        label=f"p = {p:g}".replace("inf", "∞"),
    )
    cosine = torch.cosine_similarity(u.flatten(), gradient.flatten(), dim=0).item()
    print(f"{p:4g}   {rms(u) / rms(gradient):13.1f}   {cosine:17.2f}")
ax.set(xlabel="entries, largest first (%)", ylabel="|u| / max |u|", ylim=(0, 1.05))
fig.legend(loc="outside upper center", ncols=4)
fig.alt = "Sizes of the update's entries, sorted, for four p: the larger p, the flatter the curve"

# %% [markdown]
# Both columns matter. The cosine shows how far the *direction* turns away from the gradient. The ratio shows how much
# *longer* the step is at the same learning rate: a root makes entries far below 1 larger. Exact zeros stay zero at
# every p. They occur here because a weight gets no gradient if its pixel is blank in every image that activates its
# unit.
#
# ## Five ways to train
#
# "Annealed" means from p = 8 to p = 2 with `CosineP`, stepped once per epoch. All five have the same moving-average
# momentum of 0.9.
#
# | name | direction of a step | length of a step |
# |---|---|---|
# | SGD | p = 2 | of p = 2 |
# | constant p | p = 8 | of p = 8 |
# | LPSGDM | annealed | of the annealed p |
# | matched | annealed | of p = 2 |
# | twin | p = 2 | of the annealed p |
#
# "Matched" is `scale="matched"`, normopt's control: each tensor's direction is that of p, its length that of SGD's own
# step. "Twin" is the opposite control: SGD's direction at the length of the power map's step. It is SGD with a learning
# rate that decays, separately for each tensor. normopt has no such optimizer, so we write it as a custom norm.
# Mathematically it is not a norm (its "dual map" does not have unit norm), but the engine runs it, and `CosineP`
# schedules its p.


# %%
@normopt.norms.register("twin")
@dataclass(frozen=True)
class Twin(normopt.norms.TensorNorm):
    p: float

    def dual_norm(self, x: Tensor) -> Tensor:
        return normopt.norms.Lp(self.p).dual_norm(x)

    def dual_map(self, x: Tensor) -> Tensor:
        u = normopt.norms.Lp(self.p).power([x])[0]
        return x * (u.norm() / x.norm().clamp(min=1e-30))


def twin(params: ParamsT, lr: float) -> Optimizer:
    rule = {"momentum": 0.9, "momentum_rule": "ema", "scale": "unit"}
    return normopt.SteepestDescent(params, lr, norm="twin", p=8.0, **rule)


def lpsgdm(p: float, **settings: Any) -> Maker:
    return lambda params, lr: normopt.LPSGDM(params, lr, p=p, **settings)


SHORT, LONG = [0.001, 0.003, 0.01, 0.03, 0.1], [0.1, 0.3, 1.0, 3.0, 10.0]
ARMS = {  # name: what makes the optimizer, is p annealed, learning rates to try
    "SGD": (lpsgdm(2.0), False, LONG),
    "constant p": (lpsgdm(8.0), False, SHORT),
    "LPSGDM": (lpsgdm(8.0), True, SHORT),
    "matched": (lpsgdm(8.0, scale="matched"), True, LONG),
    "twin": (twin, True, SHORT),
}


@dataclass
class Run:
    model: nn.Module
    train_loss: list[float]  # mean over each epoch
    moved: list[float]  # RMS of the weights' change in each epoch's last step
    val_loss: float
    test_accuracy: float


def train(make: Maker, annealed: bool, lr: float, seed: int) -> Run:
    model, shuffle = network(seed), torch.Generator().manual_seed(seed)
    opt = make(model.parameters(), lr)
    schedule = (
        normopt.schedules.CosineP(opt, total_steps=EPOCHS) if annealed else None
    )
    losses, moved = [], []
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(x), generator=shuffle).split(64):
            before = model[0].weight.detach().clone()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item() * len(batch) / len(x)
        losses.append(total)
        moved.append(rms(model[0].weight.detach() - before))
        if schedule is not None:
            schedule.step()
    with torch.no_grad():
        val_loss = nn.functional.cross_entropy(model(x_val), y_val).item()
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return Run(model, losses, moved, val_loss, accuracy)


# %% [markdown]
# ## Tune each learning rate
#
# Every arm has its own learning rate: the one with the lowest validation loss, on seeds that are not used again.

# %%
chosen = {}
fig, ax = plt.subplots(figsize=(7, 3.2))
for name, (make, annealed, rates) in ARMS.items():
    tried = [
        [train(make, annealed, lr, s).val_loss for s in TUNING_SEEDS]
        for lr in rates
    ]
    losses = [sum(of_rate) / len(of_rate) for of_rate in tried]
    best = min(range(len(rates)), key=lambda i: losses[i])
    chosen[name] = rates[best]
    ax.plot(rates, losses, "o-", label=name)
    edge = "" if 0 < best < len(rates) - 1 else "  (at the edge of what was tried)"
    print(f"{name:12} learning rate {rates[best]:g}{edge}")
ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss")
fig.legend(loc="outside upper center", ncols=5)
fig.alt = "Validation loss against learning rate for the five ways to train"
ratio = chosen["SGD"] / chosen["LPSGDM"]
print(f"SGD's best learning rate is {ratio:.0f} times that of LPSGDM")
holds(
    "the learning rate that is best for one is not the best for the other",
    ratio != 1,
)

# %% [markdown]
# ## The effect of the schedule
#
# The same five arms, each at its own learning rate, on fresh seeds. Left: the training loss (mean over the seeds, their
# range shaded). Right: how far the first layer's weights moved in the last step of each epoch.

# %%
runs = {}
for name, (make, annealed, _) in ARMS.items():
    runs[name] = [train(make, annealed, chosen[name], s) for s in SEEDS]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
epochs = range(1, EPOCHS + 1)
print("               final training loss       test accuracy (%)")
print("               mean  (range)             mean  (range)")
for name, rs in runs.items():
    loss = torch.tensor([r.train_loss for r in rs])
    line = left.plot(epochs, loss.mean(0), label=name)[0]
    left.fill_between(
        epochs,
        loss.min(0).values,
        loss.max(0).values,
        alpha=0.15,
        color=line.get_color(),
    )
    right.plot(
        epochs, torch.tensor([r.moved for r in rs]).mean(0), color=line.get_color()
    )
    end, accuracy = loss[:, -1], 100 * torch.tensor([r.test_accuracy for r in rs])
    print(
        f"{name:12}   {end.mean():.4f} ({end.min():.4f}–{end.max():.4f})   "
        f"{accuracy.mean():6.2f} ({accuracy.min():.2f}–{accuracy.max():.2f})"
    )
left.set(xlabel="epoch", ylabel="training loss", yscale="log")
right.set(xlabel="epoch", ylabel="RMS of the weights' change", yscale="log")
fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5)
fig.alt = "Training loss and length of the steps over the epochs for the five ways to train"

# %% [markdown]
# Are the differences significant? Runs of one seed start from the same weights and see the same batches, so they are
# compared in pairs. Here a difference counts only if every seed agrees on its sign. With five seeds that is a coarse
# test, and among many such lines a few agree by chance.


# %%
def paired(a: str, b: str, value: Callable[[Run], float]) -> list[float]:
    return [value(ra) - value(rb) for ra, rb in zip(runs[a], runs[b], strict=True)]


def final_loss(run: Run) -> float:
    return run.train_loss[-1]


def percent_right(run: Run) -> float:
    return 100 * run.test_accuracy


print("                       training loss               test accuracy (%)")
for a, b in [
    ("LPSGDM", "constant p"),
    ("LPSGDM", "SGD"),
    ("matched", "SGD"),
    ("LPSGDM", "twin"),
    ("twin", "SGD"),
    ("LPSGDM", "matched"),
]:
    row = f"{a + ' − ' + b:20}"
    for value, form in ((final_loss, "+.4f"), (percent_right, "+.2f")):
        d = paired(a, b, value)
        agree = all(v > 0 for v in d) or all(v < 0 for v in d)
        row += f"   {sum(d) / len(d):{form}} {'(all agree)' if agree else '(seeds disagree)':16}"
    print(row)

print()
for name, rs in runs.items():
    shorter = sum(r.moved[0] / r.moved[-1] for r in rs) / len(rs)
    print(f"{name:12} the first epoch's step is {shorter:.0f} times the last one's")

# %% [markdown]
# How to read this:
#
# - LPSGDM − constant p is the usual ablation. It attributes everything that changes to the schedule, including the
#   shrinking steps.
# - matched − SGD is the annealed *direction* alone, at SGD's step length; LPSGDM − twin is the same direction at the
#   annealed length. Only if these two agree is there evidence for the direction itself.
# - twin − SGD is the annealed *length* alone, in SGD's direction; LPSGDM − matched is that length in the annealed
#   direction.
#
# What this run says:

# %%
direction = {
    "SGD's": paired("matched", "SGD", final_loss),
    "the annealed": paired("LPSGDM", "twin", final_loss),
}
better = {length: all(v < 0 for v in d) for length, d in direction.items()}
for length, on_every_seed in better.items():
    holds(
        f"at {length} length, the direction lowered every seed's loss",
        on_every_seed,
    )
holds(
    "the two agree: evidence that the direction itself helps", all(better.values())
)
gain = paired("LPSGDM", "SGD", percent_right)
holds("LPSGDM's test accuracy beat SGD's on every seed", all(v > 0 for v in gain))

# %% [markdown]
# The limits of this page: digits is a small and easy data set; there is one network, one initial p and one number of
# epochs; the learning rates come from a coarse grid and two seeds. With 15 and with 20 epochs instead of 12, the same
# four verdicts came out. The page shows how to make the comparison. It says nothing about the paper's results on CIFAR
# and ImageNet.
#
# ## Adding ℓp decay, and reading the sparsity
#
# ℓp weight decay ([arXiv:2404.10824](https://arxiv.org/abs/2404.10824)) is a setting of every optimizer: `decay="lp"`
# with `decay_p` below 2 drives small weights to zero. As the authors do, we count a weight as zero if `|w| < 1e-13`,
# without pruning, in tensors of at least 2 dims (biases are not ℓp-decayed).


# %%
def sparsity(model: nn.Module) -> float:
    weights = [p.detach() for p in model.parameters() if p.dim() >= 2]
    return sum(int((w.abs() < 1e-13).sum()) for w in weights) / sum(
        w.numel() for w in weights
    )


def with_decay(strength: float) -> Maker:
    decay = dict(weight_decay=strength, decay="lp", decay_p=0.8) if strength else {}
    return lpsgdm(8.0, **decay)


print(
    "weight decay   zeros (%)   training loss   test accuracy (%)   (means over the seeds)"
)
strengths, zeros, accuracies = (
    ([0.0, 0.1] if FAST else [0.0, 0.01, 0.03, 0.06, 0.1]),
    [],
    [],
)
for strength in strengths:
    rs = [train(with_decay(strength), True, chosen["LPSGDM"], s) for s in SEEDS]
    zeros.append(100 * sum(sparsity(r.model) for r in rs) / len(rs))
    accuracies.append(100 * sum(r.test_accuracy for r in rs) / len(rs))
    loss = sum(r.train_loss[-1] for r in rs) / len(rs)
    print(
        f"{strength:12g}   {zeros[-1]:9.1f}   {loss:13.4f}   {accuracies[-1]:17.2f}"
    )

fig, ax = plt.subplots(figsize=(7, 3.2))
ax.plot(zeros, accuracies, "o-")
for z, a, s in zip(zeros, accuracies, strengths, strict=True):
    ax.annotate(
        f"λ = {s:g}", (z, a), textcoords="offset points", xytext=(0, 7), ha="center"
    )
ax.margins(y=0.2)
ax.set(xlabel="weights that are zero (%)", ylabel="test accuracy (%)")
fig.alt = (
    "Test accuracy against the share of zero weights for each strength of the decay"
)
holds("without decay no weight became zero", zeros[0] == 0)
holds(
    "the share of zeros grew with every increase of the decay",
    sorted(set(zeros)) == zeros,
)

# %% [markdown]
# Zero is absorbing under this decay: a weight that *starts* at zero never trains, and normopt warns about a tensor that
# is all zero.

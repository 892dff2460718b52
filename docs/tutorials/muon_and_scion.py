# %% [markdown]
# # Muon and Scion on a byte-level GPT
#
# [Muon](../optimizers/muon.md) and [Scion](../optimizers/scion.md) take the same kind of step in the hidden layers of a
# transformer: each replaces the momentum matrix UΣVᵀ by UVᵀ, all of whose singular values are 1. They differ in
# everything else: the embedding, the output layer and the biases, the length of each layer's step, the momentum, and
# the purpose of the weight decay. This page trains a small GPT with both, and with AdamW, and measures the differences
# in the weights.
#
# The text is the source code of Python's standard library, which every machine with Python has. The model reads 64
# bytes and predicts the next one at every position.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import normopt
from benchmarks.tasks.bytes import GPT, Bytes  # in a clone of the repository

torch.set_num_threads(1)
# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

data = Bytes().load()
(x, y), (x_val, y_val) = data.train, data.validation
print(f"{x.numel():,} bytes to train on, in windows of {x.shape[1]}")
print(bytes(x[1000].tolist()).decode(errors="replace"))

# %% [markdown]
# ## Two ways to divide a model
#
# Both methods orthogonalise matrices that are linear maps. An embedding is a table, an output layer's rows give scores,
# a bias is a vector: these need another rule, and each method has its own. [`param_groups`][normopt.param_groups]
# applies it.

# %%
for preset in ("muon", "scion"):
    print(normopt.param_groups(GPT(), preset), "\n")

# %% [markdown]
# **Muon** updates only the hidden matrices and leaves the rest to another optimizer: AdamW in its author's code, sign
# steps with this preset, because among steepest-descent steps signs are closest to Adam. The radius 0.1 of these groups
# was measured ([Where 0.1 and 0.4 come from](../how-to/param-groups.md#where-01-and-04-come-from)); one `lr` serves
# both.
#
# **Scion** gives *every* layer a norm that fits its input and output. For the embedding, whose input is one-hot, it is
# the largest RMS of an embedding vector. For hidden layers it is the largest gain from RMS to RMS, whose unit steps are
# UVᵀ times √(out/in). For the output layer it is the largest entry. The radii 50 and 3000 are its paper's for a GPT
# ([arXiv:2502.07529](https://arxiv.org/abs/2502.07529)).
#
# ## What the defaults say
#
# Momentum has two conventions. In normopt μ is always the weight of the *old* momentum; Scion's paper writes α = 1 − μ.
# The learning rates look very different only because Scion's are multiplied by its radii.

# %%
MAKE = {
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr),
    "Muon": lambda model, lr: normopt.Muon(normopt.param_groups(model, "muon"), lr),
    "Scion": lambda model, lr: normopt.Scion(
        normopt.param_groups(model, "scion"), lr
    ),
}
print(f"{'':6} {'lr':>9} {'momentum':>9} {'nesterov':>9} {'weight decay':>13}")
for name in ("Muon", "Scion"):
    groups = normopt.param_groups(GPT(), name.lower())
    opt = getattr(normopt, name)(groups)
    group = next(g for g in opt.param_groups if g["kind"] == "linear")
    print(
        f"{name:6} {group['lr']:9.2g} {group['momentum']:9} "
        f"{group['nesterov']!s:>9} {group['weight_decay']:13}"
    )
    reach = group["lr"] * group["radius"]
    print(f"{'':6} lr × radius of a hidden layer: {reach:.3g}")

# %% [markdown]
# ## Train
#
# Each optimizer has one run, at the learning rate that the tuning of the [committed study](../results.md) chose for
# this task and number of steps; it falls to 0 along half a cosine. For a comparison see the study, which has twelve
# seeds, intervals and tests; single runs like these only show what happens inside.

# %%
from benchmarks.results import collect
from benchmarks.store import Store

study = collect(Store.from_parquet(Path("docs/data/standard.parquet")))
of_bytes = study.tasks["bytes"]
LR = {name: of_bytes.row(name).lr for name in MAKE}
STEPS, BATCH = (8, 4) if FAST else (400, 16)


@torch.no_grad()
def accuracy(model):
    """Of the next byte, on the validation data: files not trained on."""
    return (model(x_val).argmax(-1) == y_val).float().mean().item()


def hidden(model):
    """The matrices that both methods orthogonalise."""
    return {n: w for n, w in model.blocks.named_parameters() if w.dim() == 2}


def train(name):
    torch.manual_seed(0)
    model = GPT()
    opt = MAKE[name](model, LR[name])
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    losses, step_of = [], {}
    for step in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        opt.zero_grad()
        logits = model(x[rows])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y[rows].flatten())
        loss.backward()
        middle = step == STEPS // 2
        if middle:
            before = {n: w.detach().clone() for n, w in hidden(model).items()}
            lr = opt.param_groups[0]["lr"]
        opt.step()
        if middle:  # what this step did to each matrix, per unit of lr
            step_of = {
                n: (before[n] - w.detach()) / lr for n, w in hidden(model).items()
            }
        fall.step()
        losses.append(loss.item())
    return model, opt, losses, step_of


fig, ax = plt.subplots(figsize=(7, 3.2))
trained = {}
for name in MAKE:
    model, opt, losses, step_of = trained[name] = train(name)
    smooth = torch.tensor(losses).unfold(0, min(20, STEPS), 1).mean(-1)
    ax.plot(range(len(losses) - len(smooth), len(losses)), smooth, label=name)
    print(f"{name:6} lr {LR[name]:.2g}   next byte {100 * accuracy(model):.1f} %")
ax.set(xlabel="steps", ylabel="training loss, mean of 20 batches")
fig.legend(loc="outside upper center", ncols=3)
fig.alt = "Training loss of the GPT under AdamW, Muon and Scion against steps"

# %% [markdown]
# ## What a step looks like
#
# Halfway through, each run recorded how one step changed the hidden matrices. The singular values of this change show
# in how many directions a step moves: Muon's and Scion's form a plateau, so their steps move in all directions, while
# AdamW's fall off. The plateau is not quite flat, because five Newton–Schulz iterations leave singular values between
# 0.68 and 1.21, and those below 1.5·10⁻³ of the Frobenius norm lower still; with `method="svd"` it is flat.

# %%
fig, ax = plt.subplots(figsize=(7, 3.2))
for name, (_, _, _, step_of) in trained.items():
    values = torch.linalg.svdvals(step_of["0.up.weight"])
    ax.plot(range(1, len(values) + 1), values / values.median(), label=name)
ax.set(xlabel="singular value, from the largest", ylabel="size / median")
ax.set(yscale="log")
ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
ax.minorticks_off()
fig.legend(loc="outside upper center", ncols=3)
fig.alt = (
    "Singular values of one step of a feed-forward matrix: "
    "a plateau for Muon and Scion, a slope for AdamW"
)

print("largest singular value of a step over their root mean square")
for name, (_, _, _, step_of) in trained.items():
    ratios = []
    for change in step_of.values():
        values = torch.linalg.svdvals(change)
        ratios.append((values[0] / values.square().mean().sqrt()).item())
    low, high = min(ratios), max(ratios)
    print(f"{name:6} {low:.2f} to {high:.2f} over {len(ratios)} matrices")

# %% [markdown]
# Another measure needs no copy of the weights: [`norm_pairs`][normopt.SteepestDescent.norm_pairs] has, for every group,
# the update's norm and the dual norm of the momentum, as the last step computed them. The dual norm times the radius is
# the decrease of the loss for one unit of `lr`, if the momentum were the gradient and the loss linear: it shows which
# layers can still reduce the loss. torch's AdamW does not report it.

# %%
for name in ("Muon", "Scion"):
    opt = trained[name][1]
    pairs = opt.norm_pairs()
    gains = [
        group["radius"] * pair.dual.item() if pair else None
        for group, pair in zip(opt.param_groups, pairs, strict=True)
    ]
    print(name)
    for group, gain in zip(opt.param_groups, gains, strict=True):
        said = "not measured: signs need no norm" if gain is None else f"{gain:.3g}"
        print(f"  {group['kind']:10} {said}")

# %% [markdown]
# ## What the decay is for
#
# Muon's weight decay is 0 by default here. Scion's is 1 and is part of the method: with λ = 1 a step, `w ← (1 − η)w −
# η·r·D(m)`, is a weighted mean of the old weights and a point of norm r. So a layer that starts inside the ball of
# radius r stays inside (up to about 1.2r, because Newton–Schulz's D(m) can have that norm), without any clipping. The
# part of the radius that a layer uses shows whether the constraint was active: in a layer far inside the ball, λ acted
# as an ordinary weight decay.


# %%
def ball(w, radius):
    """RMS → RMS norm of a matrix, as a part of the radius."""
    rows, columns = w.shape
    norm = torch.linalg.matrix_norm(w.detach(), 2) / (rows / columns) ** 0.5
    return norm.item() / radius


fresh = hidden(GPT())
names = "".join(f"{name:>9}" for name in MAKE)
print(f"{'part of the ball':18} {'at the start':>13}{names}")
for weight in fresh:
    row = [ball(hidden(trained[name][0])[weight], 50) for name in MAKE]
    print(
        f"{weight:18} {ball(fresh[weight], 50):13.3f}"
        + "".join(f"{v:9.3f}" for v in row)
    )
largest = max(ball(w, 50) for w in hidden(trained["Scion"][0]).values())
print(f"\nScion's layers use up to {100 * largest:.0f} % of their balls' radius")

# %% [markdown]
# ## What it writes
#
# The model reads the last 64 bytes and the next byte is sampled at temperature 0.7. After a few hundred steps of a
# small model the output is not valid Python, but it shows how much of Python's layout the model has learned.


# %%
@torch.no_grad()
def write(model, prompt, count, temperature=0.7):
    generator = torch.Generator().manual_seed(1)
    text = list(prompt.rjust(64, b"\n"))
    for _ in range(count):
        logits = model(torch.tensor([text[-64:]]))[0, -1] / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        text.append(drawn.item())
    lines = bytes(text[64:]).decode(errors="replace").splitlines()
    return "\n".join(line.rstrip() for line in lines).rstrip()


prompt = b"class Reader:\n    def __init__(self, name):\n        self."
for name in MAKE:
    written = write(trained[name][0], prompt, 20 if FAST else 240)
    print(f"──── {name}\n{prompt.decode()}{written}\n")

# %% [markdown]
# ## In your own model
#
# ```python
# opt = normopt.Scion(normopt.param_groups(model, preset="scion"), lr=2**-12)
# ```
#
# Read what `param_groups` prints before you train: a parameter in the wrong group is the most common mistake with both
# methods, and raises no error. [Set param groups](../how-to/param-groups.md) shows how to override it, [A norm for each
# layer](norms_by_layer.md) measures whether a learning rate found on a small model suits a large one, and [Move from
# another optimizer](../how-to/migrating.md) has the settings under which normopt's Muon is `torch.optim.Muon`, and its
# Scion the authors'.

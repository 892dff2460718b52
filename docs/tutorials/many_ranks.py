# %% [markdown]
# # Training on many ranks
#
# A norm is a sum over a whole tensor, but under FSDP no rank has a whole tensor. An optimizer that takes the norm of
# its local shard is wrong, without an error: its steps are too long, by a factor that depends on the number of ranks.
# normopt's optimizers know the placement of a tensor and gather the partial sums of all tensors in one message. This
# page trains on several processes, stops, resumes on another number of them, and counts the messages.
#
# [Train on many ranks](../how-to/sharded-training.md) is the reference: what works, what is refused, DDP, ZeRO.
#
# ## One command
#
# The program is `examples/sharded_digits.py` of the repository: an MLP on handwritten digits under FSDP2, which saves a
# checkpoint after every epoch, and starts from the last one that it finds. Below is the function that makes the model
# and the optimizer. The order matters: make the optimizer **after** `fully_shard`, which replaces the parameters.

# %%
import inspect
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"

example = runpy.run_path("examples/sharded_digits.py")
print(inspect.getsource(example["build"]))

# %% [markdown]
# On one machine `torchrun` starts the processes, one per GPU, or here one per core. On several machines, start the same
# command on each, with a common rendezvous address. In a terminal:
#
# ```bash
# torchrun --nproc-per-node 2 examples/sharded_digits.py --folder run
#
# # on each of 4 machines with 8 GPUs, which share a folder
# torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
#     examples/sharded_digits.py --folder /shared/run
# ```
#
# Here a function runs the command and returns its output.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
EPOCHS = 2 if FAST else 12


def torchrun(ranks, *words):
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command, "examples/sharded_digits.py", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


if not FAST:
    print(torchrun(2, "--folder", str(folder / "run"), "--epochs", str(EPOCHS)))

# %% [markdown]
# ## Stop, and resume on another number of ranks
#
# The same run, stopped after some epochs on two ranks, continues on one. Checkpoints are PyTorch's distributed ones:
# each rank writes its shards, and a loading rank reads the shards that it needs. The optimizer's state, momentum and
# Kahan compensation, is sharded like the parameters; p and its schedule are in the param groups.

# %%
stop = str(EPOCHS // 2)
words = ["--folder", str(folder / "moved"), "--epochs", str(EPOCHS)]
print(torchrun(2, *words, "--stop-after", stop))
print(torchrun(1, *words))

# %% [markdown]
# On the same number of ranks the run equals an uninterrupted one bit for bit. On another number the sums are added in
# another order, and it is equal up to roundoff. The tests check both, 2 → 2 and 2 → 1 → 4, with momentum, schedules of
# p and Kahan buffers. They also kill a rank: the others fail within the time-out of the process group, with an error
# that says that the connection is lost, and the job resumes from its last checkpoint.
#
# ## What a norm needs
#
# There are four communication strategies. The choice depends on the norm, the scale and the dim along which a tensor
# is sharded; FSDP2 shards dim 0, the rows.

# %%
from normopt.norms import Lp, Mixed, Schatten
from normopt.sharding.layout import Layout
from normopt.stages.direction import comm_strategy

SAY = {
    "local": "nothing of other ranks",
    "sums": "sums, gathered from all ranks",
    "rows": "nothing for its rows, which are whole",
    "whole": "whole matrices, each on one rank",
}
NORMS = {
    "SGD": (Lp(2.0), "dual"),
    "signs": (Lp(float("inf")), "unit"),
    "LPSGD, LPSGDM": (Lp(3.0), "power"),
    "ℓ3, true steepest descent": (Lp(3.0), "dual"),
    "ℓ3, as long as SGD's": (Lp(3.0), "matched"),
    "RowNormSGD, SCALE": (Mixed(2.0, float("inf")), "unit"),
    "columns": (Mixed(2.0, float("inf"), lines="columns"), "unit"),
    "Muon, Scion, NucGD": (Schatten(float("inf")), "unit"),
}
print(f"{'':27}{'sharded along dim 0':39}sharded along dim 1")
for name, (norm, scale) in NORMS.items():
    cut = [Layout(None, 2, 0, dim, torch.Size((8, 8))) for dim in (0, 1)]
    ways = [SAY[comm_strategy(norm, scale, layout)] for layout in cut]
    print(f"{name:27}{ways[0]:39}{ways[1]}")

# %% [markdown]
# AGR needs sums of every gradient before the momentum, whatever the norm. All sums of a phase, of all tensors and all
# param groups, are in one message, in float64, and are combined in the order of the ranks, so every rank computes the
# same bits. Whole matrices are assigned, the costliest first, to the rank with the least work. Each rank receives its
# matrices, maps them, and sends the shards back: two messages for each shape.
#
# ## What it costs
#
# With k ranks, n tensors and P entries in matrices, a rank receives from the others in a step, on average:
#
# | what | messages | bytes |
# |---|---|---|
# | sums, w numbers of 8 bytes a tensor | 1 a phase | 8·w·n·(k − 1) |
# | shares of matrices, in float32 | 2 a shape | 4·(2P/k + n)·(k − 1)/k |
# | *for comparison:* every matrix to every rank | n | 4·P·(k − 1)/k |
# | *for comparison:* FSDP's own, of N parameters | | 3·4·N·(k − 1)/k |
#
# For "dual" and "unit" w is 2; AGR is a separate phase with w = 3, and "matched" a third one with w = 4. Rows send one
# number, for the monitors. FSDP2 gathers the weights twice, in forward and in backward, and scatters the gradients
# once, if it frees the weights in between, which is its default.
#
# With `scale="dual"` and 16 tensors on 2 ranks that is one message of 8·2·16 = 256 bytes. The tests count messages and
# bytes of real steps on 2 and 4 processes, and compare them with this arithmetic:


# %%
def of_sums(numbers, tensors, k):
    return 8 * numbers * len(tensors) * (k - 1)


def of_shares(matrices, k):
    entries = sum(torch.Size(s).numel() for s in matrices)
    return 4 * (2 * entries / k + len(matrices)) * (k - 1) / k


def of_all(tensors, k):
    return 4 * sum(torch.Size(s).numel() for s in tensors) * (k - 1) / k


W = 64  # two blocks of a transformer of that width, with biases
matrices = 2 * [(3 * W, W), (W, W), (4 * W, W), (W, 4 * W)]
tensors = matrices + 2 * [(3 * W,), (W,), (4 * W,), (W,)]
print(f"{'':24}{'ranks':>6}{'bytes':>9}")
for k in (2, 4):
    for name, received in {
        "signs": 0,
        "ℓp, power (LPSGD)": 0,
        "ℓp, dual": of_sums(2, tensors, k),
        "ℓp, dual, AGR": of_sums(3 + 2, tensors, k),
        "ℓp, matched, AGR": of_sums(3 + 2 + 4, tensors, k),
        "rows, unit (SCALE)": of_sums(1, tensors, k),
        "spectral, unit (Muon)": of_shares(matrices, k),
    }.items():
        print(f"{name:24}{k:6}{received:9,.0f}")

# %% [markdown]
# For vector norms the number of messages does not depend on the number of tensors or parameters, and the number of
# bytes depends only on the number of tensors. What would 1,024 ranks receive? By calculation, for a transformer of 7
# billion parameters (width 4096, 32 blocks, feed-forward width 11,008, 32,000 tokens), beside the traffic of FSDP
# itself:

# %%
WIDTH, FORWARD, BLOCKS, TOKENS = 4096, 11008, 32, 32000
matrices = BLOCKS * [
    *4 * [(WIDTH, WIDTH)],
    *2 * [(FORWARD, WIDTH)],
    (WIDTH, FORWARD),
]
tensors = matrices + 2 * [(TOKENS, WIDTH)] + (2 * BLOCKS + 1) * [(WIDTH,)]
entries = sum(torch.Size(s).numel() for s in tensors)
print(f"{entries / 1e9:.2f} billion parameters in {len(tensors)} tensors\n")

RANKS = [2**i for i in range(1, 11)]
curves = {
    "FSDP itself": [3 * of_all(tensors, k) for k in RANKS],
    "matrices, all to all ranks": [of_all(matrices, k) for k in RANKS],
    "matrices, in shares": [of_shares(matrices, k) for k in RANKS],
    "ℓp, dual, AGR: sums": [of_sums(3 + 2, tensors, k) for k in RANKS],
}
fig, ax = plt.subplots(figsize=(7, 3.6))
for name, received in curves.items():
    ax.plot(RANKS, received, marker=".", label=name)
ax.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes a rank and step")
ax.set_xticks(RANKS, [f"{k:,}" for k in RANKS])
ax.minorticks_off()
fig.legend(loc="outside upper center", ncols=2)
fig.alt = (
    "Bytes that a rank receives in a step against the number of ranks: sums stay far "
    "below FSDP's own, and shares of matrices fall with the number of ranks"
)

shown = ("FSDP itself", "all to all", "in shares", "sums")
print("MiB a rank and step")
print(f"{'ranks':>6}" + "".join(f"{name:>14}" for name in shown))
for i, k in enumerate(RANKS):
    if k in (2, 8, 64, 1024):
        row = "".join(f"{each[i] / 2**20:14,.2f}" for each in curves.values())
        print(f"{k:6}{row}")

# %% [markdown]
# - **Sums** grow with the number of ranks, because each is sent to all: at 1,024 ranks a rank receives some megabytes,
#   about a ten-thousandth of FSDP's traffic. An all-reduce would not grow, but the network would decide the order of
#   its additions, and so the last bits.
# - **Shares of matrices** shrink as ranks are added, up to the number of matrices: with more ranks than matrices the
#   mean still falls, but a rank that maps a matrix receives all of it, and the others wait. Gathering every matrix on
#   every rank would cost a third of FSDP's traffic, and every rank would do all the work.
# - The tests measured messages and bytes with gloo on up to 4 ranks. The time that they take on a network has not been
#   measured.

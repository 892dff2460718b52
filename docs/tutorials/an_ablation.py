# %% [markdown]
# # An ablation, from question to report
#
# Adaptive gradient regularization ([arXiv:2407.16944](https://arxiv.org/abs/2407.16944)) reduces the entries that
# dominate a gradient, and is reported to improve the optimizers that use it. Does it help an optimizer that steps by
# *signs*, when a quarter of the training labels is wrong? This page answers the question with the program that made
# every study of this repository, and then checks how far the answer can be trusted. [Run an ablation](../ablations.md)
# is the reference for every flag and key.
#
# Everything ran when this page was built. The program's output is shown unchanged, and the run itself chose every
# sentence that depends on the numbers.
#
# ## Think before you run
#
# With g the gradient of a tensor, AGR is
#
# \[
# g_i \;\leftarrow\; g_i \left(1 - \frac{|g_i|}{\sum_j |g_j|}\right).
# \]
#
# The factor is never negative, and zero only if one entry is the whole gradient, so it changes no sign.
# [`SignSGD`][normopt.SignSGD] uses only signs: AGR *cannot* change its steps. [`Signum`][normopt.Signum] takes the sign
# of an average of gradients, which depends on magnitudes: under AGR a batch with one huge entry has less influence. So
# the question is about Signum, and SignSGD is a free test of the program: the two SignSGD arms must have the same
# results, to the last digit.
#
# ## Write it down
#
# There are six arms. The two Signum arms are tuned, each with the same budget. An arm with `tuned_as` uses the tuned
# settings of another arm: so the two SignSGD arms share a learning rate, and each Signum arm also runs at the other's
# rate. The results show why.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

# NORMOPT_DOCS_FAST=1 is a short run for the tests; its numbers mean nothing.
FAST = os.environ.get("NORMOPT_DOCS_FAST") == "1"
TRIALS, SEEDS, BUDGET = (1, 2, 0.1) if FAST else (8, 6, 1.0)

STUDY = f"""
name = "agr-on-signs"
purpose = "Does AGR help optimizers that step by signs, on digits with wrong labels?"
tasks = ["digits-noise"]
baseline = "Signum"
seeds = {SEEDS}
budget = {BUDGET}

[tuning]
trials = {TRIALS}
startup = {TRIALS}

[[arms]]
name = "Signum"
optimizer = "signum"

[[arms]]
name = "Signum + AGR"
optimizer = "signum"
settings = {{ agr = true }}

[[arms]]
name = "Signum + AGR, Signum's rate"
optimizer = "signum"
settings = {{ agr = true }}
tuned_as = "Signum"

[[arms]]
name = "Signum, AGR's rate"
optimizer = "signum"
tuned_as = "Signum + AGR"
against = "Signum + AGR"

[[arms]]
name = "SignSGD"
optimizer = "signsgd"

[[arms]]
name = "SignSGD + AGR"
optimizer = "signsgd"
settings = {{ agr = true }}
tuned_as = "SignSGD"
against = "SignSGD"
"""
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
(folder / "agr_on_signs.toml").write_text(STUDY, encoding="utf-8")

# %% [markdown]
# ## Estimate the cost
#
# In a terminal, in a clone of the repository, this is `python -m benchmarks run agr_on_signs.toml --dry-run`. Here a
# function runs the same command and returns its output.


# %%
def benchmarks(*words):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, words)],
        env={**os.environ, "COLUMNS": "84", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


results = folder / "agr-on-signs"
study_file = folder / "agr_on_signs.toml"
print(benchmarks("run", study_file, "--out", results, "--dry-run"))

# %% [markdown]
# ## Run it

# %%
workers = ("--workers", 1) if FAST else ()
said = benchmarks("run", study_file, "--out", results, *workers)
print(said[said.index("Study ") : said.index("How far to trust this.")].strip())

# %% [markdown]
# The program wrote the paragraph "What AGR does". It finds the arms whose settings differ only in AGR, tests each pair
# over the seeds, and corrects the P-values for the number of pairs.
#
# The full report is `report.html`, with figures; `summary.md` has its text, and `data/` its tables. The report also
# states its own limits:

# %%
start, end = "- **How far to trust this.** ", "\n"
summary = (results / "summary.md").read_text(encoding="utf-8")
print(summary.split(start)[1].split(end)[0].replace(". ", ".\n"))

# %% [markdown]
# ## Read the store
#
# Every run is stored, with its settings and its seed, in `runs.parquet`, which pandas and DuckDB read. In Python,
# `collect` groups the runs: one row per arm, with its tuning and its final runs. First, the test of the program:

# %%
from benchmarks.results import collect
from benchmarks.store import Store

task = collect(Store(results)).tasks["digits-noise"]


def accuracies(arm):
    return [100 * run.test_score for run in task.row(arm).runs]


same = accuracies("SignSGD") == accuracies("SignSGD + AGR")
print(
    f"{'holds' if same else 'does not hold'}: AGR changed no run of SignSGD at all"
)

# %% [markdown]
# Now the pairs. For each seed, an arm and its control start from the same weights and see the same batches, so the test
# uses their differences.

# %%
PAIRS = [
    ("Signum + AGR", "Signum", "each at its own rate"),
    ("Signum + AGR, Signum's rate", "Signum", "both at Signum's rate"),
    ("Signum + AGR", "Signum, AGR's rate", "both at AGR's rate"),
]
for arm in ("Signum", "Signum + AGR"):
    print(f"{arm:13} learning rate {task.row(arm).lr:.2g}")
print("\nwith AGR minus without, test accuracy in points")

fig, ax = plt.subplots(figsize=(7, 2.6))
found = {}
comparisons = task.compare([pair[:2] for pair in PAIRS], lambda r: r.test_score)
for i, ((arm, control, what), c) in enumerate(zip(PAIRS, comparisons, strict=True)):
    each = [
        a - b for a, b in zip(accuracies(arm), accuracies(control), strict=True)
    ]
    interval = c.difference.interval
    found[what] = c
    low, high = 100 * interval.low, 100 * interval.high
    print(
        f"{what:22} {100 * interval.mean:+6.2f}  ({low:+.2f} to {high:+.2f})"
        f"  P-value {max(c.adjusted, 0.001):.3f}{' or less' if c.adjusted < 0.001 else ''}"
    )
    ax.plot(each, [i] * len(each), "o", mfc="none", color="C0")
    ax.plot([low, high], [i, i], color="C1", linewidth=3, alpha=0.6)
    ax.plot(100 * interval.mean, i, "s", color="C1")
ax.axvline(0, color="grey", linewidth=1, linestyle=":")
ax.set(yticks=range(len(PAIRS)), yticklabels=[what for *_, what in PAIRS])
ax.set(xlabel="with AGR minus without (points of test accuracy)", ylim=(2.5, -0.5))
fig.alt = "The difference that AGR makes, seed by seed (rings) with the mean and its 95 % interval, for each arm at its own learning rate, and for both at the one's and at the other's"

# %% [markdown]
# The first line is the report's: each arm at its own tuned learning rate. It mixes two things: the effect of AGR on a
# run, and the learning rates that tuning happened to find. The other two lines remove the second. (These P-values are
# Holm-corrected over the three pairs; the report's over all pairs of a question.)


# %%
def better(comparison):
    return comparison.verdict > 0


own, *shared = (found[what] for *_, what in PAIRS)
if not better(own):
    print("Each at its own rate, the arm with AGR is not shown to be better.")
elif any(better(comparison) for comparison in shared):
    print("AGR is better each at its own rate, and at a shared rate too.")
else:
    print(
        "Each at its own rate, the arm with AGR is better; at one and the same rate it is not.\n"
        "What the first line shows is the difference of two learning rates."
    )

# %% [markdown]
# ## What tuning saw
#
# Why would tuning give one arm a better rate than the other? Its only criterion was the validation loss of one run per
# trial:

# %%
fig, ax = plt.subplots(figsize=(7, 3.2))
for arm in ("Signum", "Signum + AGR"):
    row = task.row(arm)
    tried = sorted((t.settings["lr"], t.loss) for t in row.trials)
    line = ax.plot(*zip(*tried, strict=True), "o-", label=arm)[0]
    best = min(tried, key=lambda t: t[1])
    ax.plot(*best, "o", ms=11, mfc="none", color=line.get_color())
    near = [lr for lr, loss in tried if loss < 1.1 * best[1]]
    print(
        f"{arm:13} {len(near)} of {len(tried)} trials within 10 % of the best loss,"
        f" at rates from {min(near):.2g} to {max(near):.2g}"
    )
ax.set(xscale="log", yscale="log", xlabel="learning rate")
ax.set(ylabel="validation loss")
fig.legend(loc="outside upper center", ncols=2)
fig.alt = "Validation loss of each trial against its learning rate, for Signum with and without AGR; the chosen ones are ringed"

# %% [markdown]
# If the curve is flat or jagged over a factor of ten in the learning rate, one run per trial chooses a rate by luck,
# and test accuracy need not be flat where validation loss is. The seeds of the final runs do not average out that luck,
# because all run at the chosen rate. No interval or P-value includes it.
#
# ## A second study, at fixed rates
#
# So fix the rates instead. An arm with a fixed `lr` is not tuned, and a `grid` crosses settings: every rate with and
# without AGR. Now there are several comparisons of arms that differ only in AGR, and they are corrected together.

# %%
RATES = [1e-3, 1e-2] if FAST else [3e-4, 1e-3, 3e-3, 1e-2]
SWEEP = f"""
name = "agr-at-every-rate"
purpose = "At a given learning rate, does AGR help Signum on digits with wrong labels?"
tasks = ["digits-noise"]
baseline = "Signum lr={RATES[0]:g}"
seeds = {SEEDS}
budget = {BUDGET}

[tuning]
trials = 1

[[arms]]
name = "Signum"
optimizer = "signum"
grid = {{ lr = {RATES}, agr = [false, true] }}
"""
sweep = folder / "agr-at-every-rate"
sweep_file = folder / "agr_at_every_rate.toml"
sweep_file.write_text(SWEEP, encoding="utf-8")
said = benchmarks("run", sweep_file, "--out", sweep, *workers)
print(said[said.index("What AGR does.") : said.index("How far to trust")].strip())

# %%
task = collect(Store(sweep)).tasks["digits-noise"]
fig, ax = plt.subplots(figsize=(7, 3.2))
for agr, label in ((False, "Signum"), (True, "Signum + AGR")):
    rows = [r for r in task.rows if r.settings["agr"] is agr]
    rows.sort(key=lambda row: row.lr)
    scores = [[100 * run.test_score for run in row.runs] for row in rows]
    means = [sum(s) / len(s) for s in scores]
    line = ax.plot([row.lr for row in rows], means, "o-", label=label)[0]
    lows, highs = [min(s) for s in scores], [max(s) for s in scores]
    ax.fill_between(
        [row.lr for row in rows], lows, highs, alpha=0.15, color=line.get_color()
    )
    print(f"{label:13}", "  ".join(f"{m:.1f} %" for m in means))
ax.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
fig.legend(loc="outside upper center", ncols=2)
fig.alt = "Test accuracy against the learning rate for Signum with and without AGR: means over the seeds, their range shaded"

# %% [markdown]
# ## How small a difference could have been found?
#
# A tie is no proof of equality. The half width of an interval shows what the study could detect: it would mostly miss a
# true difference that is much smaller. The half width shrinks with the square root of the number of seeds.

# %%
halves, verdicts = [], []
for r in RATES:
    c = task.comparison(f"Signum lr={r:g} agr", f"Signum lr={r:g}")
    halves.append(50 * (c.difference.interval.high - c.difference.interval.low))
    verdicts.append(c.verdict)
print(
    "half widths of the intervals, by rate:",
    "  ".join(f"±{h:.1f}" for h in halves),
    "points",
)
wide = max(halves)
print(
    f"for ±0.5 at every rate, about {max(SEEDS, round(SEEDS * (wide / 0.5) ** 2))} seeds instead of {SEEDS}"
)
print()
up, down = verdicts.count(1), verdicts.count(-1)
print(
    f"At {len(RATES)} fixed rates AGR is significantly better at {up} and worse at {down}; {len(RATES) - up - down} are ties."
)
temporary.cleanup()

# %% [markdown]
# ## What you can conclude, and what not
#
# - **That AGR does not change SignSGD** follows from the formula, and the run agrees. No number of seeds could prove
#   it, and a single difference would refute it.
# - **"Better, P-value below 0.05"** is a statement about two tuned arms on fresh seeds. It is not about AGR if the arms
#   also differ in their learning rate. Exchange the rates, or sweep them, before you draw a conclusion.
# - **The luck of the tuning** shrinks with more seeds per trial (`seeds = [1000, 1001, 1002]` under `[tuning]`), which
#   cost as much as more trials, or if you choose a rate in the middle of a flat stretch.
# - **One small network on one data set.** Nothing here says what AGR does in large networks, or for AdamW. [The
#   results](../results.md) have pairs of LPSGDM and AdamW on seven tasks, and [another study](../benchmarks/paper-agr.md)
#   asks about AdamW and Adan.
# - **A question asked after seeing the results** is a new question. The sweep above was planned after the tuning curve
#   had been seen; its P-values are valid only because no rate was left out afterwards.
#
# `python -m benchmarks compare FOLDER FOLDER` compares two finished studies arm by arm; `resume` continues one that was
# stopped.

"""An MkDocs hook: the page "What we found", made anew from the committed runs.

A verdict on each question, with its interval and the study that it is from. Where a study's runs are not in docs/data,
the page says that it is not measured yet.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the program `mkdocs` does not look there
from benchmarks.programs import paper_pages
from benchmarks.report.text import p_value, signed
from benchmarks.results import test_score
from benchmarks.stats import ALPHA, interval
from benchmarks.study.papers import DECLARED

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PAGE = "what-we-found.md"
NOT_YET = "Not measured yet: no runs of this study are committed."
# Of best_norm.json: 1/p of the ℓp norm whose step decreases the held-out loss most, by gradients of mini-batches.
BEST = {"what": "1/p", "gradient": "batch", "adaptive": False, "by": "held"}


class Held(NamedTuple):
    """The comparison of two arms over the tasks of docs/results.md: P(improvement) in percent, counts of tasks."""

    improvement: int
    low: int
    high: int
    better: int
    worse: int
    ties: int

    def turned(self) -> Held:
        """Return the same comparison with the arms exchanged."""
        return Held(100 - self.improvement, 100 - self.high, 100 - self.low, self.worse, self.better, self.ties)

    def __str__(self) -> str:
        tasks = self.better + self.worse + self.ties
        return (
            f"better on {self.better} of {tasks} tasks, worse on {self.worse} and tied on {self.ties}. Its probability "
            f"of a better test score on the same seed is {self.improvement} % (95 % interval {self.low} to {self.high})"
        )


def held(results: str, arm: str, against: str) -> Held:
    """Read the comparison of two arms from the table in docs/results.md."""
    row = rf"^\| {re.escape(arm)} \| {re.escape(against)} \| (\d+)–(\d+)–(\d+) \| (\d+) % \((\d+) to (\d+)\) \|"
    found = re.search(row, results.replace("\u00a0", " "), re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/results.md has no comparison of {arm} with {against}")
    better, worse, ties, improvement, low, high = map(int, found.groups())
    return Held(improvement, low, high, better, worse, ties)


def verdict(*pairs: Held) -> str:
    """Count the comparisons in which a method is better or worse than the same without it."""
    better, worse = sum(pair.better for pair in pairs), sum(pair.worse for pair in pairs)
    return f"better in {better}, worse in {worse} of {sum(sum(pair[3:]) for pair in pairs)} comparisons"


def paper(name: str) -> str:
    """Return the verdict of a preset that runs a paper's recipe."""
    said = re.search(r"\*\*Here:\*\* (.+?)\n\n", paper_pages.page(DECLARED[name], paper_pages.read(name)), re.DOTALL)
    return NOT_YET if said is None else said[1][:1].upper() + said[1][1:]


def recipe(name: str) -> str:
    """Return the paragraph on such a preset."""
    return f"**The paper's recipe, on Fashion-MNIST** ([study](benchmarks/{name}.md)). {paper(name)}"


def short(name: str) -> str:
    """Return the first clause of its verdict."""
    clause = re.split(r"[:;]|\.\s", paper(name))[0].rstrip(".")
    return clause[:1].lower() + clause[1:]


def zeros(results: str) -> tuple[str, str, str]:
    """Return the sparsest arm of equal score on digits-noise: optimizer, share of zeros, difference in accuracy."""
    text = " ".join(results.replace("\u00a0", " ").split())
    found = re.search(
        r"on digits-noise, (\S+) \+ ℓ0\.8 decay with (\S+ % ± \S+) exact zeros and a test accuracy (\S+ points "
        r"\(95 % interval \S+ to [^,]+),",
        text,
    )
    if found is None:
        raise ValueError("docs/results.md has no zeros of digits-noise")
    arm, share, difference = found.groups()
    return arm, share, f"{difference})"


def ends(mean: float, low: float, high: float) -> str:
    """Write a difference with the ends of its interval."""
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def best_norm(path: Path) -> tuple[str, str]:
    """Return the verdict on whether the best p falls during training, and a table."""
    if not path.is_file():
        return "not measured yet", NOT_YET
    changes = json.loads(path.read_text(encoding="utf-8"))["changes"]
    found = [c for c in changes if all(c[key] == value for key, value in BEST.items())]
    falls = sum(c["p_value"] < ALPHA and c["difference"][0] > 0 for c in found)
    rises = sum(c["p_value"] < ALPHA and c["difference"][0] < 0 for c in found)
    rows = [
        f"| {c['task']} | {c['early'][0]:.2f} | {c['late'][0]:.2f} | {ends(*c['difference'])} | "
        f"{p_value(c['p_value'], name=False)} |"
        for c in found
    ]
    head = ["| task | 1/p early | 1/p late | difference, 95 % interval | P-value (Holm) |", "|:--|--:|--:|--:|--:|"]
    said = f"the best p falls significantly on {falls or 'none'} of {len(found)} tasks, and rises on {rises or 'none'}"
    return said, "\n".join(head + rows)


def rates() -> str:
    """Compare the learning rates that tuning chose for AdamW in two studies of one network."""
    with_agr, with_lpsgdm = paper_pages.read("paper-agr"), paper_pages.read("paper-lpsgdm")
    if with_agr is None or with_lpsgdm is None:
        return ""
    (here,), (there,) = with_agr.tasks.values(), with_lpsgdm.tasks.values()
    plain, regular, tuned = here.row("AdamW"), here.row("AdamW + AGR"), there.row("AdamW tuned")
    if plain.lr is None or regular.lr is None or tuned.lr is None:
        return ""
    score = 100 * interval(tuned.values(test_score)).mean
    return (
        f"The learning rates that tuning chose differ: AdamW {plain.lr:.3g}, AdamW + AGR {regular.lr:.3g}. In the "
        f"study of LPSGDM, on the same network, tuning chose {tuned.lr:.3g} for AdamW, which reached {score:.2f} % "
        "without AGR. So the gain may come from the learning rate."
    )


def page(docs: Path) -> str:
    """Return the page as Markdown."""
    results = (docs / "results.md").read_text(encoding="utf-8")
    annealed = held(results, "LPSGDM constant p", "LPSGDM").turned()
    agr = {arm: held(results, f"{arm} + AGR", arm) for arm in ("LPSGDM", "AdamW")}
    decay = {arm: held(results, f"{arm} + ℓ0.8 decay", arm) for arm in ("LPSGDM", "AdamW")}
    sparse, share, difference = zeros(results)
    zeros_found = f"{share} zeros, accuracy {difference}"
    best, norms = best_norm(docs / "data/best_norm.json")
    study = "[The study of 7 small tasks](results.md)"
    return f"""# What we found

What the papers behind normopt claim, and what our runs show. All verdicts and numbers are computed from committed runs
when this site is built. The tasks are small and run on a CPU. [Run an ablation](ablations.md) to test your own tasks.

| question | the paper says | small tasks | the paper's recipe |
|:--|:--|:--|:--|
| [Does annealing p help?](#annealing-p) | yes | {verdict(annealed)} | {short("paper-lpsgdm")} |
| [Does AGR help?](#agr) | yes | {verdict(*agr.values())} | {short("paper-agr")} |
| [Does ℓp decay make zeros for free?](#lp-decay) | yes, 83.6 % | {zeros_found} | {short("paper-pwd")} |
| [Do regular trajectories go with success?](#trajectories) | yes | | {short("paper-trajectory")} |
| [Does the best p fall during training?](#best-norm) | yes, so p anneals | {best} | |

“Better” and “worse” are significant differences of test scores on the same seeds, corrected for the number of tests;
all others are ties.

## Does annealing p help? {{#annealing-p}}

{study} compares LPSGDM, whose p falls from 8 to 2, with LPSGDM at a constant p = 8. With the schedule it is {annealed}.

{recipe("paper-lpsgdm")}

[LPSGDM](optimizers/lpsgdm.md) · [arXiv:2606.02078](https://arxiv.org/abs/2606.02078)

## Does AGR help? {{#agr}}

{study} compares each optimizer with AGR and without:

- LPSGDM + AGR is {agr["LPSGDM"]}.
- AdamW + AGR is {agr["AdamW"]}.

{recipe("paper-agr")} {rates()}

[AGR](theory/decay-and-agr.md#agr) · [arXiv:2407.16944](https://arxiv.org/abs/2407.16944)

## Does ℓp decay make zeros for free? {{#lp-decay}}

{study}: on digits-noise, {sparse} + ℓ0.8 decay makes {share} of the weights exactly zero, and its test accuracy differs
from {sparse}'s by {difference}. Over all tasks, with settings tuned for the loss and not for zeros:

- LPSGDM + ℓ0.8 decay is {decay["LPSGDM"]}.
- AdamW + ℓ0.8 decay is {decay["AdamW"]}.

{recipe("paper-pwd")}

[ℓp decay](theory/decay-and-agr.md#lp-decay) · [arXiv:2404.10824](https://arxiv.org/abs/2404.10824)

## Do regular trajectories go with success? {{#trajectories}}

The claim is that architecture choices that make networks train well also make each step point more towards the final
weights.
[Reading a trajectory](tutorials/reading_a_trajectory.md) draws the trainings of the study.

{recipe("paper-trajectory")}

[TrajectoryMonitor](api/diagnostics.md) · [arXiv:2011.06702](https://arxiv.org/abs/2011.06702)

## Does the best p fall during training? {{#best-norm}}

At several times of a training by AdamW, a line search along the steepest direction of each ℓp norm finds the p that
decreases the held-out loss most. If this is the reason to anneal p, 1/p of that norm is larger late than early.

{norms}

[Why p anneals](theory/annealing-p.md)
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page; nothing is written into docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page(Path(config.docs_dir))))
    return files

"""How the study was made, in sentences, and how that differs from the benchmarks it learnt from."""

from __future__ import annotations

from benchmarks.environment import Environment
from benchmarks.optimizers import described
from benchmarks.report.text import counted, listed, share, unit
from benchmarks.results import Results
from benchmarks.stats import BOOTSTRAP_FROM, LEVEL
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, Range


def command(results: Results) -> str | None:
    """The command that makes this study; None for one that has no name of its own."""
    study = results.study
    return f"python -m benchmarks run {study.name}" if PRESETS.get(study.name) == study else None


def settings(results: Results) -> list[str]:
    """The study's settings, one sentence or two each."""
    study, tuning = results.study, results.study.tuning
    seeds = counted(len(tuning.seeds), "seed")
    startup = min(tuning.startup, tuning.trials)
    rest = tuning.trials - startup
    return [
        *(f"Task {task.name}: {task.task.description}." for task in results.tasks.values()),
        "Training: the learning rate of every arm falls to 0 along half a cosine over the steps; a schedule of p moves "
        "once an epoch. A seed fixes the initial weights and the batches, the same for every arm."
        + (f" Every task has {study.budget:g} times its usual epochs." if study.budget != 1 else ""),
        f"Tuning: {counted(tuning.trials, 'trial')} for every arm on every task, {startup} of them scrambled Sobol "
        f"points{f' and then {rest} by TPE' if rest else ''}, {seeds} each "
        f"({listed([str(seed) for seed in tuning.seeds])}); chosen by the lowest mean validation loss after the last "
        "epoch, where a run that diverged counts as ∞.",
        f"Searched: {'; '.join(_searched(arm) for arm in study.arms)}.",
        f"Final runs: {counted(len(study.seeds), 'seed')} that tuning has not seen, {_seeds(study.seeds)}, the same "
        "for all arms.",
        f"Intervals hold with {share(LEVEL)}: Student's t up to {BOOTSTRAP_FROM - 1} seeds, and from {BOOTSTRAP_FROM} "
        "on the bootstrap (BCa). Comparisons are paired t tests on the test score over the seeds, Holm-corrected "
        "within each task: over many tasks some differences will seem real by chance.",
        "Steps to the target are counted at the first evaluation on the validation data, one an epoch, that reaches "
        "it: the median over the seeds, where a run that does not reach it counts as longer than all that do. Targets: "
        + "; ".join(f"{task.name} {unit(task.task).plain(task.task.target)}" for task in results.tasks.values())
        + ".",
        "A run whose loss is not finite has diverged: it is a result, not an error. An arm of which a final run "
        "diverged has no mean and is compared with nothing.",
        "ms/step is processor time of a whole training step (forward, backward, optimizer) on one thread, with other "
        f"runs beside it{'; only those of runs made together compare' if len(results.environments) > 1 else ''}. State "
        "is what the optimizer keeps between steps.",
        f"Arms: {'; '.join(_arm(arm) for arm in study.arms)}.",
        *(_made(environment) for environment in results.environments),
        f"The runs took {results.seconds:,.0f} seconds of worker time.",
    ]


def protocol(results: Results) -> list[str]:
    """How AlgoPerf and “Descending through a Crowded Valley” do it, and where this is another thing."""
    study = results.study
    return [
        "AlgoPerf (arXiv 2306.07179) measures the wall-clock time on fixed hardware, eight GPUs, to reach a target on "
        "eight large workloads, with held-out variants of them; its targets come from four tuned reference "
        "optimizers. Its search spaces are the same for all workloads, tuned five times by five quasi-random trials, "
        "and its scores are areas under performance profiles up to a factor of 4.",
        "“Descending through a Crowded Valley” (arXiv 2007.01547) compares fifteen optimizers on eight problems under "
        "four tuning budgets, from none to 75 trials of random search, and four schedules of the learning rate, and "
        "runs the settings that tuning found again on ten seeds.",
        "As they do, this program tunes every arm with the same budget on validation data and runs the winners on "
        "fresh seeds; performance profiles and their areas are AlgoPerf's. It differs: "
        f"{counted(len(study.tasks), 'task')} that a CPU trains in seconds, not large ones on GPUs; "
        f"{counted(study.tuning.trials, 'trial')} once, not several times over, so that the luck of the tuning is in "
        "no interval; steps instead of seconds to the target, as small models' times are mostly overhead; targets that "
        "were set by hand; search ranges that belong to the optimizer; one schedule of the learning rate; and the "
        "score at the end of a fixed budget beside the steps to the target. What holds for these tasks need not hold "
        "for large ones.",
    ]


def _searched(arm: Arm) -> str:
    if arm.tuned_as is not None:
        times = f", the learning rate times {arm.lr_factor:g}" if arm.lr_factor != 1 else ""
        return f"{arm.name} takes over what was found for {arm.tuned_as}{times}"
    if not arm.search:
        return f"{arm.name} nothing"
    return f"{arm.name} {', '.join(_range(name, within) for name, within in arm.search.items())}"


def _range(name: str, within: Range) -> str:
    return f"{name} from {within.low:g} to {within.high:g}{'' if within.log else ', evenly'}"


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return listed([str(seed) for seed in seeds])


MOVES = {"cosine": "along half a cosine", "linear": "in a straight line", "adaptive": "as sparse gradients ask for it"}


def _arm(arm: Arm) -> str:
    fixed = ", ".join(f"{name} = {value}" for name, value in arm.settings.items())
    moves = f"p goes to {arm.p_schedule.p_end:g}, {MOVES[arm.p_schedule.kind]}" if arm.p_schedule else ""
    told = "; ".join(part for part in (fixed, moves) if part)
    return f"{arm.name}: {described(arm.optimizer).rule}" + (f" ({told})" if told else "")


def _made(e: Environment) -> str:
    data = "; ".join(f"data of {task}: sha256 {sha}" for task, sha in e.data.items())
    commit = f" at commit {e.commit}" if e.commit else ""
    return (
        f"Made with Python {e.python}, torch {e.torch}, normopt {e.normopt}{commit}, numpy {e.numpy}, scikit-learn "
        f"{e.sklearn}, {e.system}, {counted(e.cpus, 'CPU')}{f'; {data}' if data else ''}."
    )

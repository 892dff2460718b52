"""Where tuning looks: quasi-random points first, then Optuna's TPE. Pure: the same history gives the same proposal.

The quasi-random points are SciPy's scrambled Sobol points, which Optuna's own QMCSampler draws too; but that one is
experimental, starts with a point that is not of the sequence, and keeps its place in a file, so that what it proposes
depends on how often a study was interrupted. TPE (Bergstra et al., 2011) gets a history and a seed for each proposal,
for the same reason.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import FloatDistribution

from benchmarks.study.spec import Range

Settings = dict[str, float]
History = Sequence[tuple[Settings, float]]

# Optuna tells of every study and trial it makes.
optuna.logging.set_verbosity(optuna.logging.WARNING)


def seed(*words: object) -> int:
    """A seed of 32 bits from names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, words)).encode()).digest()[:4], "big")


def quasi_random(search: Mapping[str, Range], n: int, seed: int) -> list[Settings]:
    """The first n scrambled Sobol points, spread over the ranges, by ratios where they say log."""
    from scipy.stats import qmc  # which a report does not need, and takes long to import

    # Drawn to the next power of two, as the balance of Sobol points wants; the first n of them are the same anyhow.
    points = qmc.Sobol(len(search), scramble=True, rng=seed).random_base2(math.ceil(math.log2(n)))[:n]
    return [
        {name: _rounded(within.at(x), within) for (name, within), x in zip(search.items(), point, strict=True)}
        for point in points.tolist()
    ]


def tpe(search: Mapping[str, Range], history: History, seed: int) -> Settings:
    """What TPE tries after settings that had these losses; a loss of ∞ ranks behind all others."""
    sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=seed)
    study = optuna.create_study(sampler=sampler)
    ranges = {name: FloatDistribution(within.low, within.high, log=within.log) for name, within in search.items()}
    told = (optuna.trial.create_trial(params=tried, distributions={**ranges}, value=loss) for tried, loss in history)
    study.add_trials(told)
    asked = study.ask({**ranges})
    return {name: _rounded(float(asked.params[name]), within) for name, within in search.items()}


def _rounded(value: float, within: Range) -> float:
    """To three significant digits, which tables can show and no result depends on, but not out of the range."""
    return min(max(float(f"{value:.3g}"), within.low), within.high)

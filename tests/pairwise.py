"""Choose few of all combinations so that every pair of values of any two settings still occurs together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

TRIES = 20


def pairwise(
    choices: Mapping[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool] = lambda combination: True
) -> list[dict[str, Any]]:
    """Greedily pick valid combinations that cover every pair of values; the same ones at every call.

    Args:
        choices: the values of each setting.
        valid: whether a combination is to be tried at all. A pair that no valid combination is found for is left out.
    """
    names = list(choices)
    counts = [len(values) for values in choices.values()]
    both = list(itertools.combinations(range(len(names)), 2))
    missing = {(a, i, b, j) for a, b in both for i in range(counts[a]) for j in range(counts[b])}
    rng = random.Random(0)
    picked: list[dict[str, Any]] = []

    def gain(row: dict[int, int], k: int, v: int) -> float:
        pairs = ((x, row[x], k, v) if x < k else (k, v, x, row[x]) for x in row)
        return sum(p in missing for p in pairs) + rng.random() / 2

    while missing:
        wanted = min(missing)
        best: tuple[int, dict[str, Any], set[tuple[int, int, int, int]]] | None = None
        for _ in range(TRIES):
            row = {wanted[0]: wanted[1], wanted[2]: wanted[3]}
            for k in rng.sample([k for k in range(len(names)) if k not in row], len(names) - 2):
                row[k] = max(range(counts[k]), key=partial(gain, row, k))
            combination = {names[k]: choices[names[k]][row[k]] for k in range(len(names))}
            covered = {(a, row[a], b, row[b]) for a, b in both} & missing
            if valid(combination) and (best is None or len(covered) > best[0]):
                best = len(covered), combination, covered
        if best is None:
            missing.remove(wanted)
        else:
            picked.append(best[1])
            missing -= best[2]
    return picked

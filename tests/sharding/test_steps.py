"""Sharded is unsharded: every norm, on even, uneven and empty parts, step by step with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import normopt
from normopt.norms import Mixed, Norm, Schatten
from normopt.norms.base import Scale
from tests.sharding import cases
from tests.sharding.ranks import Ranks

ENGINE = "steepestdescent"
DECAYS = {
    "no decay": {},
    "coupled": dict(weight_decay=0.1, decay="coupled"),
    "decoupled": dict(weight_decay=0.1, decay="decoupled"),
    "ℓp": dict(weight_decay=0.1, decay="lp", decay_p=0.8),
}
# AdamW's and SGD's relatives; LAMB's lengths of the weights are among the rules below.
RELATIVES = ("adagrad", "adam", "lamb", "lars", "rmsprop")
NAMES = [pytest.param(n, marks=pytest.mark.exhaustive if n in RELATIVES else ()) for n in normopt.list_optimizers()]
SIGNS = ("signsgd", "signum", "lion")
EXACT = ("freon", "spectralsgd", "nucgd")  # by decompositions, which amplify the roundoff of AGR's sums in float32


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(rank[key] for rank in found) for key in found[0]}


def holds(found: list[dict[str, float]], bound: float = 1e-6) -> None:
    errors = worst(found)
    assert max(errors["weights"], errors["state"], errors["pairs"]) <= bound, errors


@pytest.mark.parametrize("agr", [False, True], ids=["", "AGR"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer(name: str, decay: str, agr: bool, ranks: Ranks) -> None:
    dtype = torch.float64 if name in EXACT and agr else torch.float32
    found = ranks.call(cases.compare, name, dict(agr=agr, **DECAYS[decay]), 0, cases.SHAPES, dtype)
    fast = name in ("muon", "scion") and agr
    holds(found, 1e-4 if fast else 1e-6)
    if name in SIGNS and decay != "coupled":
        assert worst(found)["unequal"] == 0


LP = dict(norm="lp", p=3.0)
ADAM = dict(momentum=0.9, momentum_rule="ema", bias_correction=True, metric="diagonal")
SOME = (0, 3, 7)  # parameters that are not cut
NORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "p = 1": (dict(norm="l1"), {}),
    "p = 1, unit": (dict(norm="l1", scale="unit"), {}),
    "p = 1, cut along dim 1": (dict(norm="l1", scale="unit"), dict(dim=1)),
    "p = 1 over the group": (dict(norm="l1", scope="group"), {}),
    "p = 1 over a group, some whole": (dict(norm="l1", scope="group"), dict(replicated=SOME)),
    "over a group, some whole": (LP | dict(scope="group", scale="unit"), dict(replicated=SOME)),
    "some whole": (LP | dict(agr=True), dict(replicated=SOME)),
    "matched": (LP | dict(scale="matched"), {}),
    "matched, cut along dim 1": (LP | dict(scale="matched", agr=True, momentum=0.9), dict(dim=1)),
    "one by one": (LP | dict(agr=True, foreach=False), {}),
    "spectral, matched": (dict(norm="spectral", scale="matched"), {}),
    "spectral, dual": (dict(norm="spectral"), {}),
    "spectral, cut along dim 1": (dict(norm="spectral", scale="unit"), dict(dim=1)),
    "spectral, blocks": (dict(norm="spectral", scale="unit", norm_blocks=2), dict(shapes=[(4, 6), (6, 2, 3), (2,)])),
    "rows": (dict(norm="row", scale="unit", norm_aspect="rms"), {}),
    "rows, cut along dim 1": (dict(norm="row", scale="unit"), dict(dim=1)),
    "rows of stacks": (dict(norm="row", scale="unit", norm_matrix_view="batch"), {}),
    "rows, transposed": (dict(norm="row", scale="unit", norm_matrix_view="transposed"), {}),
    "rows, dual": (dict(norm="row"), {}),
    "columns": (dict(norm="column", scale="unit", norm_aspect="rows"), {}),
    "columns, transposed": (dict(norm="column", scale="unit", norm_matrix_view="transposed"), {}),
    "a norm of one's own, of tensors": (dict(norm="of-a-tensor", scale="unit"), dict(shapes=[(5, 4), (2, 3), (9, 9)])),
    "a norm of one's own, of pieces": (dict(norm="of-pieces", momentum=0.9), {}),
    "a norm of one's own, matched": (dict(norm="of-pieces", scale="matched"), dict(dim=1)),
    "Adam": (ADAM, {}),
    "Adam, cut along dim 1": (ADAM | dict(metric_rule="max", agr=True, **DECAYS["ℓp"]), dict(dim=1, replicated=SOME)),
    "ℓ3 in adaptive coordinates, matched": (ADAM | LP | dict(scale="matched", agr=True), dict(dim=1)),
    "ℓ3 in adaptive coordinates, over a group": (ADAM | LP | dict(scope="group"), dict(replicated=SOME)),
    "spectral in adaptive coordinates": (ADAM | dict(norm="spectral", scale="unit"), {}),
    "Adan": (ADAM | dict(difference_beta=0.92, agr=True, weight_decay=0.1, decay="proximal"), dict(replicated=SOME)),
    "LAMB": (ADAM | dict(scale="relative", weight_decay=0.1, decay="inside"), dict(dim=1, replicated=SOME)),
    "NorMuon": (dict(norm="spectral", scale="unit", row_beta=0.9), {}),
    "NorMuon, cut along dim 1, on a sphere": (
        dict(norm="spectral", scale="unit", row_beta=0.9, constraint="sphere"),
        dict(dim=1, replicated=SOME),
    ),
    "NorMuon of stacks": (dict(norm="spectral", scale="unit", row_beta=0.9, norm_matrix_view="batch"), dict(dim=1)),
    "NorMuon, transposed": (dict(norm="spectral", scale="unit", row_beta=0.9, norm_matrix_view="transposed"), {}),
    "hyperball": (ADAM | dict(constraint="sphere"), dict(replicated=SOME)),
    "Stacey": (LP | dict(scale="power", eps=1e-4, coupling=0.1, momentum=0.9, momentum_rule="lion"), {}),
    "cautious": (ADAM | dict(weight_decay=0.5, decay="cautious-lp", decay_p=0.8), {}),
    "AGR over the group": (ADAM | dict(agr=True, agr_scope="group"), dict(replicated=SOME)),
    "mixed": (dict(norm="mixed", norm_p_inner=1.5, norm_p_outer=3.0), {}),
}
# Blocks of unequal rows, and the newer views: of 9 rows, which 2 and 4 ranks share unevenly, across the blocks' ends.
UNEQUAL: dict[str, Any] = dict(scale="unit", norm_blocks=(5, 3, 1), norm_aspect="rms")
TURNED: dict[str, Any] = dict(norm_matrix_view="batch-transposed")
OF_NINE: list[tuple[int, ...]] = [(9, 4), (9, 4), (9, 2, 3), (9,)]
STACKS: list[tuple[int, ...]] = [(5, 4, 9), (2, 3, 9), (2, 2, 3, 9), (4, 9)]
RARE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{norm}{', NorMuon' * bool(rows)}, unequal blocks{', turned' * turned}, cut along dim {dim}": (
        dict(norm=norm, **rows, **UNEQUAL, **(TURNED if turned else {})),
        dict(shapes=STACKS if turned else OF_NINE, dim=dim, replicated=(0,) * (dim == 1)),
    )
    for norm, rows in (("spectral", {}), ("spectral", dict(row_beta=0.9)), ("row", {}), ("column", {}))
    for turned in (False, True)
    for dim in range(2 + turned)
}
RARE |= {
    "rows, turned, dual": (dict(norm="row", **TURNED), dict(shapes=STACKS, dim=2)),
    "frobenius of patches": (dict(norm="frobenius", norm_aspect="rms", norm_matrix_view="patches"), {}),
    "nuclear, unequal blocks": (dict(UNEQUAL, norm="nuclear", scale="dual"), dict(shapes=OF_NINE)),
    "rows, unequal blocks, on 2 × 2": (dict(norm="row", **UNEQUAL), dict(shapes=OF_NINE, mesh=(2, 2))),
    "NorMuon, unequal blocks, on 2 × 2": (
        dict(norm="spectral", row_beta=0.9, **UNEQUAL),
        dict(shapes=OF_NINE, mesh=(2, 2)),
    ),
}
OFTEN = ("row, unequal blocks, cut along dim 0", "spectral, NorMuon, unequal blocks, turned, cut along dim 2")
RARELY = [pytest.param(case, marks=() if case in OFTEN else pytest.mark.exhaustive) for case in RARE]


@pytest.mark.parametrize("case", RARELY)
def test_unequal_blocks_and_stacks_turned_round(case: str, four: Ranks) -> None:
    settings, how = RARE[case]
    holds(four.call(cases.compare_as, ENGINE, settings, how))


@pytest.mark.parametrize("case", NORMS)
def test_every_norm_and_every_way_to_be_cut(case: str, ranks: Ranks) -> None:
    settings, how = NORMS[case]
    holds(ranks.call(cases.compare_as, ENGINE, settings, how))


@pytest.mark.parametrize("steps", [20, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_the_norm_stays_on_the_sphere(steps: int, ranks: Ranks) -> None:
    for found in ranks.call(cases.off_the_sphere, steps, timeout=1800):
        assert max(found["float32"], found["kahan"]) <= 1e-6, found
        assert found["nearest"] <= 2e-4, found


FUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dual": (dict(norm="lp", p=2.7, momentum=0.9, agr=True, **DECAYS["ℓp"]), {}),
    "unit": (dict(norm="lp", p=2.7, scale="unit", momentum=0.9, momentum_rule="ema", **DECAYS["decoupled"]), {}),
    "matched": (LP | dict(scale="matched", agr=True), dict(dim=1)),
    "∞, dual": (dict(norm="linf"), dict(replicated=SOME)),
    "power": (LP | dict(scale="power", agr=True), {}),
    "Adam": (ADAM | dict(agr=True, **DECAYS["ℓp"]), dict(replicated=SOME)),
    "ℓ3 in adaptive coordinates, matched": (ADAM | LP | dict(scale="matched", metric_rule="max"), dict(dim=1)),
    "LAMB": (ADAM | dict(scale="relative", weight_decay=0.1, decay="inside"), dict(dim=1)),
    "hyperball": (ADAM | dict(constraint="sphere"), dict(replicated=SOME)),
}


# Each has kernels of its own, which are compiled for it; those that are always run have every sum and every length.
ALWAYS = ("dual", "matched", "∞, dual", "Adam", "ℓ3 in adaptive coordinates, matched", "hyperball")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ALWAYS else pytest.mark.exhaustive) for case in FUSED]
)
def test_fused_steps_of_parts_are_the_for_loops_of_whole_tensors(case: str, ranks: Ranks) -> None:
    pytest.importorskip("numba")
    settings, how = FUSED[case]
    holds(ranks.call(cases.compare_as, ENGINE, settings | {"backend": {"fused": True}}, how))


def test_fused_signs_are_the_same_bits(ranks: Ranks) -> None:
    pytest.importorskip("numba")
    found = ranks.call(cases.compare_as, "signum", dict(backend={"fused": True}), {})
    assert worst(found)["unequal"] == 0


@pytest.mark.parametrize("name", ["lpsgdm", "normalizedsgd", "muon"])
def test_hsdp_replicates_what_it_cuts(name: str, four: Ranks) -> None:
    holds(four.call(cases.compare_as, name, dict(agr=name != "muon"), dict(mesh=(2, 2))))


@pytest.mark.parametrize(("scale", "rounding"), [("power", "nearest"), ("power", "kahan"), ("dual", "kahan")])
def test_16_bit_weights(scale: str, rounding: str, ranks: Ranks) -> None:
    settings = dict(scale=scale, rounding=rounding, state_dtype="float32")
    found = worst(ranks.call(cases.compare_as, "lpsgdm", settings, dict(dtype=torch.bfloat16)))
    # Weight and compensation hold 16 bits together, of which the last may be rounded otherwise.
    assert found["state"] <= 2**-16
    assert found["weights"] <= (0 if rounding == "kahan" else 2**-8)


def test_trajectories_that_run_free_stay_together(ranks: Ranks) -> None:
    settings = dict(momentum=0.9, agr=True, **DECAYS["decoupled"])
    holds(ranks.call(cases.compare_as, ENGINE, LP | settings, dict(reset=False, steps=20)), 1e-5)


def test_twenty_steps_in_float64_agree_to_its_roundoff(ranks: Ranks) -> None:
    settings = LP | dict(momentum=0.9, agr=True, scale="matched")
    holds(ranks.call(cases.compare_as, ENGINE, settings, dict(dtype=torch.float64, reset=False, steps=20)), 1e-13)


@pytest.mark.parametrize("name", ["normalizedsgd", "muon", "lpsgdm", "scale"])
def test_more_ranks_than_rows(name: str, four: Ranks) -> None:
    holds(four.call(cases.compare_as, name, dict(agr=True), dict(shapes=[(1, 3), (2, 5), (1,), (3, 1)])), 1e-4)


def test_what_is_collective_in_a_step_does_not_depend_on_the_number_of_tensors(ranks: Ranks) -> None:
    few, many = ([(5, 4), (3, 3)] * n for n in (1, 20))
    for settings, numbers in (  # of each tensor, in each all-gather, 8 bytes each
        (dict(norm="lp", p=3.0), [2]),
        (dict(norm="lp", p=3.0, agr=True), [3, 2]),
        (dict(norm="l1", agr=True), [3, 2]),
        (dict(norm="lp", p=3.0, scale="matched", agr=True), [3, 2, 4]),
        (dict(norm="lp", p=3.0, scale="power"), []),
        (dict(norm="linf", scale="unit"), []),
        (dict(norm="row", scale="unit"), [1]),
        (dict(norm="lp", p=3.0, agr=True, foreach=False), [3, 2]),
    ):
        for shapes in (few, many):
            counts = ranks.call(cases.collectives, settings, shapes)
            size = 8 * sum(numbers) * len(shapes) * (len(counts) - 1)  # from each other rank
            expected = {"all_gather": len(numbers), "bytes": size} if numbers else {}
            assert all(count == expected for count in counts), settings


def test_groups_share_their_collectives(ranks: Ranks) -> None:
    counts = ranks.call(cases.collectives_of_groups)
    assert counts[0] == {"all_gather": 2, "bytes": 8 * (3 + 2) * 3 * (len(counts) - 1)}


def test_two_all_to_alls_a_shape(ranks: Ranks) -> None:
    shapes = [(5, 4)] * 7 + [(3, 3)] * 4
    for settings in (dict(norm="spectral", scale="unit"), dict(norm="spectral", scale="dual", momentum=0.9)):
        assert ranks.call(cases.collectives, settings, shapes)[0]["all_to_all"] == 4


def test_bytes_are_those_of_the_documentations_arithmetic(four: Ranks) -> None:
    shapes = 2 * [(24, 8), (8, 8), (32, 8), (8, 32)]  # all ranks have parts of one size
    entries, n, k = sum(a * b for a, b in shapes), len(shapes), 4
    found = four.call(cases.collectives, dict(norm="spectral", scale="unit"), shapes)
    mean = sum(count["bytes"] for count in found) / k
    assert mean == 4 * (2 * entries / k + n) * (k - 1) / k
    assert all(count["all_to_all"] == 2 * len(set(shapes)) for count in found)
    for settings, numbers in ((dict(norm="lp", p=3.0), 2), (dict(norm="lp", p=3.0, agr=True), 3 + 2)):
        found = four.call(cases.collectives, settings, shapes)
        assert {count["bytes"] for count in found} == {8 * numbers * n * (k - 1)}


WHOLE: list[tuple[Norm, Scale]] = [(Schatten(3.0), scale) for scale in ("unit", "dual", "power", "matched")]
WHOLE += [(Mixed(2.0, 2.0), scale) for scale in ("unit", "dual", "matched")]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("norm", "scale"), WHOLE, ids=str)
def test_shares_are_what_gathering_all_would_give(norm: Norm, scale: Scale, dim: int, ranks: Ranks) -> None:
    assert all(ranks.call(cases.shares_and_gathered, norm, scale, dim))


def test_every_rank_maps_its_share(four: Ranks) -> None:
    assert sum(four.call(cases.mapped_here, [(6, 6)] * 8)) == 8
    assert max(four.call(cases.mapped_here, [(6, 6)] * 8)) == 2


REFUSED = {
    "two cuts": "HSDP",
    "partial": "Partial",
    "unlike chunk": "torch.chunk",
    "differentiable": "DTensors",
    "two meshes": "process group",
    "matrices over a group": "whole tensors",
    "p = 1 over a group, cut along dim 1": "whole tensors",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stepped_is_refused_with_a_reason(case: str, four: Ranks) -> None:
    said = four.call(cases.refused, case)[0]
    assert REFUSED[case] in said, said


@pytest.mark.parametrize(
    ("case", "words"),
    [("gradients", "how many"), ("order", "order"), ("p", "settings"), ("lr", "settings"), ("AGR", "settings")],
)
def test_ranks_that_would_step_otherwise_are_told_so_all_of_them(case: str, words: str, ranks: Ranks) -> None:
    for said in ranks.call(cases.disagreed, case):
        assert len(said) == 2
        assert all(words in message and "rank 1 from rank 0" in message for message in said)


def test_a_tensor_that_is_zero_on_one_rank_only_is_not_called_stuck(two: Ranks) -> None:
    assert two.call(cases.warned, "half zero") == [[], []]
    assert all("(4, 2)" in said[0] for said in two.call(cases.warned, "all zero"))


def test_gradients_that_lie_otherwise_are_brought_over(two: Ranks) -> None:
    assert two.call(cases.partial_gradients) == [True, True]

"""FSDP2, DDP, ZeRO-1 and checkpoints, in real trainings; and ranks that die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.patience import patience
from tests.sharding import training
from tests.sharding.cases import error
from tests.sharding.ranks import Ranks
from tests.versions import NEEDS_FSDP_ON_CPUS


@pytest.fixture(scope="package")
def one() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(error(a[key], b[key]) for key in a)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@NEEDS_FSDP_ON_CPUS
@pytest.mark.parametrize("method", training.METHODS)
def test_fsdp_trains_as_one_process_does(method: str, ranks: Ranks) -> None:
    sharded = ranks.call(training.trained, method, 0, 12, None, None)
    whole = ranks.call(training.trained, method, 0, 12, None, None, False)
    assert all(same(found, sharded[0]) for found in sharded)
    if method == "kahan":  # a last bit of bfloat16 more or less
        del sharded[0]["p"], whole[0]["p"]
        assert apart(sharded[0], whole[0]) <= 2**-6
    else:
        assert apart(sharded[0], whole[0]) <= 2e-5  # twelve steps of backward that run free


MOVED = [pytest.param(m, marks=[] if m in ("lpsgdm", "kahan") else pytest.mark.exhaustive) for m in training.METHODS]


@NEEDS_FSDP_ON_CPUS
@pytest.mark.parametrize("method", MOVED)
def test_checkpoints_are_resumed_on_any_number_of_ranks(
    method: str, one: Ranks, two: Ranks, four: Ranks, tmp_path: Path
) -> None:
    """2 → 2 bit for bit; 2 → 1 → 4 to roundoff."""
    at_2, at_1 = str(tmp_path / "two"), str(tmp_path / "one")
    straight = two.call(training.trained, method, 0, 12, None, None)[0]
    two.call(training.trained, method, 0, 4, None, at_2)
    assert same(two.call(training.trained, method, 4, 12, at_2, None)[0], straight)
    one.call(training.trained, method, 4, 8, at_2, at_1)
    moved = four.call(training.trained, method, 8, 12, at_1, None)[0]
    assert apart(moved, straight) <= (2**-6 if method == "kahan" else 2e-5)


@NEEDS_FSDP_ON_CPUS
@pytest.mark.parametrize("method", ["lpsgdm", "kahan", "heavy"])
def test_what_is_loaded_is_what_was_saved(method: str, two: Ranks, four: Ranks, tmp_path: Path) -> None:
    saved = two.call(training.trained, method, 0, 4, None, str(tmp_path / "x"))[0]
    assert same(four.call(training.trained, method, 4, 4, str(tmp_path / "x"), None)[0], saved)


OPTIMIZERS = [("lpsgdm", dict(scale="dual", agr=True)), ("sgd", dict(momentum=0.9)), ("muon", dict(method="svd"))]


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_ddp(name: str, settings: dict[str, object], views: bool, ranks: Ranks) -> None:
    """The same bits on every rank, the weights of one process with all of the data, and no collective in the step."""
    found = ranks.call(training.data_parallel, name, settings, views, False)
    for rank in found:
        assert rank["collectives"] == {}
        assert all(torch.equal(a, b) for a, b in zip(rank["weights"], found[0]["weights"], strict=True))
    assert max(error(a, b) for a, b in zip(found[0]["weights"], found[0]["alone"], strict=True)) <= 2e-5


@pytest.mark.parametrize("fused", [False, True])
def test_ddp_fused(fused: bool, ranks: Ranks) -> None:
    pytest.importorskip("numba")
    found = ranks.call(training.data_parallel, "lpsgdm", dict(p=3.0, scale="dual", fused=fused), True, False)
    assert all(torch.equal(a, b) for r in found for a, b in zip(r["weights"], found[0]["weights"], strict=True))


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_zero_redundancy(name: str, settings: dict[str, object], two: Ranks) -> None:
    """ZeRO-1 by torch's own wrapper: the same weights as DDP's, and each rank keeps a part of the state."""
    plain = two.call(training.data_parallel, name, settings, False, False)
    zero = two.call(training.data_parallel, name, settings, False, True)
    for rank in zero:
        assert all(torch.equal(a, b) for a, b in zip(rank["weights"], plain[0]["weights"], strict=True))
    assert sum(rank["states"] for rank in zero) == plain[0]["states"]
    assert all(0 < rank["states"] < plain[0]["states"] for rank in zero)


TIMEOUT = patience(7)  # seconds, of the process group


@NEEDS_FSDP_ON_CPUS
def test_a_killed_rank_fails_the_others_and_the_job_goes_on_from_its_last_checkpoint(
    two: Ranks, tmp_path: Path
) -> None:
    expected = two.call(training.trained, "dual", 0, 8, None, None)[0]
    ranks = Ranks(2, TIMEOUT)
    try:
        ranks.send(training.killed, str(tmp_path), 1, 5, 8)
        said = ranks.receive(0, TIMEOUT + patience(10))
        seconds, message = said.split(" ", 1)
        assert "Error" in message, said
        assert float(seconds) <= TIMEOUT + patience(3)
        ranks.processes[1].join(patience(3))
        assert not ranks.processes[1].is_alive()
    finally:
        ranks.stop()
    last = max(tmp_path.iterdir(), key=lambda p: int(p.name.split("-")[1]))
    assert last.name == "step-5"
    again = Ranks(2, TIMEOUT)
    try:
        found = again.call(training.trained, "dual", 5, 8, str(last), None)
    finally:
        again.stop()
    assert same(found[0], expected)


@pytest.mark.exhaustive
def test_a_rank_that_dies_in_a_step_fails_the_others_in_time() -> None:
    ranks = Ranks(2, TIMEOUT)
    try:
        ranks.send(training.dies_in_the_step, 1)
        said = ranks.receive(0, TIMEOUT + patience(10))
    finally:
        ranks.stop()
    seconds, message = said.split(" ", 1)
    assert "Error" in message, said
    assert float(seconds) <= TIMEOUT + patience(3)

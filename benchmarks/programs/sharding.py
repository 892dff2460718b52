"""What ranks tell each other in a step of sharded tensors: collectives and bytes, counted on gloo and on paper."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import DEFAULT, patch

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch.multiprocessing.spawn import spawn

import normopt
from benchmarks.progress import Advance

RANKS = (2, 4)
Shape = tuple[int, ...]
# Of width d: what two blocks of a transformer have, with biases. All ranks have parts of one size.
WIDTHS = (32, 64)


class Method(NamedTuple):
    """An optimizer of the study.

    Attributes:
        settings: of `normopt.SteepestDescent`.
        gathered: how many numbers of each tensor travel in each all-gather.
        whole: whether whole matrices do, so that each rank maps its share of them.
    """

    settings: dict[str, Any]
    gathered: tuple[int, ...]
    whole: bool = False


METHODS = {
    "signs": Method(dict(norm="linf", scale="unit"), ()),
    "ℓp, power (LPSGD)": Method(dict(norm="lp", p=3.0, scale="power"), ()),
    "ℓp, dual": Method(dict(norm="lp", p=3.0), (2,)),
    "ℓp, dual, AGR": Method(dict(norm="lp", p=3.0, agr=True), (3, 2)),
    "ℓp, matched, AGR": Method(dict(norm="lp", p=3.0, scale="matched", agr=True), (3, 2, 4)),
    "rows, unit (SCALE)": Method(dict(norm="row", scale="unit"), (1,)),
    "spectral, unit (Muon)": Method(dict(norm="spectral", scale="unit"), (), whole=True),
}


class Traffic(BaseModel):
    """Of one step.

    Attributes:
        collectives: how many.
        received: bytes that a rank gets from others, the mean over the ranks.
    """

    model_config = ConfigDict(extra="forbid")

    collectives: int
    received: float


class Case(BaseModel):
    """A method on a model, on so many ranks."""

    model_config = ConfigDict(extra="forbid")

    method: str
    width: int
    tensors: int
    parameters: int
    ranks: int
    counted: Traffic


class Sharding(BaseModel):
    """The whole measurement."""

    model_config = ConfigDict(extra="forbid")

    torch: str
    cases: list[Case]


def shapes_of(method: Method, width: int) -> list[Shape]:
    """The tensors that are stepped; only matrices, where whole ones travel."""
    block: list[Shape] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors: list[Shape] = [] if method.whole else [(3 * width,), (width,), (4 * width,), (width,)]
    return 2 * (block + vectors)


def on_paper(method: Method, shapes: Sequence[Shape], ranks: int, entry: int = 4) -> Traffic:
    """What a step tells, by arithmetic, where all parts are of one size.

    ::

        all-gathers   one a phase; of each of n tensors w numbers of 8 bytes, from k − 1 ranks:   8·w·n·(k − 1)
        all-to-alls   two a shape; P entries in all, of which a rank maps a k-th:
                      in:     P/k · (k − 1)/k entries
                      back:   the same, and a number of each tensor that others map:   n·(k − 1)/k entries

    Args:
        method: which.
        shapes: of the n tensors.
        ranks: k.
        entry: bytes of an entry of what the norm is given: 4 unless weights are in float64.
    """
    n, away = len(shapes), (ranks - 1) / ranks
    if ranks == 1:
        return Traffic(collectives=0, received=0)
    received = 8.0 * sum(method.gathered) * n * (ranks - 1)
    collectives = len(method.gathered)
    if method.whole:
        entries = sum(torch.Size(s).numel() for s in shapes)
        received += entry * away * (2 * entries / ranks + n)
        collectives += 2 * len(set(shapes))
    return Traffic(collectives=collectives, received=received)


def gathered_once(shapes: Sequence[Shape], ranks: int, entry: int = 4) -> Traffic:
    """What it would be if every rank were given every matrix, one all-gather each."""
    entries = sum(torch.Size(s).numel() for s in shapes)
    return Traffic(collectives=len(shapes), received=entry * entries * (ranks - 1) / ranks)


def of_fsdp(parameters: int, ranks: int, entry: int = 4) -> float:
    """The bytes that a rank receives in FSDP2's own step: weights gathered twice, gradients reduced and scattered."""
    return 3.0 * entry * parameters * (ranks - 1) / ranks


def count() -> int:
    """How many numbers of ranks there are."""
    return len(RANKS)


def measure(advance: Advance) -> Sharding:
    """Count in processes of their own; ``advance`` is told of each number of ranks."""
    cases = []
    for k in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (k, folder, list(WIDTHS)), nprocs=k)  # type: ignore[no-untyped-call]
            found = [json.loads((Path(folder) / f"{r}.json").read_text(encoding="utf-8")) for r in range(k)]
        for i, (name, width) in enumerate((name, width) for name in METHODS for width in WIDTHS):
            shapes = shapes_of(METHODS[name], width)
            counted = [rank[i] for rank in found]
            assert len({c for c, _ in counted}) == 1
            traffic = Traffic(collectives=counted[0][0], received=sum(b for _, b in counted) / k)
            cases.append(
                Case(
                    method=name,
                    width=width,
                    tensors=len(shapes),
                    parameters=sum(torch.Size(s).numel() for s in shapes),
                    ranks=k,
                    counted=traffic,
                )
            )
        advance("sharding", 1)
    return Sharding(torch=torch.__version__.split("+")[0], cases=cases)


def _rank(rank: int, ranks: int, folder: str, widths: list[int]) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = _counts(rank, ranks, widths)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    gc.collect()  # sharded tensors first: a group that is taken down while they hold it can abort the process
    dist.barrier()
    dist.destroy_process_group()


def _counts(rank: int, ranks: int, widths: list[int]) -> list[list[int]]:
    """[collectives, bytes received] of every method and width."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    found = []
    for method in METHODS.values():
        for width in widths:
            torch.manual_seed(0)
            params = []
            for shape in shapes_of(method, width):
                p = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)], src_data_rank=None))
                p.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)], src_data_rank=None)
                params.append(p)
            opt = normopt.SteepestDescent(params, lr=0.1, **method.settings)
            opt.step()
            found.append(_count(opt.step, rank))
    return found


def _count(step: Any, rank: int) -> list[int]:
    counts = [0, 0]

    def gather(into: list[torch.Tensor], mine: torch.Tensor, **_: Any) -> Any:
        counts[0] += 1
        counts[1] += (len(into) - 1) * mine.numel() * mine.element_size()
        return DEFAULT  # then it is done

    def swap(into: torch.Tensor, mine: torch.Tensor, sizes: list[int], _: list[int], **__: Any) -> Any:
        counts[0] += 1
        counts[1] += (sum(sizes) - sizes[rank]) * mine.element_size()
        return DEFAULT

    with (
        patch.object(dist, "all_gather", wraps=dist.all_gather, side_effect=gather),
        patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single, side_effect=swap),
    ):
        step()
    return counts


def lines(result: Sharding) -> list[str]:
    """A line for each method, model and number of ranks."""
    return [
        f"{c.method}, {c.tensors} tensors, {c.parameters} parameters, {c.ranks} ranks: {c.counted.collectives} "
        f"collectives, {c.counted.received:.0f} bytes a rank (on paper {expected(c).received:.0f})"
        for c in result.cases
    ]


def expected(case: Case) -> Traffic:
    """What arithmetic says of a case."""
    method = METHODS[case.method]
    return on_paper(method, shapes_of(method, case.width), case.ranks)

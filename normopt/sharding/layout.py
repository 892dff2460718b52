"""The sharding of a tensor over ranks, and its local shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Layout:
    """The sharding of a tensor along one dim over the ranks of a process group, in their order; the last may be empty.

    Attributes:
        group: the process group.
        ranks, rank: the number of ranks, and the index of this one.
        dim: the sharded dim, split as by torch.chunk.
        shape: the shape of the whole tensor.
    """

    group: ProcessGroup
    ranks: int
    rank: int
    dim: int
    shape: torch.Size

    def lengths(self) -> list[int]:
        """Return the length of each rank's shard along the sharded dim."""
        length = self.shape[self.dim]
        each = -(-length // self.ranks)
        return [max(0, min(each, length - r * each)) for r in range(self.ranks)]

    def shapes(self) -> list[list[int]]:
        """Return the shape of each rank's shard."""
        return [[*self.shape[: self.dim], n, *self.shape[self.dim + 1 :]] for n in self.lengths()]


def is_dtensor(x: object) -> bool:
    """Return whether x is a DTensor, without importing DTensor."""
    return hasattr(x, "device_mesh") and hasattr(x, "to_local")


def any_dtensor(params: Iterable[object]) -> bool:
    """Return whether any parameter is a DTensor."""
    return any(map(is_dtensor, params))


def to_local(x: Tensor) -> Tensor:
    """Return the local shard of a DTensor, which shares its memory; return any other tensor unchanged."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():
        here = cast("DTensor", x).to_local()
    # The result of an asynchronous collective.
    return cast(Tensor, cast(Any, here).wait()) if hasattr(here, "wait") else here.detach()


def full_tensor(x: Tensor) -> Tensor:
    """Gather a DTensor on every rank; return any other tensor unchanged."""
    return cast(Tensor, cast(Any, x.detach()).full_tensor()) if is_dtensor(x) else x


def to_dtensor_like(x: Tensor, like: Tensor) -> Tensor:
    """Return a local shard as a DTensor with the placements of ``like``, sharing memory; x if like is no DTensor."""
    if not is_dtensor(like):
        return x
    from torch.distributed.tensor import DTensor

    place = cast(DTensor, like)
    return DTensor.from_local(
        x, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )


def layout_of(x: Tensor) -> Layout | None:
    """Return how a tensor is sharded; None if every rank has all of it.

    Raises:
        ValueError: a DTensor is sharded along several dims of its mesh, or holds partial sums.
    """
    if not is_dtensor(x):
        return None
    from torch.distributed.tensor import DTensor, Shard

    d = cast(DTensor, x)
    mesh = d.device_mesh
    # A mesh dim of one rank does not shard; partial sums over it still need a reduction.
    cut = [i for i, p in enumerate(d.placements) if not p.is_replicate() and (mesh.size(i) > 1 or p.is_partial())]
    if not cut:
        return None
    if len(cut) > 1 or type(d.placements[cut[0]]) is not Shard:
        raise ValueError(
            f"{_described(d)}, but normopt takes tensors that are sharded along one dim of the mesh, by Shard, and "
            "replicated along the others: FSDP2 on one dim, HSDP, or tensor parallelism without FSDP"
        )
    dim = cast(Shard, d.placements[cut[0]]).dim % max(d.dim(), 1)
    return Layout(mesh.get_group(cut[0]), *_place(mesh, cut[0]), dim, d.shape)


# Only numbers are cached. A reference to a mesh or a group would keep it alive after it was destroyed, and gloo would
# then abort at the interpreter's exit.
_places: WeakKeyDictionary[DeviceMesh, dict[tuple[int, int], tuple[int, int]]] = WeakKeyDictionary()


def _place(mesh: DeviceMesh, of_mesh: int) -> tuple[int, int]:
    """Return the number of ranks along a dim of a mesh and this rank's index; cached, because it takes 10 µs."""
    known = _places.setdefault(mesh, {})
    key = dist.get_rank(), of_mesh
    if key not in known:
        known[key] = mesh.size(of_mesh), mesh.get_local_rank(of_mesh)
    return known[key]


def check_parts(params: Iterable[Tensor]) -> None:
    """Raise unless the local shards have the shapes that their layouts give.

    Raises:
        ValueError: a DTensor is not split as by torch.chunk, or the order of the ranks in its mesh and group differs.
    """
    for p in params:
        layout, here = layout_of(p), list(to_local(p).shape)
        if layout and (here != layout.shapes()[layout.rank] or layout.rank != dist.get_rank(layout.group)):
            raise ValueError(
                f"{_described(cast('DTensor', p))}, of which rank {layout.rank} has {tuple(here)}, not the shard that "
                "torch.chunk would give it: distribute it with torch.distributed.tensor.distribute_tensor"
            )


def rows_of_shard(rows: Tensor, layout: Layout | None) -> Tensor:
    """Return the part of one number a row (other dims are 1) that belongs to this rank's shard; it shares memory."""
    if layout is None or rows.shape[layout.dim] == 1 != layout.shape[layout.dim]:
        return rows
    lengths = layout.lengths()
    return rows.narrow(layout.dim, sum(lengths[: layout.rank]), lengths[layout.rank])


def _described(d: DTensor) -> str:
    mesh = tuple(d.device_mesh.shape)
    return f"a parameter of shape {tuple(d.shape)} has the placements {d.placements} on a mesh of {mesh}"


def resolved(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: a copy if it is a lazy view (conjugated or negated)."""
    return x.resolve_conj().resolve_neg()


def gradient_of(p: Tensor) -> Tensor:
    """Return the gradient of a parameter's local shard."""
    grad = cast(Tensor, p.grad)
    if is_dtensor(p) and is_dtensor(grad):
        place, given = cast("DTensor", p), cast("DTensor", grad)
        if place.placements != given.placements:  # such as partial sums, under tensor parallelism
            grad = given.redistribute(placements=place.placements)
    grad = to_local(grad)
    return resolved(cast(Any, grad).wait() if hasattr(grad, "wait") else grad)  # of an asynchronous collective

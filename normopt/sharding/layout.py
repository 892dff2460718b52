"""How a tensor lies over ranks: which part of it is here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut along one dim over the ranks of a process group, in their order; the last parts may be empty.

    Attributes:
        group: the process group.
        ranks, rank: how many they are, and which this one is.
        dim: the dim that is cut, as torch.chunk does.
        shape: of the whole tensor.
    """

    group: ProcessGroup
    ranks: int
    rank: int
    dim: int
    shape: torch.Size

    def lengths(self) -> list[int]:
        """How long each rank's part is along the dim that is cut."""
        length = self.shape[self.dim]
        each = -(-length // self.ranks)
        return [max(0, min(each, length - r * each)) for r in range(self.ranks)]

    def shapes(self) -> list[list[int]]:
        """The shape of each rank's part."""
        return [[*self.shape[: self.dim], n, *self.shape[self.dim + 1 :]] for n in self.lengths()]


def is_dtensor(x: object) -> bool:
    """Whether it is a DTensor, of which nothing is imported to say so."""
    return hasattr(x, "device_mesh") and hasattr(x, "to_local")


def any_dtensor(params: Iterable[object]) -> bool:
    """Whether any of them is a DTensor."""
    return any(map(is_dtensor, params))


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is here, sharing its memory: all of it, unless it is a DTensor."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():
        here = cast("DTensor", x).to_local()
    # What a collective is still bringing.
    return cast(Tensor, cast(Any, here).wait()) if hasattr(here, "wait") else here.detach()


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank: itself, unless it is a DTensor, of which the parts are brought together."""
    return cast(Tensor, cast(Any, x.detach()).full_tensor()) if is_dtensor(x) else x


def spread(x: Tensor, like: Tensor) -> Tensor:
    """What `local` of a tensor that lies as ``like`` does would be, as such a tensor, sharing its memory."""
    if not is_dtensor(like):
        return x
    from torch.distributed.tensor import DTensor

    place = cast(DTensor, like)
    return DTensor.from_local(
        x, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )


def layout_of(x: Tensor) -> Layout | None:
    """How a tensor is cut; None if every rank has all of it.

    Raises:
        ValueError: a DTensor that is cut along several dims of its mesh, or holds partial sums.
    """
    if not is_dtensor(x):
        return None
    from torch.distributed.tensor import DTensor, Shard

    d = cast(DTensor, x)
    mesh = d.device_mesh
    # A dim of one rank cuts nothing, but partial sums are none of the whole.
    cut = [i for i, p in enumerate(d.placements) if not p.is_replicate() and (mesh.size(i) > 1 or p.is_partial())]
    if not cut:
        return None
    if len(cut) > 1 or type(d.placements[cut[0]]) is not Shard:
        raise ValueError(
            f"{_described(d)}, and normopt takes tensors that one dim of the mesh cuts, by Shard, and the others "
            "replicate: FSDP2 on one dim, HSDP, or tensor parallelism without FSDP"
        )
    dim = cast(Shard, d.placements[cut[0]]).dim % max(d.dim(), 1)
    ranks, rank = _place(mesh, cut[0])
    return Layout(mesh.get_group(cut[0]), ranks, rank, dim, d.shape)


# Numbers alone: what held a mesh or a group would keep it alive after it was taken down, which gloo answers by an abort
# at the interpreter's exit.
_places: WeakKeyDictionary[DeviceMesh, dict[tuple[int, int], tuple[int, int]]] = WeakKeyDictionary()


def _place(mesh: DeviceMesh, of_mesh: int) -> tuple[int, int]:
    """(how many ranks, which one this is) along a dim of a mesh, which takes ten microseconds to tell."""
    known = _places.setdefault(mesh, {})
    key = torch.distributed.get_rank(), of_mesh
    if key not in known:
        known[key] = mesh.size(of_mesh), mesh.get_local_rank(of_mesh)
    return known[key]


def check_parts(params: Iterable[Tensor]) -> None:
    """Raise unless the parts that are here are those that their layouts say.

    Raises:
        ValueError: a DTensor that is cut unlike torch.chunk, or whose mesh counts the ranks in another order.
    """
    for p in params:
        layout = layout_of(p)
        if layout is None:
            continue
        here = tuple(local(p).shape)
        if list(here) != layout.shapes()[layout.rank] or layout.rank != torch.distributed.get_rank(layout.group):
            raise ValueError(
                f"{_described(cast('DTensor', p))}, of which rank {layout.rank} has {here}, not the part that "
                "torch.chunk would give it: distribute it with torch.distributed.tensor.distribute_tensor"
            )


def _described(d: DTensor) -> str:
    return f"a parameter of shape {tuple(d.shape)} lies as {d.placements} on a mesh of {tuple(d.device_mesh.shape)}"


def resolved(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: a copy, if a conjugation or a negation is pending (lazy views)."""
    return x.resolve_conj().resolve_neg()


def gradient_of(p: Tensor) -> Tensor:
    """The part of the gradient that belongs to the part of the parameter that is here."""
    grad = cast(Tensor, p.grad)
    if is_dtensor(p) and is_dtensor(grad):
        place, given = cast("DTensor", p), cast("DTensor", grad)
        if place.placements != given.placements:  # such as partial sums, under tensor parallelism
            grad = given.redistribute(placements=place.placements)
    grad = local(grad)
    return resolved(cast(Any, grad).wait() if hasattr(grad, "wait") else grad)  # of a collective that is under way

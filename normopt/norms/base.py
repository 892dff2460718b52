"""What a norm is to an optimizer: three small functions, and everything that follows from them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor

from normopt._checks import equals, is_low_precision

T = TypeVar("T")
Needs = Literal["none", "tensor", "rows", "matrix"]
Scale = Literal["power", "dual", "unit", "matched"]


class Norm(ABC):
    """A norm ‖·‖, seen from the side that an optimizer needs: its dual.

    The dual norm is ``‖g‖⋆ = max ⟨g, d⟩ over ‖d‖ ≤ 1``, and the dual map (the LMO, up to its sign)
    is where that maximum is reached::

        D(g) = argmax ⟨g, d⟩ over ‖d‖ ≤ 1          ⟨g, D(g)⟩ = ‖g‖⋆,  ‖D(g)‖ = 1,  D(0) = 0

    A norm is written as three functions over a list of n tensors, split so that one definition serves
    a tensor, a whole param group as one vector, two phases of a kernel, and shards on many ranks::

        measure(c)               → partials, shape [n, w]      what each tensor adds to the reduction
        combine(partials)        → scalars, shape [..., s]     reduces dim -2; scalars[..., 0] is ‖·‖⋆
        apply(c, scalars, kappa) → ‖c‖⋆^kappa · D(c)           kappa = 0 (unit) or 1 (dual)

    and ``norm`` itself. To write only a dual norm and a dual map, start from
    [`TensorNorm`][normopt.norms.TensorNorm]. Fields of the norm (such as p) are dataclass fields:
    primitive values, which is how they live in a param group.

    Attributes:
        power_exponent: κ of the "power" scale ``‖c‖⋆^κ D(c)``; None where "power" means nothing.
        spans_groups: whether many tensors can be one vector of it, as ``scope="group"`` asks.
        power_takes_eps: whether its power map has a form with ε > 0.
        differentiable: whether autograd gets the derivative of its maps right.
        batches: whether tensors of one shape are faster together than one by one, on a CPU too.

    Source: the frame is Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv:2409.20325; the split, ours.
    """

    spans_groups: ClassVar[bool] = True
    power_takes_eps: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    batches: ClassVar[bool] = False

    def __repr__(self) -> str:
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        said = []
        for f in fields:
            value = getattr(self, f.name)
            if value != f.default:
                said.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
        return f"{type(self).__name__}({', '.join(said)})"

    @property
    def power_exponent(self) -> float | Tensor | None:
        """κ of the "power" scale, a number or 0-d; None where "power" means nothing, as it is here."""
        return None

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """‖x‖, 0-d, of one tensor of any shape.

        Args:
            x: of real floats.

        Raises:
            TypeError: x is complex, or of integers.
        """

    @abstractmethod
    def measure(self, c: list[Tensor]) -> Tensor:
        """What each of n tensors adds to the reduction: shape [n, w].

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
        """

    @abstractmethod
    def combine(self, partials: Tensor) -> Tensor:
        """The scalars of one vector, shape [..., s], from the partials of its k pieces.

        Args:
            partials: what ``measure`` gave, shape [..., k, w].
        """

    @abstractmethod
    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        """``‖c‖⋆^kappa · D(c)`` as new tensors.

        Args:
            c: the n tensors that were measured.
            scalars: what ``combine`` gave, one row a tensor: shape [n, s].
            kappa: 0, 1 or ``power_exponent``, a number or 0-d.

        Returns:
            n tensors, shaped and typed like those of c.
        """

    def numbered(self, partials: Tensor, by: list[int]) -> Tensor:
        """The partials or scalars with every place of a piece raised; as they are, for a norm that keeps no places.

        Called where a tensor's pieces lie on several ranks, which each count their own from 0.

        Args:
            partials: what ``measure`` or ``combine`` gave, shape [n, w].
            by: by how much, for each of the n.
        """
        return partials

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """The un-normalised power map ``‖c‖⋆^κ · D(c)`` with κ = ``power_exponent``; ε is 0 in this form.

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
            eps: ε ≥ 0, which only norms with ``power_takes_eps`` read. Default 0.

        Returns:
            n new tensors, shaped and typed like those of c.

        Raises:
            ValueError: the norm declares no power exponent.
        """
        if self.power_exponent is None:
            raise ValueError(f'scale="power" is not defined for {self}: use "dual", "unit" or "matched"')
        return self.scaled(c, self.power_exponent, whole_group=False)[0]

    def needs(self, scale: Scale) -> Needs:
        """What must be whole before the direction under a scale is known: of a tensor that lies on many ranks, too.

        ::

            "none"     nothing: the direction is elementwise, and the ``power`` map whatever the scale
            "tensor"   the scalars, combined from partials of any pieces of its entries, in any dim
            "rows"     every row, of a MatrixNorm
            "matrix"   the whole tensor

        Args:
            scale: "power", "dual", "unit" or "matched".

        Returns:
            "none", "tensor", "rows" or "matrix".
        """
        return "tensor"

    def check(self, scale: Scale, params: list[Tensor]) -> None:  # noqa: B027 (most norms take everything)
        """Refuse, before every step, what this norm cannot do.

        Args:
            scale: "power", "dual", "unit" or "matched".
            params: the group's parameters, of any shapes.

        Raises:
            ValueError: the norm cannot do this scale, or a parameter's shape or dtype.
        """

    def scaled(self, c: list[Tensor], kappa: float | Tensor, whole_group: bool) -> tuple[list[Tensor], Tensor]:
        """``‖c‖⋆^kappa · D(c)`` of each tensor, or of all of them as one vector; and the dual norms, shape [n].

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
            kappa: 0, 1 or ``power_exponent``, a number or 0-d.
            whole_group: whether they are one vector, which has one dual norm, n times.
        """
        partials = self.measure(c)
        scalars = self.combine(partials).expand(len(c), -1) if whole_group else self.combine(partials[:, None])
        return self.apply(c, scalars, kappa), scalars[:, 0]

    def on(self, device: torch.device) -> Norm:
        """This norm with its tensor fields, if it has any, on a device.

        Args:
            device: where they are needed.
        """
        return self

    def is_identity(self, scale: Scale) -> bool:
        """Whether the direction under a scale is its input itself, so that nothing has to run.

        Args:
            scale: "power", "dual", "unit" or "matched".
        """
        return False

    @overload
    def dual_norm(self, x: Tensor) -> Tensor: ...
    @overload
    def dual_norm(self, x: list[Tensor]) -> list[Tensor]: ...

    def dual_norm(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """‖x‖⋆, 0-d, of a tensor of any shape, or of each tensor of a list (float32 for 16-bit input).

        Args:
            x: of real floats, or a list of such.

        Raises:
            TypeError: a tensor is complex, or of integers.
        """
        if isinstance(x, Tensor):
            return self.dual_norm([x])[0]
        return [self.combine(self.measure([to_compute_dtype(t)])[:, None])[0, 0] for t in x]

    @overload
    def dual_map(self, x: Tensor) -> Tensor: ...
    @overload
    def dual_map(self, x: list[Tensor]) -> list[Tensor]: ...

    def dual_map(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """D(x), shaped and typed like x and never sharing its memory, of a tensor or of each of a list.

        Args:
            x: of real floats, or a list of such.

        Raises:
            TypeError: a tensor is complex, or of integers.
        """
        if isinstance(x, Tensor):
            return self.dual_map([x])[0]
        c = [to_compute_dtype(t) for t in x]
        d = [self.scaled([t], 0, whole_group=False)[0][0] for t in c]
        return [u.to(t.dtype) for u, t in zip(d, x, strict=True)]


class TensorNorm(Norm):
    """The quick start: a norm written as ``dual_norm`` and ``dual_map`` of one tensor.

    Subclasses define those two (each on ONE tensor) and, if it is to be read, ``norm``; the split into
    measure, combine and apply is then made from them. What that costs: nothing can be shared between
    tensors, so ``scope="group"`` is refused, and its methods take no lists.

    Source: ours.
    """

    spans_groups: ClassVar[bool] = False

    def needs(self, scale: Scale) -> Needs:
        """The whole tensor: "matrix".

        Args:
            scale: "power", "dual", "unit" or "matched".
        """
        return "matrix"

    def norm(self, x: Tensor) -> Tensor:
        """‖x‖, 0-d, for a subclass to define, if it is to be read.

        Args:
            x: one tensor of any shape.

        Raises:
            NotImplementedError: the subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no primal norm")

    def dual_norm(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """‖x‖⋆, 0-d or of one element, for a subclass to define.

        Args:
            x: one tensor of any shape, of 32 bits or more.

        Raises:
            NotImplementedError: the subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dual_norm(x) on one tensor")

    def dual_map(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """D(x), a new tensor shaped like x, for a subclass to define.

        Args:
            x: one tensor of any shape, of 32 bits or more.

        Raises:
            NotImplementedError: the subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dual_map(x) on one tensor")

    def measure(self, c: list[Tensor]) -> Tensor:
        """The dual norms, shape [n, 1].

        Args:
            c: n tensors of any shapes.

        Raises:
            TypeError: ``dual_norm`` returned no tensor of one element.
            NotImplementedError: the subclass has no ``dual_norm``.
        """
        norms = [self.dual_norm(x) for x in c]
        for n in norms:
            if not isinstance(n, Tensor) or n.numel() != 1:
                raise TypeError(f"{self!r}.dual_norm must return a tensor of one element, but returned {n!r}")
        return stack([n.reshape(()) for n in norms])[:, None]

    def combine(self, partials: Tensor) -> Tensor:
        """The dual norm, shape [..., 1], of one piece.

        Args:
            partials: what ``measure`` gave, shape [..., 1, 1].

        Raises:
            ValueError: there are several pieces.
        """
        if partials.shape[-2] != 1:
            raise ValueError(f'{type(self).__name__} knows one tensor at a time: use scope="tensor"')
        return partials[..., 0, :]

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        """``‖c‖⋆^kappa · D(c)``, shaped like the tensors of c.

        Args:
            c: n tensors of any shapes.
            scalars: their dual norms, shape [n, 1].
            kappa: a number or 0-d.

        Raises:
            TypeError: ``dual_map`` returned no tensor of its input's shape.
            NotImplementedError: the subclass has no ``dual_map``.
        """
        d = [self.dual_map(x) for x in c]
        for u, x in zip(d, c, strict=True):
            if not isinstance(u, Tensor) or u.shape != x.shape:
                got = f"one of shape {tuple(u.shape)}" if isinstance(u, Tensor) else repr(u)
                raise TypeError(f"{self!r}.dual_map must return a tensor of shape {tuple(x.shape)}, but returned {got}")
        return d if equals(kappa, 0) else [u * n.to(u) for u, n in zip(d, scalars[:, 0] ** kappa, strict=True)]


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, sharing its memory; a real one as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def num_reals(x: Tensor) -> int:
    """How many real numbers a tensor holds; all of it, if it is a DTensor."""
    return x.numel() * (2 if x.is_complex() else 1)


def to_compute_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic is done in: float32 for 16-bit floats, else its own."""
    if not x.is_floating_point():
        raise TypeError(f"a norm takes real floating-point tensors, but was given {x.dtype}: convert it first")
    return x.float() if is_low_precision(x) else x


def stack(scalars: list[Tensor]) -> Tensor:
    """0-d or 1-d tensors, on whatever devices, stacked on the device of the first."""
    return torch.stack([s.to(scalars[0].device) for s in scalars])


def without_autocast(kinds: Iterable[str], function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` with autocast off on these types of devices: it would make matrix products in 16 bits."""
    for kind in kinds:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return without_autocast(kinds, function, *args)
    return function(*args)

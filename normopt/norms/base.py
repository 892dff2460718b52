"""The interface of a norm: three functions over a list of tensors, and the methods derived from them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from normopt._checks import equals, is_low_precision

T = TypeVar("T")
K = TypeVar("K")
TensorOrList = TypeVar("TensorOrList", Tensor, list[Tensor])
Needs = Literal["none", "tensor", "rows", "matrix"]
Scale = Literal["power", "dual", "unit", "matched"]


class Norm(ABC):
    """A norm ‖·‖ with its dual norm and dual map, which are what an optimizer uses.

    The dual norm is ``‖g‖⋆ = max ⟨g, d⟩ over ‖d‖ ≤ 1``. The dual map (the LMO, up to its sign)
    is the maximiser::

        D(g) = argmax ⟨g, d⟩ over ‖d‖ ≤ 1          ⟨g, D(g)⟩ = ‖g‖⋆,  ‖D(g)‖ = 1,  D(0) = 0

    A norm is defined by three functions over a list of n tensors. The split lets one definition serve a
    single tensor, a whole param group as one vector, a two-phase kernel, and shards on many ranks::

        measure(c)               → partials, shape [n, w]      each tensor's contribution to the reduction
        combine(partials)        → scalars, shape [..., s]     reduces dim -2; scalars[..., 0] is ‖·‖⋆
        apply(c, scalars, kappa) → ‖c‖⋆^kappa · D(c)           kappa = 0 (unit) or 1 (dual)

    and by ``norm`` itself. To write only a dual norm and a dual map, subclass
    [`TensorNorm`][normopt.norms.TensorNorm] instead. A norm's settings (such as p) are dataclass fields with
    primitive values, so that a param group can store them.

    Attributes:
        power_exponent: κ of the "power" scale ``‖c‖⋆^κ D(c)``; None if that scale is undefined.
        spans_groups: whether the norm can treat many tensors as one vector, as ``scope="group"`` requires.
        power_takes_eps: whether the power map has a form with ε > 0.
        differentiable: whether autograd differentiates the maps correctly.
        batches: whether batching tensors of equal shape is faster than a loop, on CPU too.

    Source: the framework is Bernstein and Newhouse, "Old Optimizer, New Norm", arXiv:2409.20325; the split is ours.
    """

    spans_groups: ClassVar[bool] = True
    power_takes_eps: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    batches: ClassVar[bool] = False

    def __repr__(self) -> str:
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        changed = {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}
        shown = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def power_exponent(self) -> float | Tensor | None:
        """The exponent κ of the "power" scale, a number or 0-d; None (the default) if that scale is undefined."""
        return None

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖, 0-d.

        Args:
            x: a real floating-point tensor of any shape.

        Raises:
            TypeError: x is complex or integer.
        """

    @abstractmethod
    def measure(self, c: list[Tensor]) -> Tensor:
        """Return each tensor's contribution to the reduction, shape [n, w].

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
        """

    @abstractmethod
    def combine(self, partials: Tensor) -> Tensor:
        """Reduce the partials of a vector's k pieces to its scalars, shape [..., s].

        Args:
            partials: results of ``measure``, shape [..., k, w].
        """

    @abstractmethod
    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        """Return ``‖c‖⋆^kappa · D(c)`` as new tensors.

        Args:
            c: the n tensors that were measured.
            scalars: results of ``combine``, one row per tensor: shape [n, s].
            kappa: 0, 1 or ``power_exponent``, a number or 0-d.

        Returns:
            n tensors with the shapes and dtypes of c.
        """

    def numbered(self, partials: Tensor, by: list[int]) -> Tensor:
        """Return the partials or scalars with offsets added to their shard indices; unchanged if they hold none.

        Only argmax-type norms store indices. Ranks that hold shards of one tensor each count their pieces from 0.

        Args:
            partials: results of ``measure`` or ``combine``, shape [n, w].
            by: the offset of each row, n integers.
        """
        return partials

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """Return the un-normalised power map ``‖c‖⋆^κ · D(c)`` with κ = ``power_exponent`` and ε = 0.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            eps: ε ≥ 0; only norms with ``power_takes_eps`` use it. Default 0.

        Returns:
            n new tensors with the shapes and dtypes of c.

        Raises:
            ValueError: the norm has no power exponent.
        """
        if self.power_exponent is None:
            raise ValueError(f'scale="power" is not defined for {self}: use "dual", "unit" or "matched"')
        return self.scaled(c, self.power_exponent, whole_group=False)[0]

    def power_(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """Return the `power` map, which may be c itself, overwritten.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            eps: as for `power`. Default 0.

        Returns:
            n tensors with the shapes and dtypes of c.

        Raises:
            ValueError: the norm has no power exponent.
        """
        return self.power(c, eps)

    def needs(self, scale: Scale) -> Needs:
        """Return how much of a tensor its direction depends on; this decides the communication for shards.

        ::

            "none"     nothing else: the direction is elementwise, and equals the ``power`` map under any scale
            "tensor"   the scalars, reduced from the partials of shards along any dim
            "rows"     whole rows, for a MatrixNorm
            "matrix"   the whole tensor

        Args:
            scale: "power", "dual", "unit" or "matched".

        Returns:
            "none", "tensor", "rows" or "matrix".
        """
        return "tensor"

    def check(self, scale: Scale, params: list[Tensor]) -> None:  # noqa: B027 (most norms accept everything)
        """Raise if this norm does not support a scale or a parameter; called before every step.

        Args:
            scale: "power", "dual", "unit" or "matched".
            params: the group's parameters, of any shapes.

        Raises:
            ValueError: the norm does not support the scale, or a parameter's shape or dtype.
        """

    def scaled(self, c: list[Tensor], kappa: float | Tensor, whole_group: bool) -> tuple[list[Tensor], Tensor]:
        """Return ``‖c‖⋆^kappa · D(c)`` of each tensor, or of all of them as one vector; and the dual norms, shape [n].

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            kappa: 0, 1 or ``power_exponent``, a number or 0-d.
            whole_group: whether to treat them as one vector; its dual norm is then repeated n times.
        """
        partials = self.measure(c)
        scalars = self.combine(partials).expand(len(c), -1) if whole_group else self.combine(partials[:, None])
        return self.apply(c, scalars, kappa), scalars[:, 0]

    def on(self, device: torch.device) -> Norm:
        """Return this norm with its tensor fields, if any, moved to a device.

        Args:
            device: the target device.
        """
        return self

    def is_identity(self, scale: Scale) -> bool:
        """Return whether the direction under a scale equals its input, so that no computation is needed.

        Args:
            scale: "power", "dual", "unit" or "matched".
        """
        return False

    def dual_norm(self, x: TensorOrList) -> TensorOrList:
        """Return ‖x‖⋆, 0-d, of a tensor or of each tensor of a list (float32 for 16-bit input).

        Args:
            x: a real floating-point tensor of any shape, or a list of them.

        Raises:
            TypeError: a tensor is complex or integer.
        """
        if isinstance(x, Tensor):
            return self.dual_norm([x])[0]
        return [self.combine(self.measure([to_compute_dtype(t)])[:, None])[0, 0] for t in x]

    def dual_map(self, x: TensorOrList) -> TensorOrList:
        """Return D(x) of a tensor or of each tensor of a list, with x's shape and dtype, never sharing its memory.

        Args:
            x: a real floating-point tensor of any shape, or a list of them.

        Raises:
            TypeError: a tensor is complex or integer.
        """
        if isinstance(x, Tensor):
            return self.dual_map([x])[0]
        return [self.scaled([to_compute_dtype(t)], 0, whole_group=False)[0][0].to(t.dtype) for t in x]


class TensorNorm(Norm):
    """A norm defined by ``dual_norm`` and ``dual_map`` of one tensor: the easiest way to write your own.

    Subclasses define those two (each on ONE tensor) and, optionally, ``norm``. The measure, combine and
    apply methods are derived from them. The price: ``scope="group"`` is not supported, because tensors
    share no reduction, and the methods take no lists.

    Source: ours.
    """

    spans_groups: ClassVar[bool] = False

    def needs(self, scale: Scale) -> Needs:
        """Return "matrix": the direction depends on the whole tensor.

        Args:
            scale: "power", "dual", "unit" or "matched".
        """
        return "matrix"

    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖, 0-d; optional for a subclass.

        Args:
            x: one tensor of any shape.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define norm(x), the primal norm")

    def dual_norm(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return ‖x‖⋆, 0-d or of one element; to be defined by a subclass.

        Args:
            x: one tensor of any shape, with 32 bits or more.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dual_norm(x) on one tensor")

    def dual_map(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return D(x), a new tensor with the shape of x; to be defined by a subclass.

        Args:
            x: one tensor of any shape, with 32 bits or more.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dual_map(x) on one tensor")

    def measure(self, c: list[Tensor]) -> Tensor:
        """Return the dual norms, shape [n, 1].

        Args:
            c: n tensors of any shapes.

        Raises:
            TypeError: ``dual_norm`` did not return a tensor of one element.
            NotImplementedError: the subclass does not define ``dual_norm``.
        """
        norms = [self.dual_norm(x) for x in c]
        for n in norms:
            if not isinstance(n, Tensor) or n.numel() != 1:
                raise TypeError(f"{self!r}.dual_norm must return a tensor of one element, but returned {n!r}")
        return stack([n.reshape(()) for n in norms])[:, None]

    def combine(self, partials: Tensor) -> Tensor:
        """Return the dual norm of a single piece, shape [..., 1].

        Args:
            partials: results of ``measure``, shape [..., 1, 1].

        Raises:
            ValueError: there are several pieces.
        """
        if partials.shape[-2] != 1:
            raise ValueError(f'{type(self).__name__} handles one tensor at a time: use scope="tensor"')
        return partials[..., 0, :]

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        """Return ``‖c‖⋆^kappa · D(c)`` with the shapes of c.

        Args:
            c: n tensors of any shapes.
            scalars: their dual norms, shape [n, 1].
            kappa: a number or 0-d.

        Raises:
            TypeError: ``dual_map`` did not return a tensor of its input's shape.
            NotImplementedError: the subclass does not define ``dual_map``.
        """
        d = [self.dual_map(x) for x in c]
        for u, x in zip(d, c, strict=True):
            if not isinstance(u, Tensor) or u.shape != x.shape:
                got = f"one of shape {tuple(u.shape)}" if isinstance(u, Tensor) else repr(u)
                raise TypeError(f"{self!r}.dual_map must return a tensor of shape {tuple(x.shape)}, but returned {got}")
        return d if equals(kappa, 0) else [u * n.to(u) for u, n in zip(d, scalars[:, 0] ** kappa, strict=True)]


def as_real(x: Tensor) -> Tensor:
    """Return a complex tensor as a real view with a last dim of 2; return a real tensor unchanged."""
    return torch.view_as_real(x) if x.is_complex() else x


def num_reals(x: Tensor) -> int:
    """Count the real numbers in a tensor (two per complex entry); for a DTensor, in the full tensor."""
    return x.numel() * (2 if x.is_complex() else 1)


def to_compute_dtype(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype used for arithmetic: float32 for 16-bit floats, otherwise its own."""
    if not x.is_floating_point():
        raise TypeError(f"a norm takes real floating-point tensors, but was given {x.dtype}: convert it first")
    return x.float() if is_low_precision(x) else x


def indices_by(keys: Iterable[K]) -> dict[K, list[int]]:
    """Return the indices at which each key occurs, the keys in the order of their first occurrence."""
    found: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def stack(scalars: list[Tensor]) -> Tensor:
    """Stack 0-d or 1-d tensors, possibly from several devices, on the device of the first."""
    return torch.stack([s.to(scalars[0].device) for s in scalars])


_scalars: dict[tuple[float, torch.dtype], Tensor] = {}


def fast_scalar(value: float, xs: list[Tensor]) -> float | Tensor:
    """Return a number as a foreach operation on tensors of one dtype takes it fastest.

    On CPU that is a 0-d tensor: of a number the operation would make one for each tensor of the list, in 1 µs each.
    """
    if not xs or type(xs[0]) is not Tensor or not xs[0].is_cpu or torch.compiler.is_compiling():
        return value
    key = value, xs[0].dtype
    if key not in _scalars:
        found = torch.tensor(value, dtype=xs[0].dtype, device="cpu")
        if type(found) is not Tensor or found.is_inference():  # under a mode, out of which it must not be kept
            return value
        if len(_scalars) >= 64:  # a schedule changes the value at every step
            _scalars.clear()
        _scalars[key] = found
    return _scalars[key]


def without_autocast(kinds: Iterable[str], function: Callable[..., T], *args: Any) -> T:
    """Call ``function(*args)`` with autocast off for these device types; autocast would run matmuls in 16 bits."""
    for kind in kinds:
        # Dynamo of torch 2.6 does not trace is_autocast_available.
        available = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
        if available and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return without_autocast(kinds, function, *args)
    return function(*args)

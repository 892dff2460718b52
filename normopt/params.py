"""Checks of parameters, their gradients and their state before a step, and the batches that go through it together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from normopt._checks import warn
from normopt.sharding.exchange import nonzero
from normopt.sharding.layout import is_dtensor, layout_of
from normopt.stages.direction import comm_strategy

if TYPE_CHECKING:
    from normopt.recipe import Recipe

# Attributes as functions, for loops that run in C: 50 ns a tensor.
grad_of, device_of, dtype_of, memory_layout_of = (
    cast(Any, x).__get__ for x in (Tensor.grad, Tensor.device, Tensor.dtype, Tensor.layout)
)
PIECE = 1 << 20  # entries
PLAIN = {Tensor, torch.nn.Parameter}
Kinds = tuple[set[type], set[torch.device], set[torch.dtype]]


def kinds_of(xs: list[Tensor]) -> Kinds:
    """Return the classes, the devices and the dtypes of tensors."""
    return set(map(type, xs)), set(map(device_of, xs)), set(map(dtype_of, xs))


def check_admissible(params: list[Tensor]) -> None:
    """Raise a ValueError if a parameter cannot be stepped in place: one without a shape, or a lazy view."""
    for p in params:
        if is_lazy(p):
            raise ValueError("a parameter has no shape yet, because its module is lazy: run a batch through it first")
        if p.is_conj() or p.is_neg():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a lazy conjugate or negative of another tensor's memory: "
                "make it of x.resolve_conj().resolve_neg()"
            )


def with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that have a gradient, and the gradients."""
    gradients = list(map(grad_of, params))
    if type(None) in set(map(type, gradients)):
        params = [p for p, g in zip(params, gradients, strict=True) if g is not None]
        gradients = [g for g in gradients if g is not None]
    return params, gradients


def check_dense(gradients: list[Tensor]) -> None:
    """Raise a RuntimeError if a gradient is not dense."""
    for g in gradients if set(map(memory_layout_of, gradients)) - {torch.strided} else ():
        if g.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(g.shape)} has the layout {g.layout}, and normopt takes dense "
                "ones only: use Embedding(sparse=False), or give these parameters to torch.optim.SparseAdam"
            )


def check_tensors(params: list[Tensor], gradients: list[Tensor], states: dict[str, list[Tensor | None]]) -> None:
    """Raise unless gradients and state fit their parameters, and what a step is going to write can be written.

    Args:
        params: parameters that have gradients.
        gradients: theirs.
        states: the state of each by its name, None where there is none yet.

    Raises:
        RuntimeError: as `check_like` and `check_writable`.
    """
    check_writable("parameter", params)
    check_like("gradient", gradients, params)
    for name, xs in states.items():
        kept = [x for x in xs if x is not None]
        check_like(name, kept, [p for p, x in zip(params, xs, strict=True) if x is not None])
        check_writable(name, kept)


def check_own_shapes(params: list[Tensor], state: Mapping[Tensor, Any], recipe: Recipe) -> None:
    """Check the state that has shapes of its own, and that whose steps are counted together.

    Args:
        params: parameters.
        state: the optimizer's.
        recipe: the group's.

    Raises:
        RuntimeError: a state has not its shape, or a part of what is counted together is missing.
        ValueError: a constraint to a sphere would begin with a zero tensor.
    """
    names = recipe.counted
    for p in params:
        own = state.get(p) or {}
        for slot in recipe.slots if own else ():
            if slot.shape is not None and (x := own.get(slot.name)) is not None:
                expected = slot.shape(p.shape)
                if not isinstance(x, Tensor) or x.shape != expected:
                    raise RuntimeError(
                        f"{slot.name!r} of a parameter of shape {tuple(p.shape)} must be a tensor of shape "
                        f"{tuple(expected)}, but is {x if not isinstance(x, Tensor) else tuple(x.shape)}"
                    )
        if not own or not (found := [name for name in names if own.get(name) is not None]):
            continue
        if missing := set(names) - set(found):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has {', '.join(found)}, but no {', '.join(sorted(missing))}: "
                "bias_correction=True corrects averages that began together. Set bias_correction=False, or delete the "
                "parameter's state, so that all start again"
            )
    if recipe.sphere.runs():
        check_no_zeros([p for p in params if state.get(p, {}).get("sphere_radius") is None])


def check_no_zeros(params: list[Tensor], names: Sequence[str] = ()) -> None:
    """Raise a ValueError if all entries of a tensor are zero, which a constraint to a sphere cannot keep.

    Args:
        params: tensors; frozen and empty ones and those without values are not checked.
        names: their names, if they have any.
    """
    known = names or [f"a parameter of shape {tuple(p.shape)}" for p in params]
    checked = [
        (name, p) for name, p in zip(known, params, strict=True) if p.requires_grad and p.numel() and not p.is_meta
    ]
    alive = nonzero([p for _, p in checked])
    if zeros := [name for (name, _), ok in zip(checked, alive, strict=True) if not ok]:
        raise ValueError(
            f'constraint="sphere" keeps the norm that a tensor has at its first step, but all entries are zero in '
            f"{', '.join(zeros[:8])}: initialise them away from zero, or give them a param group with "
            'constraint="none"'
        )


def check_like(name: str, xs: list[Tensor], params: list[Tensor]) -> None:
    """Raise unless each tensor has the shape and the device of its parameter, whose ``.data`` may have been replaced.

    Args:
        name: the tensors' name, for the message.
        xs: gradients or state.
        params: their parameters.

    Raises:
        RuntimeError: the shape or the device of one differs.
    """
    sizes = list(map(Tensor.size, params))
    if list(map(Tensor.size, xs)) == sizes and list(map(device_of, xs)) == list(map(device_of, params)):
        return
    for x, p in zip(xs, params, strict=True):
        if x.shape != p.shape or x.device != p.device:
            raise RuntimeError(
                f"the {name} of a parameter of shape {tuple(p.shape)} on {p.device} has the shape {tuple(x.shape)} on "
                f"{x.device}: shard, transpose and move it with its parameter, or give the parameter to a new optimizer"
            )


def check_writable(name: str, xs: list[Tensor]) -> None:
    """Raise if a tensor cannot be written entry by entry, or not outside of inference mode.

    Args:
        name: the tensors' name, for the message.
        xs: what a step is going to write.

    Raises:
        RuntimeError: one is expanded or negated lazily, or was made in inference mode, which this is not.
    """
    if all(map(Tensor.is_contiguous, xs)) and not any(map(Tensor.is_neg, xs)) and not any(map(Tensor.is_inference, xs)):
        return
    for x in xs:
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"the {name} of shape {tuple(x.shape)} was made in inference mode, and cannot be written outside of "
                "it: replace it by its clone()"
            )
        is_expanded = not x.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
        if is_expanded or x.is_neg():
            raise RuntimeError(
                f"the {name} of shape {tuple(x.shape)} cannot be written entry by entry: it is expanded or negated "
                "lazily. Give it memory of its own by clone() or resolve_neg()"
            )


def are_plain(params: list[Tensor], gradients: list[Tensor], states: Iterable[list[Any]], kinds: Kinds) -> bool:
    """Return whether a step can use all tensors as they are: no cast, no copy, nothing that `check_tensors` refuses.

    They are unsharded, of one device and of one dtype, in which a step computes; all state exists; what is written is
    contiguous.

    Args:
        params: parameters that have gradients.
        gradients: theirs.
        states: the state, a list of one entry a parameter for each slot.
        kinds: the `kinds_of` the parameters.
    """
    types, devices, dtypes = kinds
    if len(devices) > 1 or len(dtypes) > 1 or not types <= PLAIN or not dtypes <= {torch.float32, torch.float64}:
        return False
    state = list(chain.from_iterable(states))
    others = [*gradients, *state]
    if set(map(type, others)) != {Tensor} or set(map(device_of, others)) != devices:
        return False
    sizes, written = list(map(Tensor.size, params)), [*params, *state]
    return (
        set(map(dtype_of, others)) == dtypes
        and list(map(Tensor.size, others)) == sizes * (len(others) // len(sizes))
        and all(map(Tensor.is_contiguous, written))
        and not any(map(Tensor.is_neg, written))
        and not any(map(Tensor.is_inference, written))
    )


def batches(recipe: Recipe, params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the lists of tensors that go through the stages together.

    They are one tensor, those of one device, dtype and sharding, or the whole group.

    Args:
        recipe: the group's.
        params: the group's parameters that have gradients.
    """
    if not params:
        return
    if recipe.whole_group:
        yield params
    elif recipe.backend == "for-loop":
        yield from ([p] for p in params)
    else:
        buckets: dict[object, list[Tensor]] = {}
        for p in params:  # a kernel has nothing to do for empty ones
            empty = recipe.backend == "fused" and not p.numel()
            layout = layout_of(p)
            sharding = layout and (layout.group, comm_strategy(recipe.norm, recipe.direction.base, layout))
            buckets.setdefault((p.device, p.dtype, empty, is_dtensor(p), sharding), []).append(p)
        for bucket in buckets.values():
            alone = recipe.backend == "fused" or any(map(is_dtensor, bucket))
            yield from [bucket] if alone else ([bucket[i] for i in piece] for piece in pieces(recipe, bucket))


def pieces(recipe: Recipe, params: list[Tensor]) -> list[list[int]]:
    """Return the indices of the tensors that go through the stages together, in pieces.

    A step of matrices makes temporaries of about six times a piece: a piece has a sixth of the entries, but not less
    than `PIECE`, so that temporaries take no more memory than the weights do. Tensors of one shape stay together.

    Args:
        recipe: the group's.
        params: tensors of one device and dtype.
    """
    size = sum(map(Tensor.numel, params))
    most = max(size // 6, PIECE)
    if size <= most or recipe.whole_group or not recipe.norm.batches:
        return [list(range(len(params)))]
    by_shape: dict[torch.Size, list[int]] = {}
    for i, p in enumerate(params):
        by_shape.setdefault(p.shape, []).append(i)
    found: list[list[int]] = []
    left = 0
    for i in chain.from_iterable(by_shape.values()):
        if params[i].numel() > left:
            found.append([])
            left = most
        found[-1].append(i)
        left -= params[i].numel()
    return found


def warn_if_stuck(params: list[Tensor], p: float, remedy: str = "weight_decay=0 in a param group of their own") -> None:
    """Warn of tensors that ℓp decay will hold at zero, unless ``remedy`` is taken; frozen ones are never stepped."""
    decayed = [x for x in params if x.requires_grad and x.dim() >= 2 and x.numel() and not x.is_meta]
    stuck = [tuple(x.shape) for x, alive in zip(decayed, nonzero(decayed), strict=True) if not alive]
    if stuck:
        warn(
            f"ℓp decay with p = {p:g} < 2 holds a zero weight at zero, and these tensors are all zero: {stuck}. "
            f"Initialise them away from zero, or give them {remedy}."
        )

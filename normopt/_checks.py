"""Checks of user arguments. Each error says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    tensor: bool = False,
) -> None:
    """Raise unless ``value`` is a real number in the given range.

    Args:
        name: the setting's name, for the message.
        value: the user's value.
        low, high: the allowed range, including its ends unless ``open_low``, ``open_high``.
        tensor: also allow a one-element tensor, whose value is NOT read (that would sync).

    Raises:
        TypeError: ``value`` is not a number (bools and strings are not).
        ValueError: ``value`` is NaN or outside the range, or a tensor that is not one floating-point element.
    """
    kind = "a number or a one-element tensor" if tensor else "a number"
    if isinstance(value, Tensor):
        if not tensor:
            raise TypeError(f"{name} must be {kind}, but is a tensor: pass {name}.item()")
        if value.numel() != 1 or not value.is_floating_point():
            given = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise ValueError(f"Tensor {name} must be 1-element and floating-point, but is {given}")
        return
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {kind}, but is {value!r} ({type(value).__name__})")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if value != value or below or above:  # NaN is not itself; math.isnan would break a compiled graph
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, but is {value!r}")


def check_integer(name: str, value: object, low: int = 1, high: float = math.inf) -> None:
    """Raise a TypeError or ValueError unless ``value`` is an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but is {value!r} ({type(value).__name__})")
    check_number(name, value, low=low, high=high)


def plain(value: Any) -> Any:
    """Convert a setting to primitives: ``np.float32(0.5)`` to 0.5, ``torch.float32`` to "float32", lists to tuples."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if value is None or type(value) in (float, bool, str, int) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def warn(message: str) -> None:
    """Issue a UserWarning at the user's line: the innermost frame outside normopt and torch."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("normopt", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}, but is {value!r}{near(value, choices)}")


def check_bool(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r} ({type(value).__name__})")


def near(value: object, choices: Iterable[str]) -> str:
    """Return a "did you mean" clause to append to a message, or an empty string."""
    close = difflib.get_close_matches(str(value).lower(), list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def names_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor say which arguments its class takes, if it gets a keyword argument that it does not take.

    Python's own message names the base class that has the constructor, such as AnnealedP, and no remedy.
    """
    known = [*inspect.signature(init).parameters][1:]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for key in kwargs:
            if key not in known:
                name = type(args[0]).__name__
                raise TypeError(f"{name} got an unexpected argument {key!r}; it takes {', '.join(known)}")
        init(*args, **kwargs)

    return checked


def equals(value: object, number: float) -> bool:
    """Return whether a setting equals a number; False for a tensor, because reading it would sync."""
    return (type(value) in (float, int) or isinstance(value, numbers.Real)) and value == number


def is_low_precision(x: Tensor) -> bool:
    """Return whether ``x`` has a 16-bit float dtype (float16, bfloat16), for which arithmetic is in float32."""
    return x.dtype in (torch.float16, torch.bfloat16)


def is_quantized(x: Tensor) -> bool:
    """Return whether x is quantized: integers, or floats of 8 bits or fewer, which have no gradient."""
    return x.element_size() < 2 or not (x.is_floating_point() or x.is_complex())

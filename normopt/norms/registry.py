"""The registry of norms: from a name in a param group to a norm, and ``register`` for your own norms."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from normopt._checks import near, plain
from normopt.norms.base import Norm

N = TypeVar("N", bound=type[Norm])


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered name, its class, and the fields that the name fixes (``linf`` fixes p)."""

    name: str
    cls: type[Norm]
    fixed: Mapping[str, Any]
    fields: Mapping[str, Any]  # each field's default; `dataclasses.MISSING` if it has none


_entries: dict[str, Entry] = {}


def register(name: str, **fixed: Any) -> Callable[[N], N]:
    """Register a norm class under a name, so that ``norm="name"`` works in every optimizer. A class decorator.

    Args:
        name: the name, a string such as ``"lp"``.
        **fixed: fields of the class that this name fixes, such as ``p=1.0`` for ``"l1"``.

    Returns:
        The decorator; it returns the class unchanged.

    Raises:
        ValueError: the name is already registered for another class.
        TypeError: the decorated object is not a subclass of [`Norm`][normopt.norms.Norm].

    Example:
        >>> @normopt.norms.register("rows")
        ... class Rows(normopt.norms.TensorNorm): ...
    """

    if not isinstance(name, str):
        raise TypeError(f'register takes a name, as in @register("my-norm"), but was given {name!r}')

    def decorate(cls: N) -> N:
        if not (isinstance(cls, type) and issubclass(cls, Norm)):
            raise TypeError(f"register({name!r}) must decorate a subclass of Norm, but was given {cls!r}")
        taken = _entries.get(name)
        # A class that is redefined under its own name (a re-run notebook cell) replaces its old version.
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the norm name {name!r} is taken by {taken.cls.__qualname__}: choose another")
        _entries[name] = Entry(name, cls, dict(fixed), _fields_of(cls))
        return cls

    return decorate


def _fields_of(cls: type[Norm]) -> dict[str, Any]:
    """Return a norm's fields and their defaults, which become param-group settings."""
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    arguments = list(inspect.signature(cls).parameters)
    if arguments:
        raise TypeError(
            f"{cls.__qualname__} takes {', '.join(arguments)}, but a norm's settings must be dataclass fields, so that "
            "a param group can hold them: decorate it with @dataclass(frozen=True) below @register"
        )
    return {}


def list_norms() -> list[str]:
    """Return every registered name, sorted."""
    return sorted(_entries)


def entry_of(norm: object) -> Entry:
    """Return the entry of a ``norm=`` argument, a name or a Norm object."""
    if not isinstance(norm, Norm):
        return lookup(norm)
    # The name without fixed fields: "lp", not "linf".
    entry = next((entry for entry in _entries.values() if entry.cls is type(norm) and not entry.fixed), None)
    if entry is None:
        raise ValueError(f'{norm!r} is not registered: decorate its class with @normopt.norms.register("…")')
    return entry


def lookup(name: object) -> Entry:
    """Return the entry of a name, or raise a ValueError that suggests similar names."""
    if not isinstance(name, str):
        hint = f": make one, such as {name.__name__}(…)" if isinstance(name, type) else ""
        raise TypeError(f"norm must be a registered name or a Norm object, but is {name!r}{hint}")
    if name not in _entries:
        known = ", ".join(list_norms())
        raise ValueError(f"unknown norm {name!r}{near(name, _entries)} (registered: {known}; register your own first)")
    return _entries[name]


def setting_key(field: str) -> str:
    """Return the param-group key of a norm's field: ``p`` stays ``p``, any other field ``f`` is ``norm_f``."""
    return field if field == "p" else f"norm_{field}"


def flatten(norm: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a ``norm=`` argument to flat, primitive param-group settings.

    Args:
        norm: a registered name, or a Norm object of a registered class.
        given: the other settings; one that contradicts the norm raises an error.

    Returns:
        ``norm`` (a name), ``p`` and ``norm_<field>``, as far as the argument determines them. p is None if the
        norm has no p or the name fixes it (``"linf"``), since it can then be neither set nor scheduled.
        ``"lp"`` alone does not determine p.
    """
    entry = entry_of(norm)
    flat: dict[str, Any] = {"norm": entry.name}
    if isinstance(norm, Norm):
        fixed = {setting_key(f): getattr(norm, f) for f in entry.fields}
    else:
        fixed = {setting_key(f): None for f in entry.fixed}
        free = {setting_key(f): default for f, default in entry.fields.items() if f not in entry.fixed}
        # Another norm's field of the same name must not leak in from the optimizer's defaults.
        # Not |=, here and below: Dynamo of torch 2.6 and 2.7 does not trace it on a dict.
        flat.update({k: v for k, v in free.items() if v is not dataclasses.MISSING and given.get(k) is None})
    if "p" not in entry.fields:
        fixed["p"] = None
    for key, value in fixed.items():
        other = plain(given.get(key))
        if other is not None and (value is None or other != value):
            what = f"has {key} = {value!r}" if value is not None else f"does not take {key}"
            raise ValueError(f"norm {norm!r} {what}, but {key} = {other!r} was also given: leave one out")
    return flat | fixed


def missing_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that a norm needs, by a param group's flat settings, and that are not there."""
    entry = lookup(settings["norm"])
    needed = [setting_key(f) for f, default in entry.fields.items() if default is dataclasses.MISSING]
    return [key for key in needed if settings.get(key) is None and key not in {setting_key(f) for f in entry.fixed}]


def build(settings: Mapping[str, Any]) -> Norm:
    """Build the norm that a param group's flat settings describe."""
    name = settings["norm"]
    entry = lookup(name)
    values = {**settings, **flatten(name, settings)}
    fields = {f: values[setting_key(f)] for f in entry.fields if values.get(setting_key(f)) is not None}
    fields.update(entry.fixed)
    if keys := ", ".join(missing_of(values)):
        raise ValueError(f"norm {name!r} needs {keys}: pass it to the optimizer or to the param group")
    return entry.cls(**fields)

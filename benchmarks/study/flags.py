"""A study from the flags of the command line: what `benchmarks.study.toml` reads from a file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Study
from benchmarks.study.toml import BadStudy, build, read, unknown

_RANGE = re.compile(r"(.+?)\.\.(.+)")


def arm(text: str) -> dict[str, Any]:
    """An arm as an entry of a file: its optimizer, then settings.

    >>> arm("lpsgdm p=8 agr=true lr=1e-3..1")["search"]
    {'lr': {'low': 0.001, 'high': 1.0}}

    A value with two dots is a range that tuning searches by ratios, and a schedule is given by its kind. The arm's name
    is the text without the ranges, or what ``name`` says; what has blanks is quoted, as in a shell: name="no decay".

    Raises:
        BadStudy: a word is not as it must be.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadStudy(f"the arm {text!r} cannot be read: {error}") from None
    if not words or "=" in words[0]:
        raise BadStudy(f"an arm is an optimizer and its settings, as in 'lpsgdm p=8 agr=true', not {text!r}")
    table: dict[str, Any] = {"optimizer": words[0], "settings": {}, "search": {}}
    names, called = [words[0].rpartition(":")[2]], ""
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise BadStudy(f"a setting is KEY=VALUE, but {word!r} of the arm {text!r} is not")
        within = _RANGE.fullmatch(value)
        if within:
            table["search"][key] = {"low": _number(word, within[1]), "high": _number(word, within[2])}
            continue
        if key == "name":
            called = value
            continue
        names.append(word)
        if key.endswith("_schedule"):
            table[key] = {"kind": value}
        else:
            table["settings"][key] = _value(value)
    return table | {"name": called or " ".join(names)}


def study(
    what: str | None,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    trials: int | None = None,
    tuning_seeds: int | None = None,
    **others: Any,
) -> Study:
    """The preset, or the study of a file.toml, changed as the flags say; or without one, a study of its own.

    Args:
        what: the preset's name, or the file's.
        tasks, arms: in place of its tasks, and beside its arms.
        trials, tuning_seeds: of the tuning.
        others: more keys of a file, as it has them. A flag that is None, empty or False changes nothing.

    Raises:
        BadStudy: it cannot be.
    """
    base = None
    if what is not None:
        base = read(Path(what)) if what.endswith(".toml") else PRESETS.get(what)
        if base is None:
            raise BadStudy(f"{unknown('preset', what, PRESETS)}; a file's name ends in .toml")
    tuning = {"trials": trials, "seeds": tuning_seeds}
    changes = {
        "tasks": list(tasks),
        "arms": [arm(text) for text in arms],
        "tuning": {key: value for key, value in tuning.items() if value},
        **others,
    }
    changes = {key: value for key, value in changes.items() if value}
    if base is not None and not changes:
        return base
    if base is None and not (tasks and arms):
        raise BadStudy("say what to run: a preset, a file.toml, or at least one --task and one --arm")
    try:
        return build(changes, f"{base.name}-changed" if base else "custom", base)
    except BadStudy as error:
        raise BadStudy("; ".join(str(error).splitlines())) from None


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadStudy(f"a range is LOW..HIGH, two numbers, but {word!r} is not") from None


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text

"""A study from a TOML file.

::

    extends = "quick"              # a preset, of which this changes what it names and to which it adds its arms
    name = "mine"
    purpose = "whether a smaller p is enough"
    tasks = ["digits", "bytes"]
    baseline = "SGD"
    seeds = 5                      # 1, 2, 3, 4, 5; or a list
    budget = 0.5                   # what the epochs of every task are multiplied by

    [tuning]
    trials = 12
    startup = 8

    [[arms]]
    name = "LPSGDM"
    optimizer = "lpsgdm"           # or my_module:MyOptimizer
    search = { lr = { low = 1e-3, high = 1.0 } }  # the default is what the presets search for this optimizer
    settings = { momentum = 0.9 }
    grid = { p = [4, 8], agr = [false, true] }   # four arms: "LPSGDM p=4", "LPSGDM p=4 agr", …
    p_schedule = { kind = "cosine" }
    lr_schedule = { kind = "cosine", warmup = 0.05 }  # or "constant", or "wsd" with a cooldown; default: no warm-up

Without ``extends``, ``tasks`` and ``arms`` are needed, and the rest has defaults: the file's name, no purpose, the
first arm, five seeds, the tasks' own budget, 12 trials of which 8 are quasi-random.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from benchmarks.optimizers import check
from benchmarks.study import lines
from benchmarks.study.presets import LEARNING_RATES, PRESETS
from benchmarks.study.spec import Arm, Frozen, LRSchedule, PSchedule, Range, Study, Value
from benchmarks.tasks import TASKS
from normopt._checks import near

TRIALS, STARTUP, SEEDS = 12, 8, 5
# Of an optimizer of your own: it holds the best learning rate of every optimizer on every task here, at the price of
# some trials far from it.
LR = Range(low=1e-5, high=10)


class BadStudy(ValueError):
    """Settings of a study that cannot be; the message says where, and what is allowed."""


class ArmTable(Frozen):
    """An entry of ``[[arms]]``: an `Arm`, or with a grid as many as it has points."""

    name: str | None = None
    optimizer: str
    settings: dict[str, Value] = Field(default={})
    grid: dict[str, list[Value]] = Field(default={})
    p_schedule: PSchedule | None = None
    lr_schedule: LRSchedule = LRSchedule()
    search: dict[str, Range] = Field(default={})
    tuned_as: str | None = None
    lr_factor: float = 1.0
    against: str | None = None

    def arms(self) -> Iterator[Arm]:
        """An arm for every point of the grid; their names carry the values."""
        own = self.model_dump(exclude={"name", "grid", "settings"})
        if self.tuned_as is None and "lr" not in {*self.settings, *self.grid, *self.search}:
            own["search"] = {"lr": LEARNING_RATES.get(self.optimizer, LR), **own["search"]}
        name = self.name or self.optimizer
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            words = [name, *(word for key, value in point.items() if (word := _word(key, value)))]
            yield Arm(name=" ".join(words), settings=self.settings | point, **own)


class TuningTable(Frozen):
    """The table ``[tuning]``: what it leaves out is the preset's."""

    trials: int | None = Field(default=None, ge=1)
    startup: int | None = Field(default=None, ge=1)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)


class StudyTable(Frozen):
    """The whole file."""

    extends: str | None = None
    name: str | None = None
    purpose: str | None = None
    tasks: tuple[str, ...] | None = None
    arms: tuple[ArmTable, ...] = ()
    baseline: str | None = None
    tuning: TuningTable = TuningTable()
    seeds: int | tuple[int, ...] | None = None
    budget: float | None = None

    def study(self, name: str) -> Study:
        """The study, with a name if it gives itself none.

        Raises:
            ValidationError: what it says does not go together.
        """
        base = PRESETS[self.extends] if self.extends else None
        arms = {arm.name: arm for arm in base.arms} if base else {}
        given = [arm for table in self.arms for arm in table.arms()]
        # One of the same name takes the preset's place; two of one name in the file are an error that Study finds.
        added = {arm.name for arm in given}
        kept = [arm for arm in arms.values() if arm.name not in added]
        tuning = base.tuning.model_dump() if base else {"trials": TRIALS, "startup": STARTUP}
        changes: dict[str, Any] = {
            "name": self.name or name,
            "tuning": tuning | self.tuning.model_dump(exclude_none=True),
            "arms": [arm.model_dump() for arm in (*kept, *given)],
        }
        changes |= {key: getattr(self, key) for key in ("purpose", "tasks", "baseline", "budget") if _given(self, key)}
        if self.seeds is not None:
            changes["seeds"] = range(1, self.seeds + 1) if isinstance(self.seeds, int) else self.seeds
        if base is not None:
            return Study.model_validate(base.model_dump() | {"protocol": None} | changes)
        usual = {"purpose": "", "tasks": (), "baseline": given[0].name if given else "", "seeds": range(1, SEEDS + 1)}
        return Study.model_validate(usual | changes)


def read(path: Path) -> Study:
    """The study of a file.

    Raises:
        BadStudy: it cannot be; the message names the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadStudy(f"{path} cannot be read: {error}") from None
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadStudy(f"{path}: this is no TOML: {error}") from None
    found = lines.lines(text)
    try:
        return build(content, path.stem)
    except Problems as problems:
        raise BadStudy("\n".join(_told(path, found, *problem) for problem in problems.problems)) from None


class Problems(Exception):
    """What is wrong with a study: paths of keys, and what is the matter with each."""

    def __init__(self, problems: Sequence[tuple[lines.Path, str]]) -> None:
        super().__init__("; ".join(text for _, text in problems))
        self.problems = problems


def build(content: Mapping[str, Any], name: str) -> Study:
    """The study of a file's content, with a name if it gives itself none.

    Raises:
        Problems: it cannot be.
    """
    try:
        table = StudyTable.model_validate(content)
    except ValidationError as error:
        raise Problems([_problem(details) for details in error.errors()]) from None
    problems = list(_unknown(table))
    if problems:
        raise Problems(problems)
    try:
        study = table.study(name)
    except ValidationError as error:
        raise Problems([_misfit(table, details) for details in error.errors()]) from None
    return study


def _unknown(table: StudyTable) -> Iterator[tuple[lines.Path, str]]:
    """Names that nothing here has."""
    if table.extends is not None and table.extends not in PRESETS:
        yield ("extends",), unknown("preset", table.extends, PRESETS)
    for i, task in enumerate(table.tasks or ()):
        if task not in TASKS:
            yield ("tasks", i), unknown("task", task, TASKS)
    for i, arm in enumerate(table.arms):
        try:
            check(arm.optimizer, {})
        except ValueError as error:
            yield ("arms", i, "optimizer"), str(error)
            continue
        for where in ("settings", "grid", "search"):
            for key in getattr(arm, where):
                try:
                    check(arm.optimizer, {key: None})
                except ValueError as error:
                    yield ("arms", i, where, key), str(error)
        for key, values in arm.grid.items():
            if not values:
                yield ("arms", i, "grid", key), "a grid needs values"
            if key in arm.settings:
                yield ("arms", i, "grid", key), f"{key} is both in the settings and in the grid"


def unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    """That there is none of that name, the near ones, and all."""
    return f"there is no {what} {name!r}{near(name, known)} (known: {', '.join(known)})"


def _problem(details: Any) -> tuple[lines.Path, str]:
    path: lines.Path = details["loc"]
    text: str = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        return path, f"there is no key {path[-1]!r}{near(path[-1], known)} (known: {', '.join(known)})"
    if details["type"] == "missing":
        return path[:-1], f"{path[-1]} is missing"
    return path, f"{text[0].lower()}{text[1:]}, not {details['input']!r}"


def _fields(path: lines.Path) -> list[str]:
    """The keys that a table may have."""
    last = next((part for part in reversed(path) if isinstance(part, str)), None)
    inside: dict[str | None, type[Frozen]] = {
        "arms": ArmTable,
        "tuning": TuningTable,
        "p_schedule": PSchedule,
        "lr_schedule": LRSchedule,
        None: StudyTable,
    }
    return list(inside.get(last, Range).model_fields)


def _misfit(table: StudyTable, details: Any) -> tuple[lines.Path, str]:
    """Where it is that a study says its parts do not fit: the arm that is named, or the key."""
    text: str = details["msg"].removeprefix("Value error, ")
    seen: list[str] = []
    for i, arm in enumerate(table.arms):
        names = [each.name for each in arm.arms()]
        if any(repr(name) in text.partition(":")[0] for name in names):
            return ("arms", i), text
        if "twice" in text and len({*seen, *names}) < len(seen) + len(names):
            return ("arms", i), text
        seen += names
    for key in ("baseline", "seeds", "tasks", "arms"):
        if key in text or details["loc"][:1] == (key,):
            return (key,), text
    return tuple(details["loc"]), text


def _told(path: Path, found: dict[lines.Path, int], where: lines.Path, text: str) -> str:
    line = lines.line_of(found, where)
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in where)
    return ", ".join((str(path), *([f"line {line}"] if line else []), *([key] if key else []))) + f": {text}"


def _word(key: str, value: Value) -> str:
    if value is False or value is None:
        return ""
    return key if value is True else f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def _given(table: StudyTable, key: str) -> bool:
    return getattr(table, key) is not None

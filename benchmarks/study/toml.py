"""A study from a TOML file.

::

    extends = "quick"              # a preset, of which this changes what it names and to which it adds its arms
    name = "mine"
    purpose = "whether a smaller p is enough"
    tasks = ["digits", "bytes"]
    baseline = "SGD"
    seeds = 5                      # 1, 2, 3, 4, 5; or a list
    budget = 0.5                   # what the epochs of every task are multiplied by
    batch_size = 64                # of every task; the default is each task's own

    [tuning]
    trials = 12
    startup = 8
    seeds = 2                      # runs of a trial: on 1000, 1001; or a list

    [[arms]]
    name = "LPSGDM"
    optimizer = "lpsgdm"           # or my_module:MyOptimizer
    search = { lr = { low = 1e-3, high = 1.0 } }  # the default is what the presets search for this optimizer
    settings = { momentum = 0.9 }
    grid = { p = [4, 8], agr = [false, true] }   # four arms: "LPSGDM p=4", "LPSGDM p=4 agr", …
    p_schedule = { kind = "cosine" }

Without ``extends``, ``tasks`` and ``arms`` are needed, and the rest has defaults: the file's name, no purpose, the
first arm, five seeds, the tasks' own budget, 12 trials of which 8 are quasi-random.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator

from benchmarks.optimizers import check
from benchmarks.study.presets import LEARNING_RATES, PRESETS
from benchmarks.study.spec import Arm, Frozen, Range, Study, Value
from benchmarks.tasks import TASKS
from normopt._checks import near

USUAL = {
    "purpose": "",
    "tasks": (),
    "baseline": "",
    "tuning": {"trials": 12, "startup": 8, "reruns": 2},
    "seeds": range(1, 9),
}
FIRST_TUNING_SEED = 1000
LR = Range(low=1e-4, high=1)  # of an optimizer of your own: as wide as those of the others


class BadStudy(ValueError):
    """Settings of a study that cannot be; the message says where, and what is allowed."""


def unknown(what: str, name: str, names: Mapping[str, object]) -> str:
    """That there is none of that name, the near ones, and all."""
    return f"there is no {what} {name!r}{near(name, names)} (known: {', '.join(names)})"


def _known(what: str, names: Mapping[str, object]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(unknown(what, name, names))
        return name

    return AfterValidator(check)


class ArmTable(Arm):
    """An entry of ``[[arms]]``: an `Arm`, or with a grid as many as it has points."""

    name: str = ""
    grid: dict[str, list[Value]] = Field(default={})

    @field_validator("optimizer")
    @classmethod
    def _there(cls, optimizer: str) -> str:
        check(optimizer, {})
        return optimizer

    @field_validator("settings", "search", "grid")
    @classmethod
    def _its_own(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "optimizer" in info.data:  # else it is none, which is said
            check(info.data["optimizer"], settings)
        if info.field_name == "grid":
            if not all(settings.values()):
                raise ValueError("a grid needs values")
            twice = settings.keys() & info.data.get("settings", {}).keys()
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))} is both in the settings and in the grid")
        return settings

    def arms(self) -> Iterator[Arm]:
        """An arm for every point of the grid; their names carry the values."""
        own = self.model_dump(exclude={"name", "grid", "settings"})
        if self.tuned_as is None and "lr" not in {*self.settings, *self.grid, *self.search}:
            own["search"] = {"lr": LEARNING_RATES.get(self.optimizer, LR), **own["search"]}
        for values in itertools.product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            words = [
                self.name or self.optimizer,
                *(word for key, value in point.items() if (word := _word(key, value))),
            ]
            yield Arm(name=" ".join(words), settings=self.settings | point, **own)


class TuningTable(Frozen):
    """The table ``[tuning]``: what it leaves out is the preset's."""

    trials: int | None = Field(default=None, ge=1)
    startup: int | None = Field(default=None, ge=1)
    seeds: int | tuple[int, ...] | None = None
    reruns: int | None = Field(default=None, ge=0)


class StudyTable(Frozen):
    """The whole file: what it leaves out is that of the study on which it builds, if there is one."""

    extends: Annotated[str, _known("preset", PRESETS)] | None = None
    name: str | None = None
    purpose: str | None = None
    tasks: tuple[Annotated[str, _known("task", TASKS)], ...] | None = None
    arms: tuple[ArmTable, ...] = ()
    baseline: str | None = None
    tuning: TuningTable = TuningTable()
    seeds: int | tuple[int, ...] | None = None
    budget: float | None = None
    batch_size: int | None = None
    amp: bool | None = None

    def study(self, name: str, base: Study | None = None) -> Study:
        """The study, with a name if it gives itself none, and what it leaves out as in the base.

        Raises:
            ValidationError: what it says does not go together.
        """
        base = PRESETS[self.extends] if self.extends else base
        given = [arm for table in self.arms for arm in table.arms()]
        # One of the same name takes the base's place; two of one name here are an error that Study finds.
        added = {arm.name for arm in given}
        kept = [arm for arm in base.arms if arm.name not in added] if base else []
        # A protocol, where there is one, declared another study.
        old = base.model_dump(exclude={"protocol"}) if base else USUAL | ({"baseline": given[0].name} if given else {})
        new = self.model_dump(exclude={"extends", "arms"}, exclude_none=True)
        tuning = old["tuning"] | new.pop("tuning")
        return Study.model_validate(
            old
            | {"name": name}
            | {key: _seeds(value, 1) if key == "seeds" else value for key, value in new.items()}
            | {"tuning": tuning | {"seeds": _seeds(tuning.get("seeds", 1), FIRST_TUNING_SEED)}}
            | {"arms": [arm.model_dump() for arm in (*kept, *given)]}
        )


def read(path: Path) -> Study:
    """The study of a file.

    Raises:
        BadStudy: it cannot be; the message names the file and the key.
    """
    try:
        return build(tomllib.loads(path.read_text(encoding="utf-8")), path.stem)
    except tomllib.TOMLDecodeError as error:
        raise BadStudy(f"{path}: this is no TOML: {error}") from None
    except BadStudy as error:
        raise BadStudy("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadStudy(f"{path} cannot be read: {error}") from None


def build(content: Mapping[str, Any], name: str, base: Study | None = None) -> Study:
    """The study of a file's content, with a name if it gives itself none, and what it leaves out as in the base.

    Raises:
        BadStudy: it cannot be; the message has a line for each key that is wrong.
    """
    try:
        return StudyTable.model_validate(content).study(name, base)
    except ValidationError as error:
        raise BadStudy("\n".join(map(_told, error.errors()))) from None


def _told(details: Any) -> str:
    """What pydantic found, after the place of it: the second arm is arms.2."""
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in details["loc"])
    text: str = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        tables: list[type[Frozen]] = [ArmTable, *Frozen.__subclasses__()]
        keys = {name for table in tables for name in table.model_fields}
        text = f"there is no key {details['loc'][-1]!r}{near(details['loc'][-1], sorted(keys))}"
    elif details["type"] != "value_error":
        given = "" if details["type"] == "missing" else f", not {details['input']!r}"
        text = f"{text[0].lower()}{text[1:]}{given}"
    return f"{key}: {text}" if key else text


def _seeds(given: Any, first: int) -> Any:
    return range(first, first + given) if isinstance(given, int) else given


def _word(key: str, value: Value) -> str:
    if value is False or value is None:
        return ""
    return key if value is True else f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"

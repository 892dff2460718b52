"""Run param_groups over a model and compare what it gives with what is expected."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import normopt
from tests.architectures.expected import Expected, Given, normal_view
from tests.architectures.models import Built

PRESET = "muon-adamw"


@dataclass
class Verdict:
    """How a model was read: "right", "refused" (with an override that makes it right), "misread" or "skipped"."""

    name: str
    task: str
    status: str
    problems: list[str] = field(default_factory=list)
    message: str = ""


def examine(built: Built, expected_of: Callable[[nn.Module], dict[str, Expected]]) -> Verdict:
    """Return how param_groups reads a model, and how it reads it with the override that a refusal asks for."""
    if built.model is None:
        return Verdict(built.name, built.task, "skipped", message=built.why)
    message = ""
    try:
        groups = _groups(built.model)
    except ValueError as error:
        message = str(error)
        problems = refusal_problems(built.model, message)
        if problems:
            return Verdict(built.name, built.task, "misread", problems, message)
        try:
            groups = _groups(built.model, overrides=override_in(message))
        except ValueError as error:
            problems = [f"with the override: {str(error)[:300]}"]
            return Verdict(built.name, built.task, "misread", problems, message)
    given = given_by(groups)
    problems = []
    for name, expected in expected_of(built.model).items():
        if problem := expected.problem(given.get(name)):
            shape = tuple(built.model.get_parameter(name).shape)
            problems.append(f"{name} {shape} {problem}; {expected.why}")
    status = "misread" if problems else "refused" if message else "right"
    return Verdict(built.name, built.task, status, problems, message)


def _groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normopt.param_groups(model, PRESET, **settings)


def given_by(groups: list[dict[str, Any]]) -> dict[str, Given]:
    """Return what each parameter was given, by name."""
    return {
        name: Given(
            str(group["kind"]),
            str(group["norm"]),
            normal_view(tuple(param.shape), str(group.get("norm_matrix_view", "flatten"))),
            group.get("norm_blocks", 1),
            group.get("weight_decay"),
        )
        for group in groups
        for name, param in group["params"]
    }


def override_in(message: str) -> Mapping[str, Any]:
    """Return the dict that a refusal writes out as ``overrides={…}``."""
    start = message.index("overrides={") + len("overrides=")
    for end in range(start + 2, len(message) + 1):
        if message[end - 1] == "}" and message.count("{", start, end) == message.count("}", start, end):
            found: Mapping[str, Any] = ast.literal_eval(message[start:end])
            return found
    raise ValueError("the braces after overrides= are not closed")


def refusal_problems(model: nn.Module, message: str) -> list[str]:
    """Return what a refusal's message lacks: a parameter's name, its module's type, the override."""
    problems = []
    try:
        override_in(message)
    except (ValueError, SyntaxError) as error:
        problems.append(f"no override to copy ({error}) in: {message[:300]}")
    types = {type(m).__name__ for m in model.modules() if any(True for _ in m.named_parameters(recurse=False))}
    if not any(name in message for name in types):
        problems.append(f"no module type is named in: {message[:300]}")
    return problems

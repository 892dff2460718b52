"""Which cases run, and two tables of the docs: what tests/conformance and tests/frameworks found.

`make test` is for every change and takes minutes. Of a test with many cases it runs enough that every value of every
parameter occurs, and it leaves out what is marked `exhaustive`. `make test-all`, which is pytest with ``--all``, runs
everything; so does naming a test by its id. A test whose parameters matter in pairs is marked `pairs`. How long random
and repeated tests go on is set here too: NORMOPT_FUZZ and NORMOPT_STEPS.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normopt
from benchmarks.vision import allow_torchvision_import
from normopt.norms import registry
from normopt.stages import base, decay, momentum

allow_torchvision_import()  # which timm and transformers import
gc.disable()  # until the tests are collected: of a million objects that stay, to look for garbage takes a third longer

# Folders and files whose tests share what is slow to make: ranks and others forked by tests/forked.py, the site, a
# study that has been run, workers, a wheel, a task's data, the import of transformers, Dynamo's first graph; and what
# compiles with Numba most, which two workers cannot do at once.
ONE_WORKER = {
    "architectures": "architectures",
    "frameworks": "architectures",
    "sharding": "forked",
    "test_compiling.py": "forked",
    "test_docs.py": "forked",
    "test_resume.py": "forked",
    "test_sharding.py": "forked",
    "site": "site",
    "tasks": "tasks",
    "test_cli.py": "study",
    "test_compile.py": "compile",
    "test_execute.py": "workers",
    "test_packaging.py": "wheel",
    "test_typing.py": "wheel",
    "test_ends.py": "numba",
    "test_engine.py": "numba",
    "test_memory.py": "numba",
    "test_metric.py": "numba",
    "test_numba.py": "numba",
}

PREAMBLE = """# Conformance: PyTorch's own optimizer tests

Every optimizer of normopt is held to the properties that PyTorch's test suite requires of PyTorch's own optimizers,
and to some more. The inputs come from `torch.testing._internal.common_optimizers`, which is part of torch's wheel;
the tests themselves are not, and are rewritten in `tests/conformance`. Each test runs once for each kind of input
that an optimizer takes (learning rates, decays, momenta, regularizers), and where it matters for the for-loop path,
the multi-tensor path and several dtypes.

The test run, `make conformance`, writes this page, here with torch {version}. {total} cases passed,
{skipped} were skipped{failed}.
"""


@pytest.fixture
def registries() -> Iterator[None]:
    """Forget the rules, stages and norms that a test registers."""
    registered: list[Any] = [momentum.RULES, decay.RULES, base._stages, base._owners, registry._entries]
    before = [each.copy() for each in registered]
    yield
    for each, kept in zip(registered, before, strict=True):
        each.clear()
        (each.extend if isinstance(each, list) else each.update)(kept)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A test on one of torch's threads: small work only waits for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case of every test, and the exhaustive tests")
    parser.addoption("--conformance-table", help="write what tests/conformance finds to this Markdown file")
    parser.addoption("--trainers-table", help="write what tests/frameworks finds to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
    everything = asks_for_everything(config)
    os.environ.setdefault("NORMOPT_FUZZ", "300" if everything else "40")  # lives of a random test
    os.environ.setdefault("NORMOPT_STEPS", "20" if everything else "6")  # of one optimizer beside another
    if path := config.getoption("--conformance-table"):
        config.pluginmanager.register(Table(Path(path)))
    if path := config.getoption("--trainers-table"):
        config.pluginmanager.register(TrainersTable(Path(path)))


def asks_for_everything(config: pytest.Config) -> bool:
    return bool(config.getoption("--all")) or any("::" in argument for argument in config.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule as ``--dist loadgroup`` does, by ONE_WORKER: xdist 3.8 marks groups where pytest 9.2 looks no longer."""
    from xdist.scheduler import LoadScopeScheduling

    gc.enable()  # the process that schedules collects no tests

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            places = nodeid.split("::")[0].split("/")
            return next((ONE_WORKER[place] for place in places if place in ONE_WORKER), nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if asks_for_everything(config):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive") is None:
            tests[item.nodeid.split("[")[0]].append(item)
    kept = {id(item) for cases in tests.values() for item in enough_of(cases)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind calls what is left at the end leaked


def enough_of(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of one test in which every value of every parameter occurs, or, if it is marked so, every pair."""
    together = 2 if cases[0].get_closest_marker("pairs") else 1
    values = [
        set(itertools.combinations(sorted((k, repr(v)) for k, v in parameters_of(case).items()), together))
        for case in cases
    ]
    missing = set().union(*values)
    kept = [] if missing else [0]
    while missing:
        kept.append(max(range(len(cases)), key=lambda i: len(values[i] & missing)))
        missing -= values[kept[-1]]
    return [cases[i] for i in kept]


def parameters_of(case: pytest.Item) -> dict[str, object]:
    return case.callspec.params if isinstance(case, pytest.Function) and hasattr(case, "callspec") else {}


class Table:
    """Collects outcomes by question and optimizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = sorted((normopt.get_optimizer(n).__name__ for n in normopt.list_optimizers()), key=str.lower)
        self.cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = re.fullmatch(r"tests/conformance/\S*::test_(\w+)\[(.*)\]", report.nodeid)
        if name is None or (report.when != "call" and report.outcome == "passed"):
            return
        question, case = name[1].replace("_", " "), name[2].split("-")
        column = next(c for c in self.columns if c in case)
        self.cells[question][column].append(report.outcome)
        if report.skipped:
            self.reasons.append(f"- {question}, {column}: {report.longrepr[2]}")

    def pytest_sessionfinish(self) -> None:
        outcomes = [o for row in self.cells.values() for cell in row.values() for o in cell]
        failed = outcomes.count("failed")
        lines = [
            PREAMBLE.format(
                version=torch.__version__.split("+")[0],
                total=outcomes.count("passed"),
                skipped=outcomes.count("skipped"),
                failed=f", and {failed} FAILED" if failed else "",
            ),
            "| test | optimizers | cases passed |",
            "|---|---|---|",
        ]
        for question, row in sorted(self.cells.items()):  # not in the order of the workers
            lines.append(f"| {question} | {len(row)} | {summary([o for cell in row.values() for o in cell])} |")
        lines += ["", "| optimizer | tests | cases passed |", "|---|---|---|"]
        for name in self.columns:
            cells = [row[name] for row in self.cells.values() if name in row]
            lines.append(f"| {name} | {len(cells)} | {summary([o for cell in cells for o in cell])} |")
        if self.reasons:
            lines += ["", "## Skipped, and why", "", *sorted(set(self.reasons))]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class TrainersTable:
    """Collects what each trainer did with each optimizer; those that did not run stay as they were."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call" and "trainer" in found:
            row = self.rows.setdefault(found["trainer"], {"cells": {}})
            row |= {key: found[key] for key in ("package", "version")}
            row["torch"] = torch.__version__.split("+")[0]
            reason = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else ""
            row["cells"][found["case"]] = reason or [word for word in ("trains", "resumes") if found.get(word)]

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(outcomes: list[str]) -> str:
    """``12``, or ``12, 1 skipped``."""
    others = [f"{outcomes.count(o)} {o}" for o in ("skipped", "failed") if o in outcomes]
    return ", ".join([str(outcomes.count("passed")), *others])

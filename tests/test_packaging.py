"""What a user installs: the wheel is complete, holds nothing else, and imports nothing that it does not declare."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import normopt
from tests.patience import patience

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "results")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience(100), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean; without isolation, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source"), cwd=folder)
    (built,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "target"), str(built), cwd=folder)
    return built


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "normopt").rglob("*.py")}
    assert modules <= names
    assert "normopt/py.typed" in names
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names} == {"normopt", f"normopt-{normopt.__version__}.dist-info"}


def test_says_the_same_version_everywhere(wheel: Path) -> None:
    (installed,) = importlib.metadata.distributions(path=[str(wheel.parent / "target")])
    assert installed.version == normopt.__version__
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == normopt.__version__  # type: ignore[index]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changes, re.MULTILINE)[1] == normopt.__version__  # type: ignore[index]


def test_imports_only_torch_and_numpy(wheel: Path) -> None:
    """Away from the checkout, and isolated from the environment and the user's own packages."""
    target = wheel.parent / "target"
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import numpy, torch
before = set(sys.modules)
import normopt
assert not {{"diagnostics", "groups", "schedules", "sparsity"}} & vars(normopt).keys()
assert {{"groups", "param_groups", "sparsity"}} <= set(dir(normopt))
from normopt import *
assert normopt.groups.param_groups is param_groups
assert normopt.schedules is schedules and normopt.diagnostics.Trajectory is Trajectory
print(normopt.__file__)
print(sorted({{m.split(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
model = torch.nn.Linear(3, 2)
model(torch.ones(1, 3)).sum().backward()
normopt.LPSGDM(model.parameters()).step()
"""
    where, new = run(sys.executable, "-I", "-W", "error", "-c", code, cwd=wheel.parent).splitlines()
    assert Path(where).is_relative_to(target)
    # What torch and numpy load of themselves only when it is used is theirs.
    assert set(eval(new)) - {"torch", "numpy"} == {"normopt"}

"""What a user installs: the wheel is complete, holds nothing else, and imports nothing that it does not declare."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import normopt
from tests.patience import patience

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
REPOSITORY = "https://example.org/somebody/normopt"


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What is made, and is no part of the source."""
    return NOT_COPIED(folder, names) | ({"site"} & {*names} if Path(folder) == ROOT else set())


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience(100), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean; without isolation, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=not_copied)
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
normopt.integrations.timm.register  # there at its first use
assert "timm" not in sys.modules
"""
    where, new = run(sys.executable, "-I", "-W", "error", "-c", code, cwd=wheel.parent).splitlines()
    assert Path(where).is_relative_to(target)
    # What torch and numpy load of themselves only when it is used is theirs.
    assert set(eval(new)) - {"torch", "numpy"} == {"normopt"}


def test_the_metadata_are_complete(wheel: Path) -> None:
    (installed,) = importlib.metadata.distributions(path=[str(wheel.parent / "target")])
    said = installed.metadata
    assert said["Author"] == "The normopt authors"
    assert said["Summary"]
    assert said["Keywords"]
    assert said["Requires-Python"] == ">=3.11"
    assert said["Description-Content-Type"] == "text/markdown"
    needed = [r for r in installed.requires or [] if "extra ==" not in r]
    assert sorted(needed) == ["numpy>=1.26", "torch>=2.6"]  # both with a floor, so that the oldest can be installed


def test_what_is_missing_is_said_with_what_to_install(wheel: Path) -> None:
    """Beside torch and NumPy alone, as after ``pip install normopt``."""
    code = f"""
import sys
sys.path.insert(0, {str(wheel.parent / "target")!r})
for missing in ("matplotlib", "numba", "timm"):
    sys.modules[missing] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numba" else found(name, package)
import torch, normopt
w = [torch.nn.Parameter(torch.ones(200, 200))]
w[0].grad = torch.ones_like(w[0])
opt = normopt.LPSGDM(w)
opt.step()
for call in (
    lambda: normopt.LPSGDM(w, fused=True),
    lambda: importlib.import_module("normopt.integrations.timm").register(),
    lambda: normopt.sparsity.report(torch.nn.Linear(2, 2)).figure(),
    lambda: importlib.import_module("benchmarks"),
):
    try:
        call()
    except (ValueError, ImportError) as error:
        print(type(error).__name__, error)
"""
    fused, timm, plot, benchmarks = run(sys.executable, "-I", "-c", code, cwd=wheel.parent).splitlines()
    assert fused.startswith("ValueError")
    assert 'the extra "cpu"' in fused
    assert "timm" in timm
    assert 'pip install "normopt[plots]"' in plot
    assert benchmarks == "ModuleNotFoundError No module named 'benchmarks'"  # they are in the repository only


def test_the_sdist_has_all_that_its_tests_need_and_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = wheel.parent / "source"
    build = "from setuptools import build_meta; print(build_meta.build_sdist(r'%s'))"
    name = run(sys.executable, "-c", build % tmp_path, cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / name.removesuffix(".tar.gz")
    hidden = {".gitignore", ".github", ".ci", ".pre-commit-config.yaml"}
    missing = {
        str(p.relative_to(source))
        for p in source.rglob("*")
        if p.is_file() and not (unpacked / p.relative_to(source)).is_file() and not {*p.parts} & {"build", *hidden}
    }
    assert not {m for m in missing if "egg-info" not in m}
    wheels = "from setuptools import build_meta; print(build_meta.build_wheel(r'%s'))"
    again = run(sys.executable, "-c", wheels % tmp_path, cwd=unpacked).splitlines()[-1]
    assert sorted(zipfile.ZipFile(tmp_path / again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_a_release_has_whole_addresses(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml", "normopt/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    prepare = (sys.executable, str(ROOT / ".github/prepare_release.py"), REPOSITORY)
    run(*prepare, f"v{normopt.__version__}", cwd=tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert all(t.startswith("https://") for t in targets)
    ours = [t.removeprefix(f"{REPOSITORY}/") for t in targets if t.startswith(REPOSITORY)]
    assert len(ours) >= 10
    for way, _, path in (t.split("/", 2) for t in ours):
        assert (ROOT / path).exists(), path
        assert way == ("raw" if path.endswith(".svg") else "blob")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == REPOSITORY
    wrong = subprocess.run([*prepare, "v9.9"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "they must agree" in wrong.stderr


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / ".github").rglob("*.yml")))
def test_the_repositorys_own_files_parse(name: str) -> None:
    (path,) = (ROOT / ".github").rglob(name)
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert said
    for job in said.get("jobs", {}).values():
        for command in (step["run"] for step in job["steps"] if "run" in step):
            for target in re.findall(r"\bmake ([\w-]+)", command):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            for file in re.findall(r"[\w./]+\.py\b|\.ci/run", command):
                assert (ROOT / file).is_file()

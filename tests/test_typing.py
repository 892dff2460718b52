"""What type checkers say about a user's program: nothing where it is right, and where a setting is misspelt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from normopt.groups.presets import PRESETS, PresetName
from tests.patience import patience

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HEAD = """import torch

import normopt

model = torch.nn.Linear(64, 10)
opt: torch.optim.Optimizer = normopt.LPSGDM(model.parameters(), lr=0.01)
"""
# Each line has an error, and the word that a checker names.
WRONG = {
    "normopt.LPSGDM(model.parameters(), weight_decya=8.0)": "weight_decya",
    'normopt.LPSGDM(model.parameters(), scale="dul")': "dul",
    "normopt.Muon(model.parameters(), decay_pp=8.0)": "decay_pp",
    "normopt.AdamW(model.parameters(), amsgard=True)": "amsgard",
    "normopt.SteepestDescent(model.parameters(), momentumm=8.0)": "momentumm",
    'normopt.get_optimizer("powerstep")(model.parameters(), weight_decya=8.0)': "weight_decya",
    'normopt.param_groups(model, preset="scoin")': "scoin",
    'normopt.AGR(opt, scoop="group")': "scoop",
    'normopt.LpDecay(opt, overr="rows")': "overr",
    "normopt.schedules.CosineP(opt, 3, p_endd=3)": "p_endd",
    "normopt.LPSGDM(model.parameters()).step(lambda: None).backward()": "None",
}
RIGHT = (
    HEAD
    + """

def by_tensor() -> torch.Tensor:
    loss: torch.Tensor = model(torch.ones(1, 64)).sum()
    loss.backward()
    return loss


def by_number() -> float:
    return float(by_tensor())


own = normopt.SGD(model.parameters(), lr=torch.tensor(0.1), fused=None)
loss: torch.Tensor = own.step(by_tensor)
number: float = own.step(by_number)
own.step()
scheduler = torch.optim.lr_scheduler.StepLR(own, 3)
"""
)


def mypy(folder: Path, cache: Path, *arguments: str) -> str:
    """What mypy says about every file of a folder, as in a user's project."""
    command = [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={cache}", *arguments]
    command += map(str, sorted(folder.glob("*.py")))
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=patience(200), check=False
    ).stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> str:
    """Return mypy's output for all programs in one run: most of its time goes to torch, which is cached."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "wrong.py").write_text(HEAD + "\n".join(WRONG) + "\n", encoding="utf-8")
    (folder / "right.py").write_text(RIGHT, encoding="utf-8")
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)):
        (folder / f"readme_{i}.py").write_text(HEAD + block, encoding="utf-8")
    kept = pytestconfig.pluginmanager.has_plugin("cacheprovider")
    return mypy(folder, pytestconfig.cache.mkdir("mypy") if kept else folder / "cache", "--check-untyped-defs")


def test_right_programs_and_the_readme_are_clean(found: str) -> None:
    assert re.search(r"checked (\d+) source", found)[1] == str(2 + README.read_text().count("```python"))  # type: ignore[index]
    assert not re.findall(r"^(?:right|readme_\d+)\.py:.*", found, re.MULTILINE)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_setting_is_a_type_error(line: str, found: str) -> None:
    place = HEAD.count("\n") + 1 + list(WRONG).index(line)
    assert re.search(rf"^wrong\.py:{place}: error: .*{WRONG[line]}", found, re.MULTILINE), found


def test_pyright_says_the_same(tmp_path: Path) -> None:
    program = next(filter(None, map(shutil.which, ("pyright", "basedpyright"))), None)
    if program is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "wrong.py").write_text(HEAD + "\n".join(WRONG) + "\n", encoding="utf-8")
    (tmp_path / "right.py").write_text(RIGHT, encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"extraPaths": ["{ROOT}"], "typeCheckingMode": "standard"}}', encoding="utf-8"
    )
    command = [program, "--pythonpath", sys.executable, "-p", str(tmp_path)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patience(200), check=False)
    assert "right.py:" not in said.stdout
    lines = {int(n) for n in re.findall(r"wrong\.py:(\d+):\d+ - error", said.stdout)}
    first = HEAD.count("\n") + 1
    assert lines == set(range(first, first + len(WRONG)))


def test_every_preset_has_its_name_in_the_type() -> None:
    assert list(get_args(PresetName)) == list(PRESETS)

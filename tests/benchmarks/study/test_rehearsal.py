from __future__ import annotations

import pytest

from benchmarks.study import flags
from benchmarks.study.presets import PRESETS
from benchmarks.study.rehearsal import rehearse
from benchmarks.study.toml import BadStudy


@pytest.mark.parametrize("study", PRESETS.values(), ids=PRESETS)
def test_every_preset_can_be_made(study):
    rehearse(study)


@pytest.mark.parametrize(
    ("arm", "told"),
    [("lpsgdm p=abc", "p must"), ("lpsgdm p=0.5", "p must"), ("adamw lr=-1", "learning rate")],
)
def test_what_cannot_be_made_is_told_before_anything_runs(arm, told):
    study = flags.study(None, ["digits"], ["sgd", arm])
    with pytest.raises(BadStudy, match=rf"the optimizer of the arm '{arm.split()[0]}.*cannot be made: .*{told}"):
        rehearse(study)


def test_an_optimizer_that_is_gone_is_told_before_a_study_goes_on(monkeypatch, tmp_path):
    module = tmp_path / "mine_for_a_while.py"
    module.write_text("from torch.optim import SGD as Mine\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    study = flags.study(None, ["digits"], ["sgd", "mine_for_a_while:Mine"])
    rehearse(study)
    monkeypatch.delitem(__import__("sys").modules, "mine_for_a_while")
    module.unlink()
    __import__("importlib").invalidate_caches()
    with pytest.raises(BadStudy, match="mine_for_a_while"):
        rehearse(study)


def test_a_name_is_that_of_a_folder():
    with pytest.raises(ValueError, match="folder"):
        type(PRESETS["quick"]).model_validate(PRESETS["quick"].model_dump() | {"name": "../escape"})

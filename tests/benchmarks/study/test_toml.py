from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks.study import flags, lines, toml
from benchmarks.study.presets import LEARNING_RATES, PRESETS
from benchmarks.study.spec import Arm, PSchedule, Range, Tuning
from benchmarks.study.toml import LR, BadStudy, read

WHOLE = """
name = "mine"
purpose = "whether a smaller p is enough"
tasks = ["digits", "breast-cancer"]
baseline = "SGD"
seeds = [7, 8]
budget = 0.5

[tuning]
trials = 3
startup = 2
seeds = [1000, 1001]

[[arms]]
name = "SGD"
optimizer = "sgd"
search = { lr = { low = 0.01, high = 1.0 }, momentum = { low = 0.5, high = 0.99, log = false } }

[[arms]]
name = "LPSGDM"
optimizer = "lpsgdm"
settings = { momentum = 0.95 }
grid = { p = [4, inf], agr = [false, true] }
p_schedule = { kind = "linear" }

[[arms]]
optimizer = "signum"
tuned_as = "SGD"
lr_factor = 0.1
against = "LPSGDM p=4"
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_study(tmp_path):
    study = read(file(tmp_path, WHOLE))
    assert (study.name, study.purpose, study.tasks) == (
        "mine",
        "whether a smaller p is enough",
        ("digits", "breast-cancer"),
    )
    assert (study.baseline, study.seeds, study.budget) == ("SGD", (7, 8), 0.5)
    assert study.tuning == Tuning(trials=3, startup=2, seeds=(1000, 1001))
    assert [arm.name for arm in study.arms] == [
        "SGD", "LPSGDM p=4", "LPSGDM p=4 agr", "LPSGDM p=inf", "LPSGDM p=inf agr", "signum",
    ]  # fmt: skip
    assert study.arm("SGD").search["momentum"] == Range(low=0.5, high=0.99, log=False)
    assert study.arm("LPSGDM p=inf agr") == Arm(
        name="LPSGDM p=inf agr",
        optimizer="lpsgdm",
        settings={"momentum": 0.95, "p": "inf", "agr": True},
        p_schedule=PSchedule(kind="linear"),
        search={"lr": LEARNING_RATES["lpsgdm"]},
    )
    assert study.arm("signum").search == {}
    assert study.arm("signum").lr_factor == 0.1


def test_what_a_file_leaves_out_has_defaults(tmp_path):
    study = read(file(tmp_path, 'tasks = ["digits"]\n[[arms]]\noptimizer = "sgd"\n'))
    assert (study.name, study.baseline, study.seeds, study.budget) == ("study", "sgd", (1, 2, 3, 4, 5), 1.0)
    assert study.tuning == Tuning(trials=12, startup=8)


def test_a_preset_can_be_the_base(tmp_path):
    base = PRESETS["smoke"]
    replaced = base.arms[-1].name
    text = f'extends = "smoke"\nseeds = 4\n[[arms]]\nname = "{replaced}"\noptimizer = "signum"\n'
    study = read(file(tmp_path, text))
    assert (study.tasks, study.baseline, study.tuning) == (base.tasks, base.baseline, base.tuning)
    assert (study.name, study.seeds) == ("study", (1, 2, 3, 4))
    assert [arm.name for arm in study.arms] == [arm.name for arm in base.arms]
    assert study.arm(replaced).optimizer == "signum"


BASE = 'tasks = ["digits"]\n[[arms]]\nname = "A"\noptimizer = "lpsgdm"\n'


@pytest.mark.parametrize(
    ("text", "line", "key", "said"),
    [
        (BASE.replace("digits", "digit"), 1, "tasks.1", "there is no task 'digit'; did you mean 'digits'"),
        (BASE.replace("lpsgdm", "lpsgmd"), 4, "arms.1.optimizer", "unknown optimizer 'lpsgmd'; did you mean"),
        (BASE + "settings = { momentm = 0.9 }", 5, "arms.1.settings.momentm", "no setting 'momentm'; did you mean"),
        (BASE + "[arms.search]\nlr = { low = 1, high = 0.1 }", 6, "arms.1.search.lr", "a range needs low < high"),
        (BASE + "[arms.search]\nlr = { low = 1, hgih = 2 }", 6, "arms.1.search.lr.hgih", "did you mean 'high'"),
        (BASE + "[arms.search]\nlr = { low = 1 }", 6, "arms.1.search.lr", "high is missing"),
        (BASE + "[arms.search]\nmomentum = { low = -1, high = 1 }", 6, "arms.1.search.momentum", "low > 0 if log"),
        (BASE + 'sttings = {}', 5, "arms.1.sttings", "there is no key 'sttings'; did you mean 'settings'"),
        (BASE + 'p_schedule = { kind = "cosin" }', 5, "arms.1.p_schedule.kind", "or 'adaptive', not 'cosin'"),
        (BASE + "grid = { p = [] }", 5, "arms.1.grid.p", "a grid needs values"),
        (BASE + "settings = { p = 3 }\ngrid = { p = [4] }", 6, "arms.1.grid.p", "both in the settings and in the grid"),
        (BASE + 'tuned_as = "B"', 2, "arms.1", "tuned_as must name another arm"),
        (BASE + "[[arms]]\noptimizer = 'sgd'\nname = 'A'", 5, "arms.2", "arms need names of their own"),
        ("seeds = [1, 1]\n" + BASE, 1, "seeds", "the seeds must differ"),
        ("baseline = 'B'\n" + BASE, 1, "baseline", "is none of the arms: A"),
        ("budget = 0\n" + BASE, 1, "budget", "greater than 0"),
        ("budgt = 1\n" + BASE, 1, "budgt", "did you mean 'budget'"),
        ("[tuning]\ntrials = 0\n" + BASE.replace("tasks", "x"), 2, "tuning.trials", "greater than or equal to 1"),
        ('extends = "quik"\n' + BASE, 1, "extends", "there is no preset 'quik'; did you mean 'quick'"),
        ('[[arms]]\noptimizer = "sgd"', None, "tasks", "at least 1 item"),
        ("tasks = ['digits']", None, "arms", "at least 1 item"),
        ("tasks = [\n'digits'\n'x']", None, "", "no TOML.*line 3"),
    ],
)  # fmt: skip
def test_errors_name_the_file_the_line_and_the_key(tmp_path, text, line, key, said):
    path = file(tmp_path, text)
    with pytest.raises(BadStudy, match=said) as caught:
        read(path)
    head = str(path) + (f", line {line}" if line else "") + (f", {key}" if key else "") + ": "
    assert any(each.startswith(head) for each in str(caught.value).splitlines()), str(caught.value)


def test_all_errors_are_told_at_once(tmp_path):
    text = BASE.replace("digits", "digit") + "settings = { momentm = 1, pp = 2 }\n"
    with pytest.raises(BadStudy) as caught:
        read(file(tmp_path, text))
    assert [line.split(", ")[1] for line in str(caught.value).splitlines()] == ["line 1", "line 5", "line 5"]


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(BadStudy, match="cannot be read"):
        read(tmp_path / "none.toml")


def test_the_file_in_the_documentation_is_one(tmp_path):
    assert toml.__doc__ is not None
    text = "\n".join(line[4:] for line in toml.__doc__.splitlines() if line.startswith("    "))
    study = read(file(tmp_path, text))
    assert [arm.name for arm in study.arms if "LPSGDM p=" in arm.name] == [
        "LPSGDM p=4", "LPSGDM p=4 agr", "LPSGDM p=8", "LPSGDM p=8 agr",
    ]  # fmt: skip


@pytest.mark.parametrize("module", [lines, flags])
def test_the_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_flags_are_a_study_too():
    study = flags.study(
        None,
        tasks=["digits"],
        arms=["sgd lr=0.1", "lpsgdm p=inf agr=true lr=1e-3..1 momentum=0.5..0.9 p_schedule=cosine", "lion name=mine"],
        trials=2,
        seeds=3,
        budget=0.25,
    )
    assert (study.name, study.tasks, study.baseline, study.seeds, study.budget) == (
        "custom", ("digits",), "sgd lr=0.1", (1, 2, 3), 0.25,
    )  # fmt: skip
    assert study.tuning.trials == 2
    sgd, lpsgdm, lion = study.arms
    assert (sgd.settings, sgd.search) == ({"lr": 0.1}, {})
    assert lpsgdm.name == "lpsgdm p=inf agr=true p_schedule=cosine"
    assert lpsgdm.settings == {"p": "inf", "agr": True}
    assert lpsgdm.search == {"lr": Range(low=1e-3, high=1.0), "momentum": Range(low=0.5, high=0.9)}
    assert lpsgdm.p_schedule == PSchedule(kind="cosine")
    assert (lion.name, lion.search) == ("mine", {"lr": LEARNING_RATES["lion"]})


def test_flags_change_a_preset():
    assert flags.study("smoke") is PRESETS["smoke"]
    study = flags.study("smoke", arms=["torch.optim:RMSprop alpha=0.9"])
    assert study.name == "smoke-changed"
    assert [arm.name for arm in study.arms] == [*(arm.name for arm in PRESETS["smoke"].arms), "RMSprop alpha=0.9"]
    assert study.arms[-1] == Arm(
        name="RMSprop alpha=0.9", optimizer="torch.optim:RMSprop", settings={"alpha": 0.9}, search={"lr": LR}
    )
    assert study.seeds == PRESETS["smoke"].seeds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(preset="quik"), "there is no preset 'quik'; did you mean 'quick'"),
        (dict(preset=None), "say what to run"),
        (dict(preset=None, tasks=["digits"]), "at least one --task and one --arm"),
        (dict(preset="smoke", tasks=["digit"]), "there is no task 'digit'; did you mean 'digits'"),
        (dict(preset="smoke", arms=["lpsgd p=4 q"]), "a setting is KEY=VALUE, but 'q'"),
        (dict(preset="smoke", arms=["p=4"]), "an arm is an optimizer and its settings"),
        (dict(preset="smoke", arms=["sgd lr=a..b"]), "a range is LOW..HIGH"),
        (dict(preset="smoke", arms=["sgd lr=1..0.1"]), "low < high"),
        (dict(preset="smoke", arms=["no_such_module:Opt"]), "cannot be imported"),
        (dict(preset="smoke", arms=["sgd momentm=4"]), "did you mean 'momentum'"),
        (dict(preset="smoke", seeds=2000), "seeds must differ"),
    ],
)
def test_flags_that_cannot_be_are_said_so(given, said):
    with pytest.raises(BadStudy, match=said):
        flags.study(**given)

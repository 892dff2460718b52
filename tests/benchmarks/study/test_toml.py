from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks.study import flags, toml
from benchmarks.study.lanes import lanes
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
    assert study.tuning == Tuning(trials=3, startup=2, seeds=(1000, 1001), reruns=2)
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
    assert (study.name, study.baseline, study.seeds, study.budget) == ("study", "sgd", tuple(range(1, 9)), 1.0)
    assert study.tuning == Tuning(trials=12, startup=8, reruns=2)


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
    ("text", "key", "said"),
    [
        (BASE.replace("digits", "digit"), "tasks", "there is no task 'digit'; did you mean 'digits'"),
        (BASE.replace("lpsgdm", "lpsgmd"), "arms.1.optimizer", "unknown optimizer 'lpsgmd'; did you mean"),
        (BASE + "settings = { momentm = 0.9 }", "arms.1.settings", "no setting 'momentm'; did you mean"),
        (BASE + "[arms.search]\nlr = { low = 1, high = 0.1 }", "arms.1.search.lr", "a range needs low < high"),
        (BASE + "[arms.search]\nlr = { low = 1, hgih = 2 }", "arms.1.search.lr.hgih", "did you mean 'high'"),
        (BASE + "[arms.search]\nlr = { low = 1 }", "arms.1.search.lr.high", "field required"),
        (BASE + "[arms.search]\nmomentum = { low = -1, high = 1 }", "arms.1.search.momentum", "low > 0 if log"),
        (BASE + "[arms.search]\nmomentm = { low = 0.1, high = 1 }", "arms.1.search", "no setting 'momentm'"),
        (BASE + 'sttings = {}', "arms.1.sttings", "there is no key 'sttings'; did you mean 'settings'"),
        (BASE + 'p_schedule = { kind = "cosin" }', "arms.1.p_schedule.kind", "or 'curvature', not 'cosin'"),
        (BASE + "grid = { p = [] }", "arms.1.grid", "a grid needs values"),
        (BASE + "grid = { q = [1] }", "arms.1.grid", "no setting 'q'"),
        (BASE + "settings = { p = 3 }\ngrid = { p = [4] }", "arms.1.grid", "p is both in the settings and in the grid"),
        (BASE + 'tuned_as = "B"', "arm 'A'", "tuned_as must name another arm"),
        (BASE + "[[arms]]\noptimizer = 'sgd'\nname = 'A'", "arms need names of their own", "A occurs twice"),
        ("seeds = [1, 1]\n" + BASE, "the seeds must differ", ""),
        ("seeds = 0\n" + BASE, "seeds", "at least 1 item"),
        ("baseline = 'B'\n" + BASE, "the baseline 'B' is none of the arms", "A"),
        ("budget = 0\n" + BASE, "budget", "greater than 0"),
        ("batch_size = 0\n" + BASE, "batch_size", "greater than or equal to 1"),
        ("budgt = 1\n" + BASE, "budgt", "did you mean 'budget'"),
        ("[tuning]\ntrials = 0\n" + BASE.replace("tasks", "x"), "tuning.trials", "greater than or equal to 1"),
        ('extends = "quik"\n' + BASE, "extends", "there is no preset 'quik'; did you mean 'quick'"),
        ('[[arms]]\noptimizer = "sgd"', "tasks", "at least 1 item"),
        ("tasks = ['digits']", "arms", "at least 1 item"),
        ("tasks = [\n'digits'\n'x']", "this is no TOML", "line 3"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_key(tmp_path, text, key, said):
    path = file(tmp_path, text)
    with pytest.raises(BadStudy) as caught:
        read(path)
    assert any(line.startswith(f"{path}: {key}") and said in line for line in str(caught.value).splitlines()), str(
        caught.value
    )


def test_errors_of_all_keys_are_told_at_once(tmp_path):
    text = BASE.replace("digits", "digit") + "settings = { momentm = 1 }\nsearch = { pp = { low = 1, high = 2 } }\n"
    with pytest.raises(BadStudy) as caught:
        read(file(tmp_path, text))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "tasks.1", "arms.1.settings", "arms.1.search",
    ]  # fmt: skip


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


def test_the_examples_in_docstrings_hold():
    result = doctest.testmod(flags)
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


def test_names_with_blanks_are_quoted():
    study = flags.study(None, ["digits"], ["sgd lr=0.1 name='no decay'", 'lion name="a b"'], baseline="a b")
    assert [arm.name for arm in study.arms] == ["no decay", "a b"]
    assert study.baseline == "a b"


def test_flags_change_a_file(tmp_path):
    path = file(tmp_path, WHOLE)
    old = read(path)
    assert flags.study(str(path)) == old
    new = flags.study(
        str(path),
        ["bytes"],
        ["lion", "adamw name=SGD"],
        trials=4,
        tuning_seeds=3,
        seeds=2,
        budget=0.25,
        baseline="lion",
        batch_size=16,
    )
    assert (new.name, new.tasks, new.seeds, new.budget) == ("mine-changed", ("bytes",), (1, 2), 0.25)
    assert (new.baseline, new.batch_size) == ("lion", 16)
    assert new.tuning == Tuning(trials=4, startup=2, seeds=(1000, 1001, 1002), reruns=2)
    assert [arm.name for arm in new.arms] == [*(a.name for a in old.arms if a.name != "SGD"), "lion", "SGD"]
    assert new.arm("SGD").optimizer == "adamw"
    assert {spec.batch_size for spec in lanes(new)["bytes", "lion"].tuning_specs().values()} == {16}
    assert flags.study(str(path), seeds=9).model_dump() == old.model_dump() | {
        "name": "mine-changed", "seeds": tuple(range(1, 10)),
    }  # fmt: skip


def test_autocast_is_of_the_whole_study_and_makes_other_runs(tmp_path):
    half = flags.study("smoke", amp=True)
    assert half.amp
    path = tmp_path / "smoke.toml"
    path.write_text('extends = "smoke"\namp = true\n')
    assert read(path).amp
    ids, others = (
        {k for lane in lanes(study).values() for k in lane.tuning_specs()} for study in (half, PRESETS["smoke"])
    )
    assert ids
    assert not ids & others


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
        (dict(what="quik"), "there is no preset 'quik'; did you mean 'quick'"),
        (dict(what=None), "say what to run"),
        (dict(what=None, tasks=["digits"]), "at least one --task and one --arm"),
        (dict(what="smoke", tasks=["digit"]), "there is no task 'digit'; did you mean 'digits'"),
        (dict(what="smoke", arms=["lpsgd p=4 q"]), "a setting is KEY=VALUE, but 'q'"),
        (dict(what="smoke", arms=["p=4"]), "an arm is an optimizer and its settings"),
        (dict(what="smoke", arms=["sgd lr=a..b"]), "a range is LOW..HIGH"),
        (dict(what="smoke", arms=["sgd lr=1..0.1"]), "low < high"),
        (dict(what="smoke", arms=["no_such_module:Opt"]), "cannot be imported"),
        (dict(what="smoke", arms=["sgd momentm=4"]), "did you mean 'momentum'"),
        (dict(what="smoke", seeds=2000), "seeds must differ"),
        (dict(what="smoke", baseline="no"), "the baseline 'no' is none of the arms"),
        (dict(what="smoke", arms=["sgd name='a"]), "No closing quotation"),
    ],
)
def test_flags_that_cannot_be_are_said_so(given, said):
    with pytest.raises(BadStudy, match=said):
        flags.study(**given)

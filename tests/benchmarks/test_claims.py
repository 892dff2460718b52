"""What a report says of annealing, AGR and ℓp decay: it finds the controls, and follows the data."""

from __future__ import annotations

import re

import pytest

from benchmarks.report import claims, data
from benchmarks.report.figures import figures
from benchmarks.results import Results
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, Study
from tests.benchmarks.synthetic import LR, STUDY, TRUTHS, UP, Truth
from tests.benchmarks.test_report import told, words

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(scope="module")
def results(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return told(tmp_path_factory.mktemp("whole"))


def test_annealing_is_held_against_its_controls(results, tmp_path):
    text = words(results)["What annealing p does"]
    assert re.search(
        r"LPSGDM against LPSGDM constant p \(whose p stays\): better on toy-up \(\+[23]\.\d\d points\)", text
    )
    assert re.search(r"LPSGDM against Lengths \(SGD's direction .*\): not told apart on any task", text)
    assert "2 are better, 0 worse and 0 neither: in line with what is reported." in text
    assert "On no task can it be shown to be better than SGD's direction at its step lengths" in text
    other = words(told(tmp_path, {"LPSGDM": Truth(gain=-0.06), "Lengths": Truth(gain=-0.1)}))["What annealing p does"]
    assert "0 are better, 2 worse and 0 neither: against what is reported." in other
    assert "On toy-up and toy-down its direction is worth something" in other


def test_agr_is_held_against_the_same_without(results, tmp_path):
    text = words(results)["What AGR does"]
    assert "LPSGDM + AGR against LPSGDM (the same without): not told apart on any task" in text
    assert "the gain that is reported does not show here" in text
    better = words(told(tmp_path, {"LPSGDM + AGR": Truth(gain=0.05)}))["What AGR does"]
    assert "2 are better, 0 worse and 0 neither: in line" in better


def swept() -> Study:
    """Three strengths of decay, all at LPSGDM's learning rate."""
    decayed = STUDY.arm("LPSGDM + decay")
    arms = [
        decayed.model_copy(update={"name": f"decay {step:g}", "settings": decayed.settings | {"decay_step": step}})
        for step in (1e-4, 2e-4, 3e-4)
    ]
    return STUDY.model_copy(update={"name": "swept", "arms": (*STUDY.arms[:3], *arms)})


def test_the_sparsest_arm_is_chosen_without_looking_at_test_data(tmp_path):
    lost = TRUTHS["LPSGDM"].gain
    truths = {
        "decay 0.0001": Truth(gain=lost, zeros=0.3, reached=3),
        # Unlucky in test, but not by what can be seen before.
        "decay 0.0002": Truth(gain=lost - 0.05, zeros=0.6, reached=3, validation=0.05),
        # Lucky in test, and left out for its validation.
        "decay 0.0003": Truth(gain=lost, zeros=0.9, reached=3, validation=-0.05),
    }
    found = told(tmp_path, truths, swept())
    text = words(found)["What ℓp decay does"]
    assert "The sparsest arms that do not lose more than 1 point of accuracy" in text
    assert re.search(
        r"on toy-up, decay 0\.0002 with 60\.\d % .*? exact zeros and a test accuracy −[45]\.\d\d points", text
    )
    panel = next(figure for figure in figures(found) if figure.name == "zeros").panels[UP.name]
    # One line for the sweep, from its fewest zeros to its most.
    assert [trace.name for trace in panel.data] == ["SGD", "decay"]
    assert [round(x) for x in panel.data[1].x] == [30, 60, 90]
    assert list(panel.data[1].text) == ["decay 0.0001", "decay 0.0002", "decay 0.0003"]

    none = told(tmp_path / "none", {name: Truth(gain=-0.2, zeros=0.9) for name in truths}, swept())
    assert "On toy-up and toy-down every arm with it loses more than 1 point" in words(none)["What ℓp decay does"]


def test_twins_and_controls_are_found_in_the_presets():
    def names(pairs: list[claims.Pair]) -> list[tuple[str, str]]:
        return [(pair.arm, pair.control) for pair in pairs]

    standard = PRESETS["standard"]
    assert {control for _, control in names(claims.annealing(standard))} >= {"LPSGDM constant p", "LPSGDM linear p"}
    assert claims.LENGTHS in [pair.what for pair in claims.annealing(standard)]
    assert {arm for name in ("standard", "p-schedule") for arm, _ in names(claims.annealing(PRESETS[name]))} == {
        "LPSGDM"
    }
    assert names(claims.twins(standard, claims.AGR)) == [("LPSGDM + AGR", "LPSGDM"), ("AdamW + AGR", "AdamW")]
    assert [arm for arm, _ in names(claims.twins(standard, claims.DECAY))] == [
        "LPSGDM + ℓ0.8 decay",
        "AdamW + ℓ0.8 decay",
    ]
    sparse = PRESETS["pwd-sparsity"]
    assert {control for _, control in names(claims.twins(sparse, claims.DECAY))} == {"LPSGDM", "Adam"}
    assert claims.annealing(PRESETS["norms-by-layer"]) == claims.twins(PRESETS["norms-by-layer"], claims.AGR) == []


def test_sweeps_are_found_in_the_presets_and_told_in_sum(tmp_path):
    assert set(data.sweeps(PRESETS["pwd-sparsity"]).values()) == {"LPSGDM ℓ0.8", "LPSGDM ℓ1", "Adam ℓ0.8", "Adam ℓ1"}
    assert data.sweeps(PRESETS["standard"]) == {}
    decayed = STUDY.arm("LPSGDM + decay")
    arms = [
        decayed.model_copy(update={"name": f"decay {i}", "settings": decayed.settings | {"decay_step": i * 1e-4}})
        for i in range(1, 10)
    ]
    study = STUDY.model_copy(update={"name": "wide", "arms": (*STUDY.arms[:3], *arms)})
    gains = {arm.name: Truth(gain=0.05 if i < 3 else -0.2, zeros=0.5, reached=3) for i, arm in enumerate(arms)}
    text = words(told(tmp_path, gains, study))["What ℓp decay does"]
    assert (
        "Of 18 comparisons of 9 arms with the same without, on 2 tasks, 6 are better, 12 worse and 0 neither." in text
    )
    assert "against LPSGDM" not in text


def test_an_arm_with_both_regularizers_is_held_against_the_nearest_without(toys):
    both = Arm(name="both", optimizer="sgd", settings={"agr": True, "decay": "lp", "decay_step": 1e-4}, search=LR)
    decay = Arm(name="decay", optimizer="sgd", settings={"decay": "lp", "decay_step": 1e-4}, search=LR)
    study = STUDY.model_copy(update={"arms": (STUDY.arms[0], both)})
    assert claims.twins(study, claims.AGR) == [claims.Pair("both", "SGD", "the same without AGR and without decay")]
    study = STUDY.model_copy(update={"arms": (STUDY.arms[0], both, decay)})
    assert claims.twins(study, claims.AGR) == [claims.Pair("both", "decay", "the same without")]

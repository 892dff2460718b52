"""The presets of papers: declared before they are run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.programs import paper_pages
from benchmarks.results import Results, collect
from benchmarks.store import Store
from benchmarks.study import flags, papers
from benchmarks.study.lanes import chosen, lanes
from benchmarks.study.presets import PRESETS
from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import RunSpec
from tests.benchmarks.synthetic import ENVIRONMENT


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_preset_is_what_its_file_declares(name):
    protocol, path = papers.DECLARED[name], papers.path(name)
    told = papers.Protocol.model_validate_json(path.read_text(encoding="utf-8"))
    assert told.study.protocol is None
    assert told == protocol.model_copy(update={"study": protocol.study.model_copy(update={"protocol": None})})
    assert PRESETS[name] == protocol.study
    assert PRESETS[name].protocol == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", papers.DECLARED)
def test_stored_runs_are_those_of_the_declared_study(name):
    path = papers.PROTOCOLS / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no runs of {name} are stored yet")
    assert Store.from_parquet(path).study == PRESETS[name]


@pytest.mark.parametrize("name", papers.DECLARED)
def test_every_preset_of_a_paper_has_eight_seeds_and_equal_trials(name):
    study = PRESETS[name]
    assert len(study.seeds) >= 8
    decades = {round(arm.search["lr"].high / arm.search["lr"].low) for arm in study.arms if arm.search}
    assert len(decades) <= 1


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_changed_preset_claims_no_protocol(name):
    changed = flags.study(name, tasks=["cifar10-resnet18"])
    assert changed.protocol is None
    assert changed.tasks == ("cifar10-resnet18",)
    assert changed.arms == PRESETS[name].arms


Gains = dict[str, float]


def told(folder: Path, name: str, gains: Gains, zeros: Gains, regular: Callable[[RunSpec], float]) -> Results:
    """Results of a study whose arms have these gains in accuracy, shares of zeros, and median cosines."""
    study = PRESETS[name]
    store = Store(folder)
    store.begin(study, ENVIRONMENT)
    every = lanes(study)
    for (task, _), lane in every.items():
        while not lane.tuned:
            losses = dict.fromkeys(lane.tuning_specs(), 0.5)
            for trial in lane.tell(losses):
                store.add_trial(task, lane.arm.name, trial)
    for (_, arm), lane in every.items():
        choice = chosen(lane, every)
        assert choice is not None
        for spec in lane.final_specs(choice):
            noise = float(np.random.default_rng(int(spec.run_id, 16) % 2**32).normal(scale=5e-4))
            cosine = regular(spec) + noise
            score = 0.9 + 0.01 * math.sin(spec.seed) + gains.get(arm, 0.0) + noise
            point = Point(steps=1, train_loss=1 - cosine, validation_loss=0.3, score=score)
            measures = {"zeros": zeros.get(arm, 0.0), "median cosine": cosine, "straightness": 0.5, "negative γ": 0.1}
            store.add(
                RunRecord(
                    id=spec.run_id,
                    spec=spec,
                    curve=[point],
                    diverged=False,
                    test_loss=0.3,
                    test_score=score,
                    measures=measures,
                    state_bytes=1,
                    ms_per_step=1.0,
                    seconds=1.0,
                )
            )
    return collect(store)


def page_of(
    tmp_path: Path,
    name: str,
    gains: Gains | None = None,
    zeros: Gains | None = None,
    regular: Callable[[RunSpec], float] = lambda spec: 0.5,
) -> str:
    results = told(tmp_path / name, name, gains or {}, zeros or {}, regular)
    return " ".join(paper_pages.page(papers.DECLARED[name], results).split())


@pytest.mark.parametrize(("loss", "holds"), [(0.001, True), (0.02, False)])
def test_the_page_of_pwd_judges_by_zeros_and_equal_accuracy(tmp_path, loss, holds):
    arm = "ℓ0.8, ηλ = 0.00012"
    text = page_of(tmp_path, "paper-pwd", {arm: -loss, "pruned, 86 %": 0.01}, {arm: 0.86, "ℓ0.8, ηλ = 8e-05": 0.7})
    assert f"**Here:** the claim {'holds' if holds else 'does not hold'}: {arm} makes 86.00 %" in text
    assert "“pruned, 86 %” minus “ℓ0.8, ηλ = 0.00012” is +1.0" in text or not holds
    assert "| exact zeros | 83.6 % |" in text


def test_a_sparsity_that_is_not_reached_is_said(tmp_path):
    text = page_of(tmp_path, "paper-pwd", zeros={"ℓ0.8, ηλ = 0.00012": 0.7})
    assert "**Here:** no arm has 80 % zeros; ℓ0.8, ηλ = 0.00012 has 70.00 %" in text


@pytest.mark.parametrize("holds", [True, False])
def test_the_page_of_lpsgdm_asks_for_all_six_and_for_the_controls(tmp_path, holds):
    others = [f"{name}{tuned}" for name in ("SGD", "AdamW", "Lion") for tuned in ("", " tuned")]
    gains = dict.fromkeys(others, -0.01) | {"SGD at LPSGDM's length": -0.02, "p = 6 tuned": 0.02}
    text = page_of(tmp_path, "paper-lpsgdm", gains if holds else gains | {"SGD tuned": 0.01, "Lion": 0.0})
    words = ("the claim holds", 6, 0, 0) if holds else ("the claim does not hold", 4, 1, 1)
    assert f"**Here:** {words[0]}: of 6 comparisons" in text
    assert (
        f"better in {words[1]}, significantly worse in {words[2]}, with no significant difference in {words[3]}."
        in text
    )
    assert "significantly worse: the direction helps" in text
    assert "significantly better: annealing p hurts" in text
    assert "| LPSGDM | 94.81 ± 0.19 % (ResNet-18 on CIFAR-10) |" in text


def test_the_page_of_agr_asks_for_both_and_for_the_hooks(tmp_path):
    gains = {"AdamW + AGR": 0.01, "Adan + AGR": 0.01, "torch's AdamW + AGR on hooks": 0.01}
    text = page_of(tmp_path / "both", "paper-agr", gains)
    assert "**Here:** the claim holds: AdamW + AGR minus AdamW is +" in text
    assert "AGR on hooks is equivalent to AGR in the optimizer" in text
    text = page_of(tmp_path / "one", "paper-agr", gains | {"Adan + AGR": 0.0})
    assert "**Here:** the claim holds for AdamW alone, but was declared for both: " in text
    text = page_of(tmp_path / "none", "paper-agr", {"AdamW": 0.01, "Adan + AGR": 0.0})
    assert "**Here:** the claim does not hold: " in text
    text = page_of(tmp_path / "other", "paper-agr", gains | {"torch's AdamW + AGR on hooks": 0.02})
    assert "not shown to be equivalent" in text


def test_the_page_of_trajectories_counts_what_helps_both(tmp_path):
    def regular(spec: RunSpec) -> float:
        return 0.3 + 0.2 * ("-bn-" in spec.task) - 0.1 * ("skip" in spec.task) * (spec.optimizer == "sgd")

    text = page_of(tmp_path, "paper-trajectory", regular=regular)
    assert "the claim holds in 2 of 6 cases" in text
    assert "under SGD or AdamW): batch normalisation under SGD, batch normalisation under AdamW." in text
    assert "| SGD | skips | median cosine | −0.100" in text
    assert (
        "SGD: the rank correlation over 8 networks between the median cosine and the final training loss is −1.00"
        in text
    )


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_page_without_runs_shows_what_is_declared(name):
    text = paper_pages.page(papers.DECLARED[name], None)
    assert paper_pages.NOT_YET in text
    assert str(papers.digest(name)) in text
    assert "**Here:**" not in text


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_page_of_the_stored_runs_can_be_made(name):
    text = paper_pages.page(papers.DECLARED[name], paper_pages.read(name))
    assert text.startswith(f"# {paper_pages.PAGES[name].title}\n")
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


def test_lost_runs_and_too_few_are_said_instead_of_a_verdict(tmp_path):
    results = told(tmp_path, "paper-agr", {}, {}, lambda spec: 0.5)
    (task,) = results.tasks.values()
    for changes, words in (
        ({"failed": 1}, "no verdict, as final runs of AdamW were lost."),
        ({"runs": task.rows[0].runs[:1]}, "too few runs are done for a verdict."),
    ):
        rows = (replace(task.rows[0], **changes), *task.rows[1:])
        found = replace(results, tasks={task.name: replace(task, rows=rows)})
        assert f"**Here:** {words}" in paper_pages.page(papers.DECLARED["paper-agr"], found)

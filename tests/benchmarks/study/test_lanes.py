from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import qmc

from benchmarks.study import search
from benchmarks.study.lanes import Choice, Trial, chosen, lanes, left, ready
from benchmarks.study.spec import Range, Study
from tests.benchmarks.study.mini import RUNS, STUDY, run


def finish(study: Study, order=lambda specs: specs):
    """Every lane's runs, made as they become ready, those of each round in the order asked for."""
    all_lanes = lanes(study)
    losses: dict[str, float] = {}
    proposed: list[str] = []
    while True:
        open_runs = {k: s for lane in all_lanes.values() for k, s in ready(lane, all_lanes).items() if k not in losses}
        if not open_runs:
            return all_lanes, losses, proposed
        for run_id, spec in order(list(open_runs.items())):
            proposed.append(run_id)
            losses[run_id] = run(spec).last_loss
            wanted = sum(lane.runs_wanted for lane in all_lanes.values())
            assert sum(left(lane, all_lanes, losses) for lane in all_lanes.values()) == wanted - len(losses)
        for lane in all_lanes.values():
            lane.tell(losses)


def run_of(study, task, arm, settings, seed):
    return (
        lanes(study)[task, arm].final_specs(Choice(settings=settings, trials=()))[0].model_copy(update={"seed": seed})
    )


def test_every_arm_gets_its_trials_and_its_final_runs():
    all_lanes, losses, proposed = finish(STUDY)
    assert len(proposed) == len(set(proposed)) == len(losses) == RUNS
    assert sum(lane.runs_wanted for lane in all_lanes.values()) == RUNS
    assert sum(left(lane, all_lanes, losses) for lane in all_lanes.values()) == 0
    assert {key: len(lane.trials) for key, lane in all_lanes.items()} == {
        (task, arm): n for task in STUDY.tasks for arm, n in (("A", 6), ("B", 6), ("A again", 0), ("fixed", 0))
    }


def test_the_same_trials_come_whatever_the_order_in_which_runs_end():
    forth, _, _ = finish(STUDY)
    back, _, _ = finish(STUDY, order=lambda specs: specs[::-1])
    assert {k: lane.trials for k, lane in forth.items()} == {k: lane.trials for k, lane in back.items()}
    again, _, _ = finish(Study.model_validate(STUDY.model_dump() | {"name": "another"}))
    assert forth["mini", "A"].trials[0] != again["mini", "A"].trials[0]


def test_a_study_taken_up_in_the_middle_proposes_the_same():
    whole, losses, _ = finish(STUDY)
    for known in range(7):
        trials = {key: lane.trials[:known] for key, lane in whole.items()}
        resumed = lanes(STUDY, trials)
        for lane in resumed.values():
            lane.tell(losses)
        assert {k: lane.trials for k, lane in resumed.items()} == {k: lane.trials for k, lane in whole.items()}


def test_a_trial_waits_for_those_before_it():
    lane = lanes(STUDY)["mini", "A"]
    runs = list(lane.tuning_specs().values())
    assert len(runs) == 4  # the quasi-random ones, all at once
    assert lane.tell({spec.run_id: 1.0 for spec in runs[1:]}) == []
    assert [t.number for t in lane.tell({spec.run_id: 1.0 for spec in runs})] == [0, 1, 2, 3]
    assert len(lane.tuning_specs()) == 1  # TPE's, one after another
    assert not lane.tuned


def test_a_trial_is_the_mean_over_its_seeds_and_infinite_if_one_diverged():
    study = Study.model_validate(STUDY.model_dump() | {"tuning": {"trials": 2, "startup": 2, "seeds": (1000, 1001)}})
    lane = lanes(study)["mini", "A"]
    first, second, third, fourth = lane.tuning_specs()
    losses = {first: 1.0, second: 2.0, third: 3.0, fourth: math.inf}
    assert [trial.loss for trial in lane.tell(losses)] == [1.5, math.inf]
    assert lane.choice().settings == lane.trials[0].settings
    text = lane.trials[1].model_dump_json()
    assert Trial.model_validate_json(text) == lane.trials[1]


def test_the_lowest_loss_is_chosen_and_the_earliest_of_equals():
    lane = lanes(STUDY)["mini", "A"]
    trials = [
        Trial(number=n, settings={"lr": 0.1 * (n + 1)}, loss=loss, run_ids=(str(n),))
        for n, loss in enumerate((math.inf, 0.5, 0.25, 0.25, 0.75, 0.5))
    ]
    known = lanes(STUDY, {lane.key: trials})
    assert chosen(known[lane.key], known) == Choice(settings=trials[2].settings, trials=tuple(trials))


def test_the_best_three_are_run_again_and_the_mean_of_all_their_runs_decides():
    tuning = STUDY.tuning.model_copy(update={"reruns": 2})
    study = Study.model_validate(STUDY.model_dump() | {"tuning": tuning.model_dump()})
    whole, losses, proposed = finish(study)
    assert len(proposed) == len(set(proposed)) == RUNS + 2 * 2 * 3 * 2
    assert sum(lane.runs_wanted for lane in whole.values()) == len(proposed)
    assert sum(left(lane, whole, losses) for lane in whole.values()) == 0
    lane = whole["mini", "A"]
    first, again = lane.trials[:6], lane.trials[6:]
    ranks = sorted(first, key=lambda trial: trial.loss)
    assert [t.settings for t in again] == [t.settings for t in ranks[:3]]
    for before, after in zip(ranks, again, strict=False):
        runs = [run_of(study, "mini", "A", before.settings, seed) for seed in (1000, 1001, 1002)]
        assert after.run_ids == tuple(spec.run_id for spec in runs)
        assert after.loss == pytest.approx(np.mean([run(spec).last_loss for spec in runs]))
    assert lane.choice().settings == min(again, key=lambda trial: trial.loss).settings
    # What was told in another order, or stopped between, goes on alike.
    assert {k: ln.trials for k, ln in finish(study, order=lambda s: s[::-1])[0].items()} == {
        k: ln.trials for k, ln in whole.items()
    }
    for known in range(10):
        resumed = lanes(study, {key: ln.trials[:known] for key, ln in whole.items()})
        for ln in resumed.values():
            ln.tell(losses)
        assert {k: ln.trials for k, ln in resumed.items()} == {k: ln.trials for k, ln in whole.items()}


def test_the_rerun_can_change_the_choice():
    tuning = STUDY.tuning.model_copy(update={"reruns": 2})
    study = Study.model_validate(STUDY.model_dump() | {"tuning": tuning.model_dump()})
    lane = lanes(study)["mini", "A"]
    told = [
        Trial(number=n, settings={"lr": 0.1 * (n + 1)}, loss=loss, run_ids=(f"{n}",))
        for n, loss in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, math.inf))
    ]
    lane.trials.extend(told)
    assert not lane.tuned
    losses = {}
    for spec in lane.tuning_specs().values():
        assert spec.seed in (1001, 1002)
        losses[spec.run_id] = {0.1: 0.6, 0.2: 0.2, 0.3: 0.9}[round(spec.settings["lr"], 1)]
    losses |= {f"{n}": trial.loss for n, trial in enumerate(told)}
    again = lane.tell(losses)
    assert [trial.loss for trial in again] == pytest.approx([1.3 / 3, 0.2, 0.7])
    assert lane.tuned
    assert lane.choice().settings == {"lr": 0.2}


def test_a_single_trial_is_not_run_again():
    tuning = STUDY.tuning.model_copy(update={"reruns": 2, "trials": 1, "startup": 1})
    study = Study.model_validate(STUDY.model_dump() | {"tuning": tuning.model_dump()})
    whole, _, proposed = finish(study)
    assert {len(lane.trials) for lane in whole.values() if lane.arm.search} == {1}
    assert sum(lane.runs_wanted for lane in whole.values()) == len(proposed)


def test_choices_hold_what_is_tuned_and_final_runs_their_settings():
    whole, losses, _ = finish(STUDY)
    trials = {key: lane.trials for key, lane in whole.items()}
    del trials["mini-2", "A"]
    known = lanes(STUDY, trials)
    found = {key: choice for key, lane in known.items() if (choice := chosen(lane, known))}
    assert set(found) == set(whole) - {("mini-2", "A"), ("mini-2", "A again")}
    specs = {key: known[key].final_specs(choice) for key, choice in found.items()}
    assert all([spec.seed for spec in of] == [1, 2, 3] for of in specs.values())
    assert {spec.epochs for of in specs.values() for spec in of} == {4, 3}
    lr = found["mini", "A"].settings["lr"]
    assert specs["mini", "A"][0].settings == {"lr": lr}
    assert specs["mini", "A again"][0].settings == {"lr": float(f"{0.5 * lr:.6g}"), "momentum": 0.5}
    assert specs["mini", "fixed"][0].settings == {"lr": 0.1}
    assert {spec.run_id for of in specs.values() for spec in of} <= set(losses)


@pytest.mark.parametrize(("budget", "epochs"), [(2.0, 8), (0.1, 1), (0.6, 2)])
def test_the_budget_multiplies_the_epochs_of_the_task(budget, epochs):
    study = Study.model_validate(STUDY.model_dump() | {"budget": budget})
    assert {spec.epochs for spec in lanes(study)["mini", "B"].tuning_specs().values()} == {epochs}


def test_quasi_random_points_are_scrambled_sobol_points_spread_by_ratios():
    within = {"lr": Range(low=1e-4, high=1.0), "wd": Range(low=0.0, high=0.5, log=False)}
    points = search.quasi_random(within, 8, seed=3)
    unit = qmc.Sobol(2, scramble=True, rng=3).random_base2(3)
    assert np.allclose([p["lr"] for p in points], 10 ** (-4 + 4 * unit[:, 0]), rtol=6e-3)
    assert np.allclose([p["wd"] for p in points], 0.5 * unit[:, 1], rtol=6e-3, atol=6e-3)
    assert search.quasi_random(within, 5, seed=3) == points[:5]
    assert search.quasi_random(within, 1, seed=3) == points[:1]
    # A net in base 2: one point in each eighth of each range.
    assert sorted(int(8 * (math.log10(p["lr"]) + 4) / 4) for p in points) == list(range(8))
    assert all(p["lr"] == float(f"{p['lr']:.3g}") for p in points)


def test_rounding_does_not_leave_the_range():
    within = {"lr": Range(low=0.12345, high=0.12349)}
    assert all(0.12345 <= p["lr"] <= 0.12349 for p in search.quasi_random(within, 8, seed=0))


def test_tpe_goes_where_losses_are_low_and_not_where_runs_diverged():
    within = {"lr": Range(low=1e-4, high=1.0)}
    history = [
        (p, (math.log10(p["lr"]) + 3) ** 2 if p["lr"] < 0.1 else math.inf)
        for p in search.quasi_random(within, 16, seed=1)
    ]
    asked = [search.tpe(within, history, seed)["lr"] for seed in range(20)]
    assert asked[0] == search.tpe(within, history, 0)["lr"]
    assert len(set(asked)) > 10
    assert sum(1e-4 <= lr < 1e-2 for lr in asked) >= 18  # two decades of four, with the optimum in their middle
    # Where everything diverged it still has something to try.
    assert 1e-4 <= search.tpe(within, [({"lr": 0.5}, math.inf)] * 3, 0)["lr"] <= 1.0

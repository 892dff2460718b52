"""The trials as Optuna's own journal file, for its tools: ``optuna-dashboard results/quick/optuna.log``.

It is made from the store, which alone is the truth: a journal that is written while a study runs can be left with a
half-written line or a lock by a program that is killed, and then stops the next one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.study.lanes import Key, Trial
from benchmarks.study.search import frozen
from benchmarks.study.spec import Study

FILE = "optuna.log"


def write(study: Study, trials: Mapping[Key, Sequence[Trial]], folder: Path) -> Path:
    """An Optuna study for every task and arm that is tuned, named "TASK / ARM"; a trial's runs are its attributes."""
    path = folder / FILE
    with tempfile.TemporaryDirectory(dir=folder, prefix=".optuna-") as temporary:
        file = Path(temporary) / FILE
        storage = JournalStorage(JournalFileBackend(str(file)))
        for (task, arm), told in trials.items():
            search = study.arm(arm).search
            of = optuna.create_study(study_name=f"{task} / {arm}", storage=storage)
            for trial in told:
                done = frozen(search, trial.settings, trial.loss)
                done.set_user_attr("runs", list(trial.run_ids))
                of.add_trial(done)
        os.replace(file, path)
    return path

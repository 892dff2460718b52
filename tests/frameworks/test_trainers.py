"""Every trainer × every kind of optimizer: does it train, and resume bit for bit? Writes the table of the docs.

``make trainers`` writes what it found, with the versions, from which docs/hooks/trainers.py makes the table. What is
not installed is skipped, and stays in the table as it was.
"""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.frameworks.cases import CASES, EPOCHS, Net, loss_of
from tests.frameworks.trainers import BY_NAME, TRAINERS
from tests.test_resume import assert_same_end


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_and_resumes(trainer, case, tmp_path, record_property):
    packages, train = TRAINERS[trainer]
    try:
        version, *_ = [metadata.version(package).split("+")[0] for package in packages]
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    for key, value in {"trainer": trainer, "case": case, "package": packages[0], "version": version}.items():
        record_property(key, value)
    if train in BY_NAME and CASES[case].named is None:
        pytest.skip("it makes the optimizer from the model's parameters, and groups are made from the model")
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        warnings.filterwarnings("error", ".*something else has changed it")
        warnings.filterwarnings("error", ".*has nothing left to do|.*nothing is left to do")
        for name, parts in (("whole", [(EPOCHS, False)]), ("resumed", [(EPOCHS // 2, False), (EPOCHS, True)])):
            (tmp_path / name).mkdir()
            for until, resume in parts:
                torch.manual_seed(until)
                found[name] = train(CASES[case], tmp_path / name, until, resume)
                if resume is False and until < EPOCHS and CASES[case].has_p:
                    assert 2 < found[name][1].param_groups[0]["p"] < 6
    net, opt = found["whole"]
    assert loss_of(net) < 0.9 * loss_of(Net())
    if CASES[case].has_p:
        assert opt.param_groups[0]["p"] == 2.0
    record_property("trains", True)
    for part in (0, 1):
        assert_same_end(found["resumed"][part].state_dict(), found["whole"][part].state_dict())
    record_property("resumes", True)


def test_the_table_is_of_these_trainers_and_optimizers(pytestconfig):
    if pytestconfig.getoption("--trainers-table"):
        pytest.skip("it is being written")
    table = json.loads((Path(__file__).parents[2] / "docs/data/trainers.json").read_text("utf-8"))
    assert table.keys() == TRAINERS.keys()
    for trainer, row in table.items():
        assert row["cells"].keys() == CASES.keys()
        for case, found in row["cells"].items():
            impossible = TRAINERS[trainer][1] in BY_NAME and CASES[case].named is None
            assert isinstance(found, str) if impossible else found == ["trains", "resumes"]

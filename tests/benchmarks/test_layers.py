from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from plotly.offline import get_plotlyjs

from benchmarks import phases, report
from benchmarks.arms import ARMS, make_optimizer
from benchmarks.presets import PRESETS
from benchmarks.report.layers import layers
from benchmarks.report.tables import columns
from benchmarks.report.words import findings
from benchmarks.results import Results, collect
from benchmarks.spec import ArmPlan
from benchmarks.store import Store
from benchmarks.study import environment, execute
from benchmarks.tasks import TASKS
from benchmarks.tasks.bytes import CONTEXT, CORPUS, HELD_OUT, PER_EPOCH, _load, parts
from benchmarks.training import evaluate, mean_loss
from tests.benchmarks.test_report import Reader
from tests.benchmarks.test_training import spec

PRESET_ARMS = [arm.name for arm in ARMS.values() if arm.preset]
BYTES = TASKS["bytes"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_corpus_is_the_same_at_every_reading():
    first, data, files = BYTES.fingerprint(), BYTES.load(), parts()
    _load.cache_clear()
    parts.cache_clear()
    assert BYTES.fingerprint() == first == environment(PRESETS["layers-bytes"]).data
    assert parts() == files
    again = BYTES.load()
    for name in ("train", "validation", "test"):
        for old, new in zip(getattr(data, name), getattr(again, name), strict=True):
            assert torch.equal(old, new)


def test_the_corpus_is_split_by_whole_files():
    train, validation, test = parts()
    files = [*train, *validation, *test]
    assert len(set(files)) == len(files)
    whole = b"".join(file.read_bytes() for file in files)
    assert hashlib.sha256(whole).hexdigest() == BYTES.fingerprint()
    shares = [sum(file.stat().st_size for file in part) / CORPUS for part in (train, validation, test)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    # What is trained on are the bytes of the training files, from the first on.
    x, y = BYTES.load().train
    assert bytes(x.flatten().tolist()) == b"".join(file.read_bytes() for file in train)[: x.numel()]
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    assert len(x) > 20 * PER_EPOCH
    assert all(part.shape == (HELD_OUT, CONTEXT) for part in (*BYTES.load().validation, *BYTES.load().test))


@pytest.mark.parametrize("task", TASKS)
def test_a_description_counts_the_weights_right(task):
    params = list(TASKS[task].build().parameters())
    for chosen in ([p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]):
        assert f"{sum(p.numel() for p in chosen):,} " in TASKS[task].description.replace(")", " ")


def test_no_byte_sees_the_ones_after_it():
    model, text = BYTES.build(), BYTES.load().test[0][:1].clone()
    before = model(text)
    text[0, 40] = (text[0, 40] + 1) % 256
    after = model(text)
    torch.testing.assert_close(after[0, :40], before[0, :40])
    assert not torch.equal(after[0, 40], before[0, 40])


def test_loss_and_accuracy_are_over_all_that_is_predicted():
    torch.manual_seed(0)
    logits, classes = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    loss, accuracy = evaluate(torch.nn.Identity(), (logits, classes))
    logs, hits = logits.log_softmax(-1), logits.argmax(-1) == classes
    places = [(i, j) for i in range(3) for j in range(5)]
    assert loss == pytest.approx(-sum(float(logs[i, j, classes[i, j]]) for i, j in places) / 15, rel=1e-6)
    assert accuracy == sum(bool(hits[place]) for place in places) / 15


@pytest.mark.parametrize("arm", PRESET_ARMS)
@pytest.mark.parametrize("task", ["digits-mix", "bytes"])
def test_every_preset_has_every_parameter_and_trains_it(task, arm):
    torch.manual_seed(0)
    model = TASKS[task].build()
    optimizer, _ = make_optimizer(
        spec(task=task, arm=arm, lr=ARMS[arm].lr / 3, agr=False, weight_decay=0.0), model, TASKS[task].residual_depth
    )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = (part[:16] for part in TASKS[task].load().train)
    before, _ = evaluate(model, (x, y))
    for _ in range(10):
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
    assert evaluate(model, (x, y))[0] < 0.9 * before
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """A study without regularizers and without a sweep, and the folder of its report."""
    folder = tmp_path_factory.mktemp("layers")
    plans = [ArmPlan(name=name, lrs=(ARMS[name].lr,), regularizers=("none",)) for name in ("AdamW", "Muon", "Modular")]
    study = PRESETS["layers-digits"].model_copy(update=dict(arms=tuple(plans), final_seeds=(1, 2), epochs=1))
    told: list[int] = []
    execute(study, Store(folder), workers=1, advance=lambda phase, n: told.append(n))
    assert sum(told) == phases.count(study) == 9
    results = collect(Store(folder))
    report.write(results, folder)
    return results, folder


def test_a_report_leaves_out_what_its_study_has_not(small):
    results, folder = small
    html = (folder / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    markdown = (folder / "summary.md").read_text(encoding="utf-8")
    reader = Reader(html)
    for text in (" ".join(reader.words), markdown):
        assert not re.search(r"regularizer|AGR|λ|ℓp decay|anneals? p|zeros|sparsity", text, re.IGNORECASE)
    assert "<select" not in html
    assert not re.search(r"<h\d>[^<]*</h\d>\s*(<h\d>|</\w+>)|<p\b[^>]*>\s*</p>", html)  # a section with nothing in it
    assert not re.search(r"^#+ .*\n+(#|\Z)", markdown, re.MULTILINE)
    figures = json.loads(next(script for script in reader.scripts if script.startswith("{")))
    assert list(figures) == ["loss", "accuracy", "lr"]
    titles = ["The best", "Other optimizers against AdamW", "How far to trust this"]
    assert [finding.title for finding in findings(results)] == titles
    assert [column.title for column in columns(results)][:2] == ["optimizer", "learning rate"]


def test_a_report_shows_which_layer_has_which_norm(small):
    results, folder = small
    tables = layers(results)
    assert list(tables) == ["Muon", "Modular"]
    assert all("embedding.weight" in table and "spectral" in table for table in tables.values())
    words = " ".join(Reader((folder / "report.html").read_text(encoding="utf-8")).words)
    markdown = (folder / "summary.md").read_text(encoding="utf-8")
    for text in (words, markdown):
        assert "Which layer has which norm" in text
        assert all(table in text for table in tables.values())

"""What is counted, how it is shown, and what pruning sets to zero."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import normopt
import normopt.sparsity
from normopt.sparsity import prune_, report, to_sparse


def linear(rows):
    weight = torch.tensor(rows)
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.weight.data.copy_(weight)
    return model


def only(model, **kwargs):
    (count,) = report(model, **kwargs).weights
    return count


@pytest.mark.parametrize("module", ["counting", "pruning", "shrinking", "layouts"])
def test_the_examples_of_the_docstrings_are_true(module):
    names = {"torch": torch, "normopt": normopt}
    found = doctest.testmod(importlib.import_module(f"normopt.sparsity.{module}"), extraglobs=names)
    assert found.attempted
    assert not found.failed


def test_counts_of_a_matrix():
    count = only(linear([[1.0, 1e-20, 0.0], [0.0, 0.0, 0.0], [-1e-13, 0.0, 0.0]]))
    assert (count.name, count.shape, count.entries) == ("weight", (3, 3), 9)
    assert count.zeros == 6
    assert count.small == 7  # 1e-13 itself is none, as the authors count
    assert (count.rows, count.dead_rows) == (3, 1)
    assert (count.columns, count.dead_columns) == (3, 1)
    assert only(linear([[1.0, 1e-20, 0.0]]), threshold=2.0).small == 3
    assert only(linear([[1.0, float("nan"), 0.0]]), threshold=2.0).small == 2  # NaN is not small


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_channels_of_convolutions_are_those_that_the_module_means(d, groups, transposed):
    """What a dead row or column means, asked of the convolution itself."""
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")
    torch.manual_seed(0)
    conv = kind(6, 9, 2, groups=groups, bias=False).double()
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.2)
        conv.weight[0] = 0
        conv.weight[:, 1] = 0
    x = torch.rand(1, 6, *[3] * d, dtype=torch.float64) + 1
    dead_rows = sum(bool((conv(x)[0, o] == 0).all()) for o in range(9))
    dead_columns = 0
    for i in range(6):
        alone = torch.zeros_like(x)
        alone[:, i] = x[:, i]
        dead_columns += bool((conv(alone) == 0).all())
    count = only(conv)
    assert (count.rows, count.columns) == (9, 6)
    assert (count.dead_rows, count.dead_columns) == (dead_rows, dead_columns)
    assert dead_rows + dead_columns > 0


def test_a_shared_tensor_counts_once_and_vectors_not_at_all():
    tied = nn.Linear(4, 4)
    model = nn.Sequential(tied, nn.BatchNorm1d(4), nn.Sequential(tied), nn.Embedding(3, 4), nn.Linear(4, 3))
    model[4].weight = model[3].weight
    counts = report(model)
    assert [w.name for w in counts.weights] == ["0.weight", "3.weight"]
    assert counts.total.entries == 16 + 12
    assert report(nn.ReLU()).total.entries == 0


def test_sparse_layers_are_counted_like_dense_ones():
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 0.0]]), nn.ReLU(), nn.Conv1d(2, 2, 1))
    assert report(to_sparse(model)) == report(model)


def test_the_table_and_its_markdown_say_the_same():
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), linear([[0.0] * 70] * 3))
    counts = report(model)
    lines = str(counts).splitlines()
    assert [line.split()[0] for line in lines] == ["weight", "0.weight", "2.weight", "total"]
    assert len({len(line) for line in lines}) == 1
    assert "7,000" in lines[1]
    assert "210 (100.0%)" in lines[2]
    assert "3 of 73" in lines[3]
    markdown = counts.to_markdown().splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown]
    assert {len(row) for row in cells} == {7}
    assert r"\|w\| < 1e-13" in markdown[0]
    for line, row in zip(lines[1:], cells[2:], strict=True):
        assert [c.strip() for c in row if c.strip()] == re.split(r"\s{2,}", line.strip())


def test_the_figure_has_a_bar_for_every_share():
    backend = mpl.get_backend()
    plt.switch_backend("Agg")
    try:
        model = nn.Sequential(linear([[1.0, 0.0], [0.0, 0.0]]), nn.Linear(2, 5))
        figure = report(model).figure()
        (ax,) = figure.axes
        assert [t.get_text() for t in ax.get_yticklabels()] == ["0.weight", "1.weight"]
        assert [[bar.get_width() for bar in bars] for bars in ax.containers] == [[75, 0], [50, 0], [50, 0]]
        assert [t.get_text() for t in figure.legends[0].get_texts()] == ["zeros", "dead rows", "dead columns"]
        figure.canvas.draw()
        plt.close(figure)
        plt.close(report(nn.ReLU()).figure())
    finally:
        plt.switch_backend(backend)


def test_a_figure_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"normopt\[plots\]"):
        report(nn.Linear(2, 2)).figure()


def test_pruning_below_a_threshold():
    model = nn.Sequential(linear([[0.5, -0.1, 0.2], [0.3, -0.3, 0.0]]), nn.ReLU(), nn.Linear(2, 2))
    before = model[2].weight.detach().clone(), model[0].bias.detach().clone()
    counts = prune_(model, threshold=0.3, exclude=["2.*"])
    assert model[0].weight.tolist() == [[0.5, 0.0, 0.0], pytest.approx([0.3, -0.3, 0.0])]
    assert counts == report(model)
    assert counts.weights[0].zeros == 3
    assert torch.equal(model[2].weight, before[0])
    assert torch.equal(model[0].bias, before[1])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.29, 0.5, 1.0, np.float64(0.5), np.float32(0.25), 1])
def test_the_smallest_entries_of_all_tensors_go(fraction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(2, 5, 3).double(), nn.Linear(3, 25))
    flat = np.concatenate([w.detach().double().numpy().ravel() for w in model.parameters() if w.dim() > 1])
    expected = flat.copy()
    expected[np.argsort(np.abs(flat))[: int(round(fraction * 1e6) * flat.size // 10**6)]] = 0
    prune_(model, fraction=fraction)
    got = np.concatenate([w.detach().double().numpy().ravel() for w in model.parameters() if w.dim() > 1])
    assert flat.size == 200
    np.testing.assert_array_equal(got, expected)


def test_of_equal_entries_as_many_go_as_were_asked_for():
    model = linear([[1.0] * 10] * 10)
    assert prune_(model, fraction=0.29).total.zeros == 29


@pytest.mark.parametrize("over", ["rows", "columns"])
@pytest.mark.parametrize("fraction", [None, 0.4])
@pytest.mark.parametrize("model", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(6, 8, 3, groups=2)])
def test_whole_rows_and_columns_go_by_their_norm(model, over, fraction):
    torch.manual_seed(1)
    nn.init.normal_(model.weight)
    groups = getattr(model, "groups", 1)
    w = model.weight.detach().double().numpy()
    if isinstance(model, nn.ConvTranspose2d):
        w = w.reshape(groups, 6 // groups, 8 // groups, -1).transpose(0, 2, 1, 3)
    w = w.reshape(groups, 8 // groups, 6 // groups, -1)
    axes = (2, 3) if over == "rows" else (1, 3)
    norms = np.sqrt((w**2).sum(axes)).ravel()
    limit = float(np.median(norms))
    expected = int((norms < limit).sum()) if fraction is None else int(0.4 * norms.size)
    kept = np.sort(norms)[expected:]
    counts = prune_(model, threshold=limit, over=over) if fraction is None else prune_(model, fraction=0.4, over=over)
    assert getattr(counts.total, f"dead_{over}") == expected > 0
    assert model.weight.detach().double().square().sum() == pytest.approx((kept**2).sum())


def test_norms_of_tiny_and_huge_rows_are_not_lost():
    model = linear([[1e-30, 1e-30], [1e-32, 0.0], [1e30, 1e30]])
    prune_(model, threshold=1.2e-30, over="rows")
    assert (model.weight != 0).any(1).tolist() == [True, False, True]


def test_pruning_keeps_the_memory_format_and_reaches_through_it():
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    counts = prune_(conv, fraction=0.5)
    assert counts.total.zeros == 72
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    prune_(conv, fraction=0.5, over="rows")
    assert (conv.weight.flatten(1) == 0).all(1).sum() == 2


@pytest.mark.parametrize("over", ["entries", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_the_codes_of_quantized_layers_are_neither_counted_nor_pruned(dtype, over):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    codes = torch.tensor([[0, 1], [1, 0], [0, 0]]).to(dtype)
    model[1].codes = nn.Parameter(codes.clone(), requires_grad=False)
    assert report(model) == report(plain)
    for settings in (dict(fraction=0.4), dict(threshold=0.3)):
        assert prune_(model, over=over, **settings) == prune_(plain, over=over, **settings)
    assert report(plain).total.zeros > 0
    assert torch.equal(model[1].codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("over", ["rows", "columns"])
def test_norms_of_complex_rows_are_of_their_sizes(over):
    w = torch.tensor([[3 + 4j, 0], [1j, 1], [1.5j, 1.5]])
    model = nn.Linear(2, 3, bias=False, dtype=torch.complex64)
    model.weight.data.copy_(w)
    # Norms of the rows 5, √2 and √4.5; of the columns √28.25 and √3.25.
    prune_(model, threshold=2.0, over=over)
    gone = [[False], [True], [False]] if over == "rows" else [[False, True]]
    assert torch.equal(model.weight, w.masked_fill(torch.tensor(gone), 0))


def test_counts_and_pruning_stay_on_their_device_under_another_default():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Linear(6, 3))
    expected = prune_(copy.deepcopy(model), fraction=0.4, over="rows")
    with torch.device("meta"):
        assert prune_(model, fraction=0.4, over="rows") == expected
    assert expected.total.dead_rows == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "either threshold or fraction"),
        ({"threshold": 1.0, "fraction": 0.5}, ValueError, "either threshold or fraction"),
        ({"threshold": 0.0}, ValueError, "threshold"),
        ({"threshold": "1"}, TypeError, "threshold"),
        ({"fraction": 1.5}, ValueError, "fraction"),
        ({"fraction": float("nan")}, ValueError, "fraction"),
        ({"fraction": 0.5, "over": "row"}, ValueError, "did you mean 'rows'"),
        ({"fraction": 0.5, "exclude": "0.weight"}, TypeError, "several names"),
        ({"fraction": 0.5, "exclude": [0]}, TypeError, "holds 0"),
        ({"fraction": 0.5, "exclude": ["0.weight", "0.wieght"]}, ValueError, "did you mean '0.weight'"),
    ],
)
def test_a_refusal_changes_nothing(settings, error, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        prune_(model, **settings)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_what_is_no_model_or_has_no_shape_is_refused():
    for call in (report, lambda m: prune_(m, fraction=0.5)):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            call([nn.Linear(2, 2)])
        with pytest.raises(ValueError, match="run the model once"):
            call(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="threshold"):
        report(nn.Linear(2, 2), threshold=-1.0)
    with pytest.raises(ValueError, match="before to_sparse"):
        prune_(to_sparse(nn.Sequential(nn.Linear(2, 2))), fraction=0.5)

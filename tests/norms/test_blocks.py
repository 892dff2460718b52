"""Blocks of unequal rows are matrices of their own, and the views "batch-transposed" and "patches" are other views."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import normopt
from normopt.norms import Mixed, Schatten, registry, schatten
from tests.norms.test_matrices import FACTORS, NAMED, named
from tests.norms.test_operator import by_lines
from tests.norms.test_schatten import oracle
from tests.versions import DCP_ALONE

BLOCKS = (64, 16, 16)
# As NAMED, and those between.
RULES = NAMED | {
    "schatten": lambda x: oracle(x, 3.0),
    "mixed": lambda x: by_lines(x, 3.0, 1.5, "columns"),
}
FIELDS = {"schatten": dict(p=3.0), "mixed": dict(p_inner=3.0, p_outer=1.5, lines="columns")}
# How matrices [stack, rows, columns] become a tensor of the view.
VIEWS = {
    "flatten": lambda y: y[0],
    "patches": lambda y: y[0].reshape(-1, 3, 2, 2),
    "transposed": lambda y: y[0].T,
    "batch": lambda y: y,
    "batch-transposed": lambda y: y.transpose(0, 2, 1),
}
SCALES = ("unit", "dual", "matched", "power")
EXPONENTS = {"frobenius": 1.0, "spectral": 0.0, "schatten": 0.5}  # of the singular values, under "power"


def power(x, exponent):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * s**exponent) @ vt


def by_blocks(rule, aspect, y, blocks):
    """The dual norm and the map of a stack, by the rule of each matrix, in float64."""
    total, maps = 0.0, np.zeros_like(y)
    for matrix, out in zip(y, maps, strict=True):
        begin = 0
        for rows in blocks:
            part = matrix[begin : begin + rows]
            n, d = rule(part)
            f = FACTORS[aspect](rows, part.shape[1], 1)
            out[begin : begin + rows] = f * d
            total += f * n
            begin += rows
    return total, maps


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("aspect", FACTORS)
@pytest.mark.parametrize("name", RULES)
def test_one_tensor_of_unequal_blocks_is_three_matrices(name, aspect, view, scale):
    y = np.random.default_rng(0).standard_normal((2 if view.startswith("batch") else 1, 96, 12))
    dual, maps = by_blocks(RULES[name], aspect, y, BLOCKS)
    x = torch.tensor(np.ascontiguousarray(VIEWS[view](y)))
    expected = VIEWS[view](maps)
    norm = named(name, **FIELDS.get(name, {}), aspect=aspect, matrix_view=view, blocks=BLOCKS)
    assert float(norm.dual_norm(x)) == pytest.approx(dual, rel=1e-10)
    d = norm.dual_map(x)
    tolerance = 1e-9 * np.abs(expected).max()
    np.testing.assert_allclose(d.numpy(), expected, rtol=0, atol=tolerance)
    assert float(norm.norm(d)) == pytest.approx(1.0)
    # ‖x‖ is the largest of the blocks'.
    alone = named(name, **FIELDS.get(name, {}), aspect=aspect)
    parts = [part for matrix in torch.tensor(y) for part in matrix.split(BLOCKS)]
    assert float(norm.norm(x)) == pytest.approx(max(float(alone.norm(part)) for part in parts))

    if scale == "power":
        if name not in EXPONENTS:
            return
        expected = VIEWS[view](by_blocks(lambda part: (0, power(part, EXPONENTS[name])), aspect, y, BLOCKS)[1])
        tolerance = 1e-9 * np.abs(expected).max()
    for foreach in (False, True):
        w = torch.nn.Parameter(torch.zeros_like(x))
        w.grad = x.clone()
        opt = normopt.SteepestDescent([w], lr=1.0, norm=norm, scale=scale, foreach=foreach)
        opt.step()
        length = np.linalg.norm(y) / np.linalg.norm(maps)
        factor = {"dual": dual, "matched": length}.get(scale, 1.0)
        np.testing.assert_allclose(-w.detach().numpy(), factor * expected, rtol=0, atol=factor * tolerance)
    assert "blocks=(64, 16, 16)" in str(opt.backend())


@pytest.mark.parametrize("count", [3, (32, 32, 32)])
def test_equal_blocks_are_the_same_either_way(count):
    x = torch.randn(96, 12)
    ways = [Schatten(math.inf, aspect="rms", blocks=blocks) for blocks in (3, count)]
    torch.testing.assert_close(*(way.dual_map(x) for way in ways))
    assert ways[1].row_factors(x.shape, x) == pytest.approx((32 / 12) ** 0.5)


def test_vectors_rows_and_nothing():
    """A vector's entries are rows; a block may be one row; and a tensor may have rows, but no entries."""
    x = torch.tensor([3.0, 4.0, -2.0], dtype=torch.float64)
    for norm in (Schatten(math.inf, blocks=(2, 1)), Mixed(2.0, math.inf, lines="columns", blocks=(2, 1))):
        torch.testing.assert_close(norm.dual_map(x), torch.tensor([0.6, 0.8, -1.0], dtype=torch.float64))
        assert float(norm.dual_norm(x)) == pytest.approx(7.0)
        assert float(norm.norm(x)) == pytest.approx(5.0)
        empty = torch.zeros(3, 0)
        assert (float(norm.norm(empty)), float(norm.dual_norm(empty)), norm.dual_map(empty).shape) == (0, 0, (3, 0))
    whole = Schatten(math.inf, aspect="rms", blocks=(3,))
    torch.testing.assert_close(whole.dual_map(x), Schatten(math.inf, aspect="rms").dual_map(x))


def test_a_nan_stays_in_its_block():
    x = torch.randn(96, 12)
    x[70, 3] = math.nan
    for norm in (Schatten(math.inf, blocks=BLOCKS), Schatten(math.inf, method="newton-schulz", blocks=BLOCKS)):
        d = norm.dual_map(x)
        assert d[64:80].isnan().all()
        assert d[:64].isfinite().all() and d[80:].isfinite().all()  # noqa: PT018
        assert norm.dual_norm(x).isnan()


@pytest.mark.parametrize("method", ["newton-schulz", "svd"])
def test_blocks_of_one_shape_are_mapped_in_one_call(method, monkeypatch):
    seen = []
    for name in ("polar", "singular"):
        real = getattr(schatten, name)
        monkeypatch.setattr(schatten, name, lambda y, *a, real=real: seen.append(tuple(y.shape)) or real(y, *a))
    params = [torch.nn.Parameter(torch.zeros(96, 12)) for _ in range(4)]
    for p in params:
        p.grad = torch.randn(96, 12)
    normopt.Muon(params, method=method, norm_blocks=BLOCKS).step()
    assert sorted(seen) == [(4, 64, 12), (8, 16, 12)]
    seen.clear()
    normopt.Muon(params, method=method, norm_blocks=6).step()
    assert seen == [(24, 16, 12)]


@pytest.mark.parametrize("aspect", FACTORS)
def test_patches_are_the_linear_layer_of_all_taps(aspect):
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    for name in ("spectral", "row", "max"):
        patches = named(name, aspect=aspect, matrix_view="patches")
        linear = named(name, aspect=aspect)
        assert patches.factors(x.shape) == linear.factors(torch.Size([8, 48])) == [FACTORS[aspect](8, 48, 1)]
        torch.testing.assert_close(patches.dual_map(x), linear.dual_map(x.flatten(1)).reshape(x.shape))


@pytest.mark.parametrize("blocks", [1, 2, (4, 1, 1)])
@pytest.mark.parametrize("make", [lambda **k: Schatten(3.0, aspect="rms", **k), lambda **k: Mixed(2.0, 3.0, **k)])
def test_batch_transposed_is_batch_turned_round(make, blocks):
    """Also with several leading dims, and of one matrix."""
    turned, straight = (make(matrix_view=view, blocks=blocks) for view in ("batch-transposed", "batch"))
    for shape in ((2, 3, 5, 6), (3, 5, 6), (5, 6), (6,)):
        x = torch.randn(shape, dtype=torch.float64)
        y = x.mT if x.dim() > 1 else x
        expected = straight.dual_map(y)
        torch.testing.assert_close(turned.dual_map(x), expected.mT if x.dim() > 1 else expected)
        torch.testing.assert_close(turned.dual_norm(x), straight.dual_norm(y))
        torch.testing.assert_close(turned.norm(x), straight.norm(y))


# NorMuon's rows: one fused parameter beside a Linear for each of its blocks.
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_normuon_of_unequal_blocks_is_that_of_three_linears(view, foreach):
    torch.manual_seed(0)
    how = dict(lr=0.1, method="svd", foreach=foreach)
    stack = 2 if view.startswith("batch") else 1
    y = torch.randn(stack, 96, 12, dtype=torch.float64)

    def laid(y):
        return torch.from_numpy(np.ascontiguousarray(VIEWS[view](y.numpy()))).clone()

    fused = torch.nn.Parameter(laid(y))
    parts = [torch.nn.Parameter(part.clone()) for matrix in y for part in matrix.split(BLOCKS)]
    one = normopt.NorMuon([fused], norm_matrix_view=view, norm_blocks=BLOCKS, **how)
    three = normopt.NorMuon(parts, **how)
    for _ in range(3):
        g = torch.randn_like(y)
        fused.grad = laid(g)
        for p, part in zip(parts, [part for matrix in g for part in matrix.split(BLOCKS)], strict=True):
            p.grad = part.clone()
        one.step()
        three.step()
        whole = torch.cat([p.detach() for p in parts]).reshape(stack, 96, 12)
        torch.testing.assert_close(fused.detach(), laid(whole), rtol=1e-10, atol=1e-10)


def make_pair():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(96, 12)), torch.nn.Parameter(torch.randn(4, 6, 12))]
    groups = [
        dict(params=[("qkv", params[0])], norm_blocks=list(BLOCKS)),
        dict(params=[("experts", params[1])], norm_blocks=[5, 7], norm_matrix_view="batch-transposed"),
    ]
    return params, normopt.NorMuon(groups, lr=0.1)


def train(params, opt, steps):
    for step in steps:
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable", "ignore:TypedStorage is")  # by torch 2.6
@pytest.mark.parametrize("way", ["torch", "dcp", "lists"])
def test_saved_and_resumed_bit_for_bit(way, tmp_path):
    params, opt = make_pair()
    train(params, opt, range(2))
    again, resumed = make_pair()
    assert [g["norm_blocks"] for g in resumed.param_groups] == [BLOCKS, (5, 7)]
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    if way == "dcp":
        nets = [torch.nn.ParameterDict({"qkv": a, "experts": b}) for a, b in (params, again)]
        dcp.save({"optim": get_optimizer_state_dict(nets[0], opt)}, checkpoint_id=tmp_path, **DCP_ALONE)
        saved = {"optim": get_optimizer_state_dict(nets[1], resumed)}
        dcp.load(saved, checkpoint_id=tmp_path, **DCP_ALONE)
        set_optimizer_state_dict(nets[1], resumed, saved["optim"])
    else:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if way == "lists":  # as JSON would have them
            for group in saved["param_groups"]:
                group["norm_blocks"] = list(group["norm_blocks"])
        resumed.load_state_dict(saved)
    assert [g["norm_blocks"] for g in resumed.param_groups] == [BLOCKS, (5, 7)]
    train(params, opt, range(2, 5))
    train(again, resumed, range(2, 5))
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@pytest.mark.parametrize("opt", ["normuon", pytest.param("scale", marks=pytest.mark.exhaustive)])
def test_a_compiled_step_is_one_graph(opt):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(12, 4))
        made = normopt.get_optimizer(opt)([p], lr=0.1, norm_blocks=(6, 4, 2))
        p.grad = torch.ones_like(p)
        made.step()
        step = torch.compile(made.step, backend="eager", fullgraph=True) if compiled else made.step
        for seed in range(2):
            torch.manual_seed(seed)
            p.grad.copy_(torch.randn_like(p))
            step()
        runs.append(p.detach())
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    p = torch.nn.Parameter(torch.ones(12, 4))
    for blocks, error, message in (
        ((6, 4), ValueError, r"blocks = \(6, 4\) adds up to 10, not to the 12 rows of a tensor of shape \(12, 4\)"),
        ((), ValueError, "number of equal blocks, or a tuple of their row counts, but is empty"),
        ((6, 0, 6), ValueError, r"each of blocks = \(6, 0, 6\) must be in \[1, inf\], but is 0"),
        ((6, -6, 12), ValueError, "but is -6"),
        ((6, 6.0), TypeError, r"each of blocks = \(6, 6.0\) must be an integer, but is 6.0"),
        ((6, True, 5), TypeError, "must be an integer, but is True"),
        ("12", TypeError, "blocks must be an integer or a tuple of integers, but is '12'"),
        (2.5, TypeError, "blocks must be an integer or a tuple of integers, but is 2.5"),
        (((6, 6),), TypeError, "must be an integer"),
    ):
        with pytest.raises(error, match=message):
            normopt.SteepestDescent([p], norm="row", scale="unit", norm_blocks=blocks)
    opt = normopt.SteepestDescent([p], norm="row", scale="unit", norm_blocks=[np.int64(6), 4, 2], momentum=0.9)
    assert opt.param_groups[0]["norm_blocks"] == (6, 4, 2)
    assert type(opt.param_groups[0]["norm_blocks"][0]) is int
    p.grad = torch.ones_like(p)
    opt.param_groups[0]["norm_blocks"] = (6, 4)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="adds up to 10"):
        opt.step()
    assert before == opt.state_dict()
    assert torch.equal(p.detach(), torch.ones(12, 4))
    opt.param_groups[0]["norm_blocks"] = [6, 6]
    opt.step()
    given = Schatten(math.inf, blocks=[6, 4, 2])
    assert given.blocks == (6, 4, 2)
    opt.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(12, 2))], norm=given, norm_blocks=[6, 4, 2]))
    assert registry.build(opt.param_groups[-1]) == given

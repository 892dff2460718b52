"""Sparse storage: the same numbers there and back, a model that computes with them, and a life as a module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normopt.sparsity import SparseLinear, dense_state_dict, prune_, sparse_state_dict, to_dense, to_sparse


def sparse_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Flatten(),
        nn.Sequential(nn.Linear(8, 12), nn.Tanh()),
        nn.Linear(12, 6, bias=False),
        nn.BatchNorm1d(6),
    )
    prune_(model, fraction=0.7)
    model[3].weight.data[2] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_model_computes_the_same_and_comes_back_exactly(dtype):
    model = sparse_net().to(dtype).eval()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    sparse = to_sparse(model)
    assert isinstance(sparse[2][0], SparseLinear)
    assert isinstance(sparse[3], SparseLinear)
    assert not sparse[3].training
    x = torch.randn(5, 1, 4, 4, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x))
    for shape in ((8,), (1, 8), (2, 3, 8)):
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(sparse[2](x), model[2](x))
    dense = to_dense(sparse)
    assert type(dense[3]) is nn.Linear
    assert dense[3].weight.requires_grad
    assert list(dense.state_dict()) == list(before)
    for state in (dense.state_dict(), model.state_dict()):  # the model that was given is left alone
        assert all(torch.equal(state[name], v) for name, v in before.items())


def test_no_random_number_is_drawn():
    model = sparse_net()
    before = torch.get_rng_state()
    to_dense(to_sparse(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_the_input():
    model = sparse_net()
    x = torch.randn(3, 12, requires_grad=True)
    to_sparse(model)[3](x).square().sum().backward()
    got, x.grad = x.grad, None
    model[3](x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_a_sparse_model_lives_as_any_module_does(tmp_path):
    sparse = to_sparse(sparse_net())
    x = torch.randn(5, 12)
    expected = sparse[3](x)
    assert torch.equal(copy.deepcopy(sparse)[3](x), expected)
    torch.testing.assert_close(copy.deepcopy(sparse).double()[3](x.double()).float(), expected)
    torch.save(sparse.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(sparse)
    other[3].values.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other[3](x), expected)
    torch.save(sparse, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)[3](x), expected)
    assert repr(sparse[3]).startswith("SparseLinear(in_features=12, out_features=6, bias=False, nonzero=")


def test_a_state_with_wrong_indices_is_an_error_and_no_crash():
    sparse = to_sparse(sparse_net())
    state = sparse.state_dict()
    state["3.columns"] = state["3.columns"] + 10**6
    with pytest.raises(RuntimeError, match="col_ind"):
        sparse.load_state_dict(state)


def test_a_single_layer_a_shared_layer_and_none():
    layer = nn.Linear(3, 2)
    assert isinstance(to_sparse(layer), SparseLinear)
    assert torch.equal(to_dense(to_sparse(layer)).weight, layer.weight)
    shared = to_sparse(nn.Sequential(layer, nn.Linear(2, 3), layer))
    assert shared[0] is shared[2]
    empty = nn.Linear(3, 2)
    nn.init.zeros_(empty.weight)
    assert torch.equal(to_sparse(empty)(torch.ones(4, 3)), empty.bias.expand(4, 2))
    assert list(to_sparse(nn.ReLU()).children()) == []

    class Own(nn.Linear):
        pass

    assert type(to_sparse(nn.Sequential(Own(2, 2)))[0]) is Own


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_a_sparse_state_dict_comes_back_exactly(layout, tmp_path):
    model = sparse_net()
    state = sparse_state_dict(model, layout)
    assert state["3.weight"].layout == getattr(torch, f"sparse_{layout}")
    assert state["0.weight"].layout == (torch.sparse_coo if layout == "coo" else torch.strided)
    assert state["2.0.bias"].layout == torch.strided
    torch.save(state, tmp_path / "state.pt")
    back = dense_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.ones_(p)
    other.load_state_dict(back)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_bad_input():
    for call in (to_sparse, to_dense, sparse_state_dict):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            call(torch.ones(2, 2))
    with pytest.raises(ValueError, match="layout"):
        sparse_state_dict(nn.Linear(2, 2), "bsr")

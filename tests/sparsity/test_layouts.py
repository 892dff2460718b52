"""Sparse storage: the same numbers there and back, a model that computes with them, and a life as a module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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


class Seen:
    """Hooks that change or note what they see."""

    def __init__(self):
        self.grads = []

    def doubled(self, module, args, output):
        return 2 * output

    def shifted(self, module, args, kwargs):
        return (args[0] + 1,), kwargs

    def noted(self, module, grads, _):
        self.grads.append((type(module), grads[0].clone()))

    def __deepcopy__(self, memo):
        return self


def hooked(seen):
    model = sparse_net().eval()
    for layer in (model[2][0], model[3]):
        layer.register_forward_hook(seen.doubled)
        layer.register_forward_pre_hook(seen.shifted, with_kwargs=True)
    model[3].register_full_backward_hook(seen.noted)
    return model


@pytest.mark.parametrize("there_and_back", [False, True])
def test_hooks_stay_where_they_are(there_and_back):
    seen = Seen()
    model = hooked(seen)
    changed = to_dense(to_sparse(model)) if there_and_back else to_sparse(model)
    plain = sparse_net().eval()
    x = torch.randn(5, 1, 4, 4)
    inside = 2 * plain[2][0](plain[1](plain[0](x)) + 1)
    expected = plain[4](2 * plain[3](torch.tanh(inside) + 1))
    assert (expected - plain(x)).abs().max() > 0.1
    for m in (model, changed):
        torch.testing.assert_close(m(x), expected)
        m(x.requires_grad_()).square().sum().backward()
    (kind, theirs), (new, ours) = seen.grads
    assert (kind, new) == (nn.Linear, nn.Linear if there_and_back else SparseLinear)
    torch.testing.assert_close(ours, theirs)


def test_modes_attributes_and_what_is_frozen_stay_too():
    model = sparse_net()
    model[3].train(False)
    model[3].is_head = True
    model[2][0].weight.requires_grad_(False)
    codes = nn.Linear(2, 2, bias=False)
    codes.weight = nn.Parameter(torch.tensor([[0, 3], [1, 0]], dtype=torch.int8), requires_grad=False)
    model.append(codes)
    sparse = to_sparse(model)
    dense = to_dense(sparse)
    assert [m[3].training for m in (sparse, dense)] == [False, False]
    assert [m[2][0].training for m in (sparse, dense)] == [True, True]
    assert sparse[3].is_head
    assert dense[3].is_head
    assert [p.requires_grad for p in dense.parameters()] == [p.requires_grad for p in model.parameters()]
    assert vars(dense[3]).keys() == vars(model[3]).keys()
    model[3].is_head = False
    assert dense[3].is_head
    assert torch.equal(dense[5].weight, codes.weight)
    dense[3].weight.requires_grad_(False)
    assert not to_dense(to_sparse(dense))[3].weight.requires_grad


def test_a_layer_with_a_parametrization_stays_dense():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    x = torch.randn(4, 3)
    assert torch.equal(to_sparse(model)[0](x), model[0](x))
    assert nn.utils.parametrize.is_parametrized(to_sparse(model)[0])


LOST = {
    "weight_mask": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_orig": nn.utils.spectral_norm,
    "counts": lambda layer: layer.register_buffer("counts", torch.zeros(2)),
    "scale": lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(2))),
    "adapter": lambda layer: layer.add_module("adapter", nn.Linear(3, 2)),
    "a forward": lambda layer: setattr(layer, "forward", torch.zeros_like),
    "state dict hooks": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "state dict hooks ": lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
    "state dict hooks  ": lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
    "state dict hooks   ": lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_is_refused(what):
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2)))
    LOST[what](model[1][0])
    with pytest.raises(ValueError, match=rf"^1\.0 \(Linear\) differs .*{what.strip()}.*remove that first"):
        to_sparse(model)
    if "weight" not in what:
        sparse = to_sparse(nn.Linear(3, 2))
        LOST[what](sparse)
        with pytest.raises(ValueError, match=rf"^the model \(SparseLinear\) .*{what.strip()}.*remove that first"):
            to_dense(sparse)


def test_weights_stay_on_their_device_under_another_default():
    model = sparse_net().eval()
    x = torch.randn(5, 1, 4, 4)
    with torch.device("meta"):
        torch.testing.assert_close(to_sparse(model)(x), model(x))
        torch.testing.assert_close(to_dense(to_sparse(model))(x), model(x))
        assert {v.device.type for v in sparse_state_dict(model, "coo").values()} == {"cpu"}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.14 on
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


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.14 on
@pytest.mark.parametrize(("layout", "each"), [("csr", 12), ("csc", 12), ("coo", 20)])
def test_a_file_has_the_documented_bytes_per_nonzero_weight(layout, each, tmp_path):
    layer = nn.Linear(200, 100, bias=False)
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.weight[::2])
    path = tmp_path / "state.pt"
    sizes = []
    for model in (layer, to_sparse(layer)):
        torch.save(sparse_state_dict(model, layout), path)
        sizes.append(path.stat().st_size)
    nonzeros = 10_000
    assert each * nonzeros <= sizes[0] <= each * nonzeros + 5_000  # of names, row ends and the zip file
    assert 12 * nonzeros <= sizes[1] <= 12 * nonzeros + 5_000


def test_bad_input():
    for call in (to_sparse, to_dense, sparse_state_dict):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            call(torch.ones(2, 2))
    with pytest.raises(ValueError, match="layout"):
        sparse_state_dict(nn.Linear(2, 2), "bsr")

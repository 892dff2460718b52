"""The shrunk network: the same function with fewer units, as few as there can be, and nothing else touched."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normopt.sparsity import prune_, report, shrink
from tests.sparsity.networks import cnn, depthwise, kill, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])


def outputs(model, x):
    """In eval mode and float64, leaving the model alone."""
    return copy.deepcopy(model).double().eval()(x.double()).detach()


def assert_same(shrunk, model, x, tolerance):
    got, expected = outputs(shrunk.model, x), outputs(model, x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-300)
    assert shrunk.error <= tolerance
    assert shrunk.parameters_before == sum(p.numel() for p in model.parameters())
    assert shrunk.parameters_after == sum(p.numel() for p in shrunk.model.parameters())


@given(seeds, dtypes)
@settings(max_examples=60, deadline=None)
def test_networks_with_dead_units(seed, dtype):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = mlp(rng, dtype)
    x = torch.randn(16, 3, dtype=dtype)
    check(model, x, TOLERANCE[dtype])


@given(seeds, dtypes, st.sampled_from([1, 2, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_convolutions_with_dead_channels(seed, dtype, d):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = cnn(rng, dtype, d)
    x = torch.randn(4, 1, *[8 if d < 3 else 6] * d, dtype=dtype)
    check(model, x, TOLERANCE[dtype])


def check(model, x, tolerance):
    before = copy.deepcopy(model.state_dict())
    given_x = x.clone()
    shrunk = shrink(model, x, tolerance)
    assert_same(shrunk, model, x, tolerance)
    assert torch.equal(x, given_x)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(module.training for module in [*model.modules(), *shrunk.model.modules()])
    assert {p.dtype for p in shrunk.model.parameters()} == {x.dtype}
    # On other inputs, too; and there is nothing left to take out.
    torch.manual_seed(99)
    assert_same(shrunk, model, 3 * torch.randn_like(x), 10 * tolerance)
    if depthwise(model) == depthwise(shrunk.model):  # that of one channel is a convolution like any other
        assert shrink(shrunk.model, x, tolerance).parameters_after == shrunk.parameters_after
    if outputs(model, x).std(0).sum() > 0:  # a constant network may be given a bias to hold what it puts out
        assert shrunk.parameters_after <= shrunk.parameters_before


def numpy_shrunk_sizes(weights, biases, activation):
    """The hidden sizes that are left of an MLP, from the definition: one unit at a time, until none is dead."""
    weights, biases = [w.copy() for w in weights], [b.copy() for b in biases]
    while True:
        found = None
        for i in range(len(weights) - 1):
            for u in range(len(weights[i])):
                unread, constant = not weights[i + 1][:, u].any(), not weights[i][u].any()
                if (unread or constant) and len(weights[i]) > 1:
                    found = found or (i, u)
                elif unread or constant:  # the last unit of a layer stays, but neither reads nor is read
                    if constant:
                        biases[i + 1] += weights[i + 1][:, u] * activation(biases[i][u])
                    weights[i][u], weights[i + 1][:, u] = 0, 0
        if found is None:
            return [len(w) for w in weights[:-1]]
        i, u = found
        if not weights[i][u].any():
            biases[i + 1] += weights[i + 1][:, u] * activation(biases[i][u])
        weights[i], biases[i] = np.delete(weights[i], u, 0), np.delete(biases[i], u)
        weights[i + 1] = np.delete(weights[i + 1], u, 1)


@pytest.mark.parametrize("seed", range(30))
def test_as_many_units_go_as_the_definition_says(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)
    )
    for layer in model[::2]:
        for dim in (0, 1):
            kill(rng, layer.weight, dim, 0.4)
        layer.weight.data *= torch.from_numpy(rng.random(layer.weight.shape) < 0.5)
    model = model.double()
    weights = [layer.weight.detach().numpy() for layer in model[::2]]
    biases = [layer.bias.detach().numpy() for layer in model[::2]]
    shrunk = shrink(model, torch.randn(8, 4).double())
    assert [c.after for c in shrunk.layers[:-1]] == numpy_shrunk_sizes(weights, biases, np.tanh)
    assert [c.before for c in shrunk.layers] == [6, 7, 5, 2]


def test_where_nothing_is_dead_nothing_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    shrunk = shrink(model, torch.randn(5, 1, 4, 4))
    assert shrunk.error == 0
    assert shrunk.parameters_after == shrunk.parameters_before
    assert list(shrunk.model.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        got = shrunk.model.state_dict()[name]
        assert torch.equal(got, value)
        assert got.dtype == value.dtype
        assert got.data_ptr() != value.data_ptr()


def test_a_constant_goes_through_batch_norm_and_sigmoid_into_a_new_bias():
    """By hand: unit 1 of 2 puts out its bias 2; batch norm and sigmoid make (2 − 1)/√(3 + 1)·4 + 5 = 7 of it."""
    norm = nn.BatchNorm1d(2, eps=1.0)
    model = nn.Sequential(nn.Linear(1, 2), norm, nn.Sigmoid(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 2.0]))
        norm.running_mean.fill_(1)
        norm.running_var.fill_(3)
        norm.weight.fill_(4)
        norm.bias.fill_(5)
        model[3].weight.copy_(torch.tensor([[1.0, 10.0]]))
    model[3].weight.requires_grad_(False)
    shrunk = shrink(model, torch.randn(4, 1))
    assert [(c.name, c.before, c.after) for c in shrunk.layers] == [("0", 2, 1), ("3", 1, 1)]
    assert shrunk.model[3].bias.item() == pytest.approx(10 / (1 + math.exp(-7)), rel=1e-15)
    assert not shrunk.model[3].bias.requires_grad
    assert shrunk.model[3].in_features == shrunk.model[1].num_features == shrunk.model[0].out_features == 1
    assert (shrunk.parameters_before, shrunk.parameters_after) == (10, 6)


def test_one_dead_unit_makes_others_dead_in_both_directions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        # Nobody reads unit 0 of the second layer, which alone reads unit 0 of the first.
        model[4].weight[:, 0] = 0
        model[2].weight[1:, 0] = 0
        # Unit 1 of the second layer is constant, and unit 1 of the third reads only that.
        model[2].weight[1] = 0
        model[4].weight[1, [0, 2, 3]] = 0
    shrunk = shrink(model, torch.randn(8, 3))
    assert [c.after for c in shrunk.layers] == [3, 2, 3, 2]
    assert_same(shrunk, model, torch.randn(8, 3), 1e-6)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_of_a_layer_that_is_dead_one_unit_stays(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    nn.init.zeros_(model[layer].weight)
    shrunk = shrink(model, torch.randn(8, 3))
    assert [c.after for c in shrunk.layers] == [1, 1, 2]
    assert_same(shrunk, model, torch.randn(8, 3), 1e-6)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
def test_a_constant_channel_is_folded_only_where_the_border_is_constant_too(mode, padding):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 3, 3, padding=padding, padding_mode=mode)
    ).double()
    model[0].weight.data[[1, 2, 4]] = 0
    shrunk = shrink(model, torch.randn(4, 1, 6, 6), 1e-12)
    pads = mode == "zeros" and padding in (1, "same")
    # Where the border is of zeros, one constant channel stays for all three.
    assert shrunk.layers[0].after == (4 if pads else 3)
    assert_same(shrunk, model, torch.randn(4, 1, 6, 6), 1e-12)


def test_channels_whose_constant_is_zero_are_folded_under_any_padding():
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1))
    model[0].weight.data[[0, 3]] = 0
    model[0].bias.data[[0, 3]] = -1
    assert shrink(model, torch.randn(2, 2, 5)).layers[0].after == 2


@pytest.mark.parametrize(
    ("pool", "folds"),
    [
        (nn.AvgPool2d(2, padding=1), False),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), True),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.AvgPool2d(2, ceil_mode=True), True),
        (nn.MaxPool2d(2, padding=1), True),
        (nn.AdaptiveAvgPool2d(3), True),
    ],
)
def test_a_mean_over_a_border_is_no_constant(pool, folds):
    torch.manual_seed(0)
    side = pool(torch.zeros(1, 1, 5, 5)).shape[-1]
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sigmoid(), pool, nn.Flatten(), nn.Linear(3 * side**2, 2)).double()
    model[0].weight.data[1] = 0
    shrunk = shrink(model, torch.randn(4, 1, 5, 5), 1e-12)
    assert shrunk.layers[0].after == (2 if folds else 3)
    assert_same(shrunk, model, torch.randn(4, 1, 5, 5), 1e-12)


def test_depthwise_convolutions_go_with_their_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 1, bias=False),
    ).double()
    with torch.no_grad():
        model[4].weight[:, 0] = 0  # unread
        model[0].weight[1] = 0  # a constant until the border of the depthwise convolution
        model[2].weight[2] = 0  # a constant from there on
    shrunk = shrink(model, torch.randn(4, 1, 5, 5), 1e-12)
    assert [(c.name, c.after) for c in shrunk.layers] == [("0", 4), ("4", 2)]
    depthwise = shrunk.model[2]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == len(depthwise.weight) == 4
    assert_same(shrunk, model, torch.randn(4, 1, 5, 5), 1e-12)


def test_linear_layers_at_many_places_and_what_flattens_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(28, 2)
    ).double()
    model[0].weight.data[1] = 0
    model[5].weight.data[:, 2::4] = 0  # unit 2 at every one of the 7 places
    x = torch.randn(6, 7, 3).double()
    shrunk = shrink(model, x, 1e-12)
    assert [c.after for c in shrunk.layers] == [4, 3, 2]
    assert_same(shrunk, model, x, 1e-12)


def test_what_stands_before_the_first_layer_and_after_the_last_stays():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.BatchNorm2d(1),
        nn.ReLU(inplace=True),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(144, 10),
        nn.LogSoftmax(1),
    )
    prune_(model, fraction=0.5, over="rows", exclude=["7.weight"])
    x = torch.randn(4, 64)
    before = x.clone()
    shrunk = shrink(model.eval(), x)
    assert torch.equal(x, before)
    assert shrunk.layers[0].after == 2
    assert not shrunk.model.training
    assert_same(shrunk, model, x, 1e-6)
    assert shrink(nn.Sequential(nn.ReLU(), nn.Softmax(1)), x).layers == ()
    assert shrink(nn.Linear(64, 2), x).parameters_after == 130


def test_modes_and_frozen_weights_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.data[0] = 0
    model[0].weight.requires_grad_(False)
    model[1].eval()
    small = shrink(model, torch.randn(5, 3)).model
    assert [m.training for m in small] == [True, False, True]
    assert not small[0].weight.requires_grad
    assert small[0].bias.requires_grad
    assert small[1].num_batches_tracked.dtype == torch.int64
    small(torch.randn(5, 3)).sum().backward()  # and it trains on
    assert small[2].weight.grad is not None


def test_backward_and_state_dict_hooks_and_attributes_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data[0] = 0
    seen = []
    model[0].register_full_backward_hook(lambda module, _, grads: seen.append(grads[0].shape))
    model[2].register_state_dict_post_hook(lambda module, state, prefix, _: state.update(seen=True))
    model[2].is_head = True
    small = shrink(model, torch.randn(5, 3)).model
    small(torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert seen == [(5, 3)]
    assert small.state_dict()["seen"]
    assert small[2].is_head


def test_everything_is_on_its_own_device_under_another_default():
    """What is made without a device is on meta then, and cannot be computed with."""
    torch.manual_seed(0)
    model = cnn(np.random.default_rng(0), torch.float64)
    linear = mlp(np.random.default_rng(2), torch.float64)
    for network, x in ((model, torch.randn(4, 1, 8, 8).double()), (linear, torch.randn(16, 3).double())):
        expected = shrink(network, x)
        assert expected.parameters_after < expected.parameters_before
        with torch.device("meta"):
            found = shrink(network, x)
        assert found.parameters_after == expected.parameters_after
        assert {v.device.type for v in found.model.state_dict().values()} == {"cpu"}
        assert all(torch.equal(v, expected.model.state_dict()[k]) for k, v in found.model.state_dict().items())


def test_the_table_tells_what_went():
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
    model[0].weight.data[5:] = 0
    lines = str(shrink(model, torch.randn(5, 3))).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["layer", "units", "left"],
        ["0", "40", "5"],
        ["2", "2", "2"],
        ["parameters", "242", "32"],
    ]
    assert "outputs differ by" in lines[4]


def test_the_stack_inside_a_model_is_put_back_smaller():
    model = Stack()
    model.body[0].weight.data[1:] = 0
    x = torch.randn(5, 4)
    expected = model(x)
    shrunk = shrink(model.body, x)
    with pytest.raises(TypeError, match=r"\.model"):
        shrunk(x)
    model.body = shrunk.model
    torch.testing.assert_close(model(x), expected)
    assert len(model.body[0].weight) == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(list(self)):
            x = module(x)
        return x


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def changed(**attributes):
    layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


IMAGE = torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(Residual())), None, r"'1\.0' \(Residual\) is not supported"),
        (Residual(), None, r"the model \(Residual\) is not supported"),
        (Stack(), None, r"such as model\.body, and replace it by the smaller one"),
        (Backwards(nn.Linear(4, 4)), None, r"\(Backwards\) is not supported"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), None, "LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), None, "PReLU"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), None, "ParametrizedLinear"),
        (nn.Sequential(hooked()), None, "forward hooks"),
        (changed(forward=torch.zeros_like), None, r"'0' \(Linear\) has a forward\(\) set on the instance"),
        (changed(adapter=nn.Linear(4, 4)), None, "has additional adapter"),
        (changed(scores=nn.Parameter(torch.ones(4))), None, "has additional scores"),
        (changed(counts=nn.Buffer(torch.ones(4))), None, "has additional counts"),
        (shared(), None, "shares a tensor with '0'"),
        (tied(), None, "shares a tensor with '0'"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), None, "running statistics"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), None, r"comes after '1' \(Softmax\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))), None, "splits the output"),
        (nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2)), torch.randn(2, 3, 4), "mixes the units"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4, 4), "as its channels"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), IMAGE, "2 groups"),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), IMAGE, "4 groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 2)), IMAGE, "put a Flatten between"),
        (nn.Sequential(nn.Linear(6, 6), nn.Conv2d(4, 4, 3)), IMAGE, "another dim"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(2)), IMAGE, "all but the first dim"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)), IMAGE[0], "all but the first dim"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2, return_indices=True)), IMAGE, "indices"),
    ],
)
def test_what_is_no_chain_is_refused(model, x, message):
    with pytest.raises(ValueError, match=message) as caught:
        shrink(model, torch.randn(2, 4) if x is None else x)
    assert "nn.Sequential" in str(caught.value)


def test_bad_input():
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(2, 3)
    for call, error, message in (
        (lambda: shrink([model], x), TypeError, r"torch\.nn\.Module"),
        (lambda: shrink(model, [1.0, 2.0, 3.0]), TypeError, "list"),
        (lambda: shrink(model, torch.ones(2, 3, dtype=torch.long)), TypeError, r"torch\.int64"),
        (lambda: shrink(model, x[:0]), ValueError, "no outputs"),
        (lambda: shrink(model, x, tolerance=-1.0), ValueError, "tolerance"),
        (lambda: shrink(model, x, tolerance="0"), TypeError, "tolerance"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_proof_can_fail():
    """Where rounding to the weights' dtype costs more than is allowed, and where outputs are not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2)).bfloat16()
    model[0].weight.data[:4] = 0
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="tolerance = 1e-06"):
        shrink(model, x)
    assert 1e-6 < shrink(model, x, tolerance=0.1).error < 0.1
    model[2].bias.data[0] = math.nan
    with pytest.raises(RuntimeError, match="nan"):
        shrink(model, x, tolerance=0.1)


def test_what_was_pruned_and_shrunk_has_no_dead_rows_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5))
    prune_(model, fraction=0.5, over="rows", exclude=["4.weight"])
    assert report(model).total.dead_rows == 30
    shrunk = shrink(model, torch.randn(5, 20))
    counts = report(shrunk.model)
    assert counts.total.dead_rows == 0
    assert counts.total.entries < report(model).total.entries / 2

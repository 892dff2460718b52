"""What users hand in: numbers, tensors, gradients and checkpoints of every kind, and settings that do nothing."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

import normopt
from normopt import SteepestDescent
from tests import oracle

NAMES = normopt.list_optimizers()
BACKENDS = [dict(foreach=False), dict(foreach=True), dict(fused=True)]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=["for-loop", "foreach", "fused"])


def param(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def steps(opt, params, seeds):
    for seed in seeds:
        for i, w in enumerate(params):
            w.grad = param(*w.shape, seed=100 + 10 * seed + i, dtype=w.dtype).detach()
        opt.step()


class TestNumbersOfOtherLibraries:
    """NumPy's numbers are taken for what they are, as torch.optim takes them."""

    KINDS = (np.float16, np.float32, np.float64, np.longdouble, np.int64, Fraction)

    @each_backend
    @pytest.mark.parametrize("written", ["given", "in a group", "later"])
    def test_each_setting_is_its_value(self, written, backend):
        settings = dict(lr=0.1, p=3.0, momentum=0.9, weight_decay=0.05, decay_p=0.8, radius=1.5)
        odd = {key: np.float32(value) for key, value in settings.items()}
        params = [param(5, 4), param(3, seed=1)]
        more = dict(norm="lp", scale="unit", momentum_rule="ema", decay="lp")
        before = [w.detach().double().numpy().copy() for w in params]
        if written == "given":
            opt = SteepestDescent(params, **odd, **more, **backend)
        elif written == "in a group":
            opt = SteepestDescent([{"params": params, **odd}], **more, p=2.0, **backend)
        else:
            opt = SteepestDescent(params, **{**settings, "lr": 0.3}, **more, **backend)
            opt.param_groups[0].update(odd)
        if written != "later":
            assert {type(opt.param_groups[0][key]) for key in odd} == {float}
        rule = oracle.Rule(scale="unit", momentum_rule="ema", decay="lp", **{k: float(v) for k, v in odd.items()})
        ms = [None, None]
        for seed in range(3):
            steps(opt, params, [seed])
            before, ms = rule.step(before, [w.grad.double().numpy() for w in params], ms)
        for w, expected in zip(params, before, strict=True):
            np.testing.assert_allclose(w.detach().double().numpy(), expected, rtol=0, atol=3e-6)
        assert "momentum 0.9" in opt.backend()

    @each_backend
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_gives_the_bits_of_the_float(self, kind, backend):
        by_kind, by_float = [param(6, 5)], [param(6, 5)]
        lr = kind(1) / kind(8) if kind is not np.int64 else kind(1)
        for params, value in ((by_kind, lr), (by_float, float(lr))):
            opt = normopt.SGD(params, lr=value, momentum=0.5, **backend)
            assert isinstance(opt.param_groups[0]["lr"], (int, float))
            assert not isinstance(opt.param_groups[0]["lr"], np.generic)
            steps(opt, params, range(2))
            opt.param_groups[0]["lr"] = value
            opt.param_groups[0]["momentum"] = type(value)(0) if kind is np.int64 else value
            steps(opt, params, range(2, 4))
        assert torch.equal(by_kind[0], by_float[0])

    @each_backend
    def test_a_lambda_lr_that_writes_them(self, backend):
        ours, theirs = [param(6, 5)], [param(6, 5)]
        for cls, params, how in ((normopt.SGD, ours, backend), (torch.optim.SGD, theirs, dict(foreach=False))):
            opt = cls(params, lr=0.1, **how)
            sched = LambdaLR(opt, lambda s: np.float32(0.9) ** s)
            for seed in range(3):
                steps(opt, params, [seed])
                sched.step()
            assert isinstance(opt.param_groups[0]["lr"], np.floating)  # float64 under NumPy 1
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0 if backend != dict(fused=True) else 1e-6)

    def test_fields_of_a_norm_and_schedules(self):
        w = param(4, 3)
        opt = normopt.Muon([w], steps=np.int64(7))
        assert opt.param_groups[0]["norm_steps"] == 7
        assert type(opt.param_groups[0]["norm_steps"]) is int
        assert normopt.norms.Lp(np.float32(3)) == normopt.norms.Lp(3.0)
        opt = normopt.LPSGDM([w], p=np.float64(8))
        sched = normopt.schedules.CosineP(opt, total_steps=3, p_end=np.float32(2))
        sched.step()
        assert opt.param_groups[0]["p"] == 5.0

    def test_a_checkpoint_of_them_is_plain(self, tmp_path):
        w = param(4, 3)
        opt = normopt.SGD([{"params": [w], "weight_decay": np.float64(0.1)}], lr=np.float64(0.1))
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        assert torch.load(tmp_path / "opt.pt", weights_only=True)["param_groups"][0]["weight_decay"] == 0.1

    @pytest.mark.parametrize("value", [np.float32("nan"), np.float32(-1), np.float16("inf")])
    def test_they_are_checked_like_others(self, value):
        w = param(4, 3)
        with pytest.raises(ValueError, match="lr must be in"):
            normopt.SGD([w], lr=value)
        opt = normopt.SGD([w], lr=0.1)
        opt.param_groups[0]["lr"] = value
        w.grad = torch.ones_like(w)
        old = w.detach().clone()
        with pytest.raises(ValueError, match="lr must be in"):
            opt.step()
        assert torch.equal(w, old)

    @pytest.mark.parametrize("value", [True, np.True_, "0.1", np.ones(1), 1j])
    def test_what_is_no_number_is_refused(self, value):
        with pytest.raises(TypeError, match="lr must be a number"):
            normopt.SGD([param(2, 2)], lr=value)

    def test_lp_decay_on_another_optimizer(self):
        """Its product ηλ is one of floats, not of np.float32."""
        first, second = param(5, 4, dtype=torch.float64), param(5, 4, dtype=torch.float64)
        for w, lr, lam in ((first, np.float32(0.1), np.float32(0.3)), (second, *map(float, np.float32([0.1, 0.3])))):
            opt = torch.optim.SGD([w], lr=0.1, foreach=False)
            normopt.LpDecay(opt, p=0.8, weight_decay=lam)
            opt.param_groups[0]["lr"] = lr
            steps(opt, [w], [0])
        assert torch.equal(first, second)


class TestLazyViews:
    """A gradient may be a conjugation or a negation that no memory holds yet."""

    @pytest.mark.parametrize("backend", BACKENDS[:2], ids=["for-loop", "foreach"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_conjugates_step_as_torchs(self, momentum, backend):
        ours, theirs = (param(4, 3, dtype=torch.complex128) for _ in range(2))
        for cls, z, how in ((normopt.SGD, ours, backend), (torch.optim.SGD, theirs, dict(foreach=False))):
            opt = cls([z], lr=0.1, momentum=momentum, **how)
            for seed in range(3):
                z.grad = param(4, 3, seed=seed, dtype=torch.complex128).detach().conj()
                assert z.grad.is_conj()
                opt.step()
                assert z.grad.is_conj()
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("name", ["lpsgdm", "lion"])
    def test_conjugates_step_as_their_values(self, name):
        lazy, held = (param(4, 3, dtype=torch.complex64) for _ in range(2))
        for z in (lazy, held):
            opt = normopt.get_optimizer(name)([z], agr=True, maximize=True)
            for seed in range(3):
                grad = param(4, 3, seed=seed, dtype=torch.complex64).detach().conj()
                z.grad = grad if z is lazy else grad.resolve_conj()
                opt.step()
        assert torch.equal(lazy, held)

    @each_backend
    def test_negations_step_as_their_values(self, backend):
        w = torch.nn.Parameter(torch.ones(3))
        opt = normopt.SGD([w], lr=0.5, **backend)
        for lazy in (False, True, True, False):
            grad = torch.tensor([1.0, -2.0, 0.0])
            w.grad = torch._neg_view(grad) if lazy else -grad
            opt.step()
        assert w.tolist() == [3.0, -3.0, 1.0]

    def test_an_imaginary_part_of_a_conjugate_as_autograd_leaves_it(self):
        w = torch.nn.Parameter(torch.ones(3))
        w.grad = torch.tensor([1 + 2j, 3 - 4j, 5j], dtype=torch.complex64).conj().imag
        assert w.grad.is_neg()
        normopt.SignSGD([w], lr=0.5).step()
        assert w.tolist() == [1.5, 0.5, 1.5]

    def test_a_momentum_that_was_loaded_so(self):
        z, other = (param(3, dtype=torch.complex64) for _ in range(2))
        opt = torch.optim.SGD([other], lr=0.1, momentum=0.9)
        z.grad = torch.zeros_like(z)
        ours = normopt.SGD([z], lr=0.1, momentum=0.9)
        state = copy.deepcopy(opt.state_dict())
        state["state"] = {0: {"momentum_buffer": torch.tensor([1j, 2j, 1 + 1j], dtype=torch.complex64).conj()}}
        ours.load_state_dict(state)
        old = z.detach().clone()
        ours.step()
        torch.testing.assert_close(z.detach(), old - 0.09 * torch.tensor([-1j, -2j, 1 - 1j], dtype=torch.complex64))

    @pytest.mark.parametrize("x", [torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(torch.ones(2))])
    def test_a_parameter_is_refused(self, x):
        opt = normopt.SGD([param(2)])
        with pytest.raises(ValueError, match="resolve_conj"):
            opt.add_param_group({"params": [torch.nn.Parameter(x)]})
        assert len(opt.param_groups) == 1


LAYOUTS = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "bsc": lambda x: x.to_sparse_bsc((2, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_are_not_dense_are_refused_before_anything_is_written(layout, backend):
    first, last = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(LAYOUTS[layout](torch.ones(4, 4)))
    opt = normopt.LPSGDM([first, last], lr=0.1, **(backend if layout != "mkldnn" else {}))
    first.grad, last.grad = torch.ones(4, 4), LAYOUTS[layout](torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=r"layout .*normopt takes dense ones only.*SparseAdam"):
        opt.step()
    assert torch.equal(first.detach(), torch.ones(4, 4))
    assert not opt.state


class TestParametersWithoutValues:
    """On the meta device and under a FakeTensorMode optimizers are made and step; a lazy module has to run first."""

    SETTINGS = (dict(), dict(weight_decay=0.1, decay="lp", decay_p=0.8), dict(agr=True, weight_decay=0.1))

    @pytest.mark.parametrize("name", NAMES)
    def test_meta(self, name):
        for settings in self.SETTINGS:
            w = torch.nn.Parameter(torch.zeros(4, 3, device="meta"))
            opt = normopt.get_optimizer(name)([w], **settings)
            w.grad = torch.zeros(4, 3, device="meta")
            opt.step()
            assert all(b.is_meta and b.shape in (w.shape, (4, 1), ()) for b in opt.state[w].values())

    @pytest.mark.parametrize("name", NAMES)
    def test_fake(self, name):
        real = torch.nn.Parameter(torch.zeros(4, 3))
        for settings in self.SETTINGS:
            with FakeTensorMode():
                normopt.get_optimizer(name)([real], **settings)
                w = torch.nn.Parameter(torch.zeros(4, 3))
                opt = normopt.get_optimizer(name)([w], **settings, lr=torch.tensor(0.1))
                w.grad = torch.zeros(4, 3)
                opt.step()
            assert all(b.shape in (w.shape, (4, 1), ()) for b in opt.state[w].values())
            normopt.get_optimizer(name)([w], **settings)  # made outside of the mode, of what was made inside

    def test_fake_under_the_add_on(self):
        with FakeTensorMode():
            w = torch.nn.Parameter(torch.zeros(4, 3))
            normopt.LpDecay(torch.optim.SGD([w], lr=0.1))

    @pytest.mark.parametrize("name", NAMES)
    def test_lazy(self, name):
        for settings in self.SETTINGS:
            layer = torch.nn.LazyLinear(3)
            for params in (layer.parameters(), [{"params": layer.parameters(), "norm": "l2", "scale": "dual"}]):
                with pytest.raises(ValueError, match=r"no shape yet.*run a batch"):
                    normopt.get_optimizer(name)(params, **settings)
        opt = normopt.get_optimizer(name)([param(2, 2)])
        with pytest.raises(ValueError, match="no shape yet"):
            opt.add_param_group({"params": layer.parameters()})
        assert len(opt.param_groups) == 1
        layer(torch.ones(1, 2))
        opt.add_param_group({"params": layer.parameters(), "norm": "l2", "scale": "dual"})


@each_backend
@pytest.mark.parametrize(
    "value",
    [np.arange(3.0), [np.arange(3), np.arange(2)], torch.arange(3), {"a": np.arange(3)}, np.float32(1)],
    ids=["array", "list of arrays", "tensor", "dict of arrays", "number"],
)
def test_a_key_of_the_users_own_is_kept_and_never_compared(value, backend):
    def make(value):
        params = [param(4, 3), param(2, seed=1)]
        groups = [{"params": params[:1], "mine": value}, {"params": params[1:], "mine": copy.deepcopy(value)}]
        return params, SteepestDescent(groups, 0.1, norm="lp", p=3.0, momentum=0.9, **backend)

    params, opt = make(value)
    assert opt.param_groups[0]["mine"] is value
    steps(opt, params, range(3))
    opt.param_groups[0]["mine"] = copy.deepcopy(value)
    steps(opt, params, [3])
    assert "group 1" in opt.backend()
    assert "mine" in repr(opt)
    opt.add_param_group({"params": [param(2)], "mine": value})
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(other.param_groups[0]["mine"]) == repr(value)
    other_params, other = make(value)
    other.add_param_group({"params": [param(2)], "mine": value})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for a, b in zip(other_params, params, strict=True):
            a.copy_(b)
    steps(opt, params, [4])
    steps(other, other_params, [4])
    assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


def test_overrides_that_differ_where_no_repr_shows_it_make_two_groups():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    close = torch.tensor(0.123456), torch.tensor(0.123457)
    groups = normopt.param_groups(net, output=None, overrides={"0": {"lr": close[0]}, "1": {"lr": close[1]}})
    assert [float(g["lr"]) for g in groups] == [float(x) for x in close]


class TestTensorSettings:
    """A schedule writes into the tensors of the groups: each group has its own."""

    @each_backend
    @pytest.mark.parametrize("by_hand", [False, True])
    def test_a_schedule_multiplies_each_once(self, by_hand, backend):
        lr, lam = torch.tensor(0.4), torch.tensor(0.1)
        params = [param(4, 3), param(4, 3, seed=1), param(3, seed=2)]
        expected = [w.detach().double().numpy().copy() for w in params]
        opt = normopt.SGD([{"params": params[:1]}, {"params": params[1:2]}], lr=lr, weight_decay=lam, **backend)
        opt.add_param_group({"params": params[2:]})
        sched = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)  # group by group, in place
        sched.step(0.0)
        for seed in range(3):
            steps(opt, params, [seed])
            eta = 0.4 * 0.5**seed
            expected = [
                w - eta * (p.grad.double().numpy() + np.float64(np.float32(0.1)) * w)
                for w, p in zip(expected, params, strict=True)
            ]
            if by_hand:
                for group in opt.param_groups:
                    group["lr"] *= 0.5
            else:
                sched.step(1.0)
        assert [float(g["lr"]) for g in opt.param_groups] == pytest.approx([0.05] * 3)
        assert float(lr) == float(torch.tensor(0.4))
        for w, value in zip(params, expected, strict=True):
            np.testing.assert_allclose(w.detach().numpy(), value, atol=2e-6)

    def test_no_two_groups_share_one_whatever_made_them(self):
        def tensors(opt):
            return [group[key] for group in opt.param_groups for key in ("lr", "p", "weight_decay")]

        given = dict(lr=torch.tensor(0.1), p=torch.tensor(3.0), weight_decay=torch.tensor(0.2))
        groups = [{"params": [param(2, 2)], **given}, {"params": [param(3)]}, {"params": [param(4)]}]
        opt = SteepestDescent(groups, norm="lp", **given)
        shared = copy.deepcopy(opt.state_dict())
        for group in shared["param_groups"]:
            group.update(given)
        other = copy.deepcopy(opt)
        other.load_state_dict(shared)
        pickled = copy.deepcopy(opt)
        for group in pickled.param_groups:
            group.update(given)  # as an older version left them
        for each in (opt, other, pickle.loads(pickle.dumps(pickled))):
            found = [*tensors(each), *given.values()]
            assert len({x.data_ptr() for x in found}) == len(found) == 12
            assert [float(x) for x in found] == [float(x) for x in given.values()] * 4

    def test_one_that_requires_a_gradient_gets_it(self):
        lr = torch.tensor(0.1, requires_grad=True)
        start = torch.ones(2)
        opt = normopt.SGD([torch.nn.Parameter(start.clone())], lr=lr, differentiable=True)
        w = start.clone()
        opt.param_groups[0]["params"][0] = w
        w.grad = torch.tensor([3.0, -1.0])
        opt.step()
        w.sum().backward()
        assert float(lr.grad) == -2.0


def heard(make):
    """The warnings of normopt's, with the file that each points to."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make()
    return [(str(w.message), w.filename) for w in found]


class TestVectorsUnderMatrixNorms:
    MATRIX = ("freon", "muon", "normuon", "nucgd", "rownormsgd", "scale", "scion", "spectralsgd")

    def net(self):
        return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))

    @pytest.mark.parametrize("name", MATRIX)
    def test_a_whole_model_is_warned_of_once(self, name):
        cls = normopt.get_optimizer(name)
        ((message, file),) = heard(lambda: cls(self.net().parameters()))
        assert message.startswith(f"{cls.__name__} steps matrices, but some parameters are vectors or scalars")
        assert "Embeddings and output layers" in message
        assert "normopt.param_groups(model)" in message
        assert file == __file__

    def test_a_group_that_is_added_is_warned_of_too(self):
        opt = normopt.Muon([param(3, 2)])
        assert len(heard(lambda: opt.add_param_group({"params": [param(3)]}))) == 1
        assert len(heard(lambda: SteepestDescent([param(3)], norm="spectral", scale="unit"))) == 1

    def test_what_is_meant_is_not(self):
        net = self.net()
        frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        for make in (
            lambda: normopt.Muon(normopt.param_groups(net)),
            lambda: normopt.Scion(normopt.param_groups(net, "scion")),
            lambda: normopt.SCALE(normopt.param_groups(net, "scale")),
            lambda: SteepestDescent(normopt.param_groups(net, "modular", residual_depth=1), norm="spectral"),
            lambda: normopt.Muon([net[0].weight, net[2].weight, param(2, 3, 3, 3)]),
            lambda: normopt.Muon([{"params": net.parameters(), "norm": "spectral"}]),
            lambda: normopt.Muon([net[2].weight, frozen]),
            lambda: SteepestDescent(net.parameters(), norm="frobenius"),
            *(lambda n=n: normopt.get_optimizer(n)(net.parameters()) for n in NAMES if n not in self.MATRIX),
        ):
            assert heard(make) == []


IDLE = [
    (lambda ps: normopt.SGD(ps, decay="lp"), "decay = 'lp' does nothing at weight_decay = 0"),
    (lambda ps: normopt.SGD([{"params": ps}], decay="lp", weight_decay=0), "decay = 'lp'"),
    (lambda ps: normopt.Scion(ps, decay="lp", weight_decay=0.0), "decay = 'lp'"),
    (lambda ps: SteepestDescent(ps, norm="spectral", norm_steps=8), "norm_steps = 8 .* norm_method"),
    (lambda ps: SteepestDescent(ps, norm="spectral", norm_dtype="bfloat16"), "norm_dtype = 'bfloat16'"),
    (lambda ps: SteepestDescent(ps, norm="schatten", p=3.0, norm_steps=8), "norm_steps = 8"),
    (lambda ps: SteepestDescent(ps, norm=normopt.norms.Schatten(math.inf, steps=8)), "norm_steps = 8"),
    (lambda ps: normopt.Muon(ps, method="svd", steps=8), "norm_steps = 8"),
    (lambda ps: normopt.Muon(ps, method="svd", dtype="float32"), "norm_dtype = 'float32'"),
    (lambda ps: normopt.NucGD(ps, method="svd", steps=5), "norm_steps = 5"),
    (lambda ps: normopt.NucGD(ps, norm_dtype="bfloat16"), "norm_dtype"),
    (lambda ps: normopt.SpectralSGD(ps, norm_steps=8), "norm_steps = 8"),
    (lambda ps: normopt.SignSGD(ps, state_dtype="float32"), "state_dtype = 'float32' does nothing at momentum = 0"),
    (lambda ps: normopt.LPSGD(ps, state_dtype=torch.float32), "state_dtype"),
    (lambda ps: normopt.LPSGD(ps, dampening=0.1), "dampening"),
    (lambda ps: SteepestDescent(ps, norm="l2", scale="power", eps=1e-3), "eps = 0.001 does nothing at p = 2"),
    (lambda ps: SteepestDescent([{"params": ps}], beta2=0.9), 'beta2 = 0.9 does nothing without momentum_rule="lion"'),
    (lambda ps: normopt.AdamW(ps, beta2=0.9), "beta2 = 0.9 .*the β₂ of adaptive coordinates is metric_beta"),
]
UNLESS_SCHEDULED = [
    (lambda ps: normopt.SGD(ps, dampening=0.5), "dampening = 0.5 does nothing at momentum = 0"),
    (lambda ps: normopt.SGD(ps, state_dtype="float32"), "state_dtype = 'float32' does nothing at momentum = 0"),
    (lambda ps: normopt.LPSGDM(ps, p=2.0, eps=1e-3), "eps = 0.001 does nothing at p = 2"),
    (lambda ps: SteepestDescent(ps, norm="lp", p=2, scale="power", eps=1e-3), "eps = 0.001"),
]
USED = [
    lambda ps: normopt.SGD(ps, decay="lp", weight_decay=torch.tensor(0.0)),
    lambda ps: normopt.SGD([{"params": ps[:1], "weight_decay": 0.1}, {"params": ps[1:]}], decay="lp"),
    lambda ps: normopt.SGD([{"params": ps, "decay": "lp", "weight_decay": 0.1}], decay_p=0.8),
    lambda ps: SteepestDescent([{"params": ps, "momentum_rule": "lion", "momentum": 0.9}], beta2=0.9),
    lambda ps: normopt.SGD([{"params": ps[:1], "momentum": 0.9}, {"params": ps[1:]}], dampening=0.1),
    lambda ps: normopt.SGD([{"params": ps[:1], "momentum": 0.9}, {"params": ps[1:]}], state_dtype="float32"),
    lambda ps: normopt.Muon([{"params": ps[:1], "norm_method": "svd"}, {"params": ps[1:]}], steps=8, dtype="float32"),
    lambda ps: normopt.Muon([{"params": ps, "norm_method": "svd"}]),
    lambda ps: normopt.SpectralSGD([{"params": ps, "norm_method": "newton-schulz"}], norm_steps=8),
    lambda ps: normopt.LPSGD(ps, p=torch.tensor(2.0), eps=1e-3),
    lambda ps: normopt.LPSGD([{"params": ps, "p": 3.0}], p=2.0, eps=1e-3),
    lambda ps: SteepestDescent([{"params": ps, "norm": "l2"}], norm="lp", p=8.0, scale="power"),
    lambda ps: normopt.SGD([{"params": ps, "decay": "lp", "dampening": 0.1, "state_dtype": "float32"}]),
    *(lambda ps, m=m: normopt.Muon(ps, method=m) for m in ("svd", "newton-schulz", "polar-express")),
    *(lambda ps, m=m: normopt.Scion(ps, method=m) for m in ("svd", "newton-schulz", "polar-express")),
    *(lambda ps, m=m: normopt.SpectralSGD(ps, method=m) for m in ("svd", "newton-schulz")),
    *(lambda ps, m=m: normopt.NucGD(ps, method=m) for m in ("svd", "lanczos")),
    *(lambda ps, n=n: normopt.get_optimizer(n)(ps) for n in NAMES),
]


class TestArgumentsThatDoNothing:
    def params(self):
        return [param(4, 3), param(3, 4, seed=1)]

    @pytest.mark.parametrize(("make", "message"), IDLE)
    def test_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make(self.params())

    @pytest.mark.parametrize(("make", "message"), UNLESS_SCHEDULED)
    def test_are_warned_of_where_a_schedule_may_turn_them_on(self, make, message):
        ((found, file),) = heard(lambda: make(self.params()))
        assert message in found
        assert file == __file__

    @pytest.mark.parametrize("make", USED)
    def test_what_some_group_uses_is_neither(self, make):
        assert heard(lambda: make(self.params())) == []

    def test_a_schedule_of_p_may_end_at_2(self):
        params = self.params()
        opt = normopt.LPSGDM(params, p=8.0, eps=1e-3)
        sched = normopt.schedules.CosineP(opt, total_steps=3)
        for seed in range(4):
            steps(opt, params, [seed])
            sched.step()
        assert opt.param_groups[0]["p"] == 2.0

    def test_a_momentum_that_comes_later(self):
        """Of float32 then, as was asked for."""
        w = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        with pytest.warns(UserWarning, match="unless a schedule"):
            opt = normopt.SGD([w], state_dtype="float32")
        OneCycleLR(opt, max_lr=0.1, total_steps=10)
        w.grad = torch.ones_like(w)
        opt.step()
        assert opt.state[w]["momentum_buffer"].dtype == torch.float32


class TestSchedulesOfTheMomentum:
    @each_backend
    @pytest.mark.parametrize("cls", [normopt.SignSGD, normopt.LPSGD])
    @pytest.mark.parametrize("sched", [OneCycleLR, CyclicLR])
    def test_are_refused_by_a_rule_without_one(self, sched, cls, backend):
        def make(o, **more):
            return OneCycleLR(o, 0.1, 10, **more) if sched is OneCycleLR else CyclicLR(o, 0.01, 0.1, **more)

        w = param(4, 3)
        old = w.detach().clone()
        opt = cls([w], lr=0.1, **backend)
        steps(opt, [w], [0])
        assert not torch.equal(w, old)
        old = w.detach().clone()
        make(opt)
        for act in (lambda: steps(opt, [w], [0]), opt.backend):
            with pytest.raises(ValueError, match=f"{cls.__name__} fixes momentum = 0.*cycle_momentum=False"):
                act()
        assert torch.equal(w, old)
        assert not opt.state
        opt = cls([w], lr=0.1, **backend)
        make(opt, cycle_momentum=False)
        steps(opt, [w], [0])
        assert not torch.equal(w, old)

    def test_of_a_checkpoint_or_a_group_too(self):
        theirs = torch.optim.SGD([param(4, 3)], lr=0.1, momentum=0.9)
        for act in (
            lambda o: o.load_state_dict(theirs.state_dict()),
            lambda o: o.add_param_group({"params": [param(2)], "momentum": 0.9}),
        ):
            opt = normopt.SignSGD([param(4, 3)], lr=0.3)
            with pytest.raises(ValueError, match="SignSGD fixes momentum = 0"):
                act(opt)
            assert [g["lr"] for g in opt.param_groups] == [0.3]

    @pytest.mark.parametrize("name", [n for n in NAMES if not normopt.get_optimizer(n)._no_momentum])
    def test_are_taken_by_the_others(self, name):
        w = param(4, 3)
        opt = normopt.get_optimizer(name)([w])
        OneCycleLR(opt, max_lr=0.1, total_steps=10)
        steps(opt, [w], [0])
        assert f"momentum {opt.param_groups[0]['momentum']:g}" in opt.backend()


class TestCheckpointsOfOthers:
    def trained(self, make):
        params = [param(4, 3), param(3, 4, seed=1)]
        opt = make(params)
        steps(opt, params, range(2))
        return opt

    @pytest.mark.parametrize(
        ("theirs", "what"),
        [
            (torch.optim.AdamW, "betas, exp_avg"),
            (torch.optim.RMSprop, "square_avg"),
            (torch.optim.Adagrad, "sum"),
            (lambda ps: torch.optim.Adadelta(ps), "acc_delta"),
        ],
    )
    @pytest.mark.parametrize("name", NAMES)
    def test_are_refused_and_nothing_is_changed(self, name, theirs, what):
        if name in ("adam", "adamw", "lamb") and theirs is torch.optim.AdamW:
            pytest.skip("whose rule it is: test_zoo_adaptive.py")
        opt = self.trained(normopt.get_optimizer(name))
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match=f"{what}.*, which {type(opt).__name__} does not read.*another optimizer"):
            opt.load_state_dict(self.trained(theirs).state_dict())
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, state in before["state"].items():
            assert all(torch.equal(after["state"][i][key], value) for key, value in state.items())

    def test_are_refused_before_their_first_step_too(self):
        with pytest.raises(ValueError, match="betas"):
            normopt.LPSGDM([param(4, 3)]).load_state_dict(torch.optim.AdamW([param(4, 3)]).state_dict())

    @pytest.mark.parametrize("theirs", [normopt.Lion, normopt.Signum, normopt.SGD, normopt.Muon, normopt.LPSGD])
    def test_another_rule_of_ours_is_refused(self, theirs):
        opt = self.trained(normopt.LPSGDM if theirs is not normopt.LPSGD else normopt.PowerStep)
        before = copy.deepcopy(opt.param_groups[0]["norm"]), opt.param_groups[0]["lr"]
        state = self.trained(theirs).state_dict()
        if theirs is normopt.LPSGD:  # whose rule of a momentum that it has not is PowerStep's
            opt.load_state_dict(state)
            return
        with pytest.raises(ValueError, match="would make LPSGDM another optimizer"):
            opt.load_state_dict(state)
        assert (opt.param_groups[0]["norm"], opt.param_groups[0]["lr"]) == before

    def test_what_is_asked_for_is_loaded(self):
        """The momentum of Signum, and its lr, under LPSGDM's own rule."""
        theirs = self.trained(normopt.Signum)
        state = copy.deepcopy(theirs.state_dict())
        for group in state["param_groups"]:
            for key in ("norm", "p", "scale"):
                del group[key]
        opt = normopt.LPSGDM([param(4, 3), param(3, 4, seed=1)], p=3.0)
        opt.load_state_dict(state)
        assert [opt.param_groups[0][k] for k in ("norm", "p", "scale", "lr")] == ["lp", 3.0, "power", 1e-4]
        for ours, w in zip(opt.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            assert torch.equal(opt.state[ours]["momentum_buffer"], theirs.state[w]["momentum_buffer"])

    def test_state_of_the_users_own_is_kept(self):
        opt = self.trained(normopt.LPSGDM)
        for state in opt.state.values():
            state["mine"] = torch.ones(2)
        other = normopt.LPSGDM([param(4, 3), param(3, 4, seed=1)])
        with pytest.warns(UserWarning, match="mine, which LPSGDM does not read; they are kept"):
            other.load_state_dict(opt.state_dict())
        assert [state["mine"].tolist() for state in other.state.values()] == [[1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CosineP", "; did you mean normopt.schedules.CosineP?"),
        ("Schatten", "; did you mean normopt.norms.Schatten?"),
        ("sgd", "; did you mean normopt.SGD?"),
        ("parm_groups", "; did you mean normopt.param_groups?"),
        ("frobnicate", ""),
        ("__wrapped__", ""),
    ],
)
def test_a_name_that_is_not_there_says_where_one_like_it_is(name, hint):
    with pytest.raises(AttributeError) as error:
        getattr(normopt, name)
    assert str(error.value) == f"module 'normopt' has no attribute {name!r}{hint}"

"""Tensors that a step may find: of other memory, shape or dtype than before, lazily conjugated, sparse, quantized."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import normopt
from normopt.addons import AGR, LpDecay
from tests.versions import NEEDS_GRAD_DTYPE, shards_of

LR, LAM, P = 0.1, 0.3, 0.8
PATHS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def numbers(x):
    """What a tensor holds in float64, complex numbers as pairs."""
    x = x.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(x) if x.is_complex() else x).double().numpy().copy()


def expected(kind, w, g):
    """A step of SGD that carries an add-on, from the definitions."""
    if kind is AGR:
        return w - LR * g * (1 - np.abs(g) / np.abs(g).sum())
    if w.ndim < 2:
        return w - LR * g
    x = np.abs(w) ** (2 - P)
    return (w - LR * g) * x / (x + P * LR * LAM)


def attach(kind, opt):
    return kind(opt) if kind is AGR else LpDecay(opt, p=P, weight_decay=LAM)


def check_step(kind, opt, params, rtol=2e-6):
    before = [(numbers(p), None if p.grad is None else numbers(p.grad)) for p in params]
    opt.step()
    for p, (w, g) in zip(params, before, strict=True):
        np.testing.assert_allclose(numbers(p), w if g is None else expected(kind, w, g), rtol=rtol, atol=1e-7)


CHANGES = {
    "swapped": lambda x: torch.randn_like(x),
    "offloaded and back": lambda x: x.clone(),
    "cut": lambda x: x[:2],
    "transposed": lambda x: x.t().contiguous(),
    "a transposed view": lambda x: x.t(),
    "every second column": lambda x: x[:, ::2],
    "flattened": lambda x: x.view(-1),
    "longer": lambda x: torch.cat([x, x]),
    "empty": lambda x: x[:0],
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_data_that_changes_between_steps(kind, change, path):
    if change == "every second column" and path.get("fused"):
        pytest.skip("torch's fused SGD itself is wrong on weights with gaps")
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 4)) for _ in range(2)]
    opt = torch.optim.SGD(params, lr=LR, **path)
    attach(kind, opt)
    for step in range(4):
        if step == 2:
            params[0].data = CHANGES[change](params[0].data)
        for p in params:
            p.grad = torch.randn_like(p)
        check_step(kind, opt, params)
    params[0].data = torch.randn(5, 4)
    params[0].grad = torch.randn(5, 4)
    check_step(kind, opt, params)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("every second column", "a transposed view")])
def test_data_that_changes_between_steps_of_normopts_own(change, path):
    if change == "float64" and path.get("fused"):
        pytest.skip("the fused kernels of a CPU take no float64")
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 4)) for _ in range(2)]
    opt = normopt.LPSGD(params, lr=LR, p=3.0, **path)
    LpDecay(opt, p=P, weight_decay=LAM, over="rows")
    for step in range(4):
        if step == 2:
            params[0].data = CHANGES[change](params[0].data)
        for p in params:
            p.grad = torch.randn_like(p)
        before = [(numbers(p), numbers(p.grad)) for p in params]
        opt.step()
        for p, (w, g) in zip(params, before, strict=True):
            stepped = w - LR * np.sign(g) * np.sqrt(np.abs(g))
            if w.ndim > 1:
                x = np.linalg.norm(w, axis=1, keepdims=True) ** (2 - P)
                stepped *= x / (x + P * LR * LAM)
            np.testing.assert_allclose(numbers(p), stepped, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("change", ["cut", "transposed", "float64"])
def test_a_gradient_that_its_parameter_cannot_have_is_refused_and_all_are_put_back(change, with_closure):
    """torch would step where the dtypes alone differ; a gradient in the place of one that it lets nobody put there."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 4)) for _ in range(3)]
    opt = torch.optim.SGD(params, lr=LR, foreach=False)
    AGR(opt)
    grads = [torch.randn(5, 4) for _ in params]
    held = [g.clone() for g in grads]

    def closure():
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        params[1].data = CHANGES[change](params[1].data)

    args = (closure,) if with_closure else ()
    if not with_closure:
        closure()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="assign a gradient"):
        opt.step(*args)
    assert torch.equal(params[0], before)
    for p, g, x in zip(params, grads, held, strict=True):
        assert p.grad is g
        assert torch.equal(g, x)


@NEEDS_GRAD_DTYPE
@pytest.mark.parametrize("path", PATHS[:2], ids=str)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_gradients_of_another_dtype(dtype, grad_dtype, path):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3).to(dtype)) for _ in range(2)]
    params[0].grad_dtype = grad_dtype
    opt = torch.optim.SGD(params, lr=LR, **path)
    read = []
    AGR(opt)
    opt.register_step_pre_hook(lambda *_: read.extend(p.grad for p in params))
    LpDecay(opt, p=P, weight_decay=LAM)
    grads = [torch.randn(4, 3).to(p.grad_dtype) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    opt.step()
    for p, w, g, u in zip(params, before, grads, read, strict=True):
        assert p.grad is g
        assert u.dtype == g.dtype
        x = numbers(g)
        exact = torch.from_numpy(x * (1 - np.abs(x) / np.abs(x).sum()))
        torch.testing.assert_close(u, exact.to(g.dtype), rtol=torch.finfo(g.dtype).eps, atol=0)
        stepped = numbers((w - LR * u.double()).to(dtype))
        a = np.abs(numbers(w)) ** (2 - P)
        np.testing.assert_allclose(numbers(p), stepped * a / (a + P * LR * LAM), rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [AGR, LpDecay])
@pytest.mark.parametrize("what", ["gradient", "weight", "both", "a negated gradient"])
def test_conjugations_and_negations_that_are_pending(what, kind):
    torch.manual_seed(0)
    z = [torch.randn(4, 3, dtype=torch.complex64) for _ in range(4)]
    if what == "a negated gradient":
        params, grads = [torch.nn.Parameter(z[0].real.clone())], [z[1].conj().imag]
        assert grads[0].is_neg()
    else:
        w, g = z[0], z[1]
        params = [torch.nn.Parameter(w if what == "gradient" else w.conj()), torch.nn.Parameter(z[2])]
        grads = [g if what == "weight" else g.conj(), z[3]]
    opt = torch.optim.SGD(params, lr=LR, foreach=False)
    attach(kind, opt)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    check_step(kind, opt, params)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_weights_and_gradients_in_csr_are_refused_before_anything_is_written(kind, with_closure):
    dense, sparse = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2).to_sparse_csr())
    opt = torch.optim.SGD([dense, sparse], lr=LR, foreach=False)
    addon = attach(kind, opt)
    grads = [torch.ones(3, 2), torch.ones(3, 2).to_sparse_csr()]

    def closure():
        dense.grad, sparse.grad = grads

    if not with_closure:
        closure()
    with pytest.raises(RuntimeError, match="is sparse"):
        opt.step(*[closure] * with_closure)
    assert torch.equal(dense, torch.ones(3, 2))
    assert torch.equal(sparse.to_dense(), torch.ones(3, 2))
    assert dense.grad is grads[0]
    addon.detach()
    opt.step()
    assert torch.equal(sparse.to_dense(), torch.full((3, 2), 1 - LR))


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_quantized_weights_stay(kind, dtype, with_closure):
    torch.manual_seed(0)
    p, code = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.eye(3).to(dtype), requires_grad=False)
    opt = torch.optim.SGD([p, code], lr=LR)
    attach(kind, opt)
    w, g = numbers(p), torch.randn(4, 3)

    def closure():
        p.grad = g

    if not with_closure:
        closure()
    opt.step(*[closure] * with_closure)
    np.testing.assert_allclose(numbers(p), expected(kind, w, numbers(g)), rtol=2e-6)
    assert torch.equal(code.float(), torch.eye(3))


@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_gradients_that_come_and_go(kind):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    opt = torch.optim.SGD(params, lr=LR)
    attach(kind, opt)
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) if step >> i & 1 else None
        check_step(kind, opt, params)


@pytest.mark.parametrize(
    "value", [np.ones(3), [np.ones(2)], torch.ones(3), {"a": np.ones(2)}], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("key", ["mine", "p", "weight_decay", "lr_scale"])
@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_a_groups_own_key_may_hold_anything(kind, key, value):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]

    class Plain(torch.optim.Optimizer):
        """Has no weight decay of its own."""

        def __init__(self, groups):
            super().__init__(groups, {"lr": LR})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    groups = [{"params": [params[0]], key: value}, {"params": [params[1]]}]
    opt = Plain(groups)
    if kind is LpDecay and key == "weight_decay":
        with pytest.raises(ValueError, match="group 0 has weight_decay = "):
            attach(kind, opt)
        return
    addon = attach(kind, opt)
    for p in params:
        p.grad = torch.randn_like(p)
    check_step(kind, opt, params)
    opt.load_state_dict(opt.state_dict())
    check_step(kind, opt, params)
    assert repr(addon)
    addon.detach()
    assert opt.param_groups[0][key] is not None
    assert opt.param_groups[0].keys() == {"params", "lr", key}


@pytest.mark.parametrize("kind", [AGR, LpDecay])
def test_a_default_device_that_is_not_the_weights(kind):
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))]
    grads = [torch.randn_like(p) for p in params]
    with torch.device("meta"):
        opt = torch.optim.SGD(params, lr=LR)
        attach(kind, opt)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        before = [(p.detach().clone(), g) for p, g in zip(params, grads, strict=True)]
        opt.step()
    for p, (w, g) in zip(params, before, strict=True):
        np.testing.assert_allclose(numbers(p), expected(kind, numbers(w), numbers(g)), rtol=2e-6, atol=1e-7)


def test_agr_on_fake_tensors():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.randn(4, 3))
        opt = torch.optim.SGD([p], lr=LR)
        AGR(opt)
        p.grad = gradient = torch.randn(4, 3)
        opt.step()
        assert p.grad is gradient


def second_backward(p, step):
    """Whether a graph that has kept a weight is refused after a step has written it."""
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    version = p._version
    step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Idle(torch.optim.Optimizer):
    """Leaves the weights to its hooks."""

    def __init__(self, params):
        super().__init__(params, {"lr": LR})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("over", ["entries", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_second_backward_after_the_decay_raises(dtype, over):
    p = torch.nn.Parameter(torch.randn(4, 3).to(dtype))
    opt = Idle([p])
    LpDecay(opt, weight_decay=LAM, over=over)
    if p.is_complex():
        loss = (p * p.conj()).real.sum()
        loss.backward(retain_graph=True)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        second_backward(p, opt.step)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_second_backward_after_the_decay_of_normopts_own_raises(path):
    p = torch.nn.Parameter(torch.randn(4, 3))
    opt = normopt.LPSGD([p], lr=LR, p=3.0, **path)
    LpDecay(opt, weight_decay=LAM, over="rows")
    second_backward(p, opt.step)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_second_backward_after_the_decay_of_a_dtensor_raises(one_rank):
    p = torch.nn.Parameter(shards_of(torch.randn(4, 3), one_rank, [Shard(0)]))
    opt = Idle([p])
    LpDecay(opt, p=P, weight_decay=LAM)
    before = numbers(p.detach().full_tensor())
    second_backward(p, opt.step)
    x = np.abs(before) ** (2 - P)
    np.testing.assert_allclose(numbers(p.detach().full_tensor()), before * x / (x + P * LR * LAM), rtol=2e-6)

"""Monitors over tensors that are not what they expect: quantized, lazily conjugated, sparse, reshaped, fake."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import normopt
from normopt import GeometryMonitor, TrajectoryMonitor
from normopt.diagnostics.rows import METRICS
from tests.diagnostics.test_geometry import check
from tests.diagnostics.test_geometry import oracle as metrics
from tests.diagnostics.trainings import oracle
from tests.versions import NEEDS_GRAD_DTYPE

CODES = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "for-loop": lambda ps: normopt.LPSGDM(ps, lr=0.1, p=3.0, foreach=False),
    "foreach": lambda ps: normopt.LPSGDM(ps, lr=0.1, p=3.0, foreach=True),
}


def numbers(x):
    x = x.detach().resolve_conj().resolve_neg().to_dense()
    return (torch.view_as_real(x) if x.is_complex() else x).double().numpy().copy()


def flat(params):
    return np.concatenate([numbers(p).reshape(-1) for p in params])


def draw(params, seed):
    torch.manual_seed(seed)
    for p in params:
        if p.requires_grad:
            p.grad = torch.randn_like(p)


def weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantized_weights_are_no_part_of_the_geometry(name, dtype):
    rows, ends = [], []
    for code in (True, False):
        params = weights()
        frozen = torch.nn.Parameter(torch.eye(4).to(dtype), requires_grad=False)
        opt = OPTIMIZERS[name]([params[0], *[frozen] * code, params[1]])
        if code:
            opt.add_param_group({"params": [torch.nn.Parameter(frozen.detach().clone(), requires_grad=False)]})
        monitor = GeometryMonitor(opt, every=1)
        for step in range(3):
            draw(params, step)
            opt.step()
        ends.append(flat(params))
        rows.append(monitor.rows)
        assert torch.equal(frozen.float(), torch.eye(4))
    assert np.array_equal(*ends)
    found, alone = rows
    assert found[::2].tobytes() == alone.tobytes()
    assert all(np.isnan(found[1::2][metric]).all() for metric in METRICS if metric not in ("lr", "p"))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_trajectory_beside_quantized_weights(dtype, exact, tmp_path):
    params = weights()
    frozen = torch.nn.Parameter(torch.eye(4).to(dtype), requires_grad=False)
    opt = torch.optim.SGD([params[0], frozen, params[1]], lr=0.1)
    monitor = TrajectoryMonitor(opt, sketch=4096, directory=tmp_path / "there" if exact else None)
    iterates = [flat(params)]
    for step in range(4):
        draw(params, step)
        opt.step()
        monitor.record(1.0)
        iterates.append(flat(params))
    found = monitor.result()
    distance, norm, cosine, *_ = oracle(iterates, np.ones(4), np.full(4, 0.1))
    np.testing.assert_allclose(found.update_l2, norm, rtol=1e-6)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6 if exact else 0.05)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6 if exact else 0.1)


def complex_weights(which):
    """Complex parameters and gradients of which some are conjugated lazily."""
    torch.manual_seed(0)
    z = [torch.randn(4, 3, dtype=torch.complex64) for _ in range(4)]
    params = [torch.nn.Parameter(z[0].conj() if which != "gradients" else z[0]), torch.nn.Parameter(z[1])]
    return params, [z[2].conj() if which != "weights" else z[2], z[3]]


@pytest.mark.parametrize("which", ["weights", "gradients", "both"])
def test_a_pending_conjugation(which, tmp_path):
    params, grads = complex_weights(which)
    opt = torch.optim.SGD(params, lr=0.1, foreach=False)
    geometry = GeometryMonitor(opt, every=1)
    trajectory = TrajectoryMonitor(opt, directory=tmp_path / "there")
    iterates = [flat(params)]
    for step in range(3):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        before, g = [numbers(p) for p in params], [numbers(p.grad) for p in params]
        opt.step()
        trajectory.record(1.0)
        iterates.append(flat(params))
        check(geometry.rows[step], metrics(g, before, [numbers(p) for p in params], 2.0))
    found = trajectory.result()
    distance, norm, cosine, *_ = oracle(iterates, np.ones(3), np.full(3, 0.1))
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6)
    np.testing.assert_allclose(found.update_l2, norm, rtol=1e-6)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_weights_and_gradients_in_csr_are_measured_as_dense_ones(tmp_path):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3).to_sparse_csr()), torch.nn.Parameter(torch.randn(3))]
    opt = torch.optim.SGD(params, lr=0.1, foreach=False)
    geometry = GeometryMonitor(opt, every=1)
    trajectory = TrajectoryMonitor(opt, directory=tmp_path / "there")
    iterates = [flat(params)]
    for step in range(2):
        params[0].grad, params[1].grad = torch.randn(4, 3).to_sparse_csr(), torch.randn(3)
        before, g = [numbers(p) for p in params], [numbers(p.grad) for p in params]
        opt.step()
        trajectory.record(1.0)
        iterates.append(flat(params))
        check(geometry.rows[step], metrics(g, before, [numbers(p) for p in params], 2.0))
    np.testing.assert_allclose(trajectory.result().update_l2, oracle(iterates, [1, 1], [0.1, 0.1])[1], rtol=1e-6)


@NEEDS_GRAD_DTYPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_another_dtype(dtype):
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in weights()]
    params[0].grad_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    opt = torch.optim.SGD(params, lr=0.1, foreach=False)
    geometry = GeometryMonitor(opt, every=1)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.grad_dtype)
    before, g = [numbers(p) for p in params], [numbers(p.grad) for p in params]
    opt.step()
    check(geometry.rows[0], metrics(g, before, [numbers(p) for p in params], 2.0))


def test_gradients_that_come_and_go(tmp_path):
    params = weights()
    opt = torch.optim.SGD(params, lr=0.1)
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, directory=tmp_path / "there")
    iterates = [flat(params)]
    for step in range(4):
        draw(params, step)
        for i, p in enumerate(params):
            if step >> i & 1:
                p.grad = None
        before, g = [numbers(p) for p in params], [numbers(p.grad) for p in params if p.grad is not None]
        opt.step()
        iterates.append(flat(params))
        row = geometry.rows[step]
        if g:
            check(row, metrics(g + [np.zeros(0)] * (2 - len(g)), before, [numbers(p) for p in params], 2.0))
        else:
            assert np.isnan(row["grad_l2"])
            assert row["update_norm"] == 0
    np.testing.assert_allclose(trajectory.result().update_l2, oracle(iterates, [1] * 4, [0.1] * 4)[1], rtol=1e-6)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="under a default device of no numbers torch's AdamW fails")
def test_a_default_device_that_is_not_the_weights(tmp_path):
    """What is made without a device would be made there, and "meta" holds no numbers."""
    found = []
    for device in ("cpu", "meta"):
        params = weights()
        opt = torch.optim.AdamW(params, lr=torch.tensor(0.1), foreach=False)
        grads = [[torch.randn(p.shape, generator=torch.Generator().manual_seed(s)) for p in params] for s in range(4)]
        with torch.device(device):
            geometry = GeometryMonitor(opt, every=1, norm="spectral")
            monitors = [
                TrajectoryMonitor(opt, sketch=64),
                TrajectoryMonitor(opt, directory=tmp_path / device, may_skip=True),
            ]
            for step in range(4):
                for p, g in zip(params, grads[step], strict=True):
                    p.grad = g
                monitors[1].record(9.0)
                if step == 2:
                    monitors[1].record(8.0)  # the step of the last one was skipped
                opt.step()
                monitors[0].record(1.0 / (step + 1))
            state = monitors[0].state_dict()
            other = TrajectoryMonitor(opt, sketch=64)
            other.load_state_dict(state)
            results = [other.result(), *(m.result() for m in monitors)]
        found.append([geometry.rows.tobytes(), *(r.cosine.tobytes() + r.loss.tobytes() for r in results)])
    assert found[0] == found[1]


def test_fake_tensors_are_watched_like_others():
    with FakeTensorMode():
        params = weights()
        opt = torch.optim.SGD(params, lr=0.1)
        geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, sketch=64)
        for step in range(3):
            draw(params, step)
            opt.step()
            trajectory.record(torch.tensor(1.0))
        assert geometry.steps == trajectory._stepped == 3


CHANGES = {
    "cut": lambda x: x[:2],
    "transposed": lambda x: x.t().contiguous(),
    "flattened": lambda x: x.view(-1),
    "complex": lambda x: torch.complex(x, x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("exact", [False, True])
def test_another_shape_is_refused_before_anything_is_written(exact, change, tmp_path):
    params = weights()
    opt = torch.optim.SGD(params, lr=0.1)
    monitor = TrajectoryMonitor(opt, sketch=64, directory=tmp_path / "there" if exact else None)
    for step in range(2):
        draw(params, step)
        opt.step()
        monitor.record(1.0)
    before = str(monitor.state_dict())
    size = (tmp_path / "there" / "iterates.bin").stat().st_size if exact else 0
    params[0].grad = None
    params[0].data = CHANGES[change](params[0].data)
    draw(params, 2)
    held = flat(params)
    for act in (opt.step, monitor.result):
        with pytest.raises(RuntimeError, match=r"shape .* had \(4, 3\) when the monitor was made"):
            act()
    assert np.array_equal(flat(params), held)
    assert str(monitor.state_dict()) == before
    if exact:
        assert (tmp_path / "there" / "iterates.bin").stat().st_size == size
    with pytest.raises(RuntimeError, match="when the monitor was made"):
        monitor.close()  # its last update is not known
    assert not opt._optimizer_step_pre_hooks
    opt.step()
    assert not np.array_equal(flat(params), held)
    params[0].grad, params[0].data = None, weights()[0].data  # as long as it was: the end is known again
    assert len(monitor.result().update_l2) == 2


def test_data_that_is_swapped_moved_or_of_another_dtype_is_followed(tmp_path):
    params = weights()
    opt = torch.optim.SGD(params, lr=0.1)
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, directory=tmp_path / "there")
    swaps = [lambda x: x, torch.randn_like, lambda x: x.t().contiguous().t(), torch.Tensor.half, torch.Tensor.double]
    iterates = []
    for step, swap in enumerate(swaps):
        params[0].grad, params[0].data = None, swap(params[0].data)
        draw(params, step)
        before, g = [numbers(p) for p in params], [numbers(p.grad) for p in params]
        iterates.append(flat(params))
        opt.step()
        check(geometry.rows[step], metrics(g, before, [numbers(p) for p in params], 2.0))
    iterates.append(flat(params))
    distance, norm, *_ = oracle(iterates, np.ones(5), np.full(5, 0.1))
    found = trajectory.result()
    np.testing.assert_allclose(found.update_l2, norm, rtol=1e-5)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-5, atol=1e-6)


VALUES = [np.ones(3), [np.ones(2)], torch.ones(3), torch.ones(1, dtype=torch.complex64), "a", None, {"a": np.ones(2)}]


class Plain(torch.optim.Optimizer):
    """An optimizer whose groups need have nothing but parameters."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("key", ["mine", "p", "lr"])
def test_a_groups_own_key_may_hold_anything(key, value):
    params = weights()
    opt = Plain([{"params": [params[0]], key: value}, {"params": [params[1]], "p": 3.0, "lr": np.float32(0.5)}])
    geometry, trajectory = GeometryMonitor(opt, every=1), TrajectoryMonitor(opt, sketch=64)
    for step in range(2):
        draw(params, step)
        opt.step()
        trajectory.record(1.0)
    rows = geometry.rows
    assert np.isnan(rows[rows["group"] == 0]["p"]).all()
    assert np.isnan(rows[rows["group"] == 0]["lr"]).all()
    assert rows[rows["group"] == 1][["p", "lr"]].tolist() == [(3.0, 0.5)] * 2
    assert np.isfinite(rows["update_norm"]).all()
    assert np.isnan(trajectory.result().lr).all()

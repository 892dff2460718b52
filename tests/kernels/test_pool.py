"""Fused steps beside others in the process: threads, forked workers, a GradScaler."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch

import normopt
from normopt.kernels import pool
from normopt.kernels.tables import Chunks
from tests.patience import patience

BUFFER = "momentum_buffer"


@pytest.fixture(params=["torch's threads", "Python's threads"])
def two_threads(request, monkeypatch):
    if request.param == "Python's threads":
        monkeypatch.setattr(pool, "_forked", True)
    elif pool._torch_openmp() is None:
        pytest.skip("torch has another pool than GNU OpenMP's")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def train(out: dict[int, torch.Tensor], name: int) -> None:
    params = [torch.nn.Parameter(torch.ones(300, 300)) for _ in range(3)]
    opt = normopt.SteepestDescent(params, lr=0.01, norm="lp", p=2.7, scale="dual", momentum=0.9, fused=True)
    for i in range(20):
        for p in params:
            p.grad = torch.full_like(p, 0.1 * (i + 1))
        opt.step()
    out[name] = params[0].detach().clone()


def test_several_threads_step_at_once(two_threads):
    out: dict[int, torch.Tensor] = {}
    workers = [threading.Thread(target=train, args=(out, i)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert sorted(out) == [0, 1, 2, 3]
    assert all(torch.equal(out[i], out[0]) for i in range(4))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers that interrupt")
def test_an_interrupted_step_ends_after_all_of_its_threads(two_threads):
    """What is raised before they have ended leaves them writing into memory that its receiver may free."""
    began, ended = threading.Event(), threading.Event()

    def work(begin, end):
        if threading.current_thread() is threading.main_thread():
            assert began.wait(60)
        else:
            began.set()
            time.sleep(0.5)
            ended.set()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)  # again and again
        with pytest.raises(KeyboardInterrupt):
            pool.share_out(work, Chunks([torch.Size([1 << 20])]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert ended.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_kernels_run_on_the_threads_that_torch_made():
    """In a process of its own, in which nothing else makes threads."""
    program = """
import os, threading, torch
torch.set_num_threads(2)
torch.ones(1 << 22).sin_()
threads = lambda: set(os.listdir("/proc/self/task"))
before = threads()
from normopt.kernels import pool
from normopt.kernels.tables import Chunks
ran, both = set(), threading.Barrier(2, timeout=60)
def work(begin, end):
    both.wait()
    ran.add(str(threading.get_native_id()))
for _ in range(3):
    pool.share_out(work, Chunks([torch.Size([1 << 20])]))
assert len(ran) == 2 and ran <= before, (ran, before)
"""
    if pool._torch_openmp() is None:
        pytest.skip("torch has another pool than GNU OpenMP's")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr


class Stepping(torch.utils.data.Dataset):
    """A data set whose every item takes a fused step: the worst that a forked worker can do."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        p = torch.nn.Parameter(torch.ones(400, 400))
        p.grad = torch.ones_like(p)
        with mock.patch.object(torch, "get_num_threads", return_value=2):  # a loader's worker has one
            normopt.SteepestDescent([p], lr=0.5, norm="linf", scale="unit", fused=True).step()
        return p.detach()[0, :2].clone()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_data_loaders(two_threads):
    p = torch.nn.Parameter(torch.ones(400, 400))
    opt = normopt.SteepestDescent([p], lr=0.5, norm="linf", scale="unit", fused=True)
    loader = torch.utils.data.DataLoader(
        Stepping(), num_workers=2, multiprocessing_context="fork", timeout=patience(20)
    )
    for _ in range(2):  # by the second time the pool has threads here
        for item in loader:
            p.grad = torch.ones_like(p)
            opt.step()
            assert torch.equal(item, torch.full((1, 2), 0.5))


def test_an_error_in_a_thread_is_raised_here_and_the_pool_goes_on(two_threads):
    chunks = Chunks([torch.Size([pool.ALONE * 2])])

    def fails(begin, end):
        if begin:
            raise RuntimeError("as told")

    with pytest.raises(RuntimeError, match="as told"):
        pool.share_out(fails, chunks)
    seen = np.zeros(len(chunks), bool)

    def marks(begin, end):
        seen[begin:end] = True

    pool.share_out(marks, chunks)
    assert seen.all()


def test_a_gradscaler_lets_the_step_unscale_and_skip_itself():
    p, q = (torch.nn.Parameter(torch.ones(10, 10)) for _ in range(2))
    opt = normopt.LPSGDM([p], lr=0.1, p=3.0, agr=True, fused=True)
    plain = normopt.LPSGDM([q], lr=0.1, p=3.0, agr=True)
    assert opt._step_supports_amp_scaling
    assert not plain._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)
    x = torch.randn(10)
    scaler.scale((p @ x).square().sum()).backward()
    (q @ x).square().sum().backward()
    scaler.step(opt)
    scaler.update()
    plain.step()
    torch.testing.assert_close(p, q)
    before, momentum = p.detach().clone(), opt.state[p][BUFFER].clone()
    p.grad = torch.full_like(p, math.inf)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(p, before)
    assert torch.equal(opt.state[p][BUFFER], momentum)
    assert scaler.get_scale() == 512


def test_gradients_that_were_unscaled_before_the_step_are_not_scaled_by_what_the_last_step_was():
    p, q = (torch.nn.Parameter(torch.ones(10)) for _ in range(2))
    opt, plain = normopt.SGD([p], lr=0.1, fused=True), normopt.SGD([q], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for unscaled_before in (False, True, False):
        opt.zero_grad()
        plain.zero_grad()
        scaler.scale(p.square().sum()).backward()
        q.square().sum().backward()
        if unscaled_before:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        plain.step()
        torch.testing.assert_close(p, q)


def test_a_skipped_first_step_is_no_step():
    """With dampening the momentum's first value is another, so there GradScaler itself has to skip."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = normopt.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    assert not opt._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.zeros(()))
    scaler.step(opt)
    scaler.update()
    assert not opt.state
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(opt.state[p][BUFFER], torch.ones(4))

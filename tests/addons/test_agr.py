"""AGR: whose gradients it takes, when, and that they come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normopt.addons import AGR
from tests.addons.optimizers import CASES, SHAPES, build, copies, give, gradients, same
from tests.oracle import agr


def regularized(g):
    return torch.from_numpy(np.asarray(agr(g.double().numpy()))).to(g.dtype)


class Spy(torch.optim.Optimizer):
    """Keeps the gradients that its steps read."""

    def __init__(self, params, raises=False):
        super().__init__(params, {"lr": 1.0})
        self.seen, self.raises = [], raises

    def step(self, closure=None):
        for _ in range(2 if closure else 1):  # as a line search, or SAM, calls it more than once
            loss = closure() if closure else None
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            self.seen.append([None if g is None else g.clone() for g in grads])
            for g in grads:
                if g is not None:
                    g.mul_(-7)
            if self.raises:
                raise ArithmeticError
        return loss


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_come_back_the_same_objects_with_the_same_bits(name):
    params, opt = build(name, torch.float32)
    AGR(opt)
    for gs in gradients(params, 3):
        give(params, gs)
        own = [p.grad for p in params]
        opt.step()
        assert all(p.grad is g for p, g in zip(params, own, strict=True))
        assert same(own, gs)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([*SHAPES, (0, 2), (2, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_what_a_step_reads(shape, dtype, scale, seed):
    torch.manual_seed(seed)
    w = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    g = (torch.randn(shape, dtype=torch.float64) ** 3 * scale).clamp(-6e4, 6e4).to(dtype)
    w.grad = g.clone()
    opt = Spy([w])
    AGR(opt)
    opt.step()
    torch.testing.assert_close(opt.seen[0][0], regularized(g))
    assert opt.seen[0][0].dtype == dtype
    assert torch.equal(w.grad, g)


def over_group(gs):
    """The oracle: AGR of all entries of a group as one vector, in float64."""
    flat = agr(np.concatenate([g.double().numpy().ravel() for g in gs]))
    parts = np.split(flat, np.cumsum([g.numel() for g in gs])[:-1])
    return [torch.from_numpy(x.reshape(g.shape)).to(g.dtype) for x, g in zip(parts, gs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_sum_over_a_group(dtype):
    """Also of a group with one-element and empty tensors, without a gradient, and at the ends of float16."""
    torch.manual_seed(0)
    shapes = [[(3, 2), (1,), (0, 2), (4,)], [(2, 2)], [(3,)]]
    params = [[torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in some] for some in shapes]
    late = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    opt = Spy([{"params": [*params[0], late]}, {"params": params[1], "agr_scope": "tensor"}, {"params": params[2]}])
    AGR(opt, scope="group")
    assert [group["agr_scope"] for group in opt.param_groups] == ["group", "tensor", "group"]
    for size in (1.0, 6e4, 6e-8) if dtype == torch.float16 else (1.0, 1e300, 1e-300):
        gs = [[(torch.rand(p.shape, dtype=torch.float64) - 0.5) * 2 * size for p in some] for some in params]
        gs = [[g.to(dtype) for g in some] for some in gs]
        for some, given_ in zip(params, gs, strict=True):
            for p, g in zip(some, given_, strict=True):
                p.grad = g.clone()
        opt.step()
        seen = [g for g in opt.seen[-1] if g is not None]
        expected = [*over_group(gs[0]), *map(regularized, gs[1]), *over_group(gs[2])]
        tol = dict(rtol=1e-12, atol=0) if dtype == torch.float64 else dict(rtol=1e-3, atol=6e-8)
        for a, b in zip(seen, expected, strict=True):
            torch.testing.assert_close(a, b, **tol)
        for some, own in zip(params, gs, strict=True):
            assert same([p.grad for p in some], own)


def test_a_group_of_several_dtypes_is_one_vector():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float16, torch.float64, torch.bfloat16)]
    for p in params:
        p.grad = torch.tensor([1.0, -2.0, 0.5], dtype=p.dtype)
    opt = Spy(params)
    AGR(opt, scope="group")
    opt.step()
    for a, b in zip(opt.seen[0], over_group([p.grad for p in params]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="scope must be one of 'tensor', 'group'"):
        AGR(Spy(params), scope="all")


def test_complex_gradients_are_pairs_of_reals():
    w = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    g = torch.randn(3, 2, dtype=torch.complex64)
    w.grad = g.clone()
    opt = Spy([w])
    AGR(opt)
    opt.step()
    torch.testing.assert_close(torch.view_as_real(opt.seen[0][0]), regularized(torch.view_as_real(g)))
    assert torch.equal(w.grad, g)


def test_a_stand_in_lies_in_memory_as_its_gradient_does():
    """torch's fused steps on a CPU read both by one stride."""
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(3, 4, 5, 2).to(memory_format=memory_format))
        opt = torch.optim.Adam([w], lr=0.1, fused=True)
        AGR(opt)
        for _ in range(3):
            w.grad = torch.randn(3, 4, 5, 2).to(memory_format=memory_format)
            opt.step()
        ends.append(w.detach().contiguous())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_makes_the_gradients(by_keyword):
    """As Lightning and skorch do it: stale gradients lie there when the step is called."""
    params, _ = build("SGD", torch.float32)
    stale, *fresh = gradients(params, 3)
    opt = Spy(params)
    AGR(opt)
    give(params, stale)
    calls = []

    def closure():
        if calls:  # the optimizer multiplied what it read, not these
            assert same([p.grad for p in params], fresh[0])
        opt.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params, fresh[len(calls)], strict=True))
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    assert (opt.step(closure=closure) if by_keyword else opt.step(closure)) == calls[1]
    for seen, made in zip(opt.seen, fresh, strict=True):
        for a, g in zip(seen, made, strict=True):
            torch.testing.assert_close(a, regularized(g))
    assert same([p.grad for p in params], fresh[1])


def test_gradients_go_on_accumulating():
    w = torch.nn.Parameter(torch.ones(3))
    x = torch.tensor([1.0, 2.0, 3.0])
    opt = Spy([w])
    AGR(opt)
    for i in (1, 2):
        (w * x).sum().backward()
        opt.step()
        assert torch.equal(w.grad, i * x)
        torch.testing.assert_close(opt.seen[-1][0], regularized(i * x))


@pytest.mark.parametrize("then", ["step", "detach", "zeroed", "replaced"])
def test_after_a_step_that_raised(then):
    w = torch.nn.Parameter(torch.ones(3))
    g = torch.tensor([1.0, 2.0, 3.0])
    w.grad = g
    opt = torch.optim.SGD([w], lr=1.0)
    agr = AGR(opt)

    def fails(*_):
        raise ArithmeticError

    handle = opt.register_step_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        opt.step()
    handle.remove()
    if then == "step":
        opt.step()
        assert w.grad is g
        torch.testing.assert_close(w.detach(), 1 - regularized(g))
    elif then == "detach":
        agr.detach()
        assert w.grad is g
    elif then == "zeroed":  # in place: the old gradient must not come back
        opt.zero_grad(set_to_none=False)
        opt.step()
        assert torch.equal(w.detach(), torch.ones(3))
    else:
        w.grad = new = torch.tensor([0.0, 1.0, 1.0])
        opt.step()
        assert w.grad is new
        torch.testing.assert_close(w.detach(), 1 - regularized(new))
    assert torch.equal(g, torch.tensor([1.0, 2.0, 3.0]))


def test_a_closure_that_raises_leaves_the_gradients_as_it_left_them():
    w = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([w], lr=1.0)
    AGR(opt)
    left = torch.tensor([1.0, 2.0, 3.0])

    def closure():
        w.grad = left
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        opt.step(closure)
    assert w.grad is left
    opt.step()
    torch.testing.assert_close(w.detach(), 1 - regularized(left))


def test_the_middle_of_a_line_search_that_raises():
    w = torch.nn.Parameter(torch.ones(3))
    opt = Spy([w], raises=True)
    agr = AGR(opt)
    g = torch.tensor([1.0, 2.0, 3.0])

    def closure():
        w.grad = g

    with pytest.raises(ArithmeticError):
        opt.step(closure)
    opt.raises = False
    opt.step(closure)
    assert w.grad is g
    agr.detach()
    assert torch.equal(g, torch.tensor([1.0, 2.0, 3.0]))


def test_frozen_parameters_are_passed_over():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = Spy([a, b])
    AGR(opt)
    a.grad = torch.tensor([1.0, 2.0, 3.0])
    opt.step()
    assert b.grad is None
    assert opt.seen[0][1] is None
    with torch.inference_mode():
        opt.step()
    assert torch.equal(a.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert same(copies([a]), [torch.ones(3)])

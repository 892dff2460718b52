"""A fused step touches the memory that its tensors have at that moment, whatever was done to them since the last one.

Each test does to a fused, a foreach and a for-loop optimizer what trainers do to parameters, gradients and state, and
compares weights and state step by step. What eager operations refuse is to be refused before anything is written.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import normopt
from normopt.kernels import fused
from tests.versions import NEEDS_GRAD_DTYPE, NEEDS_TRITON

BUFFER, COMPENSATION = "momentum_buffer", "kahan_compensation"

RULES = {
    "SGD": dict(norm="l2", momentum=0.9),
    "Lion": dict(norm="linf", scale="unit", momentum=0.9, momentum_rule="lion"),
    "LPSGDM": dict(norm="lp", p=3.0, scale="power", momentum=0.9, momentum_rule="ema"),
    "dual": dict(norm="lp", p=2.7, scale="dual", momentum=0.9, agr=True, weight_decay=1e-2, decay="lp", decay_p=0.8),
}


class Trio:
    """The same parameters three times, stepped fused, by foreach and by the for-loop; the same is done to all."""

    bits = 2e-6  # relative; the power of a momentum near 0 has more of it

    def __init__(self, shapes=((7, 5), (40,), (3, 11)), dtype=torch.float32, **rule):
        torch.manual_seed(0)
        drawn = [torch.randn(s).to(dtype) for s in shapes]
        how = ({"fused": True}, {"foreach": True}, {"foreach": False})
        self.params = [[torch.nn.Parameter(x.clone()) for x in drawn] for _ in how]
        self.opts = [normopt.SteepestDescent(p, lr=1e-2, **h, **rule) for p, h in zip(self.params, how, strict=True)]

    def each(self, change):
        """``change(params, opt)`` on all."""
        for params, opt in zip(self.params, self.opts, strict=True):
            change(params, opt)

    def gradients(self, missing=()):
        for i, same in enumerate(zip(*self.params, strict=True)):
            g = torch.randn_like(same[0])
            for p in same:
                p.grad = None if i in missing else g.clone()

    def step(self, missing=()):
        self.gradients(missing)
        self.step_with_these()

    def step_with_these(self):
        """Step, compare, and let all start from the for-loop's weights: free runs part at signs and powers."""
        before = [q.detach().clone() for q in self.params[-1]]
        for opt in self.opts:
            opt.step()
        for params, opt in zip(self.params[:-1], self.opts[:-1], strict=True):
            self.compare(params, opt, before)
            for p, q in zip(params, self.params[-1], strict=True):
                with torch.no_grad():
                    p.copy_(q)
                for key, value in self.opts[-1].state.get(q, {}).items():
                    opt.state[p][key].copy_(value)

    def compare(self, params, opt, before):
        for p, q, w in zip(params, self.params[-1], before, strict=True):
            bits = 1e-2 if p.dtype == torch.bfloat16 else self.bits
            size = torch.maximum(w.abs(), q.abs())  # a unit in the last place of the larger
            size = torch.maximum(size, (q - w).abs().max()) if q.numel() else size
            assert ((p - q).abs() <= bits * size).all()
            ours, theirs = opt.state.get(p, {}), self.opts[-1].state.get(q, {})
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert ours[key].shape == p.shape
                torch.testing.assert_close(ours[key], theirs[key], rtol=bits, atol=bits)

    def refuse(self, match):
        """All refuse the step, and nothing is written."""
        for params, opt in zip(self.params, self.opts, strict=True):
            kept = [p.detach().clone() for p in params], [s[BUFFER].clone() for s in opt.state.values()]
            versions = [p._version for p in params]
            with pytest.raises(RuntimeError, match=match):
                opt.step()
            now = [p.detach() for p in params], [s[BUFFER] for s in opt.state.values()]
            for old, new in zip(kept, now, strict=True):
                assert all(map(torch.equal, old, new))
            assert versions == [p._version for p in params]


def rules(f):
    return pytest.mark.parametrize("name", RULES)(f)


@rules
def test_state_moved_away_and_back(name):
    trio = Trio(**RULES[name])

    def move(params, opt):
        states = [s[BUFFER] for s in opt.state.values()]
        away = [x.data.clone() for x in states]
        for x in states:
            x.data = torch.empty(0)
        gc.collect()
        keep = [torch.full((64,), float("nan")) for _ in range(50)]  # what was freed becomes others'
        for x, y in zip(states, away, strict=True):
            x.data = y.clone()
        del keep

    for _ in range(3):
        trio.step()
        trio.each(move)
    trio.step()


@rules
def test_parameters_cut_with_their_state(name):
    """A vocabulary of 50 rows is cut to 3 after a step."""
    trio = Trio(((50, 8), (6,)), **RULES[name])
    trio.step()

    def cut(params, opt):
        params[0].data = params[0].data[:3]
        opt.state[params[0]][BUFFER].data = opt.state[params[0]][BUFFER].data[:3]

    trio.each(cut)
    trio.step()
    trio.step()


CHANGES = {
    "cut": lambda x: x[:3],
    "cut and moved": lambda x: x[:3].clone(),
    "transposed": lambda x: x.t(),
    "transposed and moved": lambda x: x.t().contiguous(),
    "flattened": lambda x: x.view(-1),
    "reshaped": lambda x: x.view(5, 7),
    "grown": lambda x: torch.cat([x, x]),
    "one more dim": lambda x: x[None],
}


@rules
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_of_another_shape_than_their_state(name, change):
    trio = Trio(((7, 5), (40,)), **RULES[name])
    trio.step()
    trio.gradients()

    def do(params, opt):
        params[0].data = CHANGES[change](params[0].data)

    trio.each(do)
    trio.refuse("gradient of a parameter")
    trio.gradients()
    trio.refuse(f"{BUFFER} of a parameter")


@rules
def test_a_square_transposed_in_place(name):
    """Same address, shape and size; other strides."""
    trio = Trio(((6, 6), (40,)), **RULES[name])
    trio.step()
    trio.each(lambda params, opt: setattr(params[0], "data", params[0].data.t()))
    trio.step()
    trio.each(lambda params, opt: setattr(opt.state[params[0]][BUFFER], "data", opt.state[params[0]][BUFFER].data.t()))
    trio.step()


@rules
def test_storages_swapped_between_steps(name):
    trio = Trio(**RULES[name])
    for _ in range(3):
        trio.step()
        trio.each(lambda params, opt: [setattr(p, "data", p.data.clone()) for p in params])
        gc.collect()


@pytest.mark.parametrize("which", ["parameter", "gradient", BUFFER])
@pytest.mark.parametrize("left", [0, 1, 34])
def test_a_storage_that_was_freed_or_shrunk_is_refused(which, left):
    """35 entries are needed. Eager operations would read past the end, so that only the fused step is asked."""
    trio = Trio(((7, 5), (40,)), **RULES["SGD"])
    trio.step()
    trio.gradients()
    params, opt = trio.params[0], trio.opts[0]
    x = {"parameter": params[0].data, "gradient": params[0].grad, BUFFER: opt.state[params[0]][BUFFER]}[which]
    x.untyped_storage().resize_(4 * left)
    other, momentum = params[1].detach().clone(), opt.state[params[1]][BUFFER].clone()
    with pytest.raises(RuntimeError, match=rf"{which} of shape \(7, 5\) on cpu has no memory of its own"):
        opt.step()
    assert torch.equal(params[1], other)
    assert torch.equal(opt.state[params[1]][BUFFER], momentum)
    x.untyped_storage().resize_(4 * 35)
    with torch.no_grad():
        x.zero_()
    opt.step()


def test_a_storage_shrunk_under_a_tensor_that_keeps_its_address():
    """The tensor lies in a larger storage, of which only the end is taken away: FSDP and caches do so."""
    whole = torch.randn(100)
    p = torch.nn.Parameter(whole[20:60])
    opt = normopt.SGD([p], lr=0.1, momentum=0.9, fused=True)
    p.grad = torch.ones(40)
    opt.step()
    whole.untyped_storage().resize_(4 * 59)
    with pytest.raises(RuntimeError, match="has no memory of its own"):
        opt.step()


@NEEDS_GRAD_DTYPE
@pytest.mark.parametrize(("fused", "scope"), [(True, "tensor"), (False, "tensor"), (False, "group")])
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_other_dtypes_than_their_parameters(fused, scope, gradient, dtype):
    torch.manual_seed(0)
    values = [torch.randn(33).to(dtype) for _ in range(3)]
    grads = [torch.randn(33).to(d) for d in (dtype, gradient, gradient)]
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    for params in (ours, theirs):
        for p, g in zip(params, grads, strict=True):
            p.grad_dtype = None
            p.grad = g.clone()
    rule = dict(lr=0.1, norm="lp", p=2.7, scale="unit", scope=scope)
    for _ in range(2):
        normopt.SteepestDescent(ours, fused=fused, foreach=None if fused else True, **rule).step()
        for q in theirs:  # as float32, which holds all of them but the float64, which is rounded to it
            q.grad = q.grad.float()
        with torch.no_grad():
            wide = [torch.nn.Parameter(q.detach().double()) for q in theirs]
            for w, q in zip(wide, theirs, strict=True):
                w.grad = q.grad.double()
            normopt.SteepestDescent(wide, foreach=False, **rule).step()
            for q, w in zip(theirs, wide, strict=True):
                q.copy_(w)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=8e-3 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)
            with torch.no_grad():
                p.copy_(q)


@NEEDS_GRAD_DTYPE
def test_the_dtype_of_one_gradient_changes_between_steps():
    trio = Trio(**RULES["SGD"])
    trio.step()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        trio.gradients()

        def change(params, opt, dtype=dtype):
            params[1].grad_dtype = None
            params[1].grad = params[1].grad.to(dtype)

        trio.each(change)
        trio.step_with_these()


@rules
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("empty", [(0,), (0, 3)])
def test_an_empty_parameter_and_a_step_without_the_other_gradients(name, empty, place):
    shapes = [(7, 5), (40,)]
    shapes.insert(place, empty)
    trio = Trio(shapes, **RULES[name])
    for missing in ((), {0, 1, 2} - {place}, (), {place}, {0, 1, 2}, ()):
        trio.step(missing)


@rules
def test_gradients_come_and_go(name):
    trio = Trio(**RULES[name])
    for missing in ((0,), (1,), (), (0, 1), (2,), (), ()):
        trio.step(missing)


@rules
def test_a_second_backward_after_a_step_raises(name):
    """The graph has kept a weight that the step has changed: eager operations and kernels must both say so."""
    for how in ({"fused": True}, {"foreach": False}):
        p = torch.nn.Parameter(torch.randn(4, 4))
        opt = normopt.SteepestDescent([p], lr=0.1, **how, **RULES[name])
        loss = (p * p).sum()
        loss.backward(retain_graph=True)
        for _ in range(2):
            opt.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
            loss = (p * p).sum()
            loss.backward(retain_graph=True)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_versions_of_weights_and_state_are_bumped(rounding):
    p = torch.nn.Parameter(torch.randn(9).bfloat16())
    opt = normopt.SGD([p], lr=0.1, momentum=0.9, rounding=rounding, fused=True)
    for _ in range(3):
        p.grad = torch.randn(9).bfloat16()
        kept = [p, *opt.state.get(p, {}).values()]
        versions = [x._version for x in kept]
        gradient = p.grad._version
        opt.step()
        assert all(x._version > v for x, v in zip(kept, versions, strict=True))
        assert p.grad._version == gradient
    assert (COMPENSATION in opt.state[p]) == (rounding == "kahan")


def test_a_gradient_with_its_negative_bit_set():
    for how in ({"fused": True}, {"foreach": False}, {"foreach": True}):
        p = torch.nn.Parameter(torch.zeros(5))
        opt = normopt.SGD([p], lr=1.0, **how)
        for sign in (1, -1, 1):
            p.grad = torch._neg_view(torch.full((5,), -float(sign)))
            before = p.detach().clone()
            opt.step()
            assert torch.equal(p, before - sign)


def test_the_dtype_of_state_changed_by_data():
    trio = Trio(**RULES["SGD"])
    trio.step()

    def to(params, opt, dtype=torch.bfloat16):
        for s in opt.state.values():
            s[BUFFER].data = s[BUFFER].data.to(dtype)

    trio.each(to)
    trio.gradients()
    trio.step_with_these()
    for opt in trio.opts:
        assert {s[BUFFER].dtype for s in opt.state.values()} == {torch.float32}


def test_parameters_of_a_group_put_in_another_order():
    trio = Trio(((40,), (40,), (40,)), **RULES["SGD"])
    trio.step()
    trio.each(lambda params, opt: opt.param_groups[0]["params"].reverse())
    trio.step()
    trio.step()


def test_a_states_key_that_is_no_parameter():
    """As many entries as parameters, but one of them is a trainer's own."""
    trio = Trio(((40,), (40,)), **RULES["SGD"])
    trio.step()
    trio.step()

    def change(params, opt):
        opt.state["global_step"] = 7
        del opt.state[params[1]]

    trio.each(change)
    trio.step()
    trio.step()


@rules
def test_states_exchanged_between_parameters(name):
    trio = Trio(((40,), (40,)), **RULES[name])
    trio.step()
    trio.step()

    def exchange(params, opt):
        first, second = (opt.state.pop(p) for p in params)
        opt.state[params[1]] = first
        opt.state[params[0]] = second

    trio.each(exchange)
    trio.step()


def test_a_gradient_in_the_state_that_the_step_before_has_made():
    """The momentum is written before the gradient, which lies in it, is read."""
    trio = Trio(((40,), (40,)), **RULES["SGD"])
    trio.step()
    trio.gradients()
    for (p, q), opt in zip(trio.params, trio.opts, strict=True):
        momentum = opt.state[p][BUFFER]
        q.grad = momentum.view(40) if opt is trio.opts[0] else momentum.clone()  # only a fused step copies it itself
    trio.step_with_these()


def test_nothing_of_the_users_is_kept_alive():
    """Gradients that are set to None, state that is cleared and groups that are taken away are free at once."""
    params = [torch.nn.Parameter(torch.randn(40)) for _ in range(2)]
    opt = normopt.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9, fused=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(40)
        opt.step()
    gone = [weakref.ref(x) for p in params for x in (p.grad, opt.state[p][BUFFER])] + [weakref.ref(params[1])]
    opt.zero_grad()
    opt.state.clear()
    opt.param_groups.pop()
    del params[1], p
    params[0].grad = torch.randn(40)
    opt.step()
    gc.collect()
    assert [x() for x in gone] == [None] * 5


@pytest.mark.parametrize("which", ["parameter", BUFFER])
def test_what_cannot_be_written_entry_by_entry_is_refused(which):
    for change in (lambda x: x[:1].expand(40), lambda x: torch._neg_view(x)):
        trio = Trio(((7, 5), (40,)), **RULES["SGD"])
        trio.step()
        trio.gradients()

        def put(params, opt, change=change):
            x = params[1] if which == "parameter" else opt.state[params[1]][BUFFER]
            x.data = change(x.data)

        trio.each(put)
        trio.refuse(f"{which} of shape .* cannot be written entry by entry")


def test_what_was_made_in_inference_mode_is_written_there_alone():
    trio = Trio(**RULES["SGD"])
    for _ in range(2):
        with torch.inference_mode():
            trio.step()
        trio.gradients()
        for params, opt in zip(trio.params, trio.opts, strict=True):
            before = [p.detach().clone() for p in params]
            with pytest.raises(RuntimeError, match=r"momentum_buffer of shape .* was made in inference mode"):
                opt.step()
            assert all(map(torch.equal, before, params))
    trio.each(lambda _, opt: [own.update({BUFFER: own[BUFFER].clone()}) for own in opt.state.values()])
    trio.step()
    with torch.inference_mode():
        made = torch.ones(3)
    trio.each(lambda _, opt: opt.add_param_group({"params": made.clone().requires_grad_()}))
    for params, opt in zip(trio.params, trio.opts, strict=True):
        (opt.param_groups[1]["params"][0],) = (made,)
        made.grad = torch.ones(3)
        before = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match=r"parameter of shape .* was made in inference mode"):
            opt.step()
        assert all(map(torch.equal, before, params))
        assert made.sum() == 3


SHARED = {
    "the same": lambda x: [x[:300_000], x[:300_000]],
    "in part": lambda x: [x[:300_000], x[100_000:]],
    "three": lambda x: [x[:200_000], x[300_000:], x[100_000:350_000]],
    "one of another shape": lambda x: [x[:300_000].view(3, -1), x[299_999:].view(-1)],
    "turn and turn about": lambda x: [x.view(-1, 2)[:, 0], x.view(-1, 2)[:, 1]],
}


@rules
@pytest.mark.parametrize("part", SHARED)
def test_parameters_that_share_memory_are_stepped_one_after_the_other(name, part):
    """As by the for-loop. foreach reads all of them before it writes one."""
    trio = Trio([(400_000,), (7, 5)], **RULES[name])
    trio.bits = 3e-5
    del trio.params[1], trio.opts[1]
    trio.step()

    def share(params, opt):
        views = [torch.nn.Parameter(x) for x in SHARED[part](params[0].data)]
        opt.state.clear()
        params[:] = [*views, params[1]]
        opt.param_groups[0]["params"] = list(params)

    def look(params, opt):
        assert len({p.untyped_storage().data_ptr() for p in params}) == 2

    trio.each(share)
    for _ in range(3):
        trio.step_with_these()
        trio.each(look)
        trio.gradients()


def test_a_state_in_the_memory_of_another():
    trio = Trio([(300_000,), (300_000,)], **RULES["SGD"])
    del trio.params[1], trio.opts[1]
    trio.step()
    trio.each(lambda params, opt: opt.state[params[1]].update({BUFFER: opt.state[params[0]][BUFFER]}))
    trio.step()
    trio.step()
    params, opt = trio.params[0], trio.opts[0]
    opt.state[params[0]][BUFFER] = params[0].detach()
    with pytest.raises(RuntimeError, match="share memory"):
        opt.step()


@rules
@pytest.mark.parametrize("more", [0, fused.FEW])
def test_a_gradient_in_memory_that_is_written(name, more, monkeypatch):
    """Its entries are those from before the step; eager operations that would read some later refuse them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # tensors are stepped one after the other
    torch.manual_seed(0)
    x, y = torch.randn(400_000), torch.randn(400_000)
    found = []
    for how in (dict(fused=True), dict(foreach=False)):
        own, theirs = x.clone(), y.clone()
        a, b, c = (torch.nn.Parameter(v) for v in (own[:300_000], own[300_000:], theirs))
        others = [torch.nn.Parameter(torch.ones(5)) for _ in range(more)]
        opt = normopt.SteepestDescent([c, a, b, *others], lr=0.1, **how, **RULES[name])
        apart = torch.linspace(-1, 1, 400_000)[:300_000]  # in as large a storage, as `theirs` has
        for where in (own[100_000:], apart, theirs[:300_000], apart, apart.flip(0), own[:300_000], own[1:300_001]):
            a.grad = where if "fused" in how else where.clone()
            for p in (b, c, *others):
                p.grad = torch.ones_like(p)
            opt.step()
        found.append(torch.cat([own, theirs]))
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-5 * max(1.0, float(found[1].abs().max())))


def test_steps_go_back_to_one_batch_when_memory_is_shared_no_longer():
    trio = Trio([(40,), (40,)], **RULES["SGD"])
    trio.each(lambda params, _: setattr(params[1], "data", params[0].data))
    trio.step()
    assert len(trio.opts[0]._updates[0]) == 2
    trio.each(lambda params, _: setattr(params[1], "data", params[0].data.clone()))
    trio.step()
    trio.step()
    assert len(trio.opts[0]._updates[0]) == 1


@NEEDS_GRAD_DTYPE
def test_a_complex_gradient_of_a_real_parameter_is_refused():
    p = torch.nn.Parameter(torch.ones(5))
    p.grad_dtype = None
    p.grad = torch.ones(5, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="a gradient is complex"):
        normopt.SGD([p], lr=0.1, fused=True).step()


def test_a_gradient_that_a_collective_is_still_bringing():
    """A wrapper subclass: it has an address only by its offset, and no memory."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    for how in ({"fused": True}, {"foreach": False}):
        p = torch.nn.Parameter(torch.zeros(6))
        opt = normopt.SGD([p], lr=1.0, **how)
        for begin in (6, 0, 6):
            p.grad = torch.ones(6)
            opt.step()
            p.grad = AsyncCollectiveTensor(torch.ones(12)[begin : begin + 6])
            opt.step()
        assert torch.equal(p, torch.full((6,), -6.0))


class Handled(RuleBasedStateMachine):
    """Random things that trainers do, between steps, on every backend."""

    @initialize(name=st.sampled_from(list(RULES)), bf16=st.booleans(), seed=st.integers(0, 2**16))
    def begin(self, name, bf16, seed):
        self.trio = Trio(((7, 5), (40,), (6, 6), (0, 3)), torch.bfloat16 if bf16 else torch.float32, **RULES[name])
        self.name = name
        torch.manual_seed(seed)

    def both(self, change):
        self.trio.each(change)

    @rule(missing=st.sets(st.integers(0, 3)))
    def step(self, missing):
        self.trio.step(missing)

    @rule()
    def steps(self):
        self.trio.step()
        self.trio.step()

    @rule(i=st.integers(0, 2))
    def offload(self, i):
        def move(params, opt):
            for x in (params[i], *opt.state.get(params[i], {}).values()):
                away = x.data.clone()
                x.data = torch.empty(0, dtype=x.dtype)
                x.data = away.clone()

        self.both(move)

    @rule(i=st.integers(0, 2))
    def cut(self, i):
        def do(params, opt):
            if params[i].dim() and params[i].shape[0] > 1:
                k = params[i].shape[0] - 1
                for x in (params[i], *opt.state.get(params[i], {}).values()):
                    x.data = x.data[:k]
                params[i].grad = None

        self.both(do)

    @rule(i=st.integers(0, 2), moved=st.booleans())
    def transpose(self, i, moved):
        def do(params, opt):
            if params[i].dim() == 2:
                for x in (params[i], *opt.state.get(params[i], {}).values()):
                    x.data = x.data.t().contiguous() if moved else x.data.t()
                params[i].grad = None

        self.both(do)

    @rule(i=st.integers(0, 2))
    def flatten_the_parameter_alone(self, i):
        trio = self.trio
        if all(
            params[i].dim() == 2 and params[i] in opt.state for params, opt in zip(trio.params, trio.opts, strict=True)
        ):
            self.both(lambda params, opt: setattr(params[i], "data", params[i].data.reshape(-1)))
            trio.gradients()
            trio.refuse(f"{BUFFER} of a parameter")
            self.both(lambda params, opt: opt.state.pop(params[i]))

    @rule(i=st.integers(0, 2))
    def swap_the_state(self, i):
        def do(params, opt):
            if params[i] in opt.state:
                opt.state[params[i]][BUFFER] = opt.state[params[i]][BUFFER].clone()

        self.both(do)

    @rule(i=st.integers(0, 2))
    def lose_the_state(self, i):
        self.both(lambda params, opt: opt.state.pop(params[i], None))

    @rule()
    def change_the_dtype(self):
        def do(params, opt):
            for p in params:
                p.data = p.data.to(torch.float32 if p.dtype == torch.bfloat16 else torch.bfloat16)
                p.grad = None
                # Kernels round the state before the step, eager operations after it: signs would part.
                for x in opt.state.get(p, {}).values():
                    x.copy_(x.bfloat16())

        self.both(do)

    @precondition(lambda self: hasattr(torch.Tensor, "grad_dtype"))
    @rule(i=st.integers(0, 2), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    def let_a_gradient_be_of_another_dtype(self, i, dtype):
        self.trio.gradients()

        def do(params, opt):
            params[i].grad_dtype = None
            params[i].grad = params[i].grad.to(dtype)

        self.both(do)
        self.trio.step_with_these()

    @rule(i=st.integers(0, 2), j=st.integers(0, 2), buffer=st.booleans())
    def let_a_gradient_be_in_memory_that_is_written(self, i, j, buffer):
        """Eager steps, which read some entries too late, get a copy of it."""
        self.trio.gradients()
        params, opt = self.trio.params[0], self.trio.opts[0]
        where = opt.state.get(params[j], {}).get(BUFFER) if buffer else params[j].data
        if where is None or where.numel() < params[i].numel() or where.dtype != params[i].dtype:
            return
        for same in self.trio.params:
            same[i].grad = where.reshape(-1)[: params[i].numel()].reshape(params[i].shape).clone()
        params[i].grad = where.reshape(-1)[: params[i].numel()].reshape(params[i].shape)
        self.trio.step_with_these()

    @rule(lr=st.sampled_from([1e-2, 1e-3, 0.0]))
    def schedule(self, lr):
        for opt in self.trio.opts:
            for group in opt.param_groups:
                group["lr"] = lr

    @rule(i=st.integers(0, 2))
    def freeze(self, i):
        def do(params, opt):
            params[i].requires_grad_(not params[i].requires_grad)

        self.both(do)

    @precondition(lambda self: len(self.trio.opts[0].param_groups) < 3)
    @rule()
    def add_a_group(self):
        drawn = torch.randn(9, 4).to(self.trio.params[0][0].dtype)

        def do(params, opt):
            params.append(torch.nn.Parameter(drawn.clone()))
            opt.add_param_group({"params": [params[-1]]})

        self.both(do)

    @rule()
    def save_and_load(self):
        for opt in self.trio.opts:
            opt.load_state_dict(opt.state_dict())


TestHandled = Handled.TestCase
TestHandled.settings = settings(
    max_examples=int(os.environ["NORMOPT_FUZZ"]),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def pytest_generate_tests(metafunc):
    """With --all, the combinations are in parts, which several workers can share; without, a few of them are tried."""
    if "one_of" in metafunc.fixturenames:
        parts = [(i, 16) for i in range(16)] if metafunc.config.getoption("--all") else [(0, 40)]
        metafunc.parametrize("one_of", parts, ids=lambda part: "{} of {}".format(*part))


def guard_pages(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.guard_pages", *map(str, arguments)]
    root = Path(__file__).parents[2]
    given = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))} | environment
    done = subprocess.run(command, env=given, capture_output=True, text=True, cwd=root)
    return done.returncode, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_numba_kernels_between_guard_pages(one_of):
    """Every pair of settings, sizes round every length of a vector and of a chunk, one and two threads."""
    code, said = guard_pages("numba", *one_of)
    assert code == 0, said


@NEEDS_TRITON
def test_triton_kernels_between_guard_pages(one_of):
    pytest.importorskip("triton", reason="triton is for Linux")
    if torch.cuda.is_available():
        pytest.skip("guard pages are in the memory of the host")
    code, said = guard_pages("triton", *one_of, TRITON_INTERPRET="1")
    assert code == 0, said


def test_guard_pages_end_a_kernel_that_reads_one_entry_too_far():
    code, said = guard_pages("overrun")
    assert code == -signal.SIGSEGV, said


@pytest.mark.parametrize("guards", ["torch's", "none"])
def test_what_has_not_changed_is_not_looked_at_closely(guards, monkeypatch):
    """Between steps lr, p and the gradients change, as in training; without torch's guards, all is looked at."""
    if guards == "none":
        monkeypatch.setattr(fused, "TensorGuards", None)
    torch.manual_seed(0)
    pairs = [[torch.nn.Parameter(x.clone()) for _ in range(2)] for x in map(torch.randn, [(3, 4), (7,), (5, 2)])]
    settings = dict(norm="lp", p=2.7, momentum=0.9, agr=True, weight_decay=0.1, decay="lp")
    settings |= dict(metric="diagonal", bias_correction=True, momentum_rule="ema")
    opts = [normopt.SteepestDescent([pair[i] for pair in pairs], fused=not i, **settings) for i in range(2)]
    seen = []
    look = fused.Operand.look
    monkeypatch.setattr(fused.Operand, "look", lambda self, tensors: (seen.append(self.name), look(self, tensors)))
    kept = []
    for step in range(5):
        for opt in opts:
            opt.param_groups[0] |= dict(lr=0.01 * (1 + step), p=2.7 + 0.01 * step)
        for pair in pairs:
            g = torch.randn_like(pair[0])
            kept.append([p.grad for p in pair])  # so that no memory is used again
            pair[0].grad, pair[1].grad = g, g.clone()
        for opt in opts:
            opt.step()
        if step == 0:
            seen.clear()
        for fast, plain in pairs:
            torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert bool(seen) == (guards == "none")

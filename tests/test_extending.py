"""A momentum rule, a decay and a stage with state that are added here: right, or refused by name, on every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normopt
from normopt._checks import check_bool
from normopt.kernels import support
from normopt.stages import (
    Batch,
    Coefficients,
    Decay,
    Momentum,
    Op,
    Slot,
    Stage,
    register_decay,
    register_momentum,
    register_stage,
    setting,
)
from normopt.stages.base import number
from normopt.stages.decay import Rule, descend_, factor, scale_

SHAPES = [(13, 7), (40,), (1,), (4099,)]
BACKENDS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


pytestmark = pytest.mark.usefixtures("registries")


def steps(n: int = 4, **settings: Any) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[list[np.ndarray]]]:
    """The first weights, the gradients of each step and the weights after each."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    first = [p.detach().double().numpy() for p in params]
    opt = normopt.SteepestDescent(params, **settings)
    gradients, weights = [], []
    for _ in range(n):
        for p in params:
            p.grad = torch.randn_like(p)
        gradients.append([p.grad.double().numpy() for p in params if p.grad is not None])
        opt.step()
        weights.append([p.detach().double().numpy() for p in params])
    return first, gradients, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_momentum_rule(backend: str) -> None:
    """Quasi-hyperbolic momentum, arXiv:1810.06801: c = (1 − ν)g + νm, m an average, ν here beta2."""
    if backend == "fused":
        pytest.importorskip("numba")

    @register_momentum("qhm")
    def qhm(s: Momentum) -> Coefficients:
        return Coefficients(s.momentum, 1 - s.momentum, e=1 - s.beta2, f=s.beta2)

    for scale, p in (("power", 2.0), ("dual", 2.7)):
        settings = dict(lr=0.1, norm="lp", p=p, scale=scale, momentum=0.9, beta2=0.7, momentum_rule="qhm")
        w, gradients, found = steps(**settings, **BACKENDS[backend])
        m = [np.zeros_like(x) for x in w]
        for g, after in zip(gradients, found, strict=True):
            m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
            c = [0.3 * b + 0.7 * a for a, b in zip(m, g, strict=True)]
            q = p / (p - 1)
            norms = [1.0 if scale == "power" else (np.abs(x) ** q).sum() ** (1 / q) for x in c]
            u = [n * np.sign(x) * (np.abs(x) / n) ** (q - 1) for x, n in zip(c, norms, strict=True)]
            w = [a - 0.1 * b for a, b in zip(w, u, strict=True)]
            for ours, theirs in zip(after, w, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_with_a_kernel(backend: str) -> None:
    """The proximal step of ‖w‖²λ/2, on tensors of all shapes: w ← (w − ηu)/(1 + ηλ)."""
    if backend == "fused":
        pytest.importorskip("numba")

    @register_decay("shrink")
    class Proximal(Rule):
        def update(self, batch: Batch, s: Decay) -> None:
            descend_(batch.w, batch.u, batch.step_size)
            shrink = 1 / (1 + batch.lr * batch.weight_decay)
            scale_(batch.w, [torch.as_tensor(shrink, dtype=x.dtype) for x in batch.w])

        def lower(self, lr: float | Tensor, s: Decay) -> Op:
            return factor(0.0, lr * s.weight_decay, inverse=True, wide=False)

    w, gradients, found = steps(lr=0.1, momentum=0, weight_decay=0.5, decay="shrink", **BACKENDS[backend])
    for g, after in zip(gradients, found, strict=True):
        w = [(a - 0.1 * b) / 1.05 for a, b in zip(w, g, strict=True)]
        for ours, theirs in zip(after, w, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_a_decay_without_a_kernel_is_refused_when_fused() -> None:
    @register_decay("nothing")
    class Nothing(Rule):
        """One that does nothing."""

    settings: dict[str, Any] = dict(lr=0.1, weight_decay=0.5, decay="nothing")
    for backend in ("for-loop", "foreach"):
        steps(**settings, **BACKENDS[backend])
    with pytest.raises(ValueError, match="fused=True is not available here: the decay Nothing has no kernel"):
        steps(**settings, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_with_state(dtype: torch.dtype) -> None:
    """Weights that are averaged as they go: state in float32, made, saved, loaded, checked and cast by the engine."""

    @register_stage
    @dataclass
    class Average(Stage):
        place = "weights"
        state = ("average",)

        keep: float = setting(0.0, number(low=0, high=1), "the weight of the old average; 0 keeps none")

        def runs(self) -> bool:
            return self.keep > 0

        def slots(self) -> tuple[Slot, ...]:
            return (Slot("average", "float32"),)

        def apply(self, batch: Batch, scalars: Tensor | None) -> None:
            (slot,) = self.slots()
            old = [x if a is None else a for a, x in zip(batch.read(slot), batch.w, strict=True)]
            batch.store(slot, torch._foreach_lerp(old, batch.w, 1 - self.keep))

    def make(**how: Any) -> tuple[list[torch.nn.Parameter], normopt.SteepestDescent]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
        return params, normopt.SteepestDescent(params, lr=0.1, momentum=0.9, keep=0.8, **how)

    def go(params: list[torch.nn.Parameter], opt: normopt.SteepestDescent, seed: int) -> None:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()

    runs = [make(foreach=how) for how in (False, True)]
    expected: list[Tensor] = []
    for seed in range(3):
        for params, opt in runs:
            go(params, opt, seed)
        for i, p in enumerate(runs[0][0]):
            now = p.detach().float().clone()
            expected[i:] = [now if seed == 0 else expected[i] + 0.2 * (now - expected[i]), *expected[i + 1 :]]
    for params, opt in runs:
        for p, e in zip(params, expected, strict=True):
            assert opt.state[p]["average"].dtype == torch.float32
            # What a 16-bit weight loses when it is rounded, the average does not see.
            torch.testing.assert_close(
                opt.state[p]["average"],
                e,
                rtol=2**-7 if dtype != torch.float32 else 1e-6,
                atol=1e-6 if dtype == torch.float32 else 2e-2,
            )

    params, opt = make()
    opt.load_state_dict(runs[0][1].state_dict())
    for ours, theirs in zip(opt.state.values(), runs[0][1].state.values(), strict=True):
        assert torch.equal(ours["average"], theirs["average"])
        assert ours["average"].dtype == torch.float32
    saved = runs[0][1].state_dict()
    saved["state"][0]["average"] = torch.zeros(3)
    with pytest.raises(ValueError, match="average of parameter 0 has the shape"):
        make()[1].load_state_dict(saved)
    opt.state[params[0]]["average"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="average of a parameter of shape"):
        go(params, opt, 5)
    with pytest.raises(ValueError, match="fused=True is not available here: the stage Average has no kernel"):
        make(fused=True)
    with pytest.raises(ValueError, match="keep must be in"):
        normopt.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, keep=2.0)  # type: ignore[call-arg]


def test_two_stages_cannot_have_one_setting() -> None:
    with pytest.raises(ValueError, match="Write has a setting 'lr' already"):

        @register_stage
        @dataclass
        class Other(Stage):
            lr: float = setting(0.1, number(), "another")


def test_a_stage_after_the_direction_still_reads_c() -> None:
    seen: list[Tensor] = []

    @register_stage
    @dataclass
    class Watch(Stage):
        place = "weights"
        watch: bool = setting(False, check_bool, "keep c")

        def runs(self) -> bool:
            return self.watch

        def apply(self, batch: Batch, scalars: Tensor | None) -> None:
            seen.append(batch.c[0].clone())

    p, m = torch.nn.Parameter(torch.zeros(5)), torch.zeros(5)
    opt = normopt.Lion([p], lr=0.1, momentum=0.9, watch=True, foreach=True)
    for _ in range(3):
        p.grad = torch.randn(5)
        opt.step()
        assert torch.equal(seen[-1], torch.lerp(m, p.grad, 1 - 0.9))
        m = opt.state[p]["momentum_buffer"].clone()


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_stage_before_the_direction_keeps_what_it_stores(foreach: bool, correction: bool) -> None:
    """Also where the direction could overwrite c: it may be the stage's own state."""

    @register_stage
    @dataclass
    class Keep(Stage):
        place = "momentum"
        state = ("kept",)
        keep_c: bool = setting(False, check_bool, "store c, and go on with what is stored")

        def runs(self) -> bool:
            return self.keep_c

        def slots(self) -> tuple[Slot, ...]:
            return (Slot("kept"),)

        def apply(self, batch: Batch, scalars: Tensor | None) -> None:
            (slot,) = self.slots()
            found = batch.read(slot)
            kept = [c if x is None else x.copy_(c) for x, c in zip(found, batch.c, strict=True)]
            batch.store(slot, kept)
            batch.c = kept

    p = torch.nn.Parameter(torch.zeros(3))
    rule = dict(momentum=0.9, momentum_rule="ema", bias_correction=True) if correction else dict(momentum=0.9)
    how = rule if correction else rule | dict(momentum_rule="lion")
    opt = normopt.SteepestDescent([p], lr=0.1, norm="linf", scale="unit", keep_c=True, foreach=foreach, **how)
    for _ in range(4):
        p.grad = torch.tensor([0.1, -0.2, 0.3])
        opt.step()
        kept = opt.state[p]["kept"]
        torch.testing.assert_close(kept / kept[0], torch.tensor([1.0, -2.0, 3.0]))


@pytest.mark.parametrize(
    ("coefficients", "works"), [(Coefficients(1.0, 1.0), True), (Coefficients(0.9, 0.1, d=1.0, f=0.0), False)]
)
def test_bias_correction_of_a_rule_of_ones_own(coefficients: Coefficients, works: bool) -> None:
    @register_momentum("own")
    def rule(s: Momentum) -> Coefficients:
        return coefficients

    p = torch.nn.Parameter(torch.zeros(3))
    how: dict[str, Any] = dict(lr=0.1, momentum=0.9, momentum_rule="own", bias_correction=True)
    if not works:
        with pytest.raises(ValueError, match="in the first step it is 0 under momentum_rule='own'"):
            normopt.SteepestDescent([p], **how)
        return
    opt = normopt.SteepestDescent([p], **how)
    for _ in range(3):
        p.grad = torch.ones(3)
        opt.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.3))  # the mean of equal gradients


def test_a_stage_needs_a_place_that_exists() -> None:
    with pytest.raises(ValueError, match="the place of Other must be one of"):

        @register_stage
        @dataclass
        class Other(Stage):
            place = "nowhere"  # type: ignore[assignment]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_registered_later_is_seen_by_optimizers_that_have_stepped(backend: str) -> None:
    if backend == "fused":
        pytest.importorskip("numba")

    def grow(weight: float) -> None:
        @register_momentum("growing")
        def rule(s: Momentum) -> Coefficients:
            return Coefficients(0.0, weight)

    grow(1.0)
    p = torch.nn.Parameter(torch.zeros(5))
    opt = normopt.SteepestDescent([p], lr=1.0, momentum=0.5, momentum_rule="growing", **BACKENDS[backend])
    p.grad = torch.ones(5)
    opt.step()
    grow(3.0)
    opt.step()
    assert torch.equal(p.detach(), torch.full((5,), -4.0))
    if backend == "fused":
        return

    @register_stage
    @dataclass
    class Clip(Stage):
        place = "gradient"
        clip: float = setting(0.0, number(low=0), "the largest entry of a gradient; 0 clips nothing")

        def runs(self) -> bool:
            return self.clip > 0

        def apply(self, batch: Batch, scalars: Tensor | None) -> None:
            batch.c = batch.g = list(torch._foreach_clamp_max(batch.g, self.clip))

    opt.step()
    opt.param_groups[0]["clip"] = 0.5
    opt.step()
    assert torch.equal(p.detach(), torch.full((5,), -8.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_step_of_its_own_with_the_old_momentum_in_c(backend: str) -> None:
    if backend == "fused":
        pytest.importorskip("numba")

    @register_momentum("first")
    def rule(s: Momentum) -> Coefficients:
        return Coefficients(0.5, 0.25, d=2.0, e=1.0, f=0.0, first=1.0)

    p = torch.nn.Parameter(torch.zeros(3))
    opt = normopt.SteepestDescent([p], lr=1.0, momentum=0.5, momentum_rule="first", **BACKENDS[backend])
    p.grad = torch.tensor([1.0, -2.0, 4.0])
    opt.step()  # c = g, m = g
    opt.step()  # c = 2g + g
    torch.testing.assert_close(p.detach(), -4 * p.grad)
    assert not opt._step_supports_amp_scaling


def test_a_norm_derived_from_lp_stays_itself_when_p_changes() -> None:
    @normopt.norms.register("half-lp")
    @dataclass(frozen=True, repr=False)
    class HalfLp(normopt.norms.Lp):
        def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
            return [0.5 * u for u in super().power(c, eps)]

    p = torch.nn.Parameter(torch.zeros(1))
    opt = normopt.SteepestDescent([p], lr=1.0, norm="half-lp", p=2.5, scale="power")
    p.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["p"] = 2.6
    opt.step()
    assert float(p.detach()) == -1.0


def test_names_and_slots_of_normopt_are_not_taken() -> None:
    with pytest.raises(ValueError, match="is one of normopt's own"):
        register_momentum("heavy")(lambda s: Coefficients(0.0, 1.0))
    with pytest.raises(ValueError, match="Momentum has a slot 'momentum_buffer' already"):

        @register_stage
        @dataclass
        class Other(Stage):
            state = ("momentum_buffer",)


@pytest.mark.parametrize("rule", ["heavy", "ema", "lion"])
def test_a_backend_is_a_module_with_a_step(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its row in the table of kernels."""
    row = support.KERNELS["cpu"]._replace(module="tests.kernels.numpy_backend", compiler="numpy")
    monkeypatch.setitem(support.KERNELS, "cpu", row)
    how = dict(lr=0.1, momentum=0.9, momentum_rule=rule, weight_decay=0.1)
    ours, expected = ([torch.nn.Parameter(torch.ones(s)) for s in SHAPES] for _ in range(2))
    opts = [normopt.SteepestDescent(ours, **how, fused=True), normopt.SteepestDescent(expected, **how, foreach=False)]
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(ours, expected, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert "on fused" in opts[0].backend()


def test_a_module_or_a_preset_in_the_wrong_place_is_sent_to_the_right_one():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"params is a Linear, a module: give model\.parameters\(\), or .*param_groups"):
        normopt.Muon(net)
    for name, wanted in (("muon-adamw", "Muon"), ("scion-mlp", "Scion"), ("modular", "Muon")):
        with pytest.raises(ValueError, match=rf"{name!r} is a preset of param_groups .* to normopt\.{wanted}$"):
            normopt.get_optimizer(name)
    with pytest.raises(TypeError, match="momentum"):
        normopt.LPSGDM(net.parameters(), beta=0.9)

"""A life of an optimizer in random order, every step of it judged by the NumPy oracle.

Hypothesis interleaves steps, NaN gradients, saving and loading, new groups, freezing, changes of dtype,
LR and p schedulers. 100 sequences by default; ``make fuzz``
is the nightly mode.
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import normopt
from tests.oracle import Rule

BUFFER = "momentum_buffer"

SEQUENCES = int(os.environ["NORMOPT_FUZZ"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2**-6}
SHAPES = [(3, 4), (5,), (), (2, 2, 2), (1,), (0, 2)]
RULE_KEYS = set(Rule.__dataclass_fields__) - {"c", "u", "t", "v", "top", "d", "before", "rows", "z", "radii"}
# The oracle's names of further state, a list of one entry a tensor.
STATE = {
    "v": "exp_avg_sq",
    "top": "max_exp_avg_sq",
    "d": "exp_avg_diff",
    "before": "previous_grad",
    "z": "dual_iterate",
    "radii": "sphere_radius",
}


@st.composite
def group_settings(draw) -> dict:
    """Any settings that the engine accepts, of one group."""
    rule_name = draw(st.sampled_from(["heavy", "ema", "lion"]))
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    out = dict(
        norm="lp",
        p=draw(st.sampled_from([1.0, 1.5, 2.0, 3.0, 8.0, math.inf])),
        scale=draw(st.sampled_from(["power", "dual", "unit", "matched", "relative"])),
        lr=draw(st.sampled_from([1e-3, 1e-2])),
        momentum=momentum,
        momentum_rule=rule_name,
        agr=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        decay=draw(st.sampled_from(["coupled", "decoupled", "lp", "proximal", "inside", "cautious", "cautious-lp"])),
        decay_p=draw(st.sampled_from([0.8, 1.0, 2.0, 3.0])),
        maximize=draw(st.booleans()),
        foreach=draw(st.sampled_from([None, False, True])),
        state_dtype=draw(st.sampled_from([None, "float32", "float64"])),
    )
    if draw(st.booleans()):
        out["metric"] = draw(st.sampled_from(["none", "diagonal"]))
        out["metric_beta"] = 0.9
        out["metric_rule"] = draw(st.sampled_from(["average", "sum", "max"]))
        out["bias_correction"] = not (momentum and rule_name == "heavy") and draw(st.booleans())
        out["difference_beta"] = draw(st.sampled_from([0.0, 0.5]))
        out["coupling"] = 0.0 if out["metric"] != "none" else draw(st.sampled_from([0.0, 0.3]))
        if not out["weight_decay"] or out["decay"] in ("coupled", "inside", "lp", "cautious-lp"):
            out["constraint"] = draw(st.sampled_from(["none", "sphere"]))
    if rule_name == "heavy":
        out["dampening"] = draw(st.sampled_from([0.0, 0.3]))
    if momentum and rule_name != "lion" and not out.get("dampening"):
        out["nesterov"] = draw(st.booleans())
    if out["scale"] in ("dual", "unit") and not out.get("metric"):
        out["scope"] = draw(st.sampled_from(["tensor", "group"]))
    if out["decay"] == "inside" and out["scale"] == "matched":
        out["decay"] = "coupled"
    if out["p"] == 1.0 and out["scale"] == "power":
        out["scale"] = "dual"
    return out


class Life(RuleBasedStateMachine):
    @initialize(settings=group_settings(), seed=st.integers(0, 2**16))
    def born(self, settings, seed):
        self.rng = torch.Generator().manual_seed(seed)
        self.frozen: set[int] = set()
        self.groups = [settings]
        self.opt = normopt.SteepestDescent([{"params": self.new_params(torch.float64), **settings}])
        self.lr_sched = torch.optim.lr_scheduler.StepLR(self.opt, 2, gamma=0.5)
        self.p_sched = self.new_p_schedule()

    def new_params(self, dtype):
        return [torch.nn.Parameter(torch.randn(s, generator=self.rng, dtype=torch.float64).to(dtype)) for s in SHAPES]

    def new_p_schedule(self):
        starts = [g["p"] for g in self.opt.param_groups]
        space = "p" if 1.0 in starts else "exponent"
        if math.inf in starts and 1.0 in starts:
            return normopt.schedules.ConstantP(self.opt)
        return normopt.schedules.CosineP(self.opt, total_steps=4, space=space)

    def params(self):
        return [p for g in self.opt.param_groups for p in g["params"]]

    def step_and_judge(self, poison=None):
        for i, p in enumerate(self.params()):
            g = torch.randn(p.shape, generator=self.rng, dtype=torch.float64).to(p.dtype)
            if poison is not None and g.numel():
                g.view(-1)[poison % g.numel()] = math.nan
            p.grad = None if i in self.frozen else g
        before = [
            [(p, *self.as_arrays(p), self.state_of(p)) for p in group["params"] if p.grad is not None]
            for group in self.opt.param_groups
        ]
        untouched = [(p, p.detach().clone()) for p in self.params() if p.grad is None]
        self.opt.step()
        for p, old in untouched:
            assert torch.equal(p, old)
        for group, entries in zip(self.opt.param_groups, before, strict=True):
            if group["scope"] == "group":
                self.judge(group, entries)
            else:  # each tensor with its own count of steps
                for entry in entries:
                    self.judge(group, [entry])

    def as_arrays(self, p):
        buffer = self.opt.state[p].get(BUFFER) if p in self.opt.state else None
        m = None if buffer is None else buffer.double().numpy().copy()
        return p.detach().double().numpy().copy(), p.grad.double().numpy().copy(), m

    def state_of(self, p):
        state = self.opt.state.get(p, {})
        return {key: x.double().numpy().copy() for key, x in state.items()}

    def judge(self, group, entries):
        if not entries:
            return
        params, ws, gs, ms, states = map(list, zip(*entries, strict=True))
        oracle = Rule(**{k: v for k, v in group.items() if k in RULE_KEYS})
        oracle.t = int(states[0].get("step", 0))
        for name, key in STATE.items():
            if key in states[0]:
                setattr(oracle, name, [state[key] for state in states])
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            new_ws, new_ms = oracle.step(ws, gs, ms)
        for i, p in enumerate(params):
            m = np.zeros_like(gs[i]) if ms[i] is None else ms[i]
            noise = oracle.momentum * np.abs(m) + np.abs(gs[i]) + np.abs(ws[i]) * (oracle.decay == "coupled")
            noise = noise + sum(np.abs(states[i].get(key, 0.0)) for key in ("exp_avg_diff", "previous_grad"))
            sure = ~(np.abs(oracle.c[i]) < 1e-4 * noise)
            size = np.maximum(np.abs(ws[i]), oracle.lr * np.abs(oracle.u[i])) + 1e-30
            ours = p.detach().double().numpy()
            bad, expected = np.isnan(ours), np.isnan(new_ws[i])
            if oracle.p == 1:  # one-hot at a NaN, of which there may be several: somewhere in the group
                poisoned = any(np.isnan(c).any() for c in oracle.c)
                assert any(bool(q.isnan().any()) for q in params) or not poisoned
            else:  # never hidden; at p = 2, where the norm drops out, it stays with its own entry
                assert np.all(np.isnan(oracle.c[i]) <= bad)
                assert np.all(bad <= expected)
                assert bad.any() == expected.any() or oracle.p == 2
            error = np.abs(ours - new_ws[i]) / size
            assert np.all((error <= TOLERANCE[p.dtype])[sure & ~bad & ~expected]), (i, error)
            if new_ms[i] is not None and oracle.momentum:
                buffer = self.opt.state[p][BUFFER]
                tolerance = max(TOLERANCE[p.dtype], TOLERANCE.get(buffer.dtype, 0))
                buffer = buffer.double().numpy()
                assert np.array_equal(np.isnan(buffer), np.isnan(new_ms[i]))
                assert np.all((np.abs(buffer - new_ms[i]) <= tolerance * noise)[~np.isnan(buffer)])

    @rule()
    def step(self):
        self.step_and_judge()

    @rule(poison=st.integers(0, 11))
    def step_with_nan_and_recover(self, poison):
        """NaN goes exactly where the oracle says; then the checkpoint of before is loaded, as a trainer does."""
        weights, saved = [p.detach().clone() for p in self.params()], self.saved()
        self.step_and_judge(poison)
        with torch.no_grad():
            for p, w in zip(self.params(), weights, strict=True):
                p.copy_(w)
        self.reborn(saved)

    def saved(self):
        file = io.BytesIO()
        torch.save([s.state_dict() for s in (self.opt, self.lr_sched, self.p_sched)], file)
        return file.getvalue()

    @rule()
    def save_and_load(self):
        before = self.opt.state_dict()
        self.reborn(self.saved())
        after = self.opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["state"].keys() == before["state"].keys()
        for i, state in before["state"].items():
            for key, value in state.items():
                loaded = after["state"][i][key]
                # A buffer that is older than its parameter's dtype is cast now instead of at its next step.
                assert torch.equal(loaded, value.to(loaded.dtype))

    def reborn(self, saved):
        """A new process: everything built again from scratch, then loaded."""
        fresh = [{"params": g["params"], **s} for g, s in zip(self.opt.param_groups, self.groups, strict=True)]
        first = len(self.lr_sched.base_lrs)
        self.opt = normopt.SteepestDescent(fresh[:first], lr=9.0)
        schedule_class, kwargs = type(self.lr_sched), dict(step_size=2, gamma=0.5)
        self.lr_sched = schedule_class(self.opt, **kwargs)
        old, self.p_sched = self.p_sched, None
        space = {"space": old.space, "total_steps": 4} if hasattr(old, "space") else {}
        self.p_sched = type(old)(self.opt, **space)
        for group in fresh[first:]:
            self.opt.add_param_group(group)
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for target, state in zip((self.opt, self.lr_sched, self.p_sched), states, strict=True):
            target.load_state_dict(state)

    @precondition(lambda self: len(self.opt.param_groups) < 3)
    @rule(settings=group_settings())
    def add_param_group(self, settings):
        self.groups.append(settings)
        self.opt.add_param_group({"params": self.new_params(torch.float64), **settings})

    @rule(i=st.integers(0, 17))
    def freeze_or_unfreeze(self, i):
        self.frozen ^= {i % len(self.params())}

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def change_dtype(self, dtype):
        for p in self.params():
            p.grad = None
            p.data = p.data.to(dtype)

    @rule()
    def lr_scheduler_step(self):
        self.lr_sched.step()

    @rule()
    def p_scheduler_step(self):
        self.p_sched.step()

    @precondition(lambda self: hasattr(self, "opt"))
    @invariant()
    def groups_are_primitive(self):
        for group in self.opt.param_groups:
            for key, value in group.items():
                assert key == "params" or value is None or isinstance(value, (bool, int, float, str))


TestLife = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")(Life.TestCase)
TestLife.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=15,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

"""Schedules of p as learning-rate schedulers: what trainers ask of one, and what is saved with the optimizer."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LRScheduler, SequentialLR

import normopt
from normopt.schedules import AdaptiveP, ConstantP, CosineP, LinearP, PiecewiseP, PSchedule

STEPS = 7
SCHEDULES = {
    "CosineP": lambda opt, **kwargs: CosineP(opt, STEPS, **kwargs),
    "LinearP": lambda opt, **kwargs: LinearP(opt, STEPS, p_end=3.0, space="exponent", **kwargs),
    "PiecewiseP": lambda opt, **kwargs: PiecewiseP(opt, [2, 5], [4.0, 3.0], **kwargs),
    "ConstantP": lambda opt, **kwargs: ConstantP(opt, **kwargs),
    "AdaptiveP": lambda opt, **kwargs: AdaptiveP(opt, beta=0.5, **kwargs),
    "momentum": lambda opt, **kwargs: CosineP(opt, STEPS, setting="momentum", end=0.5, **kwargs),
}


def optimizer(p=8.0, **kwargs):
    rng = torch.Generator().manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(4, 3, generator=rng)) for _ in range(3))
    return normopt.SteepestDescent(
        [{"params": [a]}, {"params": [b], "norm": "linf"}, {"params": [c], "p": 5.0}],
        **{"lr": 0.01, "norm": "lp", "p": p, "scale": "matched", "momentum": 0.9} | kwargs,
    )


def train(opt, sched, first, last):
    for step in range(first, last):
        rng = torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            for w in group["params"]:
                w.grad = torch.randn(w.shape, generator=rng) * (torch.rand(w.shape, generator=rng) < 0.5)
        opt.step()
        sched.step()


def weights(opt):
    return [w.detach().clone() for group in opt.param_groups for w in group["params"]]


def put(opt, saved):
    with torch.no_grad():
        for w, x in zip((w for group in opt.param_groups for w in group["params"]), saved, strict=True):
            w.copy_(x)


@pytest.mark.parametrize("p", [8.0, torch.tensor(8.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("stop", [1, 3, STEPS + 1])
@pytest.mark.parametrize("order", ["load, make", "make, load"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_optimizers_state_is_enough(name, order, stop, p, tmp_path):
    """As nanoGPT and timm save: model and optimizer, and no scheduler."""
    make = SCHEDULES[name]
    whole = optimizer(p)
    sched = make(whole)
    train(whole, sched, 0, stop)
    torch.save([whole.state_dict(), weights(whole)], tmp_path / "run.pt")
    train(whole, sched, stop, STEPS + 3)

    state, saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again = optimizer(p)
    put(again, saved)
    with warnings.catch_warnings():
        if stop >= STEPS:
            warnings.filterwarnings("ignore", "(CosineP|LinearP) continues from step 8.*nothing is left")
        if order == "make, load":
            resumed = make(again)
            again.load_state_dict(state)
        else:
            again.load_state_dict(state)
            resumed = make(again)
        train(again, resumed, stop, STEPS + 3)
    assert resumed.state_dict() == sched.state_dict()
    assert [torch.equal(x, y) for x, y in zip(weights(again), weights(whole), strict=True)] == [True] * 3
    ours, theirs = ([group[sched.setting] for group in opt.param_groups] for opt in (again, whole))
    assert ours == theirs


@pytest.mark.parametrize("order", ["optimizer", "schedule", "optimizer, schedule", "schedule, optimizer"])
def test_loaded_in_any_order(order):
    whole = optimizer()
    sched = CosineP(whole, STEPS)
    train(whole, sched, 0, 3)
    states = {"optimizer": copy.deepcopy(whole.state_dict()), "schedule": sched.state_dict()}
    sched.step()
    again = optimizer()
    resumed = CosineP(again, STEPS)
    resumed.step()
    for each in order.split(", "):
        {"optimizer": again, "schedule": resumed}[each].load_state_dict(states[each])
    resumed.step()
    assert resumed.get_last_p() == sched.get_last_p()
    assert resumed.last_epoch == 4


def test_last_epoch_is_torchs():
    opt = optimizer()
    sched = CosineP(opt, STEPS)
    visited = []
    for _ in range(4):
        visited.append(sched.get_last_p())
        sched.step()
    for done, expected in enumerate(visited[1:]):
        found = CosineP(opt, STEPS, last_epoch=done)  # the last epoch done, so that the next one begins
        assert (found.get_last_p(), found.last_epoch) == (expected, done + 1)
    anew = CosineP(opt, STEPS, last_epoch=-1)
    assert anew.base_ps == anew.get_last_p() == visited[3]
    assert anew.last_epoch == 0
    anew = CosineP(optimizer(), STEPS)
    anew.step(2)
    assert (anew.get_last_p(), anew.last_epoch) == (visited[2], 2)
    # An old checkpoint without the initial p, which the user remembers.
    old = optimizer(p=3.96)
    with pytest.raises(ValueError, match=r'last_epoch = 2 needs the p .* group\["initial_p"\]'):
        CosineP(old, STEPS, last_epoch=2)
    for group, start in zip(old.param_groups, (8.0, None, 5.0), strict=True):
        if start:
            group["initial_p"] = start
    assert CosineP(old, STEPS, last_epoch=2).get_last_p() == visited[3]


def test_groups_that_came_after_the_schedule_stay_as_they_are_when_it_is_made_again():
    def add(opt):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "p": 4.0})

    opt = optimizer()
    sched = CosineP(opt, STEPS)
    add(opt)
    sched.step()
    again = optimizer()
    add(again)
    again.load_state_dict(opt.state_dict())
    resumed = CosineP(again, STEPS)
    for each in (sched, resumed):
        each.step()
    assert resumed.get_last_p() == sched.get_last_p()
    assert resumed.get_last_p()[3] == 4.0


def test_two_settings_are_kept_apart():
    opt = optimizer()
    schedules = [CosineP(opt, STEPS), LinearP(opt, 9, setting="momentum", end=0.0)]
    for _ in range(3):
        schedules[1].step()
    schedules[0].step()
    again = optimizer()
    again.load_state_dict(opt.state_dict())
    assert CosineP(again, STEPS).last_epoch == 1
    assert LinearP(again, 9, setting="momentum", end=0.0).last_epoch == 3


def test_of_another_librarys_optimizer():
    def make():
        opt = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, 3))], weight_decay=0.0)
        normopt.LpDecay(opt, p=0.8, weight_decay=0.1)
        return opt

    opt = make()
    sched = LinearP(opt, 5, setting="lp_decay", end=0.0)
    train(opt, sched, 0, 2)
    again = make()
    resumed = LinearP(again, 5, setting="lp_decay", end=0.0)
    again.load_state_dict(opt.state_dict())
    train(again, resumed, 2, 3)
    sched.step()
    assert resumed.get_last_p() == sched.get_last_p() == [pytest.approx(0.025)]


def test_another_hand_on_p_is_said():
    opt = optimizer()
    sched = CosineP(opt, STEPS)
    opt.param_groups[0]["p"] = 3.0
    with pytest.warns(UserWarning, match=r"p of group 0 is 3\.0, but CosineP has set it to 8\.0: something else"):
        sched.step()
    sched.step()  # once
    other = LinearP(opt, STEPS, last_epoch=-1)
    with pytest.warns(UserWarning, match="such as another schedule"):
        sched.step()
    with pytest.warns(UserWarning, match="LinearP has set it"):
        other.step()


@pytest.mark.parametrize("cls", [normopt.SGD, torch.optim.SGD])
def test_a_checkpoint_without_a_schedule_is_said(cls):
    """Its p was moved by something else, or by a version that kept no step."""

    def make(momentum=0.9):
        return cls([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=momentum)

    opt = make()
    sched = LinearP(opt, 5, setting="momentum", end=0.5)
    opt.load_state_dict(make(0.7).state_dict())
    with pytest.warns(UserWarning, match="of an optimizer without a schedule.* continues from step 0"):
        sched.step()
    assert sched.get_last_p() == [0.8]


def test_nothing_left_to_do_is_said():
    opt = optimizer()
    first = CosineP(opt, 3)
    for _ in range(2):
        first.step()
    with pytest.warns(UserWarning, match="continues from step 2, which the param groups keep.*last_epoch=-1"):
        CosineP(opt, 3)
    second = LinearP(opt, 3, p_end=6.0, last_epoch=-1)
    second.step()
    assert second.get_last_p()[0] == 4.0
    CosineP(optimizer(), 1)  # which never has anything to do


def test_it_is_a_scheduler_of_torch_that_leaves_lr_alone():
    opt = optimizer(lr=torch.tensor(0.01))
    sched = CosineP(opt, STEPS)
    assert isinstance(sched, LRScheduler)
    assert sched.optimizer is opt
    assert sched.last_epoch == 0
    assert "initial_lr" not in opt.param_groups[0]
    assert "step" not in vars(opt)  # torch's schedulers put a wrapper there
    held = opt.param_groups[0]["lr"]
    for lrs in (sched.get_lr(), sched.get_last_lr()):
        assert lrs == [0.01, 0.01, 0.01]
        assert lrs[0] is not held
    sched.step()
    assert opt.param_groups[0]["lr"] is held
    # Accelerate's: a scheduler with this name is no longer stepped after so many micro-batches.
    assert not hasattr(sched, "total_steps")
    sched._step_count += 1
    assert "_step_count" not in sched.state_dict()


def test_one_scheduler_of_both_is_torchs():
    def make():
        opt = optimizer()
        return opt, ChainedScheduler([CosineAnnealingLR(opt, STEPS), CosineP(opt, STEPS)])

    opt, both = make()
    train(opt, both, 0, 3)
    assert both.get_last_lr() == [group["lr"] for group in opt.param_groups]
    again, resumed = make()
    put(again, weights(opt))
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed.load_state_dict(both.state_dict())
    train(opt, both, 3, STEPS)
    train(again, resumed, 3, STEPS)
    assert [(g["lr"], g["p"]) for g in again.param_groups] == [(g["lr"], g["p"]) for g in opt.param_groups]
    assert opt.param_groups[0]["p"] == 2.0
    assert all(map(torch.equal, weights(again), weights(opt)))


@pytest.mark.parametrize("order", [1, -1])
def test_schedules_in_sequence_are_refused(order):
    opt = optimizer()
    parts = [CosineAnnealingLR(opt, 3), CosineP(opt, 3)][::order]

    def run():
        both = SequentialLR(opt, parts, [1])
        opt.step()
        both.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match="use ChainedScheduler"):
            run()


def test_a_wrapper_that_never_steps_is_refused():
    """ignite's LRScheduler, which reads get_lr() inside of this flag, writes lr and adds to last_epoch."""
    sched = CosineP(optimizer(), STEPS)
    sched._get_lr_called_within_step = True
    with pytest.raises(TypeError, match="in ignite, trainer"):
        sched.get_lr()
    assert sched.get_last_lr() == [0.01] * 3


def test_a_step_that_fails_counts_nothing():
    class Failing(PSchedule):
        def p_at(self, start, s):
            if s == 3:
                raise ArithmeticError("no p here")
            return start - s

    opt = optimizer()
    sched = Failing(opt)
    sched.step()
    before = sched.state_dict(), [dict(group) for group in opt.param_groups]
    with pytest.raises(ArithmeticError):
        sched.step()
    assert (sched.state_dict(), [dict(group) for group in opt.param_groups]) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(copied):
    opt = optimizer()
    sched = CosineP(opt, STEPS)
    sched.step()
    other = copied(sched)
    other.step()
    assert sched.last_epoch == 1
    sched.step()
    assert other.get_last_p() == sched.get_last_p()
    assert other.optimizer is not opt


class TestStepWithOptimizer:
    def test_every_step_counts_once(self):
        class Twice(normopt.LPSGDM):
            def step(self, closure=None):
                return super().step(closure)

        for cls in (normopt.LPSGDM, Twice):
            opt = cls([torch.nn.Parameter(torch.ones(2))], p=8.0)
            sched = CosineP(opt, 3)
            assert sched.step_with_optimizer() is sched.step_with_optimizer()  # twice is once
            visited = []
            for _ in range(4):
                opt.param_groups[0]["params"][0].grad = torch.ones(2)
                visited.append(opt.param_groups[0]["p"])
                opt.step(lambda: 0.0)
            assert visited == [8.0, 5.0, 2.0, 2.0]

    @pytest.mark.parametrize("made", ["before", "after"])
    def test_resumes_by_the_optimizers_state(self, made):
        def run(stop=None):
            opt = optimizer()
            CosineP(opt, STEPS).step_with_optimizer()
            train(opt, none, 0, stop or STEPS)
            if stop:
                state, saved = copy.deepcopy(opt.state_dict()), weights(opt)
                opt = optimizer()
                if made == "before":
                    CosineP(opt, STEPS).step_with_optimizer()
                opt.load_state_dict(state)
                if made == "after":
                    CosineP(opt, STEPS).step_with_optimizer()
                put(opt, saved)
                train(opt, none, stop, STEPS)
            return weights(opt)

        none = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), lambda _: 1.0)
        none.step = lambda: None
        assert all(map(torch.equal, run(), run(stop=3)))

    def test_a_step_that_only_makes_state_is_none(self):
        """torch.distributed.checkpoint's, before it loads into a new optimizer."""
        opt = optimizer()
        sched = CosineP(opt, STEPS).step_with_optimizer()
        for group in opt.param_groups:
            group["lr"] = 0.0
            for w in group["params"]:
                w.grad = torch.zeros_like(w)
        opt.step(closure=None)
        assert sched.last_epoch == 0
        opt.step()
        assert sched.last_epoch == 1

    def test_a_step_that_raised_is_none(self):
        opt = optimizer()
        sched = CosineP(opt, STEPS).step_with_optimizer()
        opt.param_groups[0]["momentum"] = math.nan
        with pytest.raises(ValueError, match="momentum"):
            opt.step()
        assert sched.last_epoch == 0
        opt.param_groups[0]["momentum"] = 0.9
        opt.step()
        assert sched.last_epoch == 1

    def test_a_wrapper_without_hooks_is_refused(self):
        class Wrapper(torch.optim.Optimizer):
            def __init__(self, optimizer):
                self.param_groups = optimizer.param_groups

        with pytest.raises(TypeError, match="Wrapper is a wrapper without step hooks"):
            CosineP(Wrapper(optimizer()), STEPS).step_with_optimizer()

    @pytest.mark.parametrize("cls", [normopt.LPSGD, normopt.LPSGDM])
    def test_an_argument_of_the_optimizer_is_the_same(self, cls):
        """What a script can say that makes the optimizer from names and numbers."""

        def run(stop=None, **kwargs):
            opt = cls([torch.nn.Parameter(torch.ones(4, 3))], p=6.0, **kwargs)
            train(opt, Nothing, 0, stop or STEPS)
            if stop:
                state, saved = copy.deepcopy(opt.state_dict()), weights(opt)
                opt = cls([torch.nn.Parameter(torch.ones(4, 3))], p=6.0, **kwargs)
                opt.load_state_dict(state)
                put(opt, saved)
                train(opt, Nothing, stop, STEPS)
            return opt.param_groups[0]["p"], weights(opt)[0]

        class Nothing:
            step = staticmethod(lambda: None)

        by_hand = cls([torch.nn.Parameter(torch.ones(4, 3))], p=6.0)
        train(by_hand, CosineP(by_hand, STEPS, p_end=3.0), 0, STEPS)
        for found in (run(p_steps=STEPS, p_end=3.0), run(stop=2, p_steps=STEPS, p_end=3.0)):
            assert found[0] == 3.0
            assert torch.equal(found[1], weights(by_hand)[0])
        assert run(p_steps=STEPS)[0] == 2.0
        assert run()[0] == 6.0
        with pytest.raises(ValueError, match=r"p_end = 3\.0 does nothing without p_steps"):
            run(p_end=3.0)
        with pytest.raises(ValueError, match="p_steps must be"):
            run(p_steps=0)


def loaded(opt):
    """Load the state of an optimizer whose p a schedule has moved for three steps."""
    before = optimizer()
    train(before, CosineP(before, STEPS), 0, 3)
    opt.load_state_dict(before.state_dict())
    return opt


class Quiet:
    """A schedule's place for a test that has none."""

    def step(self):
        pass


def test_a_checkpoint_whose_p_a_schedule_made_warns_where_no_schedule_follows():
    opt = loaded(optimizer())
    with pytest.warns(
        UserWarning, match=r"the checkpoint's p = 5\.\d+ was set by a schedule, of which 3 steps"
    ) as told:
        train(opt, Quiet(), 0, 3)
    assert len(told) == 1
    assert told[0].filename == __file__
    # Nor is a schedule of another setting one of p.
    other = optimizer()
    momentum = CosineP(other, STEPS, setting="momentum", end=0.5)
    loaded(other)
    with pytest.warns(UserWarning, match="no schedule of p"):
        train(other, momentum, 0, 1)


@pytest.mark.parametrize("kind", ["after", "before", "with the optimizer", "pickled", "deleted keys", "no load"])
def test_no_warning_where_a_schedule_follows_or_none_is_asked_for(kind):
    opt, sched = optimizer(), Quiet()
    if kind == "before":
        sched = CosineP(opt, STEPS)
    if kind == "with the optimizer":
        CosineP(opt, STEPS).step_with_optimizer()
    if kind == "pickled":
        opt, sched = pickle.loads(pickle.dumps((opt, CosineP(opt, STEPS))))
    if kind != "no load":
        loaded(opt)
    if kind == "after":
        sched = CosineP(opt, STEPS)
    if kind == "deleted keys":
        for group in opt.param_groups:
            group.pop("initial_p", None)
            group.pop("last_epoch_of_p", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, sched, 0, 3)

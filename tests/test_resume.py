"""A run that is killed and resumed ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

import random
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import normopt
from tests import crash_worker, forked
from tests.crash_worker import PLACES, SAVE_EVERY, TOTAL, make_run
from tests.versions import DCP_ALONE

# AdamW's and SGD's relatives keep what these keep.
RELATIVES = ("adagrad", "adam", "lamb", "lars", "rmsprop")
NAMES = [
    pytest.param(name, marks=pytest.mark.exhaustive if name in RELATIVES else ()) for name in normopt.list_optimizers()
]
CRASHES_EACH = 4


def run(*args) -> int | None:
    return forked.run(crash_worker.train, *args)


def assert_same_end(first, second):
    """Weights and optimizer state, dtypes included, with no tolerance."""

    def walk(a, b):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                walk(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                walk(x, y)
        else:
            assert a == b

    walk(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere_and_resumed(name, tmp_path):
    """CRASHES_EACH kill -9 in one life, each at a random step and another place in it."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "crashed").mkdir()
    assert run(name, tmp_path / "whole") == 0
    rng = random.Random(f"crash points of {name}")
    places = rng.sample(PLACES, CRASHES_EACH)
    steps = sorted(rng.randrange(TOTAL) for _ in places)
    for step, place in zip(steps, places, strict=True):
        if place == "while saving":
            step = step // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY - 1
        assert run(name, tmp_path / "crashed", step, place) == -signal.SIGKILL
    assert run(name, tmp_path / "crashed") == 0
    whole, crashed = (torch.load(tmp_path / d / "end.pt", weights_only=True) for d in ("whole", "crashed"))
    assert_same_end(whole, crashed)


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable", "ignore:TypedStorage is")  # by torch 2.6
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as meant: one process
@pytest.mark.parametrize("name", NAMES)
def test_distributed_checkpoint_on_one_process(name, tmp_path):
    if torch.__version__ < (2, 7) and make_run(name)[1].defaults["momentum"] == 0:
        pytest.skip("this torch loads no optimizer that has no state")

    def train(net, opt, scheduled, steps):
        for i in steps:
            torch.manual_seed(i)
            opt.zero_grad()
            net[2](net[1](net[0](torch.randn(8, 5))).bfloat16()).float().square().mean().backward()
            opt.step()
            for sched in scheduled:
                sched.step()

    def as_dict(net, opt, scheduled):
        weights, state = get_state_dict(net, opt)
        return {"net": weights, "opt": state, "scheduled": [s.state_dict() for s in scheduled]}

    first = make_run(name)
    train(*first, range(5))
    dcp.save(as_dict(*first), checkpoint_id=tmp_path, **DCP_ALONE)

    net, opt, scheduled = make_run(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loaded = as_dict(net, opt, scheduled)  # makes the state of a fresh optimizer by a step with lr = 0
    assert_same_end(before, dict(net.state_dict()))
    dcp.load(loaded, checkpoint_id=tmp_path, **DCP_ALONE)
    # torch's strict mode wants state for every parameter or for none, but an optimizer without momentum
    # has it for the weights that Kahan rounds, the 16-bit ones, alone.
    options = StateDictOptions(strict=opt.defaults["momentum"] != 0)
    set_state_dict(net, opt, model_state_dict=loaded["net"], optim_state_dict=loaded["opt"], options=options)
    for sched, state in zip(scheduled, loaded["scheduled"], strict=True):
        sched.load_state_dict(state)
    train(*first, range(5, 9))
    train(net, opt, scheduled, range(5, 9))
    assert_same_end(first[0].state_dict(), net.state_dict())
    assert_same_end(first[1].state_dict()["state"], opt.state_dict()["state"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_torch_sgd_checkpoints_load_here_and_ours_there(momentum, tmp_path):
    settings = dict(lr=0.05, momentum=momentum, nesterov=momentum > 0, weight_decay=0.01)

    def net_of(weights=None):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        if weights is not None:
            net.load_state_dict(weights)
        return net

    def train(net, opt, steps):
        for i in steps:
            torch.manual_seed(i)
            opt.zero_grad()
            net(torch.randn(8, 4)).square().mean().backward()
            opt.step()

    whole = net_of()
    train(whole, torch.optim.SGD(whole.parameters(), **settings), range(8))
    for first, second in ((torch.optim.SGD, normopt.SGD), (normopt.SGD, torch.optim.SGD)):
        a = net_of()
        opt = first(a.parameters(), foreach=False, **settings)
        train(a, opt, range(4))
        torch.save((a.state_dict(), opt.state_dict()), tmp_path / "half.pt")
        weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
        b = net_of(weights)
        other = second(b.parameters(), lr=99.0, foreach=False)
        other.load_state_dict(state)
        train(b, other, range(4, 8))
        assert_same_end(whole.state_dict(), b.state_dict())

"""AdamW, Adam, Adagrad and RMSprop: torch's arguments, torch's numbers, and torch's checkpoints in both directions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

import normopt

SHAPES = [(7, 5), (6,), (2, 3, 2), ()]


def make(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]


def step(params: list[torch.nn.Parameter], opt: torch.optim.Optimizer, seeds: range, without: int = -1) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        for i, p in enumerate(params):
            p.grad = None if i == without else torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
        opt.step()


def assert_close(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], bound: float, lr: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        error = (p - q).detach().abs() / q.detach().abs().clamp(min=lr)
        assert float(error.max()) <= bound


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (normopt.AdamW, AdamW, {}),
    "AdamW positional": (
        lambda ps: normopt.AdamW(ps, 2e-3, (0.8, 0.99), 1e-6, 0.2, True),
        lambda ps: AdamW(ps, 2e-3, (0.8, 0.99), 1e-6, 0.2, True),
        {},
    ),
    "AdamW without momentum": (normopt.AdamW, AdamW, dict(betas=(0.0, 0.9), maximize=True)),
    "Adam": (normopt.Adam, Adam, dict(weight_decay=0.1)),
    "Adagrad": (normopt.Adagrad, Adagrad, dict(weight_decay=0.1)),
    "RMSprop": (normopt.RMSprop, RMSprop, dict(alpha=0.9, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", CASES)
def test_arguments_and_steps_are_torchs(name: str) -> None:
    ours, theirs, settings = CASES[name]
    params, others = make(torch.float64), make(torch.float64)
    opt, other = ours(params, **settings), theirs(others, **settings)
    step(params, opt, range(20))
    step(others, other, range(20))
    assert_close(params, others, 1e-13, other.param_groups[0]["lr"])


def test_groups_may_have_torchs_names() -> None:
    """Of a class with a metric, and in a group that has one; an ε of the power map stays that."""
    group = {"params": make(), "betas": (0.5, 0.9), "eps": 1e-6, "amsgrad": True}
    diagonal = {"metric": "diagonal", "bias_correction": True, "norm": "l2", "scale": "dual", "nesterov": False}
    for opt in (normopt.AdamW([group]), normopt.Muon([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}])):
        if isinstance(opt, normopt.Muon):
            opt.add_param_group({**group, "params": make(), **diagonal})
        found = opt.param_groups[-1]
        names = ("momentum", "metric_beta", "metric_eps", "metric_rule", "eps")
        assert [found[k] for k in names] == [0.5, 0.9, 1e-6, "max", 0.0]
        assert not {"betas", "amsgrad"} & found.keys()
        again = normopt.AdamW([{**found, "params": make()}])  # a group of another optimizer
        assert again.param_groups[0] == again.defaults | found | {"params": again.param_groups[0]["params"]}
    power = {"params": make(), "norm": "lp", "p": 3.0, "scale": "power", "eps": 1e-3, "alpha": 0.5}
    found = normopt.AdamW([power]).param_groups[0]
    assert [found[k] for k in ("eps", "metric_eps", "metric_beta")] == [1e-3, 1e-8, 0.5]


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda ps: normopt.AdamW(ps, betas=0.9), ValueError, "betas must be 2 numbers, but is 0.9"),
        (lambda ps: normopt.AdamW(ps, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), but is 1.0"),
        (lambda ps: normopt.AdamW(ps, eps=0), ValueError, r"metric_eps must be in \["),
        (lambda ps: normopt.AdamW(ps, amsgrad=1), TypeError, "amsgrad must be True or False"),
        (lambda ps: normopt.AdamW(ps, momentum=0.9), ValueError, "momentum = 0.9 is given a second time, as betas"),
        (lambda ps: normopt.AdamW(ps, metric="none"), TypeError, "AdamW fixes metric = 'diagonal'"),
        (lambda ps: normopt.AdamW([{"params": ps, "betas": (2, 0)}]), ValueError, r"betas\[0\] must be in"),
        (lambda ps: normopt.RMSprop(ps, momentum=0.9), TypeError, "RMSprop fixes momentum = 0.0"),
        (lambda ps: normopt.Adagrad([{"params": ps, "betas": (0.9, 0)}]), ValueError, "Adagrad fixes momentum = 0"),
        (lambda ps: normopt.SteepestDescent(ps, betas=(0.9, 0.9)), TypeError, "β₂ as metric_beta or"),
        (lambda ps: normopt.SteepestDescent(ps, metric="diagonal", eps=1e-8), ValueError, "set eps=0. .* metric_eps"),
        (lambda ps: normopt.SGD([{"params": ps, "amsgrad": True}]), ValueError, 'amsgrad=True is metric_rule="max"'),
    ],
)
def test_what_cannot_be_is_refused(make_it: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_it(make())


TORCH: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (normopt.AdamW, AdamW, dict(lr=0.02, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)),
    "AMSGrad": (lambda ps: normopt.AdamW(ps, amsgrad=True), AdamW, dict(lr=0.02, amsgrad=True)),
    "Adam": (normopt.Adam, Adam, dict(lr=0.02, weight_decay=0.1)),
    "Adam, decoupled": (normopt.Adam, Adam, dict(lr=0.02, weight_decay=0.1, decoupled_weight_decay=True)),
    "Adam, fused": (normopt.AdamW, Adam, dict(lr=0.02, betas=(0.0, 0.9), maximize=True, fused=True)),
    "SGD": (normopt.SGD, SGD, dict(lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.1)),
    "SGD, Nesterov": (normopt.SGD, SGD, dict(lr=0.02, momentum=0.9, nesterov=True)),
    "SGD without momentum": (normopt.SGD, SGD, dict(lr=0.02)),
}


def without_run(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "foreach", "fused")}


@pytest.mark.parametrize("name", TORCH)
def test_torchs_checkpoints_load_and_go_back(name: str) -> None:
    """3 steps of torch's, from which ours makes 5 beside torch's, from which torch's makes 5 beside ours."""
    ours, theirs, settings = TORCH[name]
    params, others = make(), make()
    other = theirs(others, **settings)
    step(others, other, range(3), without=1)  # a parameter that has no state yet
    for p, q in zip(params, others, strict=True):
        p.data.copy_(q.data)
    opt = ours(params)
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    step(params, opt, range(3, 8), without=1)
    step(others, other, range(3, 8), without=1)
    assert_close(params, others, 6e-7, 0.02)
    state = copy.deepcopy(normopt.to_torch_state_dict(opt))
    assert [without_run(g) for g in state["param_groups"]] == [without_run(g) for g in other.param_groups]
    assert {i: s.keys() for i, s in state["state"].items()} == {
        i: s.keys() for i, s in other.state_dict()["state"].items() if name != "SGD without momentum"
    }
    other = theirs(others)
    other.load_state_dict(state)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    step(params, opt, range(8, 13))
    step(others, other, range(8, 13))
    assert_close(params, others, 6e-7, 0.02)


def test_older_and_other_checkpoints() -> None:
    params, others = make(), make()
    other = Adam(others, weight_decay=0.1)
    step(others, other, range(2))
    old = other.state_dict()
    for state in old["state"].values():
        state["step"] = 2  # torch before 1.12
    del old["param_groups"][0]["decoupled_weight_decay"]  # before 2.7
    opt = normopt.AdamW(params)
    opt.load_state_dict(old)
    assert opt.param_groups[0]["decay"] == "decoupled"
    step(params, opt, range(1))
    assert opt.state[params[0]]["step"] == 3
    sparse = normopt.AdamW(make(), weight_decay=0.1, decay="lp")  # a decay that torch does not have stays
    sparse.load_state_dict(AdamW(others).state_dict())
    assert [sparse.param_groups[0][k] for k in ("decay", "weight_decay")] == ["lp", 0.01]
    before = copy.deepcopy(opt.state_dict())
    for theirs in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, RMSprop):
        opt_of_theirs = theirs(others)
        for seeds in (range(0), range(1)):
            step(others, opt_of_theirs, seeds)
            with pytest.raises(ValueError, match="saved by another optimizer"):
                opt.load_state_dict(opt_of_theirs.state_dict())
    with pytest.raises(ValueError, match=r"would make AdamW another optimizer: {'metric_rule': 'max'}"):
        opt.load_state_dict(Adam(others, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match=r"betas.*which Adagrad does not read"):
        normopt.Adagrad(params).load_state_dict(other.state_dict())
    assert str(opt.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda ps: normopt.AdamW(ps, agr=True), r"group 0 has {'agr': True}, which torch.optim.Adam does not have"),
        (lambda ps: normopt.AdamW(ps, decay="lp"), "{'decay': 'lp'}, which torch.optim.Adam does not"),
        (lambda ps: normopt.AdamW([{"params": ps, "radius": 2.0}]), "{'radius': 2.0}"),
        (lambda ps: normopt.AdamW([{"params": ps, "norm": "linf"}]), "'norm': 'linf', 'scale': 'dual'"),
        (lambda ps: normopt.AdamW([{"params": ps[:1]}, {"params": ps[1:], "metric": "none"}]), "group 1 has {'metric'"),
        (normopt.RMSprop, "'bias_correction': False"),
        (normopt.Adagrad, "'metric_rule': 'sum'"),
        (lambda ps: normopt.SGD(ps, weight_decay=0.1, decay="decoupled"), "'decoupled'}, which torch.optim.SGD"),
        (lambda ps: normopt.SGD(ps, rounding="kahan"), "'rounding': 'kahan'"),
        (lambda ps: normopt.Muon(ps[:1]), "'momentum_rule': 'ema', 'norm': 'spectral'"),
    ],
)
def test_what_torch_does_not_have_does_not_go_back(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normopt.to_torch_state_dict(make_it(make()))


def test_only_ours_go_to_torch() -> None:
    with pytest.raises(TypeError, match="takes an optimizer of normopt, but was given SGD"):
        normopt.to_torch_state_dict(SGD(make()))


def test_a_checkpoint_of_muon_and_adamw_is_one_file(tmp_path: Any) -> None:
    """Saved and resumed bit for bit, in bfloat16 too, where the second moment stays float32."""

    def build() -> tuple[list[torch.nn.Parameter], normopt.Muon]:
        params = make(torch.bfloat16)
        adam = {"betas": (0.8, 0.99), "eps": 1e-6, "metric": "diagonal", "bias_correction": True, "nesterov": False}
        rest = {"params": params[1:], "norm": "l2", "scale": "dual", "lr": 3e-4, "weight_decay": 0.1, **adam}
        return params, normopt.Muon([{"params": params[:1]}, rest], rounding="kahan")

    params, opt = build()
    step(params, opt, range(3))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    others, other = build()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    step(params, opt, range(3, 6))
    step(others, other, range(3, 6))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(x, other.state[q][key]) for key, x in opt.state[p].items())
    assert opt.state[params[1]]["exp_avg_sq"].dtype == torch.float32

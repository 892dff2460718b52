"""The adaptive family: torch's arguments, numbers and checkpoints, in both directions; the papers' rules in NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, RMSprop

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


Array = np.ndarray
ADAM: dict[str, Any] = dict(momentum=0.9, momentum_rule="ema", metric="diagonal", bias_correction=True)
SPECTRAL: dict[str, Any] = dict(norm="spectral", scale="unit", momentum_rule="ema")


def average(s: dict[str, Array], name: str, x: Array, new: float) -> Array:
    """(1 − α)·old + α·x, from 0; the papers' α, the weight of the new."""
    s[name] = (1 - new) * s.get(name, np.zeros_like(x)) + new * x
    return s[name]


def adan(w: Array, g: Array, s: dict[str, Any], t: int, lr: float, prox: bool = True) -> Array:
    """Algorithm 1 of arXiv:2208.06677 in its own betas, with the corrections of the authors' code."""
    a1, a2, a3, eps, decay = 0.02, 0.08, 0.01, 1e-8, 0.02
    difference = g - s.get("g", g)
    s["g"] = g
    m = average(s, "m", g, a1) / (1 - (1 - a1) ** t)
    v = average(s, "v", difference, a2) / (1 - (1 - a2) ** t)
    n = average(s, "n", (g + (1 - a2) * difference) ** 2, a3) / (1 - (1 - a3) ** t)
    step = lr / (np.sqrt(n) + eps) * (m + (1 - a2) * v)
    return (w - step) / (1 + decay * lr) if prox else (1 - decay * lr) * w - step


def relative(w: Array, r: Array) -> Array:
    return r * (np.linalg.norm(w) / np.linalg.norm(r) if w.any() else 1.0)


def lars(w: Array, g: Array, s: dict[str, Any], t: int, lr: float) -> Array:
    """Algorithm 1 of arXiv:1904.00962."""
    return w - lr * relative(w, average(s, "m", g + 0.1 * w, 0.1))


def lamb(w: Array, g: Array, s: dict[str, Any], t: int, lr: float) -> Array:
    """Algorithm 2 of arXiv:1904.00962."""
    m, v = average(s, "m", g, 0.1) / (1 - 0.9**t), average(s, "v", g * g, 0.001) / (1 - 0.999**t)
    return w - lr * relative(w, m / (np.sqrt(v) + 1e-6) + 0.01 * w)


def normuon(w: Array, g: Array, s: dict[str, Any], t: int, lr: float) -> Array:
    """arXiv:2510.05491 at Muon's length, with its momentum and aspect."""
    left, _, right = np.linalg.svd(0.05 * g + 0.95 * average(s, "m", g, 0.05), full_matrices=False)
    u = left @ right
    new = u / (np.sqrt(average(s, "v", (u * u).mean(1, keepdims=True), 0.05)) + 1e-8)
    return w - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * new * np.linalg.norm(u) / np.linalg.norm(new)


def stacey(w: Array, g: Array, s: dict[str, Any], t: int, lr: float) -> Array:
    """Stacey(3, 2) of arXiv:2506.06606, in the form of the authors' code."""
    old, tau = s.get("m", np.zeros_like(g)), 1e-3
    c = 0.9 * old + 0.1 * g
    average(s, "m", g, 0.001)
    s["z"] = s.get("z", w) - 1e-3 * c
    u = c * (np.abs(c) + 1e-4) ** ((2 - 3) / (3 - 1))
    return (1 - tau - lr * 5e-4) * w + tau * s["z"] - lr * (1 - tau) * u


# The rule of the paper, the class with its defaults, its settings under the engine's names.
PAPERS: dict[str, tuple[Callable[..., Array], Callable[..., normopt.SteepestDescent], dict[str, Any]]] = {
    "Adan": (
        adan,
        lambda ps, **k: normopt.Adan(ps, weight_decay=0.02, **k),
        ADAM | dict(momentum=0.98, difference_beta=0.92, metric_beta=0.99, weight_decay=0.02, decay="proximal"),
    ),
    "Adan, no prox": (
        lambda *a: adan(*a, prox=False),
        lambda ps, **k: normopt.Adan(ps, weight_decay=0.02, no_prox=True, **k),
        ADAM | dict(momentum=0.98, difference_beta=0.92, metric_beta=0.99, weight_decay=0.02, decay="decoupled"),
    ),
    "LARS": (
        lars,
        lambda ps, **k: normopt.LARS(ps, weight_decay=0.1, **k),
        dict(momentum=0.9, momentum_rule="ema", scale="relative", weight_decay=0.1, decay="coupled", lr=0.01),
    ),
    "LAMB": (lamb, normopt.LAMB, ADAM | dict(metric_eps=1e-6, scale="relative", weight_decay=0.01, decay="inside")),
    "NorMuon": (
        normuon,
        lambda ps, **k: normopt.NorMuon([p for p in ps if p.dim() == 2], method="svd", **k),
        SPECTRAL
        | dict(momentum=0.95, nesterov=True, row_beta=0.95, norm_method="svd", norm_aspect="original", lr=0.02),
    ),
    "Stacey": (
        stacey,
        normopt.Stacey,
        dict(
            **dict(norm="lp", p=3.0, scale="power", eps=1e-4, momentum=0.9, momentum_rule="lion", beta2=0.999),
            **dict(coupling=1e-3, coupling_rate=1e-3, weight_decay=5e-4),
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PAPERS)
def test_fifty_steps_are_the_papers(name: str, dtype: torch.dtype) -> None:
    rule, cls, settings = PAPERS[name]
    opt = cls(make(dtype))
    params, lr = opt.param_groups[0]["params"], opt.param_groups[0]["lr"]
    same = normopt.SteepestDescent(params, **{"lr": 1e-3, **settings}).param_groups[0]
    unread = {"params", "norm_dtype"}  # by exact polar factors
    assert {k: opt.param_groups[0][k] for k in same.keys() - unread} == {k: same[k] for k in same.keys() - unread}
    ws = [p.detach().double().numpy().copy() for p in params]
    states: list[dict[str, Any]] = [{} for _ in ws]
    for t in range(1, 51):
        for p, w in zip(params, ws, strict=True):
            p.data.copy_(torch.as_tensor(w))  # so that errors of rounding do not add up in the weights
            p.grad = (10.0 ** (t % 3 - 1) * torch.randn(p.shape, dtype=torch.float64)).to(dtype)
        opt.step()
        for i, p in enumerate(params):
            new = rule(ws[i], p.grad.double().numpy(), states[i], t, lr)
            size = np.maximum(np.abs(ws[i]), np.abs(new - ws[i])).max()
            bound = (1e-12 if dtype == torch.float64 else 2e-6) * size
            np.testing.assert_allclose(p.detach().double().numpy(), new, rtol=0, atol=bound)
            ws[i] = np.asarray(new)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda ps: normopt.Adan(ps, betas=(0.9, 0.9)), ValueError, r"betas must be 3 numbers, but is \(0.9, 0.9\)"),
        (lambda ps: normopt.Adan(ps, no_prox=True, decay="lp"), ValueError, 'no_prox=True is decay="decoupled"'),
        (lambda ps: normopt.NorMuon(ps[:1], norm="l2"), TypeError, "NorMuon fixes norm = 'spectral'"),
        (lambda ps: normopt.LAMB(ps, metric_rule="max"), TypeError, "LAMB fixes metric_rule = 'average'"),
        (lambda ps: normopt.Adan(ps).load_state_dict(Adam(ps).state_dict()), ValueError, "which Adan does not read"),
        (lambda ps: normopt.AdamW(ps, betas=0.9), ValueError, "betas must be 2 numbers, but is 0.9"),
        (lambda ps: normopt.AdamW(ps, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), but is 1.0"),
        (lambda ps: normopt.AdamW(ps, eps=0), ValueError, r"^eps must be in \["),
        (lambda ps: normopt.AdamW(ps, amsgrad=1), TypeError, "amsgrad must be True or False"),
        (
            lambda ps: normopt.AdamW(ps, momentum=0.9),
            ValueError,
            "momentum = 0.9 is given a second time: betas sets it",
        ),
        (lambda ps: normopt.AdamW(ps, metric="none"), TypeError, "AdamW fixes metric = 'diagonal'"),
        (lambda ps: normopt.AdamW([{"params": ps, "betas": (2, 0)}]), ValueError, r"betas\[0\] must be in"),
        (lambda ps: normopt.RMSprop(ps, momentum=0.9), TypeError, "RMSprop fixes momentum = 0.0"),
        (lambda ps: normopt.Adagrad([{"params": ps, "betas": (0.9, 0)}]), ValueError, "Adagrad fixes momentum = 0"),
        (lambda ps: normopt.SteepestDescent(ps, betas=(0.9, 0.9)), TypeError, "β₂ as metric_beta or"),
        (
            lambda ps: normopt.SteepestDescent(ps, metric="diagonal", eps=1e-8),
            ValueError,
            "eps = 1e-08 does nothing .* metric_eps",
        ),
        (
            lambda ps: normopt.Adan([{"params": ps, "no_prox": True}]),
            ValueError,
            "'no_prox', which is an argument of",
        ),
        (lambda ps: normopt.Freon([{"params": ps[:1], "c": 0.3}]), ValueError, "'c', which is an argument of Freon"),
        (lambda ps: normopt.Freon(ps[:1], norm_exponent=0.3), TypeError, "fixes norm_exponent = 0.0: use an argument"),
        (
            lambda ps: normopt.AdamW([{"params": ps, "alpha": 0.5, "betas": (0.8, 0.7)}]),
            ValueError,
            "is given a second time",
        ),
        (lambda ps: normopt.Adagrad([{"params": ps, "amsgrad": False}]), ValueError, "amsgrad is for metric_rule"),
        (
            lambda ps: normopt.AdamW(ps).load_state_dict(normopt.Adan(ps).state_dict()),
            ValueError,
            "other optimizer: {'diff",
        ),
        (
            lambda ps: normopt.Adan(ps).load_state_dict(normopt.AdamW(ps).state_dict()),
            ValueError,
            "other optimizer: {'diff",
        ),
        (
            lambda ps: normopt.NorMuon(ps).load_state_dict(normopt.Muon(ps).state_dict()),
            ValueError,
            "row_beta",
        ),
        (lambda ps: normopt.LAMB(ps).load_state_dict(AdamW(ps).state_dict()), ValueError, "which LAMB does not read"),
        (
            lambda ps: normopt.AdamW(ps).load_state_dict(AdamW(ps, amsgrad=True).state_dict()),
            ValueError,
            "amsgrad is",
        ),
        (
            lambda ps: normopt.Muon(ps).load_state_dict(Muon(ps[:1]).state_dict()),
            ValueError,
            "optim.Muon do not",
        ),
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
        (lambda ps: normopt.LAMB(ps, decay="decoupled"), "norm = 'l2' and scale = 'relative'"),
        (lambda ps: normopt.LARS(ps, momentum=0.0), "norm = 'l2' and scale = 'relative'"),
        (
            lambda ps: normopt.AdamW([{"params": ps, "norm": "linf"}]),
            "norm = 'linf' and scale = 'dual': only the",
        ),
        (lambda ps: normopt.AdamW([{"params": ps[:1]}, {"params": ps[1:], "metric": "none"}]), "group 1 has {'metric'"),
        (normopt.RMSprop, "'bias_correction': False"),
        (normopt.Adagrad, "'metric_rule': 'sum'"),
        (lambda ps: normopt.SGD(ps, weight_decay=0.1, decay="decoupled"), "'decoupled'}, which torch.optim.SGD"),
        (lambda ps: normopt.SGD(ps, rounding="kahan"), "'rounding': 'kahan'"),
        (lambda ps: normopt.Muon(ps[:1]), "norm = 'spectral' and scale = 'unit'"),
    ],
)
def test_what_torch_does_not_have_does_not_go_back(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normopt.to_torch_state_dict(make_it(make()))


def test_torchs_names_of_a_group_are_read_when_it_is_added() -> None:
    params = make()
    opt = normopt.AdamW(params, lr=0.1)
    opt.param_groups[0]["betas"] = (0.5, 0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="read when the group is added: now set momentum and metric_beta"):
        opt.step()
    assert not opt.state


def test_state_of_a_users_own_stays_here() -> None:
    params = make()
    opt = normopt.AdamW(params, lr=0.1)
    opt.state[params[0]]["mine"] = torch.ones(1)
    AdamW(make()).load_state_dict(normopt.to_torch_state_dict(opt))


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


def test_rows_are_averaged_under_the_optimizers_own_norm() -> None:
    """A group that names another has no row averages, and no ε of the power map, unless it asks for one."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    opt = normopt.NorMuon(normopt.param_groups(model, preset="muon"))
    assert {g["norm"]: g["row_beta"] for g in opt.param_groups} == {"spectral": 0.95, "linf": 0.0}
    opt.add_param_group({"params": [("row", make()[0])], "norm": "row", "row_beta": 0.5})
    assert opt.param_groups[-1]["row_beta"] == 0.5
    stacey = normopt.Stacey([{"params": make()[:1]}, {"params": make(), "norm": "l2", "scale": "dual"}])
    assert [group["eps"] for group in stacey.param_groups] == [1e-4, 0]

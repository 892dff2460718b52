"""Every zoo member described in PyTorch's own terms: one OptimizerInfo each, as torch's tests have for theirs."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import normopt

SMALL_STEPS = {"signsgd", "signum", "lion"}  # move every weight by lr, whatever the gradient
MATRIX = {"freon", "muon", "normuon", "nucgd", "rownormsgd", "scale", "scion", "spectralsgd"}


def optim_inputs(name):
    """The settings that every test runs through, described; those of torch's SGD where they apply."""
    cls = normopt.get_optimizer(name)
    group = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    lr = 1e-3 if name in SMALL_STEPS else 1e-2

    def inputs(device, dtype=None):
        out = [
            OptimizerInput(params=None, kwargs={}, desc="default"),
            OptimizerInput(params=None, kwargs={"lr": lr}, desc="non-default lr"),
            OptimizerInput(params=None, kwargs={"lr": torch.tensor(lr)}, desc="tensor lr"),
            OptimizerInput(params=None, kwargs={"lr": lr, "weight_decay": 0.1}, desc="weight decay"),
            OptimizerInput(
                params=None, kwargs={"lr": lr, "weight_decay": 0.1, "decay": "coupled"}, desc="coupled decay"
            ),
            OptimizerInput(params=None, kwargs={"lr": lr, "weight_decay": 0.1, "maximize": True}, desc="maximize"),
            OptimizerInput(params=None, kwargs={"lr": lr, "agr": True}, desc="AGR"),
            OptimizerInput(
                params=None,
                kwargs={"lr": lr, "agr": True, "weight_decay": 0.01, "decay": "lp", "decay_p": 0.8},
                desc="AGR and lp decay",
            ),
        ]
        if "momentum" in cls.__init__.__code__.co_varnames:
            out += [OptimizerInput(params=None, kwargs={"lr": lr, "momentum": 0.5}, desc="momentum")]
        if name == "sgd":
            nesterov = {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
            dampening = {"lr": lr, "momentum": 0.9, "dampening": 0.5}
            out += [
                OptimizerInput(params=None, kwargs=nesterov, desc="nesterov"),
                OptimizerInput(params=None, kwargs=dampening, desc="dampening"),
            ]
        if "scale" in cls.__init__.__code__.co_varnames:
            scales = ("power",) if name == "freon" else ("dual", "matched")
            out += [OptimizerInput(params=None, kwargs={"lr": lr, "scale": s}, desc=s) for s in scales]
        if group["p"] is not None:
            out += [OptimizerInput(params=None, kwargs={"lr": lr, "p": 3.0}, desc="p = 3")]
        return out

    return inputs


def error_inputs(device, dtype):
    """What must be refused at construction: torch's list for all its optimizers, and ours."""
    ours = [
        ({"lr": -1e-2}, "lr must be in", "negative lr"),
        ({"weight_decay": -0.1}, "weight_decay must be in", "negative weight decay"),
        ({"decay": "l1"}, "decay must be one of", "unknown decay"),
        ({"decay_p": 0.0}, "decay_p must be in", "decay_p of zero"),
        ({"rounding": "up"}, "rounding must be one of", "unknown rounding"),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=desc), error_type=ValueError, error_regex=regex
        )
        for kwargs, regex, desc in ours
    ]


SCHEDULERS = [
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt, threshold=1e-4)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
    [lambda opt: ExponentialLR(opt, gamma=0.99)],
    [lambda opt: CosineAnnealingLR(opt, T_max=60)],
    [lambda opt: OneCycleLR(opt, max_lr=1e-2, total_steps=70, cycle_momentum=opt.defaults["momentum"] != 0)],
]

INFOS = [
    OptimizerInfo(
        normopt.get_optimizer(name),
        optim_inputs_func=optim_inputs(name),
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach",) if name in MATRIX - {"rownormsgd", "scale"} else ("foreach", "differentiable"),
        not_og_supported_flags=("state_dtype", "rounding"),
        supports_complex=name not in MATRIX,
    )
    for name in normopt.list_optimizers()
]

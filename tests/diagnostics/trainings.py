"""Trainings that can be watched, and the definitions of what a monitor should find, in float64."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import normopt
from normopt.diagnostics import TrajectoryMonitor


def oracle(iterates, losses, lrs, inf_loss=0.0):
    """The definitions, in float64, from every iterate: θ [T+1, n], ℓ and η [T]."""
    theta = np.asarray(iterates, dtype=np.float64)
    end = theta[-1]
    updates = theta[1:] - theta[:-1]
    distance = np.sqrt(((theta - end) ** 2).sum(1))
    norm = np.sqrt((updates**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (updates * (end - theta[:-1])).sum(1) / (norm * distance[:-1])
        consecutive = (updates[:-1] * updates[1:]).sum(1) / (norm[:-1] * norm[1:])
        gamma = (distance[:-1] ** 2 - distance[1:] ** 2) / (2 * np.asarray(lrs) * (np.asarray(losses) - inf_loss))
    return distance, norm, cosine, consecutive, gamma


def digits(dtype=torch.float32):
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=dtype), torch.tensor(y)


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype)


def flat(model):
    return np.concatenate([p.detach().double().reshape(-1).numpy() for p in model.parameters()])


def train(model, optimizer, steps, monitors=(), when="after", seed=0, schedule=None):
    """Iterates, losses and learning rates of a training on the digits, as they were."""
    x, y = digits(next(model.parameters()).dtype)
    batches = torch.Generator().manual_seed(seed)
    iterates, losses, lrs = [flat(model)], [], []
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        if when == "before":
            for monitor in monitors:
                monitor.record(loss)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if when == "after":
            for monitor in monitors:
                monitor.record(loss)
        if schedule is not None:
            schedule.step()
        iterates.append(flat(model))
        losses.append(loss.item())
    return np.stack(iterates), losses, lrs


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "lpsgdm": lambda p: normopt.LPSGDM(p, lr=0.01, p=3.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def one_parameter(value=(1.0, 2.0), lr=0.1, **kwargs):
    p = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    return p, TrajectoryMonitor(opt := torch.optim.SGD([p], lr=lr), sketch=64, **kwargs), opt


def step(p, opt, gradient=(1.0, -1.0)):
    p.grad = torch.tensor(gradient, dtype=p.dtype)
    opt.step()

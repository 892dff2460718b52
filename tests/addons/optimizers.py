"""Optimizers that the tests hang add-ons on: torch's with all their ways of stepping, and some of others' habits."""

from __future__ import annotations

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), (), (1,), (3, 3)]
MATRICES = [(4, 3), (3, 5)]


class Adan(Optimizer):
    """Adan as a third party might write it: its own step, which writes into ``.grad`` and keeps the previous one."""

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2, b3 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                s, g = self.state[w], w.grad
                if not s:
                    s["step"] = 0
                    s["m"], s["d"], s["n"] = (torch.zeros_like(w) for _ in range(3))
                    s["previous"] = g.clone()
                s["step"] += 1
                diff = g - s["previous"]
                s["previous"].copy_(g)
                s["m"].lerp_(g, 1 - b1)
                s["d"].lerp_(diff, 1 - b2)
                g.add_(diff, alpha=b2)
                s["n"].lerp_(g.square(), 1 - b3)
                c1, c2, c3 = (1 - b ** s["step"] for b in (b1, b2, b3))
                denominator = (s["n"] / c3).sqrt().add_(group["eps"])
                w.addcdiv_(s["m"] / c1 + b2 * s["d"] / c2, denominator, value=-group["lr"])
        return loss


class Outer(AdamW):
    """Calls the hooked step of its base class, so that every hook runs twice."""

    def step(self, closure=None):
        return super().step(closure)


class Retrying(AdamW):
    """Its base class's step fails the first time, and the second time does not."""

    fails = True

    def step(self, closure=None):
        try:
            return super().step(self.fail if self.fails else closure)
        except ArithmeticError:
            self.fails = False
            return self.step(closure)

    def fail(self):
        raise ArithmeticError


CASES = {
    "SGD": (SGD, dict(lr=0.1, momentum=0.9, nesterov=True), SHAPES),
    "SGD foreach": (SGD, dict(lr=0.1, momentum=0.9, foreach=True), SHAPES),
    "SGD fused": (SGD, dict(lr=0.1, momentum=0.9, fused=True), SHAPES),
    "Adam": (Adam, dict(lr=0.05, foreach=False), SHAPES),
    "Adam foreach": (Adam, dict(lr=0.05, foreach=True), SHAPES),
    "Adam fused": (Adam, dict(lr=0.05, fused=True, amsgrad=True), SHAPES),
    "AdamW": (AdamW, dict(lr=0.05, weight_decay=0, foreach=False), SHAPES),
    "AdamW foreach": (AdamW, dict(lr=0.05, weight_decay=0, foreach=True), SHAPES),
    "AdamW fused": (AdamW, dict(lr=0.05, weight_decay=0, fused=True), SHAPES),
    "RMSprop": (RMSprop, dict(lr=0.01, momentum=0.5, foreach=False), SHAPES),
    "RMSprop foreach": (RMSprop, dict(lr=0.01, centered=True, foreach=True), SHAPES),
    "Adagrad": (Adagrad, dict(lr=0.1, foreach=False), SHAPES),
    "Adagrad foreach": (Adagrad, dict(lr=0.1, foreach=True), SHAPES),
    "Adagrad fused": (Adagrad, dict(lr=0.1, fused=True), SHAPES),
    "Adan": (Adan, dict(lr=0.05), SHAPES),
    "Outer": (Outer, dict(lr=0.05, weight_decay=0), SHAPES),
    "Retrying": (Retrying, dict(lr=0.05, weight_decay=0), SHAPES),
}
if hasattr(torch.optim, "Muon"):
    CASES["Muon"] = (torch.optim.Muon, dict(lr=0.05, weight_decay=0), MATRICES)


def build(name, dtype=torch.float64, seed=0, **changes):
    """Parameters and their optimizer."""
    cls, settings, shapes = CASES[name]
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    return params, cls(params, **settings | changes)


def gradients(params, steps, seed=1):
    """Recorded gradients: a list of tensors a step."""
    torch.manual_seed(seed)
    return [[torch.randn_like(p) for p in params] for _ in range(steps)]


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def copies(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

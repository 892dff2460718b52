"""Optimizers in NumPy float64, from their papers; AGR and the factor of ℓp decay are those of tests/oracle.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.oracle import agr, lp_decay_factor

Array = np.ndarray
Update = Callable[[Array, Array, float, dict], Array]


def sgd(mu: float) -> Update:
    """Heavy ball as torch.optim.SGD has it: m ← μm + g from m = g."""

    def step(w: Array, g: Array, lr: float, s: dict) -> Array:
        s["m"] = mu * s["m"] + g if "m" in s else g
        return w - lr * s["m"]

    return step


def adamw(weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Update:
    """arXiv 1711.05101."""

    def step(w: Array, g: Array, lr: float, s: dict) -> Array:
        s["t"] = s.get("t", 0) + 1
        s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
        s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
        m_hat, v_hat = s["m"] / (1 - beta1 ** s["t"]), s["v"] / (1 - beta2 ** s["t"])
        return (1 - lr * weight_decay) * w - lr * m_hat / (np.sqrt(v_hat) + eps)

    return step


def adan(beta1: float = 0.98, beta2: float = 0.92, beta3: float = 0.99, eps: float = 1e-8) -> Update:
    """arXiv 2208.06677, with the bias corrections of its authors' code; the βs weight the OLD state."""

    def step(w: Array, g: Array, lr: float, s: dict) -> Array:
        s["t"] = s.get("t", 0) + 1
        diff = g - s.get("previous", g)
        s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
        s["d"] = beta2 * s.get("d", 0) + (1 - beta2) * diff
        s["n"] = beta3 * s.get("n", 0) + (1 - beta3) * (g + beta2 * diff) ** 2
        s["previous"] = g
        b1, b2, b3 = (1 - b ** s["t"] for b in (beta1, beta2, beta3))
        return w - lr * (s["m"] / b1 + beta2 * s["d"] / b2) / (np.sqrt(s["n"] / b3) + eps)

    return step


def cosine(lr: float, t: int, total: int) -> float:
    """The learning rate of step t = 0, 1, …"""
    return lr * (1 + math.cos(math.pi * t / total)) / 2


def walk(
    update: Update,
    weights: Sequence[Array],
    gradients: Sequence[Sequence[Array]],
    lr: float,
    with_agr: bool = False,
    decay: tuple[float, float] | None = None,
) -> tuple[list[Array], list[dict]]:
    """Weights and states after a step a list of gradients, under a cosine lr; ``decay`` is (p, λ)."""
    ws, states = [w.copy() for w in weights], [{} for _ in weights]
    for t, gs in enumerate(gradients):
        eta = cosine(lr, t, len(gradients))
        for i, (w, g, s) in enumerate(zip(ws, gs, states, strict=True)):
            new = update(w, agr(g) if with_agr else g, eta, s)
            if decay is not None and w.ndim >= 2:
                new = new * lp_decay_factor(w, decay[0], eta * decay[1])
            ws[i] = new
    return ws, states


def group_factor(w: Array, over: str, p: float, reach: float, heads: int = 1) -> Array:
    """The factor of every entry, by a loop over the groups: X/(X + pηλ) with X = ‖w_G‖₂^(2−p)."""
    members = np.zeros(w.shape, dtype=int)
    for index in np.ndindex(w.shape):
        members[index] = {"rows": index[0], "columns": index[1], "heads": index[0] * heads // w.shape[0]}[over]
    out = np.ones_like(w)
    for group in range(members.max() + 1):
        length = math.sqrt(math.fsum(float(x) ** 2 for x in w[members == group]))
        out[members == group] = lp_decay_factor(np.array([length]), p, reach)[0]
    return out

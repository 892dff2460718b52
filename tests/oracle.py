"""The judge: every rule in NumPy, written from the papers' formulas and from no line of normopt.

float64 throughout, and longdouble (a 15-bit exponent) inside norms, so that plain formulas hold from
1e-30 to 1e30 without any scaling. Arrays in, arrays out; nothing here is fast or in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


def lp_norm(x: Array, p: float) -> float:
    a = np.abs(x).astype(np.longdouble).ravel()
    if a.size == 0:
        return np.longdouble(0)
    return a.max() if p == math.inf else (a**p).sum() ** (np.longdouble(1) / np.longdouble(p))


def conjugate(p: float) -> float:
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1)


def lp_dual_norm(g: Array, p: float) -> float:
    return lp_norm(g, conjugate(p))


def lp_dual_map(g: Array, p: float, norm: float | None = None) -> Array:
    """argmax ⟨g, d⟩ over ‖d‖_p ≤ 1: sign(g)(|g|/‖g‖_q)^(q−1); p = 1 puts ±1 on the first largest entry."""
    norm = lp_dual_norm(g, p) if norm is None else norm
    if norm == 0 or g.size == 0:
        return np.zeros_like(g, dtype=np.float64)
    if p == math.inf:
        return np.sign(g)
    if p == 1:
        d = np.zeros_like(g, dtype=np.float64)
        i = np.abs(g).argmax()
        d.flat[i] = np.sign(g.flat[i]) * (np.abs(g.flat[i]) == norm)
        return d
    a = np.abs(g).astype(np.longdouble) / norm
    return (np.sign(g) * a ** (np.longdouble(1) / np.longdouble(p - 1))).astype(np.float64)


def power_map(c: Array, p: float, eps: float = 0.0) -> Array:
    rho = 1.0 if p == math.inf else 1 - 1 / (p - 1)
    if eps > 0:
        return c * (np.abs(c) + eps) ** (-rho)
    return np.sign(c) * np.abs(c).astype(np.longdouble) ** (1 - np.longdouble(rho))


def rms(x: Array) -> float:
    return np.sqrt(np.mean(x.astype(np.longdouble) ** 2))


def direction(cs: list[Array], p: float, scale: str, scope: str = "tensor", eps: float = 0.0) -> list[Array]:
    if scale == "power":
        return [power_map(c, p, eps).astype(np.float64) for c in cs]
    if scope == "group":
        whole = np.concatenate([c.ravel() for c in cs])
        n = lp_dual_norm(whole, p)
        d = lp_dual_map(whole, p)
        ends = np.cumsum([c.size for c in cs])[:-1]
        ds = [x.reshape(c.shape) for x, c in zip(np.split(d, ends), cs, strict=True)]
        return [x if scale == "unit" else (n * x).astype(np.float64) for x in ds]
    out = []
    for c in cs:
        d, n = lp_dual_map(c, p), lp_dual_norm(c, p)
        if scale == "unit":
            u = d
        elif scale == "dual":
            u = (n * d).astype(np.float64)
        else:
            u = d if n == 0 else (d * (rms(c) / rms(d))).astype(np.float64)
        out.append(u)
    return out


def agr(g: Array) -> Array:
    """g(1 − |g|/Σ|g|) of arXiv 2407.16944, with Σ of the others for the largest entry, where 1 − x cancels."""
    total = np.abs(g).sum()
    if g.size <= 1 or total == 0:
        return g
    flat = g.ravel()
    out = flat * (1 - np.abs(flat) / total)
    i = np.abs(flat).argmax()
    out[i] = flat[i] * (np.abs(np.delete(flat, i)).sum() / total)
    return out.reshape(g.shape)


def scaled_to(x: Array, length: float) -> Array:
    """x at an ℓ2 length; 0 stays 0."""
    n = lp_norm(x, 2)
    return x if n == 0 else (x * (length / n)).astype(np.float64)


def polar(c: Array) -> Array:
    """UVᵀ of c as a matrix, dim 0 × the rest; of a vector c/‖c‖₂."""
    if c.ndim < 2:
        return scaled_to(c, 1.0)
    u, _, vt = np.linalg.svd(c.reshape(len(c), -1), full_matrices=False)
    return (u @ vt).reshape(c.shape)


def lp_decay_factor(w: Array, p: float, lr_decay: float) -> Array:
    """X/(X + pηλ) with X = |w|^(2−p), of arXiv 2404.10824; 1/(1 + pηλ|w|^(p−2)) for p ≥ 2."""
    k = p * lr_decay
    if k == 0:
        return np.ones_like(w)
    if p >= 2:
        return 1 / (1 + k * np.abs(w) ** (p - 2))
    x = np.abs(w) ** (2 - p)
    return x / (x + k)


@dataclass
class Rule:
    """One optimizer as numbers; ``step`` advances weights and buffers and keeps what it read as c."""

    p: float = 2.0
    scale: str = "dual"
    scope: str = "tensor"
    eps: float = 0.0
    lr: float = 1e-3
    radius: float = 1.0
    momentum: float = 0.0
    momentum_rule: str = "heavy"
    beta2: float = 0.99
    dampening: float = 0.0
    nesterov: bool = False
    agr: bool = False
    weight_decay: float = 0.0
    decay: str = "decoupled"
    decay_p: float = 1.0
    maximize: bool = False
    bias_correction: bool = False
    metric: str = "none"
    metric_beta: float = 0.999
    metric_eps: float = 1e-8
    metric_rule: str = "average"
    agr_scope: str = "tensor"
    difference_beta: float = 0.0
    row_beta: float = 0.0
    coupling: float = 0.0
    coupling_rate: float = 1e-3
    constraint: str = "none"
    spectral: bool = False
    t: int = 0
    d: list[Array] = field(default_factory=list)
    before: list[Array] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    z: list[Array] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)
    top: list[Array] = field(default_factory=list)
    c: list[Array] = field(default_factory=list)
    u: list[Array] = field(default_factory=list)

    def step(self, ws: list[Array], gs: list[Array], ms: list[Array | None]) -> tuple[list[Array], list[Array | None]]:
        lam, eta, mu, r = self.weight_decay, self.lr, self.momentum, self.radius
        new_m: list[Array | None] = []
        self.c, seen = [], []
        self.t += 1
        for x, w, m in zip(self._regularized(gs), ws, ms, strict=True):
            x = x + lam * w if self.decay == "coupled" else x
            c, m2 = self._momentum(x, m, mu)
            self.c.append(c / self._weights() if self.bias_correction else c)
            seen.append(x)
            new_m.append(m2)
        if self.difference_beta:
            seen = self._differences(seen)
        base = "dual" if self.scale == "relative" else self.scale
        if self.spectral:
            self.u = [polar(c) for c in self.c]
        elif self.metric == "none":
            self.u = direction(self.c, self.p, base, self.scope, self.eps)
        else:
            self.u = self._in_coordinates(seen, base)
        if self.row_beta:
            self.u = self._rows(self.u)
        if self.decay == "inside":
            self.u = [u + lam * w for u, w in zip(self.u, ws, strict=True)]
        if self.scale == "relative":
            lengths = [float(lp_norm(w, 2)) or float(lp_norm(u, 2)) for w, u in zip(ws, self.u, strict=True)]
            self.u = [scaled_to(u, n) for u, n in zip(self.u, lengths, strict=True)]
        if self.constraint == "sphere":
            self.radii = self.radii or [float(lp_norm(w, 2)) for w in ws]
            self.u = [scaled_to(u, n) for u, n in zip(self.u, self.radii, strict=True)]
        new_w = []
        for i, (w, u) in enumerate(zip(ws, self.u, strict=True)):
            k = 1 - self.coupling
            kind = self.decay.removeprefix("cautious-")
            aligned = np.sign(u) * np.sign(w) >= 0 if self.decay.startswith("cautious") else np.ones(w.shape, bool)
            if kind in ("decoupled", "cautious") and lam:
                after = (1 - eta * lam * aligned) * w - eta * r * k * u
            elif kind == "proximal":
                after = (w - eta * r * k * u) / (1 + eta * lam)
            elif kind == "lp" and lam and w.ndim >= 2:
                after = (w - eta * r * k * u) * np.where(aligned, lp_decay_factor(w, self.decay_p, eta * lam), 1)
            else:
                after = w - eta * r * k * u
            if self.coupling:
                self.z = self.z or [x.copy() for x in ws]
                self.z[i] = self.z[i] - self.coupling_rate * self.c[i]
                after = after + self.coupling * (self.z[i] - w)
            new_w.append(scaled_to(after, self.radii[i]) if self.constraint == "sphere" else after)
        return new_w, new_m

    def _regularized(self, gs: list[Array]) -> list[Array]:
        xs = [-g if self.maximize else g for g in gs]
        if not self.agr:
            return xs
        if self.agr_scope == "tensor":
            return [agr(x) for x in xs]
        whole = agr(np.concatenate([x.ravel() for x in xs]))
        ends = np.cumsum([x.size for x in xs])[:-1]
        return [x.reshape(g.shape) for x, g in zip(np.split(whole, ends), gs, strict=True)]

    def _differences(self, gs: list[Array]) -> list[Array]:
        """Add β·d/(1−βᵗ) to c; return g + β(g − g_prev), which the metric sees. Adan, arXiv:2208.06677."""
        beta = self.difference_beta
        changes = [g - b for g, b in zip(gs, self.before or gs, strict=True)]
        self.d = [beta * d + (1 - beta) * x for d, x in zip(self.d or [0 * g for g in gs], changes, strict=True)]
        self.before = [g.copy() for g in gs]
        share = 1 - beta**self.t if self.bias_correction else 1.0
        self.c = [c + beta * d / share for c, d in zip(self.c, self.d, strict=True)]
        return [g + beta * x for g, x in zip(gs, changes, strict=True)]

    def _rows(self, us: list[Array]) -> list[Array]:
        """NorMuon, arXiv:2510.05491: rows are those of a tensor's dim 0."""
        flat = [u.reshape(len(u), -1) for u in us]
        means = [(u**2).mean(1, keepdims=True) for u in flat]
        beta = self.row_beta
        self.rows = [beta * v + (1 - beta) * x for v, x in zip(self.rows or [0 * x for x in means], means, strict=True)]
        out = [u / (np.sqrt(v) + 1e-8) for u, v in zip(flat, self.rows, strict=True)]
        return [scaled_to(x, float(lp_norm(u, 2))).reshape(u.shape) for x, u in zip(out, us, strict=True)]

    def _weights(self) -> float:
        """The sum of the weights of gradients 1 … t in c, added up one by one."""
        if self.momentum == 0:
            return 1.0
        m: Array | None = None
        c = np.zeros(())
        for _ in range(self.t):
            c, m = self._momentum(np.ones(()), m, self.momentum)
        return float(c)

    def metric_of(self, gs: list[Array]) -> list[Array]:
        """P = √v̂ + ε of each tensor, after v has seen these gradients."""
        beta, zeros = self.metric_beta, [np.zeros_like(g) for g in gs]
        v = self.v or zeros
        if self.metric_rule == "sum":
            self.v = [x + g**2 for x, g in zip(v, gs, strict=True)]
            return [np.sqrt(x) + self.metric_eps for x in self.v]
        self.v = [beta * x + (1 - beta) * g**2 for x, g in zip(v, gs, strict=True)]
        self.top = [np.maximum(x, y) for x, y in zip(self.top or zeros, self.v, strict=True)]
        used = self.top if self.metric_rule == "max" else self.v
        share = sum((1 - beta) * beta**k for k in range(self.t)) if self.bias_correction else 1.0
        return [np.sqrt(x / share) + self.metric_eps for x in used]

    def _in_coordinates(self, gs: list[Array], scale: str) -> list[Array]:
        metric = self.metric_of(gs)
        plain = "dual" if scale == "matched" else scale
        white = [c / np.sqrt(x) for c, x in zip(self.c, metric, strict=True)]
        us = [
            u / np.sqrt(x) for u, x in zip(direction(white, self.p, plain, self.scope, self.eps), metric, strict=True)
        ]
        if scale != "matched":
            return us
        straight = [c / x for c, x in zip(self.c, metric, strict=True)]  # P⁻¹c
        return [u * float(rms(s) / rms(u) if u.any() else 1.0) for u, s in zip(us, straight, strict=True)]

    def _momentum(self, g: Array, m: Array | None, mu: float) -> tuple[Array, Array | None]:
        if mu == 0:
            return g, m
        if self.momentum_rule == "heavy":
            m2 = g.copy() if m is None else mu * m + (1 - self.dampening) * g
            return (g + mu * m2 if self.nesterov else m2), m2
        m = np.zeros_like(g) if m is None else m
        if self.momentum_rule == "ema":
            m2 = mu * m + (1 - mu) * g
            return ((1 - mu) * g + mu * m2 if self.nesterov else m2), m2
        return mu * m + (1 - mu) * g, self.beta2 * m + (1 - self.beta2) * g

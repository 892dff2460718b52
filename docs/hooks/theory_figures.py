"""The figures of the theory pages, drawn anew for the site from normopt itself.

As an MkDocs hook it adds ``theory/scales.svg``, ``theory/annealing.svg`` and ``theory/decay-agr.svg``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import normopt
from normopt.norms import Lp

sys.path.insert(0, str(Path(__file__).parent))
from style import COLOURS, GREY, STYLE, svg

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SCALES = ("unit", "dual", "power", "matched")
N = 1000


def gaussian() -> torch.Tensor:
    """N numbers from a Gaussian, the same every time."""
    return torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def p_axis(ax: Axes, ps: list[float]) -> None:
    """An axis that is even in 1/p, from the smallest p to ∞."""
    ax.set_xticks([1 / p for p in ps], [f"{p:g}".replace("inf", "∞") for p in ps])
    ax.set_xlim(1 / ps[0], 1 / ps[-1])
    ax.set_xlabel("p")


def step(w: torch.Tensor, g: torch.Tensor, **settings: object) -> torch.Tensor:
    """The weights after one step of the engine."""
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    normopt.SteepestDescent([p], lr=1.0, **settings).step()  # type: ignore[arg-type]
    return p.detach()


def scales() -> str:
    """How long an update is under each scale."""
    c = 1e-3 * gaussian()
    inverse = np.linspace(1 / 1.5, 0, 81)
    fig, ax = plt.subplots(figsize=(7, 3.2))
    for scale in SCALES:
        lengths = []
        for x in inverse:
            p = math.inf if x == 0 else 1 / float(x)
            u = -step(torch.zeros_like(c), c, norm="lp", p=p, scale=scale)
            lengths.append((u.norm() / c.norm()).item())
        ax.plot(inverse, lengths, label=scale)
    p_axis(ax, [1.5, 2, 3, 4, 8, math.inf])
    ax.set(yscale="log", ylabel="RMS(u) / RMS(c)")
    fig.legend(loc="outside upper center", ncols=4)
    return svg(fig)


def annealing() -> str:
    """The exponent over a schedule, and what each p guarantees on a diagonal quadratic."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    steps = 101
    for space, name in (("p", "annealed in p"), ("exponent", "annealed in the exponent")):
        opt = normopt.LPSGD([torch.nn.Parameter(torch.ones(1))], p=8.0)
        schedule = normopt.schedules.CosineP(opt, total_steps=steps, space=space)  # type: ignore[arg-type]
        exponents = []
        for _ in range(steps):
            exponents.append(1 / (opt.param_groups[0]["p"] - 1))
            opt.step()
            schedule.step()
        left.plot(np.linspace(0, 100, steps), exponents, label=name)
    left.set(xlabel="part of the training (%)", ylabel="κ = 1/(p−1)", ylim=(0, 1.05))
    left.legend(loc="upper left")
    uneven, even = 1 / torch.arange(1, N + 1, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    cases = [("h = 1/i, Gaussian g", uneven, gaussian()), ("h = 1/i, g = h", uneven, uneven)]
    cases.append(("h = 1, Gaussian g", even, gaussian()))
    inverse = np.linspace(1 / 2, 0, 61)
    for (name, h, g), colour in zip(cases, COLOURS[2:], strict=False):
        gains = [decrease(h, g, x) / decrease(h, g, 0.5) for x in inverse]
        right.plot(inverse, gains, label=name, color=colour)
    right.axhline(1, color=GREY, lw=0.8, ls=(0, (4, 3)))
    p_axis(right, [2, 3, 4, 8, math.inf])
    right.set(yscale="log", ylabel="guarantee, relative to p = 2")
    right.legend(loc="best")
    return svg(fig)


def decrease(h: torch.Tensor, g: torch.Tensor, inverse: float) -> float:
    """The guaranteed decrease ‖g‖_q²/(2L_p) at p = 1/inverse ≥ 2, with L_p the ℓ_{p/(p−2)} norm of the curvatures."""
    p = math.inf if inverse == 0 else 1 / float(inverse)
    smoothness = Lp(math.inf if p == 2 else 1 / (1 - 2 * float(inverse))).norm(h)
    return (Lp(p).dual_norm(g).square() / (2 * smoothness)).item()


def decay_and_agr() -> str:
    """Weights on their way to zero, and AGR's soft cap."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    k = 0.01
    for p, colour in zip((0.5, 1.0, 1.5, 2.0), COLOURS, strict=False):
        w = torch.nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
        w.grad = torch.zeros_like(w)
        opt = normopt.SGD([w], lr=0.1, weight_decay=k / (0.1 * p), decay="lp", decay_p=p)
        walk = []
        for _ in range(300):
            walk.append(w[0, 0].item())
            opt.step()
        left.plot(walk, color=colour, label=f"p = {p:g}")
        if p < 2:
            left.axvline(1 / ((2 - p) * k), color=colour, lw=1, ls=":")
    left.set(xlabel="steps", ylabel="|w|", ylim=(0, 1.02), xlim=(0, 300))
    left.legend()
    sizes = np.linspace(0, 5, 101)
    capped = []
    for x in sizes:
        g = torch.tensor([float(x), 0.5, 0.5], dtype=torch.float64)  # r = 1
        capped.append(-step(torch.zeros_like(g), g, norm="l2", scale="dual", agr=True)[0].item())
    right.plot(sizes, np.minimum(sizes, 1), color=GREY, lw=1, ls=(0, (4, 3)), label="min(x, r)")
    right.plot(sizes, capped, label="AGR: xr/(x + r)")
    right.set(xlabel="x/r", ylabel="result / r", ylim=(0, 1.25))
    right.legend()
    return svg(fig)


FIGURES: dict[str, Callable[[], str]] = {"scales": scales, "annealing": annealing, "decay-agr": decay_and_agr}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Draw them for the site; nothing is written into docs/."""
    from mkdocs.structure.files import File

    for name, draw in FIGURES.items():
        with plt.rc_context(STYLE):
            files.append(File.generated(config, f"theory/{name}.svg", content=draw()))
    return files

"""The picture of the whole idea: ℓp unit balls, one gradient, and the dual map of each.

As an MkDocs hook it adds ``assets/unit_balls.svg`` to the site, and the same in two rows for phones. Run it to write
the copy that the README shows: ``python docs/hooks/unit_balls.py``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import normopt

sys.path.insert(0, str(Path(__file__).parent))
from style import COLOURS, GREY, STYLE, svg

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

NAME = "assets/unit_balls.svg"
NARROW = "assets/unit_balls_narrow.svg"
GRADIENT = (1.0, 0.45)


def ball(p: float) -> tuple[np.ndarray, np.ndarray]:
    """The unit circle of ℓp: every direction divided by its ℓp norm."""
    angle = np.linspace(0, 2 * math.pi, 361)
    x, y = np.cos(angle), np.sin(angle)
    size = np.maximum(abs(x), abs(y)) if p == math.inf else (abs(x) ** p + abs(y) ** p) ** (1 / p)
    return x / size, y / size


def draw(rows: int = 1) -> str:
    """The picture, as SVG text, with its panels in so many rows."""
    g = torch.tensor(GRADIENT, dtype=torch.float64)
    panels = [(1.0, "p = 1", "one coordinate"), (2.0, "p = 2", "SGD"), (4.0, "p = 4", "in between")]
    panels.append((math.inf, "p = ∞", "signSGD"))
    with plt.rc_context(STYLE):
        columns = len(panels) // rows
        fig, grid = plt.subplots(rows, columns, figsize=(2.25 * columns, 2.75 * rows), squeeze=False)
        axes = grid.ravel()
        for ax, (p, title, who), colour in zip(axes, panels, COLOURS, strict=False):
            d = normopt.norms.Lp(p).dual_map(g).tolist()
            # The line on which ⟨g, d⟩ is as large as the ball allows: it touches the ball at D(g).
            along = np.array([-GRADIENT[1], GRADIENT[0]]) / math.hypot(*GRADIENT)
            line = np.array(d)[:, None] + along[:, None] * np.array([-0.75, 0.75])
            ax.plot(*line, color=GREY, lw=1, ls=(0, (4, 3)))
            ax.fill(*ball(p), facecolor=colour, alpha=0.14)
            ax.plot(*ball(p), color=colour, lw=1.6)
            arrow(ax, GRADIENT, GREY, 1.4)
            arrow(ax, d, colour, 2.4)
            ax.set(xlim=(-1.1, 1.5), ylim=(-1.1, 1.35), aspect="equal")
            ax.axis("off")
            ax.text(0, -1.2, f"{title}\n{who}", ha="center", va="top")
        axes[0].text(1.06, 0.5, "g", fontsize=12)
        axes[0].text(0.3, -0.24, "D(g)", color=COLOURS[0], fontsize=12)
        return svg(fig)


def arrow(ax: Axes, to: tuple[float, ...] | list[float], colour: str, width: float) -> None:
    """An arrow from the origin."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    ax.annotate("", xy=(to[0], to[1]), xytext=(0, 0), arrowprops=style)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Draw it anew for the site, so that it always shows what the code does."""
    from mkdocs.structure.files import File

    committed = files.get_file_from_path(NAME)
    if committed is not None:
        files.remove(committed)
    files.append(File.generated(config, NAME, content=draw()))
    files.append(File.generated(config, NARROW, content=draw(rows=2)))
    return files


if __name__ == "__main__":
    (Path(__file__).parents[1] / NAME).write_text(draw(), encoding="utf-8")

"""How every figure of the documentation looks: no background, and lines that read on white and on near-black."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("svg")  # a build has no display

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

GREY = "#808894"  # about equally far from the site's white and from its dark background
COLOURS = ["#3b82f6", "#e8743b", "#1f9d6c", "#b05ce6", "#c9a100", "#d6457a"]

STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",  # no font has to be found where the page is read
    "svg.hashsalt": "normopt",  # the same figure gives the same file
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def svg(figure: Figure) -> str:
    """A figure as SVG text without a date or a version in it; the figure is closed."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)

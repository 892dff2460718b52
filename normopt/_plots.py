"""Import matplotlib, an optional dependency, only when something is plotted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def subplots(rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes from matplotlib.pyplot.subplots.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plotting needs matplotlib: install the extra "plots", pip install "normopt[plots]"', name=error.name
        ) from error
    figure, axes = plt.subplots(rows, columns, **options)
    return figure, axes

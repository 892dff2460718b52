"""How long a test waits for another process before it says that nothing will come."""

from __future__ import annotations

import os


def patience(seconds: float) -> float:
    """Three times what an idle machine needs; more where more is running than there are cores.

    Args:
        seconds: how long it takes on an idle machine, at most.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    return 3 * seconds * max(1.0, load / (os.cpu_count() or 1))

"""An optimizer that tells a file of each step."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


class Counted(torch.optim.SGD):
    def step(self, closure=None):
        with Path(os.environ["COUNTED"]).open("ab") as file:
            file.write(b".")
        time.sleep(0.005)
        return super().step(closure)

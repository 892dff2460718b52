"""What the memory allows: the least time in which a step with momentum could read w, g and m and write w and m."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.speed.models import Tensors
from normopt.kernels.pool import share_out
from normopt.kernels.tables import Chunks

STREAMS = 5  # w, g, m read; w, m written


class Loop:
    """The barest loop in place that reads three streams and writes two, over the very tensors, on torch's threads."""

    name = "in-place loop"

    def __init__(self, tensors: Tensors) -> None:
        try:
            from benchmarks.speed.loop import kernel
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f'the limit of a CPU needs {error.name}: pip install -e ".[cpu]"') from None
        self.tensors = tensors
        self.chunks = Chunks([w.shape for w in tensors.weights])
        self.kernel = kernel(tensors.weights[0].dtype == torch.bfloat16)
        self.refresh()

    def refresh(self) -> None:
        """Note where the tensors are now; no part of a step."""
        t = self.tensors
        lists = t.weights, t.gradients, t.buffers[0]
        self.tables = [np.array([x.data_ptr() for x in tensors], dtype=np.int64) for tensors in lists]

    def step(self) -> None:
        """Once over the tensors."""
        table = *self.tables, self.chunks.tensor, self.chunks.start, self.chunks.count
        share_out(lambda begin, end: self.kernel(*table, begin, end), self.chunks)


class Copy:
    """One copy on the device of as many bytes: half of the streams are read, and as many written."""

    name = "copy of as many bytes"

    def __init__(self, tensors: Tensors) -> None:
        w = tensors.weights[0]
        self.source = torch.zeros(STREAMS * tensors.bytes // 2, dtype=torch.uint8, device=w.device)
        self.target = torch.empty_like(self.source)

    def refresh(self) -> None:
        """There is nothing to note."""

    def step(self) -> None:
        """Once over the bytes."""
        self.target.copy_(self.source)


def limit(tensors: Tensors) -> Loop | Copy:
    """The limit of the device that the tensors are on."""
    return Copy(tensors) if tensors.weights[0].is_cuda else Loop(tensors)

"""What is stepped: the parameter lists of models, without the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.speed.records import told_by_linux

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A name, the shapes of the parameters, how many of the first are embeddings, and of which sweep it is a point."""

    name: str
    shapes: tuple[Shape, ...]
    embeddings: int = 0
    sweep: str = ""

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def matrices(self) -> Model:
        """The matrices alone, without the embeddings: what Muon is for."""
        return Model(self.name, tuple(s for s in self.shapes[self.embeddings :] if len(s) == 2))


def resnet18() -> Iterator[Shape]:
    """The parameters of torchvision's ResNet-18, in their order."""

    def convolution(outs: int, ins: int, side: int) -> Iterator[Shape]:
        yield outs, ins, side, side
        yield from ((outs,), (outs,))  # the batch norm behind it

    yield from convolution(64, 3, 7)
    ins = 64
    for outs in (64, 128, 256, 512):
        for block in range(2):
            yield from convolution(outs, ins, 3)
            yield from convolution(outs, outs, 3)
            if block == 0 and ins != outs:
                yield from convolution(outs, ins, 1)
            ins = outs
    yield from ((1000, 512), (1000,))


def vit() -> Iterator[Shape]:
    """The parameters of timm's ViT-S/16, in their order."""
    d = 384
    yield from ((1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,))
    for _ in range(12):
        yield from ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,))
        yield from ((d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,))
    yield from ((d,), (d,), (1000, d), (1000,))


def gpt2() -> Iterator[Shape]:
    """The parameters of GPT-2's smallest size, in their order; the output shares the embedding."""
    d = 768
    yield from ((50257, d), (1024, d))
    for _ in range(12):
        yield from ((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,))
        yield from ((d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,))
    yield from ((d,), (d,))


MODELS = {
    model.name: model
    for model in (
        Model("mlp", ((128, 64), (128,), (128, 128), (128,), (10, 128), (10,))),  # of the task digits
        Model("resnet18", tuple(resnet18())),
        Model("vit-s", tuple(vit())),
        Model("gpt2", tuple(gpt2()), embeddings=2),
        Model("tiny1000", ((1000,),) * 1000),
        Model("one100m", ((10_000, 10_000),)),
        Model("polar", ((256, 256),) * 24 + ((128, 512),) * 48),
    )
}
MATRICES = "polar"
TINY = "tiny1000"

# How the cost of a step grows: with the number of tensors at one total, and with the total.
COUNTS, MILLIONS = (10, 30, 100, 300, 1000, 3000, 10_000), (1, 3, 10, 30, 100, 300, 500)
SWEEP = (
    *(Model(f"{n} tensors", ((10_000_000 // n,),) * n, sweep="tensors") for n in COUNTS),
    *(Model(f"{n} M parameters", ((n * 10_000,),) * 100, sweep="parameters") for n in MILLIONS),
)


class Tensors:
    """A model's weights and gradients, and the buffers of state: one set, which all that step them share.

    So every candidate finds the same addresses and the same cache behind the one before it, and memory is needed once.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(size: float) -> list[Tensor]:
            return [size * torch.randn(s, generator=generator, dtype=dtype, device=device) for s in model.shapes]

        self.weights = [Parameter(x) for x in drawn(0.05)]
        self.drawn = drawn(0.01)
        self.buffers = [[torch.zeros_like(w) for w in self.weights] for _ in range(2)]
        self.gradients: list[Tensor] = []
        self.renew()

    @property
    def bytes(self) -> int:
        """Of the weights alone."""
        return sum(w.numel() * w.element_size() for w in self.weights)

    def renew(self) -> None:
        """Make the gradients anew, as after ``zero_grad(set_to_none=True)``: as drawn, none where one was before."""
        self.gradients = [g.clone() for g in self.drawn]  # the old are alive until all new ones are there
        for w, g in zip(self.weights, self.gradients, strict=True):
            w.grad = g

    @property
    def intact(self) -> bool:
        """Whether the gradients are where they were given, and as they were drawn."""
        given = zip(self.weights, self.gradients, self.drawn, strict=True)
        return all(w.grad is g and torch.equal(g, drawn) for w, g, drawn in given)

    def adopt(self, optimizer: Optimizer) -> None:
        """Put the shared buffers in the place of an optimizer's own."""
        for i, w in enumerate(self.weights):
            own = optimizer.state.get(w, {})
            alike = [k for k, x in own.items() if isinstance(x, Tensor) and (x.shape, x.dtype) == (w.shape, w.dtype)]
            for key, buffers in zip(alike, self.buffers, strict=False):
                own[key] = buffers[i]


SETS = 11  # of a model's size, alive at once: weights 1, gradients 3 (drawn, old, new), state 4, temporaries 3


def fits(model: Model, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the free memory is enough to time a model; True if the system does not report it."""
    if device.type == "cuda":
        free: float = torch.cuda.mem_get_info(device)[0]
    else:
        said = told_by_linux("meminfo", "MemAvailable")
        free = 1024 * int(said.split()[0]) if said else inf
    return SETS * model.parameters * dtype.itemsize <= free

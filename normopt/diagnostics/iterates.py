"""What is kept of a trajectory's weights: a sketch of every update in memory, or every iterate in a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normopt.diagnostics.measures import entries
from normopt.diagnostics.sketch import Sketch
from normopt.sharding.exchange import summed
from normopt.sharding.layout import layout_of, local

Array = NDArray[np.float64]
LOSS, LR = 0, 1  # the columns of what is kept of a step besides its update
CHUNK = 256  # steps for which memory is taken at once
ABOUT, ITERATES, STEPS = "about.json", "iterates.bin", "steps.bin"


@dataclass(frozen=True)
class Walk:
    """A trajectory's lengths and angles, for T steps, and the losses and learning rates that were kept with them."""

    loss: Array
    lr: Array
    distance: Array  # T + 1: the last is 0
    update_l2: Array
    cosine: Array
    consecutive_cosine: Array  # T − 1
    sketch: int | None


class Weights:
    """Parameters as one vector in pieces, one a device, in float64 if any of them is, else in float32.

    Of DTensors each rank has the part that is here, and what all ranks have whole is the first one's alone: what is
    summed over the vector is then summed over the ranks, by ``over_ranks``.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        # float32 holds every value of the 16-bit formats.
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        self.dtype = torch.float64 if wide else torch.float32
        layouts = [layout_of(p) for p in params]
        self.cut = next((lay for lay in layouts if lay is not None), None)
        if len({lay.group for lay in layouts if lay is not None}) > 1:
            raise ValueError(
                "a monitor takes parameters that are cut over one process group, but these are over several"
            )
        self.on: dict[torch.device, list[Tensor]] = {}
        for p, layout in zip(params, layouts, strict=True):
            of_device = self.on.setdefault(p.device, [])
            if layout is not None or self.cut is None or self.cut.rank == 0:
                of_device.append(p)
        self.shapes = [[_shape(p) for p in ps] for ps in self.on.values()]
        self.sizes = [sum(map(math.prod, shapes)) for shapes in self.shapes]

    @torch.no_grad()
    def now(self) -> list[Tensor]:
        """A copy of the weights as they are, on the devices where they were.

        Raises:
            RuntimeError: a parameter was given another shape.
        """
        for ps, shapes in zip(self.on.values(), self.shapes, strict=True):
            for p, shape in zip(ps, shapes, strict=True):
                if _shape(p) != shape:
                    raise RuntimeError(
                        f"a parameter has the shape {tuple(_shape(p))}, but had {tuple(shape)} when the monitor was "
                        "made: call result() before shapes change, and make another monitor after it"
                    )
        return [
            torch.cat(
                [
                    torch.empty(0, dtype=self.dtype, device=device),
                    *(entries(local(p)).reshape(-1).to(device, self.dtype) for p in ps),
                ]
            )
            for device, ps in self.on.items()
        ]

    def over_ranks(self, sums: Array) -> Array:
        """Numbers summed over all ranks that have parts of the vector."""
        if self.cut is None:
            return sums
        return summed(torch.from_numpy(sums).to(next(iter(self.on))), self.cut).cpu().numpy()


def _shape(p: Tensor) -> torch.Size:
    """The shape of what is here of a parameter, as reals."""
    here = local(p)
    return torch.Size((*here.shape, 2)) if here.is_complex() else here.shape


class Store(Protocol):
    """What a monitor writes into. ``steps`` is how many updates are in it."""

    steps: int

    def begin(self) -> None:
        """Take the weights as θ_0."""

    def move(self) -> None:
        """Keep the update from the weights that were taken last to those of now."""

    def stay(self) -> None:
        """Keep an update of zero."""

    def put(self, step: int, column: int, value: float | Tensor) -> None:
        """Keep the loss or the learning rate of a step."""

    def walk(self) -> Walk: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Rows:
    """A table that grows on a device, in chunks, so that a row is appended without asking the device anything."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = width, dtype, device
        self.chunks: list[Tensor] = []

    def row(self, i: int) -> Tensor:
        """Row i, to write into; NaN if it is new."""
        while i >= CHUNK * len(self.chunks):
            self.chunks.append(torch.full((CHUNK, self.width), torch.nan, dtype=self.dtype, device=self.device))
        return self.chunks[i // CHUNK][i % CHUNK]

    def first(self, n: int) -> Tensor:
        """A copy of the first n rows."""
        if n:
            self.row(n - 1)
        return torch.cat([*self.chunks, torch.empty(0, self.width, dtype=self.dtype, device=self.device)])[:n].clone()

    def load(self, rows: Tensor) -> None:
        self.chunks = []
        for i, row in enumerate(rows):
            self.row(i).copy_(row)


class Sketched:
    """S·U_t of every step, ‖U_t‖² exactly, and one copy of the weights to take the next update from."""

    def __init__(self, weights: Weights, k: int, seed: int) -> None:
        self.weights, self.seed = weights, seed
        self.sketch = Sketch(weights.sizes, k, seed, list(weights.on))
        self.steps = 0
        self.previous: list[Tensor] | None = None
        home = next(iter(weights.on))
        self.wide = torch.float32 if home.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.updates = Rows(k, torch.float32, home)
        self.squares = Rows(1, self.wide, home)
        self.kept = Rows(2, self.wide, home)

    def begin(self) -> None:
        if self.previous is None:
            self.previous = self.weights.now()

    def move(self) -> None:
        now = self.weights.now()
        assert self.previous is not None
        update = [a - b for a, b in zip(now, self.previous, strict=True)]
        self.updates.row(self.steps).copy_(self.sketch(update))
        norms = [torch.linalg.vector_norm(u, dtype=self.wide).to(self.squares.device) for u in update]
        self.squares.row(self.steps).copy_(torch.stack(norms).square().sum())
        self.previous = now
        self.steps += 1

    def stay(self) -> None:
        self.updates.row(self.steps).zero_()
        self.squares.row(self.steps).zero_()
        self.steps += 1

    def put(self, step: int, column: int, value: float | Tensor) -> None:
        self.kept.row(step)[column] = value

    def walk(self) -> Walk:
        kept = self.kept.first(self.steps).cpu().double().numpy()
        squares = self.squares.first(self.steps).cpu().double().numpy()[:, 0]
        sums = self.weights.over_ranks(np.stack([*_products(self._backwards(), self.steps), squares]))
        return _walk(sums[:-1], kept, sums[-1], self.sketch.k)

    def _backwards(self) -> Iterable[tuple[Array, Array]]:
        rest = np.zeros(self.sketch.k)
        for update in reversed(self.updates.first(self.steps).cpu().numpy()):
            u = update.astype(np.float64)
            rest = rest + u  # summed from the end: no small difference of two far positions is ever taken
            yield u, rest

    def state_dict(self) -> dict[str, Any]:
        n = self.steps
        return {
            "steps": n,
            "sketch": self.sketch.k,
            "seed": self.seed,
            "sizes": list(self.weights.sizes),
            "updates": self.updates.first(n),
            "squares": self.squares.first(n),
            "kept": self.kept.first(n + 2),
            "previous": [] if self.previous is None else [piece.clone() for piece in self.previous],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = {"sketch": self.sketch.k, "seed": self.seed, "sizes": list(self.weights.sizes)}
        _check_fits(state, mine)
        self.steps = state["steps"]
        for rows, name in ((self.updates, "updates"), (self.squares, "squares"), (self.kept, "kept")):
            rows.load(state[name])
        pieces = zip(state["previous"], self.weights.on, strict=bool(state["previous"]))
        self.previous = [piece.to(device, copy=True) for piece, device in pieces] or None

    def close(self) -> None:
        self.previous = None


class OnDisk:
    """Every iterate, appended to a file as raw numbers, and the losses and learning rates in another."""

    def __init__(self, weights: Weights, directory: Path) -> None:
        self.weights, self.directory = weights, directory
        self.iterates, self.table = directory / ITERATES, directory / STEPS
        self.about: dict[str, Any] = {"weights": sum(weights.sizes), "dtype": str(weights.dtype).removeprefix("torch.")}
        self.steps = 0
        self.mine = self.begun = False  # whether the files are this trajectory's; whether θ_0 is in them

    def begin(self) -> None:
        if not self.begun:
            self._append(self.weights.now())
            self.begun = True

    def move(self) -> None:
        self._append(self.weights.now())
        self.steps += 1

    def stay(self) -> None:
        # Not the weights of now, which may have changed since: those belong to the next update.
        self._append([torch.from_numpy(_rows(self.directory)[-1].copy())])
        self.steps += 1

    def _append(self, row: list[Tensor]) -> None:
        self._make()
        # Closed again, so that the operating system has it: it outlives this process, though not the machine.
        with self.iterates.open("ab") as file:
            for piece in row:
                file.write(piece.cpu().numpy().data)

    def put(self, step: int, column: int, value: float | Tensor) -> None:
        self._make()
        with self.table.open("r+b") as file:
            missing = 2 * (step + 1) - file.seek(0, 2) // 8
            file.write(np.full(max(0, missing), np.nan).data)
            file.seek(8 * (2 * step + column))
            file.write(np.array([float(value)]).data)

    def _make(self) -> None:
        if self.mine:
            return
        if self.iterates.exists():
            raise ValueError(
                f"{self.directory} holds a trajectory already: give an empty directory, or go on with that one "
                "by load_state_dict() before the first step"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / ABOUT).write_text(json.dumps(self.about), encoding="utf-8")
        self.table.touch()
        self.iterates.touch()
        self.mine = True

    def walk(self) -> Walk:
        return _read([self.directory], self.weights.over_ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "begun": self.begun} | self.about

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_fits(state, self.about)
        width = np.dtype(self.about["dtype"]).itemsize * sum(self.weights.sizes)
        needed = width * (state["steps"] + 1) if state["begun"] else 0
        self.mine = self.iterates.exists()
        if needed > (self.iterates.stat().st_size if self.mine else 0):
            raise ValueError(f"{self.directory} does not hold the {state['steps']} steps of this state")
        if self.mine:
            # What came after the checkpoint did not happen. The loss of a step yet to come may be there.
            os.truncate(self.iterates, needed)
            os.truncate(self.table, min(16 * (state["steps"] + 2), self.table.stat().st_size))
        self.steps, self.begun = state["steps"], state["begun"]

    def close(self) -> None:
        pass


def read(directory: str | Path) -> Walk:
    """The walk of the iterates in a directory, of as many whole steps as there are, such as after a crash."""
    directory = Path(directory)
    return _read(sorted(directory.glob("rank-*")) or [directory], lambda sums: sums)


def _read(parts: Sequence[Path], over_ranks: Callable[[Array], Array]) -> Walk:
    """That of the directories of some ranks, if the others' part of every sum is put in."""
    rows = [_rows(part) for part in parts]
    steps = max(0, min(map(len, rows)) - 1)
    kept = np.full((steps, 2), np.nan)
    found = np.fromfile(parts[0] / STEPS)
    found = found[: len(found) // 2 * 2].reshape(-1, 2)[:steps]
    kept[: len(found)] = found

    def backwards(of: NDArray[Any]) -> Iterable[tuple[Array, Array]]:
        last = after = of[steps].astype(np.float64)
        for t in reversed(range(steps)):
            here = of[t].astype(np.float64)
            yield after - here, last - here
            after = here

    each = [_products(backwards(of), steps) for of in rows if steps]
    return _walk(over_ranks(np.sum(each, axis=0) if each else np.zeros((4, 0))), kept, None, None)


def _rows(directory: Path) -> NDArray[Any]:
    """The iterates, memory-mapped; a last one that was cut off is left out."""
    if not (directory / ABOUT).exists():
        raise ValueError(f"{directory} holds no trajectory: TrajectoryMonitor(optimizer, directory=…) writes one")
    about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
    dtype, width = np.dtype(about["dtype"]), about["weights"]
    if width == 0:  # no part of any weight was on this rank
        return np.empty(((directory / STEPS).stat().st_size // 16 + 1, 0), dtype)
    n = (directory / ITERATES).stat().st_size // (dtype.itemsize * width)
    if n == 0:
        return np.empty((0, width), dtype)
    return np.memmap(directory / ITERATES, dtype, "r", shape=(n, width))


def _products(backwards: Iterable[tuple[Array, Array]], steps: int) -> Array:
    """U_t², (θ_T − θ_t)², ⟨U_t, θ_T − θ_t⟩ and ⟨U_t, U_{t+1}⟩, shape [4, T], of such pairs or their sketches, the last
    first.
    """
    found = np.zeros((4, steps))
    following = None
    with np.errstate(invalid="ignore", over="ignore"):
        for t, (u, rest) in zip(reversed(range(steps)), backwards, strict=True):
            found[:3, t] = u @ u, rest @ rest, u @ rest
            if following is not None:
                found[3, t] = u @ following
            following = u
    return found


def _walk(products: Array, kept: Array, squares: Array | None, k: int | None) -> Walk:
    """From the inner products, and from ‖U_t‖² where those are of sketches; 0/0 is NaN."""
    lengths, rests = np.sqrt(products[:2])
    exact = lengths if squares is None else np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(products[2] / lengths / rests, -1, 1)
        consecutive = np.clip(products[3] / lengths / np.roll(lengths, -1), -1, 1)[:-1]
    return Walk(kept[:, LOSS], kept[:, LR], np.append(rests, 0.0), exact, cosine, consecutive, k)


def _check_fits(state: dict[str, Any], mine: dict[str, Any]) -> None:
    saved = {name: state.get(name) for name in mine}
    if saved != mine:
        raise ValueError(f"this state is of a monitor with {saved}, but this one has {mine}: make it as that one was")

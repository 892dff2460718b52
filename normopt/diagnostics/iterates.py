"""Storage of a trajectory: a sketch of every update in memory, or every iterate on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normopt.diagnostics.measures import as_dense_real
from normopt.diagnostics.sketch import Sketch
from normopt.norms.base import stack
from normopt.params import dtype_of
from normopt.sharding.exchange import sum_over_ranks
from normopt.sharding.layout import layout_of, to_local

Array = NDArray[np.float64]
LOSS, LR = 0, 1  # columns of the per-step scalars
CHUNK = 256  # steps per memory allocation
ABOUT, ITERATES, STEPS = "about.json", "iterates.bin", "steps.bin"


class TrajectoryRecord(NamedTuple):
    """Inner products of a trajectory of T steps, with its losses and learning rates.

    Attributes:
        products: ‖U_t‖², ‖θ_T − θ_t‖², ⟨U_t, θ_T − θ_t⟩ and ⟨U_t, U_{t+1}⟩, of sketches if there is one, [4, T].
        squares: the exact ‖U_t‖² [T].
        scalars: ℓ_t and η_t, NaN where there is none, [T, 2].
        sketch: the size of the sketch, None if exact.
    """

    products: Array
    squares: Array
    scalars: Array
    sketch: int | None


class FlatParams:
    """The parameters as one vector, one piece per device, in float64 if any parameter is, else in float32.

    With DTensors each rank holds its local shards, and only the first rank holds the unsharded parameters. A sum over
    the vector is therefore the sum over all ranks: see ``sum_over_ranks``.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        # float32 holds every value of the 16-bit formats.
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        self.dtype = torch.float64 if wide else torch.float32
        layouts = [layout_of(p) for p in params]
        self.layout = next((lay for lay in layouts if lay is not None), None)
        if len({lay.group for lay in layouts if lay is not None}) > 1:
            raise ValueError("a monitor needs all DTensors sharded over the same process group, but these use several")
        self.by_device: dict[torch.device, list[Tensor]] = {}
        for p, layout in zip(params, layouts, strict=True):
            held = self.by_device.setdefault(p.device, [])
            if layout is not None or self.layout is None or self.layout.rank == 0:
                held.append(p)
        self.shapes = [[_shape(p) for p in ps] for ps in self.by_device.values()]
        self.sizes = [sum(map(math.prod, shapes)) for shapes in self.shapes]
        self.dense = self.layout is None and all(p.layout == torch.strided for p in params)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Copy the current weights, one vector per device.

        Raises:
            RuntimeError: a parameter's shape has changed.
        """
        pieces = []
        for (device, params), shapes in zip(self.by_device.items(), self.shapes, strict=True):
            if self.dense and set(map(dtype_of, params)) == {self.dtype} and list(map(Tensor.size, params)) == shapes:
                pieces.append(torch.cat(list(map(Tensor.ravel, params))))  # as below, in half the time
                continue
            for p, shape in zip(params, shapes, strict=True):
                if _shape(p) != shape:
                    raise RuntimeError(
                        f"a parameter has the shape {tuple(_shape(p))}, but had {tuple(shape)} when the monitor was "
                        "made: call result() before shapes change, and make another monitor after it"
                    )
            vectors = (as_dense_real(to_local(p)).reshape(-1).to(device, self.dtype) for p in params)
            pieces.append(torch.cat([torch.empty(0, dtype=self.dtype, device=device), *vectors]))
        return pieces

    def sum_over_ranks(self, sums: Array) -> Array:
        """Sum over all ranks that hold parts of the vector."""
        if self.layout is None:
            return sums
        return sum_over_ranks(torch.from_numpy(sums).to(next(iter(self.by_device))), self.layout).cpu().numpy()


def _shape(p: Tensor) -> torch.Size:
    """Return the shape of a parameter's local shard as reals."""
    here = to_local(p)
    return torch.Size((*here.shape, 2)) if here.is_complex() else here.shape


class GrowingTable:
    """Table on a device that grows in chunks, so that appending a row needs no host sync."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.empty = torch.empty(0, width, dtype=dtype, device=device)
        self.chunks: list[Tensor] = []

    def row(self, i: int) -> Tensor:
        """Return row i as a writable view; new rows are NaN."""
        while i >= CHUNK * len(self.chunks):
            self.chunks.append(self.empty.new_full((CHUNK, self.empty.shape[1]), torch.nan))
        return self.chunks[i // CHUNK][i % CHUNK]

    def first(self, n: int) -> Tensor:
        """Copy the first n rows."""
        if n:
            self.row(n - 1)
        return torch.cat([self.empty, *self.chunks])[:n].clone()

    def load(self, rows: Tensor) -> None:
        """Replace all rows."""
        self.chunks = []
        for i, row in enumerate(rows):
            self.row(i).copy_(row)


class SketchStore:
    """Store S·U_t and the exact ‖U_t‖² of every step, and the last weights, to compute the next update."""

    def __init__(self, weights: FlatParams, k: int, seed: int) -> None:
        self.weights = weights
        self.about = {"sketch": k, "seed": seed, "sizes": list(weights.sizes)}
        self.shown = f"sketch={k}, seed={seed}"
        self.sketch = Sketch(weights.sizes, k, seed, list(weights.by_device))
        self.steps = 0
        self.previous: list[Tensor] | None = None
        home = next(iter(weights.by_device))
        self.wide = torch.float32 if home.type == "mps" else torch.float64  # MPS has no float64
        self.updates = GrowingTable(k, torch.float32, home)
        self.squares = GrowingTable(1, self.wide, home)
        self.kept = GrowingTable(2, self.wide, home)

    def start(self) -> None:
        """Store the current weights as θ_0, unless that was done before."""
        if self.previous is None:
            self.previous = self.weights.snapshot()

    def record_update(self) -> None:
        """Store the update from the last stored weights to the current ones."""
        snapshot = self.weights.snapshot()
        assert self.previous is not None
        update = [a - b for a, b in zip(snapshot, self.previous, strict=True)]
        self.updates.row(self.steps).copy_(self.sketch(update))
        norms = stack([torch.linalg.vector_norm(u, dtype=self.wide) for u in update])
        self.squares.row(self.steps).copy_(norms.square().sum())
        self.previous = snapshot
        self.steps += 1

    def record_zero(self) -> None:
        """Store an update of zero."""
        self.updates.row(self.steps).zero_()
        self.squares.row(self.steps).zero_()
        self.steps += 1

    def record_scalar(self, step: int, column: int, value: float | Tensor) -> None:
        """Store the loss or the learning rate of a step."""
        self.kept.row(step)[column] = value

    def to_record(self) -> TrajectoryRecord:
        kept = self.kept.first(self.steps).cpu().double().numpy()
        squares = self.squares.first(self.steps).cpu().double().numpy()[:, 0]
        sums = self.weights.sum_over_ranks(np.stack([*_inner_products(self._backwards(), self.steps), squares]))
        return TrajectoryRecord(sums[:-1], sums[-1], kept, self.sketch.k)

    def _backwards(self) -> Iterable[tuple[Array, Array]]:
        rest = np.zeros(self.sketch.k)
        for update in reversed(self.updates.first(self.steps).cpu().numpy()):
            u = update.astype(np.float64)
            rest = rest + u  # θ_T − θ_t summed from the end, which avoids cancellation between distant iterates
            yield u, rest

    def state_dict(self) -> dict[str, Any]:
        n = self.steps
        tables = {"updates": self.updates.first(n), "squares": self.squares.first(n), "kept": self.kept.first(n + 2)}
        return {"steps": n, **self.about, **tables, "previous": [piece.clone() for piece in self.previous or []]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_fits(state, self.about)
        self.steps = state["steps"]
        for rows, name in ((self.updates, "updates"), (self.squares, "squares"), (self.kept, "kept")):
            rows.load(state[name])
        pieces = zip(state["previous"], self.weights.by_device, strict=bool(state["previous"]))
        self.previous = [piece.to(device, copy=True) for piece, device in pieces] or None

    def close(self) -> None:
        self.previous = None


class DiskStore:
    """Append every iterate to one raw binary file, losses and learning rates to another."""

    def __init__(self, weights: FlatParams, directory: Path) -> None:
        self.weights, self.directory = weights, directory
        self.iterates, self.table = directory / ITERATES, directory / STEPS
        self.about: dict[str, Any] = {"weights": sum(weights.sizes), "dtype": str(weights.dtype).removeprefix("torch.")}
        self.shown = f"directory={str(directory)!r}"
        self.steps = 0
        self.mine = self.begun = False  # the files belong to this trajectory; θ_0 is in them

    def start(self) -> None:
        if not self.begun:
            self._append(self.weights.snapshot())
            self.begun = True

    def record_update(self) -> None:
        self._append(self.weights.snapshot())
        self.steps += 1

    def record_zero(self) -> None:
        # Repeat the last iterate: a change of the weights since then belongs to the next update.
        self._append([torch.from_numpy(_load_iterates(self.directory)[-1].copy())])
        self.steps += 1

    def _append(self, row: list[Tensor]) -> None:
        self._create_files()
        # Closing hands the data to the operating system, so that it survives a crash of the process.
        with self.iterates.open("ab") as file:
            for piece in row:
                file.write(piece.cpu().numpy().data)

    def record_scalar(self, step: int, column: int, value: float | Tensor) -> None:
        self._create_files()
        with self.table.open("r+b") as file:
            missing = 2 * (step + 1) - file.seek(0, 2) // 8
            file.write(np.full(max(0, missing), np.nan).data)
            file.seek(8 * (2 * step + column))
            file.write(np.array([float(value)]).data)

    def _create_files(self) -> None:
        if self.mine:
            return
        if self.iterates.exists():
            raise ValueError(f"{self.directory} holds a trajectory already: use load_state_dict() or another directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / ABOUT).write_text(json.dumps(self.about), encoding="utf-8")
        self.table.touch()
        self.iterates.touch()
        self.mine = True

    def to_record(self) -> TrajectoryRecord:
        return _read([self.directory], self.weights.sum_over_ranks)

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
            # Drop the steps after the checkpoint. The table may already hold the loss of the next step.
            os.truncate(self.iterates, needed)
            os.truncate(self.table, min(16 * (state["steps"] + 2), self.table.stat().st_size))
        self.steps, self.begun = state["steps"], state["begun"]

    def close(self) -> None:
        pass


def read(directory: str | Path) -> TrajectoryRecord:
    """Read the trajectory in a directory: all complete steps, also after a crash."""
    directory = Path(directory)
    return _read(sorted(directory.glob("rank-*")) or [directory], lambda sums: sums)


def _read(parts: Sequence[Path], sum_over_ranks: Callable[[Array], Array]) -> TrajectoryRecord:
    """Read the directories of some ranks; ``sum_over_ranks`` adds the other ranks' terms."""
    rows = [_load_iterates(part) for part in parts]
    steps = max(0, min(map(len, rows)) - 1)
    kept = np.full((steps, 2), np.nan)
    found = np.fromfile(parts[0] / STEPS, "2f8")[:steps]  # only complete rows
    kept[: len(found)] = found

    def backwards(of: NDArray[Any]) -> Iterable[tuple[Array, Array]]:
        last = after = of[steps].astype(np.float64)
        for t in reversed(range(steps)):
            here = of[t].astype(np.float64)
            yield after - here, last - here
            after = here

    each = [_inner_products(backwards(of), steps) for of in rows if steps]
    products = sum_over_ranks(np.sum(each, axis=0) if each else np.zeros((4, 0)))
    return TrajectoryRecord(products, products[0], kept, None)


def _load_iterates(directory: Path) -> NDArray[Any]:
    """Memory-map the iterates, without a truncated last one."""
    if not (directory / ABOUT).exists():
        raise ValueError(f"{directory} holds no trajectory: TrajectoryMonitor(optimizer, directory=…) writes one")
    about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
    file, dtype, width = directory / ITERATES, np.dtype(about["dtype"]), about["weights"]
    if width == 0:  # this rank holds no weights
        return np.empty(((directory / STEPS).stat().st_size // 16 + 1, 0), dtype)
    n = file.stat().st_size // (dtype.itemsize * width)
    return np.memmap(file, dtype, "r", shape=(n, width)) if n else np.empty((0, width), dtype)


def _inner_products(backwards: Iterable[tuple[Array, Array]], steps: int) -> Array:
    """Return ‖U_t‖², ‖θ_T − θ_t‖², ⟨U_t, θ_T − θ_t⟩ and ⟨U_t, U_{t+1}⟩, shape [4, T].

    ``backwards`` yields the pairs (U_t, θ_T − θ_t), or their sketches, from the last step to the first.
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


def _check_fits(state: dict[str, Any], mine: dict[str, Any]) -> None:
    saved = {name: state.get(name) for name in mine}
    if saved != mine:
        raise ValueError(f"the state is of a monitor with {saved}, but this one has {mine}: use the same arguments")

"""What a run of the speed program keeps: the machine, and every sample of every case."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from scipy import stats

import normopt
from benchmarks.stats import LEVEL

DIGITS = 7  # of seconds behind the point


class Record(BaseModel):
    """A frozen piece of the results."""

    model_config = ConfigDict(frozen=True)


class Machine(Record):
    """Where it was measured; ``copied`` is the bytes per second that a large copy on the device reads and writes."""

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    device: str
    copied: float | None = None


class Entry(Record):
    """One candidate in one case.

    Attributes:
        optimizer, backend: its name, in two parts.
        streams: how often its rule has to read or write a model's worth of memory, at least; 0 if that is no measure.
        first: seconds of its first step, in which it compiles, or reads what is compiled from a cache.
        seconds: of its step in each round.
        launches: on CUDA, of kernels, copies and graphs in a step.
    """

    optimizer: str
    backend: str
    streams: float
    first: Annotated[float, AfterValidator(lambda seconds: round(seconds, DIGITS))]
    seconds: list[float] = []
    launches: int | None = None


class Case(Record):
    """One model on one device with one number of threads: entries side by side, the first of them the reference.

    Attributes:
        part: of the program, "table", "growth", "share" or "limits".
        group: the family of a case of the table, the sweep of one of the growth.
        fresh: whether the gradients are new tensors at every step.
    """

    part: str
    group: str = ""
    model: str
    tensors: int
    parameters: int
    dtype: str
    device: str
    threads: int
    fresh: bool
    entries: list[Entry]
    failed: dict[str, str]

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        about = [self.model, *([self.group] if self.part == "table" else [])]
        about += ["fresh gradients"] if self.fresh and self.part == "limits" else []
        return ", ".join([*about, threads if self.device == "cpu" else "CUDA"])

    @property
    def reference(self) -> Entry:
        return self.entries[0]

    def entry(self, optimizer: str, backend: str) -> Entry | None:
        return next((e for e in self.entries if (e.optimizer, e.backend) == (optimizer, backend)), None)

    def moved(self, entry: Entry) -> float:
        """Bytes of each parameter that a step's rule has to read and write."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return entry.streams * itemsize

    def bandwidth(self, entry: Entry) -> float:
        """Bytes per second that a step's rule has to move, by the median."""
        return self.moved(entry) * self.parameters / median(entry.seconds)


class Startup(Record):
    """The first step of fresh processes: with an empty cache, with the cache that leaves, and an import beside it."""

    rule: str
    device: str
    compiler: str
    importing: float
    cold: float
    cached: float


class Held(Record):
    """Memory: bytes of state for each parameter, and a step's peak of temporaries as a multiple of the weights."""

    optimizer: str
    model: str
    state: float
    peak: float


class Results(Record):
    """Everything that a run measured, the peers that it lacked, and the models that found no room.

    Attributes:
        unheld: optimizers whose memory could not be measured, each with why.
    """

    machine: Machine
    rounds: int
    absent: list[str]
    too_large: list[str]
    startup: list[Startup]
    cases: list[Case]
    held: list[Held] = []
    unheld: dict[str, str] = {}


def machine(device: torch.device, peers: Sequence[str], copied: float | None) -> Machine:
    """Where this process runs."""
    packages = {"normopt": normopt.__version__}
    for name in ("torch", "numba", "triton", *peers):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(
        cpu=told_by_linux("cpuinfo", "model name") or platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        copied=copied,
    )


def told_by_linux(file: str, name: str) -> str | None:
    """Return the value of the first line with this name in a file of /proc; None if there is none."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and its 95 % interval, None of so few pairs that there is none."""

    median: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.median:.2f}" + ("" if self.interval is None else " ({:.2f}–{:.2f})".format(*self.interval))

    def times(self, factor: float) -> Ratio:
        return Ratio(self.median * factor, self.interval and (self.interval[0] * factor, self.interval[1] * factor))

    def inverse(self) -> Ratio:
        return Ratio(1 / self.median, self.interval and (1 / self.interval[1], 1 / self.interval[0]))


def ratio(this: Entry, that: Entry) -> Ratio:
    """How many times as long one step takes as another: each round's ratio by itself, then their median.

    The interval is of order statistics: the k-th smallest ratio and the k-th largest, with the largest k between which
    the true median lies with 95 % probability, whatever the ratios' distribution. Fewer than 6 rounds have none.
    """
    ratios = sorted(a / b for a, b in zip(this.seconds, that.seconds, strict=True))
    k = int(stats.binom.ppf((1 - LEVEL) / 2, len(ratios), 0.5))
    return Ratio(median(ratios), (ratios[k - 1], ratios[-k]) if k else None)


def quartiles(entry: Entry) -> tuple[float, float, float]:
    """Of the seconds of a step."""
    ordered = sorted(entry.seconds)
    low, high = (ordered[math.floor(q * (len(ordered) - 1) + 0.5)] for q in (0.25, 0.75))
    return low, median(ordered), high

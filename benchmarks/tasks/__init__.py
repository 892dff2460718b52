"""The tasks: what is learned. A task is one file with a class that fits `Task`, and a line in `TASKS`."""

from __future__ import annotations

from benchmarks.tasks.base import Splits, Task
from benchmarks.tasks.breast_cancer import BreastCancer
from benchmarks.tasks.bytes import Bytes
from benchmarks.tasks.diabetes_sparse import DiabetesSparse
from benchmarks.tasks.digits import Digits
from benchmarks.tasks.digits_cnn import DigitsCNN
from benchmarks.tasks.digits_mix import DigitsMix
from benchmarks.tasks.digits_noise import DigitsNoise
from benchmarks.tasks.fashion import DEEP, FashionCNN, FashionMLP, FashionResNet
from benchmarks.tasks.images import TASKS as IMAGES
from benchmarks.tasks.mnist1d import MNIST1D
from benchmarks.tasks.quadratic import Quadratic, QuadraticAxes
from benchmarks.tasks.rosenbrock import Rosenbrock

_TASKS: tuple[Task, ...] = (
    Digits(),
    DigitsMix(),
    DigitsNoise(),
    DigitsCNN(),
    BreastCancer(),
    DiabetesSparse(),
    Bytes(),
    Quadratic(),
    QuadraticAxes(),
    Rosenbrock(),
    MNIST1D(),
    FashionMLP(),
    FashionCNN(),
    FashionResNet(),
    *DEEP,
    *IMAGES,
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}

__all__ = ["TASKS", "Splits", "Task"]

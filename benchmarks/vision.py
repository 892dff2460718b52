"""torchvision, made importable beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # a definition lives as long as its library object


def allow_torchvision_import() -> None:
    """Call this before anything imports torchvision.

    torchvision's wheels from PyPI are built for CUDA. Beside a CPU torch their C++ library cannot be
    loaded, and then ``import torchvision`` fails because the operators that it describes do not exist.
    Declaring those operators (nms and qnms, which data sets and classifiers never call) is enough.
    Where the library can be loaded, or torchvision is absent, this does nothing.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _libraries:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        stub = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _libraries.append(stub)

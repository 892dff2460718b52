"""Find out whether the tensors of a param group can be stepped by fused kernels. Imports compilers, but no kernel."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normopt.sharding.layout import is_dtensor


class Kernels(NamedTuple):
    """The kernels of a kind of device: a module with `Step`, its compiler, what installs that, and the dtypes taken.

    ``lacks`` are the fields of `Flags` that they do not know, or not together.
    """

    module: str
    compiler: str
    source: str
    dtypes: tuple[torch.dtype, ...]
    lacks: tuple[tuple[str, ...], ...] = (("sphere", "decay"), ("sphere", "coupling"), ("sphere", "smoothed"))


MISSING = "missing"
_CUDA_DTYPES = torch.float32, torch.bfloat16, torch.float16
KERNELS = {
    "cpu": Kernels("normopt.kernels.cpu", "numba", 'the extra "cpu"', (torch.float32, torch.bfloat16)),
    "cuda": Kernels("normopt.kernels.triton", "triton", "PyTorch's CUDA wheels", _CUDA_DTYPES),
}


def why_not(
    differentiable: bool, state_dtype: str | None, params: Sequence[Tensor], flags: Mapping[str, object]
) -> str | None:
    """Return what prevents a fused step of stages that all have a kernel, as the end of a sentence; None if nothing.

    Args:
        differentiable: whether autograd is to record the step.
        state_dtype: the momentum's dtype by name.
        params: the parameters.
        flags: the fields of `Flags` that the stages set.
    """
    if differentiable:
        return "a kernel has no derivative"
    kinds = {p.device.type for p in params}
    for kind in sorted(kinds):
        if kind not in KERNELS:
            return f"there are no kernels for {kind} tensors"
        _, compiler, source, _, lacks = KERNELS[kind]
        if missing := [names for names in lacks if all(map(flags.get, names))]:
            return f"the kernels for {kind} do not have {' with '.join(missing[0])} yet"
        if failure := _import_failure(compiler):
            return f"{compiler} is not installed, which {source} brings" if failure == MISSING else failure
    if any(type(p) not in (Tensor, torch.nn.Parameter) and not is_dtensor(p) for p in params):
        return "some parameters are tensors of a class of their own"
    for dtype, kind in {(p.dtype, p.device.type) for p in params}:
        if dtype not in KERNELS[kind].dtypes or (state_dtype or "float32") not in _names(KERNELS[kind].dtypes):
            offered = ", ".join(_names(KERNELS[kind].dtypes))
            return f"on {kind} it takes weights and momentum in {offered}, but some are {state_dtype or _name(dtype)}"
    return None


@cache
def _import_failure(compiler: str) -> str | None:
    """Return why a compiler cannot be used, `MISSING` if it is not installed; None if it can.

    It is imported to find out: Numba refuses to be beside a NumPy that is newer than it knows.
    """
    if importlib.util.find_spec(compiler) is None:
        return MISSING
    try:
        module: Any = importlib.import_module(compiler)
    except Exception as error:
        return f"{compiler} is installed, but importing it fails: {error}"
    return "NUMBA_DISABLE_JIT is set" if compiler == "numba" and module.config.DISABLE_JIT else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> list[str]:
    return [_name(d) for d in dtypes]

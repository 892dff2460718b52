"""Run the fused kernels on tensors that end at, or begin after, a page that nobody may touch.

A process of its own: one entry too far ends it by a segmentation fault. The combination that is being tried is
printed before it is. ``python -m tests.kernels.guard_pages numba 0 1`` tries all, ``numba 3 8`` those of the fourth
of eight parts, ``overrun`` lets a kernel read one entry too far. ``triton`` needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Any

import numpy as np
import torch

import normopt
from normopt.kernels import cpu, fused
from normopt.kernels.tables import CHUNK, Chunks
from tests.pairwise import pairwise

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 1023, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
SHAPES = [(n,) for n in SIZES] + [(3, 5), (1, 1), (17, 241), ()]
F32, BF16 = torch.float32, torch.bfloat16
at_end = True


def memory(nbytes: int) -> ctypes.Array:
    """So many bytes between two pages that may not be touched: up against the one behind, or the one before."""
    whole = -(-max(nbytes, 1) // PAGE) * PAGE
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = LIBC.mmap(None, whole + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
    for page in (address, address + PAGE + whole):
        assert LIBC.mprotect(page, PAGE, 0) == 0
    begin = address + PAGE + (whole - nbytes if at_end else 0)
    return (ctypes.c_char * nbytes).from_address(begin)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, between such pages."""
    if not x.numel():
        return x.clone()
    y = torch.frombuffer(memory(x.numel() * x.element_size()), dtype=x.dtype).view(x.shape)
    return y.copy_(x)


def guarded_array(x: np.ndarray) -> np.ndarray:
    if not x.size:
        return x
    y = np.frombuffer(memory(x.nbytes), dtype=x.dtype).reshape(x.shape)
    y[...] = x
    return y


class GuardedNumpy:
    """NumPy, but for the arrays that the kernels are handed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any, **more: Any) -> np.ndarray:
        return guarded_array(np.empty(*args, **more))

    def zeros(self, *args: Any, **more: Any) -> np.ndarray:
        return guarded_array(np.zeros(*args, **more))

    def array(self, *args: Any, **more: Any) -> np.ndarray:
        return guarded_array(np.array(*args, **more))


class GuardedChunks(Chunks):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, guarded_array(value))


MOMENTA: dict[str, dict[str, Any]] = {
    "none": {},
    "heavy": dict(momentum=0.9),
    "dampened": dict(momentum=0.9, dampening=0.5),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "ema": dict(momentum=0.9, momentum_rule="ema"),
    "ema nesterov": dict(momentum=0.9, momentum_rule="ema", nesterov=True),
    "lion": dict(momentum=0.9, momentum_rule="lion"),
}
DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "coupled": dict(weight_decay=0.1, decay="coupled"),
    "decoupled": dict(weight_decay=0.1, decay="decoupled"),
    **{f"lp{p:g}": dict(weight_decay=0.1, decay="lp", decay_p=p) for p in (0.8, 1.0, 1.5, 2.0, 3.0, 4.0)},
}
CHOICES: dict[str, list[Any]] = dict(
    p=[1.005, 1.3, 1.5, 2.0, 2.7, 3.0, math.inf],
    scale=["power", "smoothed", "dual", "unit", "matched"],
    momentum=list(MOMENTA),
    decay=list(DECAYS),
    dtypes=[(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F32, BF16, F32), (BF16, F32, BF16)],
    agr=[False, True],
    maximize=[False, True],
    rounding=["nearest", "stochastic", "kahan"],
    threads=[1, 2],
)


def is_valid(c: dict[str, Any]) -> bool:
    return c["rounding"] == "nearest" or c["dtypes"][0] == BF16


def stepped(c: dict[str, Any], how: dict[str, bool], put: Any) -> list[torch.Tensor]:
    """The weights after three steps; the first makes the state, which then is put where ``put`` puts it."""
    scale = {"smoothed": "power"}.get(c["scale"], c["scale"])
    more = dict(eps=1e-3) if c["scale"] == "smoothed" else {}
    weight, gradient, state = c["dtypes"]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(put(torch.randn(s).to(weight))) for s in SHAPES]
    opt = normopt.SteepestDescent(
        params,
        lr=1e-2,
        norm="lp",
        p=c["p"],
        scale=scale,
        agr=c["agr"],
        maximize=c["maximize"],
        rounding=c["rounding"],
        state_dtype=str(state).removeprefix("torch."),
        **more,
        **how,
        **MOMENTA[c["momentum"]],
        **DECAYS[c["decay"]],
    )
    for _ in range(3):
        for p in params:
            p.grad_dtype = None
            p.grad = put(torch.randn(p.shape).to(gradient))
        opt.step()
        for own in opt.state.values():
            for key, x in own.items():
                own[key] = put(x)
    return [p.detach() for p in params]


def run(c: dict[str, Any]) -> None:
    global at_end
    torch.set_num_threads(c["threads"])
    expected = stepped(c, {"fused": True}, torch.clone)
    for end in (True, False):
        at_end = end
        ours = stepped(c, {"fused": True}, guarded)
        for p, q in zip(ours, expected, strict=True):  # where tensors are changes no bit
            torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def run_triton(c: dict[str, Any]) -> None:
    """One step by Triton's interpreter, of few tensors: it is slow."""
    global at_end
    from tests.kernels.triton_cases import Stepped

    class Guarded(Stepped):
        def placed(self, x: Any, dtype: torch.dtype) -> torch.Tensor:
            return guarded(torch.as_tensor(x).to(dtype))

    scale = {"smoothed": "power"}.get(c["scale"], c["scale"])
    more: dict[str, Any] = dict(eps=1e-3) if c["scale"] == "smoothed" else {}
    more |= MOMENTA[c["momentum"]] | DECAYS[c["decay"]]
    weight, gradient, state = c["dtypes"]
    shapes = [(1,), (17,), (3, 5), (CHUNK + 1,)]

    def stepped_by(kind: type[Stepped]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        opt = kind(
            [torch.randn(s) for s in shapes], weight, gradient=gradient, state=state, p=c["p"], scale=scale,
            agr=c["agr"], maximize=c["maximize"], rounding=c["rounding"], lr=0.3, **more,
        )  # fmt: skip
        opt.step([torch.randn(s) for s in shapes])
        return opt.weights

    expected = stepped_by(Stepped)
    for end in (True, False):
        at_end = end
        for p, q in zip(stepped_by(Guarded), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def guard_numpy() -> None:
    cpu.np = fused.np = GuardedNumpy()  # type: ignore[attr-defined]
    fused.Chunks = GuardedChunks  # type: ignore[misc]


def overrun() -> None:
    """One chunk is said to be one entry longer than it is."""

    class TooLong(GuardedChunks):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.count[-1:] += 1

    fused.Chunks = TooLong  # type: ignore[misc]
    p = torch.nn.Parameter(guarded(torch.zeros(33)))
    p.grad = guarded(torch.zeros(33))
    normopt.SGD([p], lr=0.1, fused=True).step()


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "overrun":
        overrun()
    else:
        guard_numpy()
        part, parts = map(int, numbers)
        tried = pairwise(CHOICES, is_valid)[part::parts]
        for c in tried:
            print(c, flush=True)
            (run if what == "numba" else run_triton)(c)
        print(f"{len(tried)} combinations", flush=True)

"""How long the first step of a process takes: ``python -m benchmarks.speed.startup RULE DEVICE`` takes one and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.speed.candidates import DRESSED, DUAL, PLAIN, candidates
from benchmarks.speed.measure import clock_of, on_cpu
from benchmarks.speed.models import Model, Tensors
from benchmarks.speed.records import Startup

RULES = (PLAIN[1], DUAL[0], DRESSED)
SMALL = Model("four small tensors", ((64, 64), (64,)) * 2)
COMPILERS = {"cpu": ("numba", "normopt.kernels.cpu"), "cuda": ("triton", "normopt.kernels.triton")}
CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR")


def startup(rule: str, device: torch.device) -> Startup:
    """A rule's first fused step in two fresh processes: with an empty cache, and with what the first left in it."""
    with TemporaryDirectory() as cache:
        cold, cached = (_fresh(rule, device, cache) for _ in range(2))
    compiler, _ = COMPILERS[device.type]
    return Startup(
        rule=rule,
        device=device.type,
        compiler=compiler,
        importing=cached["importing"],
        cold=cold["first"],
        cached=cached["first"],
    )


def _fresh(rule: str, device: torch.device, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed.startup", rule, device.type]
    environment = os.environ | dict.fromkeys(CACHES, cache)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the first step of {rule} failed in a process of its own:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def first_step(rule: str, device: torch.device) -> dict[str, float]:
    """Seconds of importing the compiler and of the first fused step of this process, in which nothing is imported."""
    compiler, kernels = COMPILERS[device.type]
    importing = on_cpu(lambda: import_module(compiler))
    import_module(kernels)
    (candidate,) = (c for c in candidates(SMALL) if (c.optimizer, c.backend) == (rule, "fused"))
    optimizer = candidate.make(Tensors(SMALL, torch.float32, device).weights)
    clock = clock_of(device)
    return {"importing": round(importing, 4), "first": round(clock(optimizer.step), 4)}


if __name__ == "__main__":
    print(json.dumps(first_step(sys.argv[1], torch.device(sys.argv[2]))))

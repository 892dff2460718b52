"""What an optimizer holds of memory: its state between steps, and what a step allocates on top of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.candidates import Candidate
from benchmarks.speed.measure import WARM, Step, scheduled
from benchmarks.speed.models import Model, Tensors
from benchmarks.speed.records import Held


def held(model: Model, candidate: Candidate, dtype: torch.dtype, device: torch.device) -> Held:
    """What a candidate holds, after a few steps with gradients that are new at each of them."""
    tensors = Tensors(model, dtype, device)
    optimizer = candidate.make(tensors.weights)
    step = scheduled(optimizer, candidate.orders or ())
    for _ in range(WARM):
        tensors.renew()
        step()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(optimizer.state)}
    tensors.renew()
    return Held(
        optimizer=candidate.optimizer,
        model=model.name,
        state=sum(storages.values()) / model.parameters,
        peak=(peak_on_cuda if device.type == "cuda" else peak_on_cpu)(step) / tensors.bytes,
    )


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Every tensor in dicts and lists within each other, which is how a state is kept."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from (x for part in held.values() for x in tensors_in(part))
    elif isinstance(held, list | tuple):
        yield from (x for part in held for x in tensors_in(part))


def peak_on_cpu(step: Step) -> int:
    """The most bytes alive at once of those that torch allocates in a step, by the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_on_cuda(step: Step) -> int:
    """The same on CUDA, by the allocator's own count, from which what the step frees of older bytes is taken off."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

"""A training run that checkpoints, can be killed anywhere, and goes on: what test_resume.py starts as processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

import normopt

TOTAL, SAVE_EVERY = 12, 3
PLACES = ("before step", "in step", "after step", "while saving")


def make_run(name: str):
    """A network of float32 and bfloat16 layers with everything that has state: AGR, ℓp decay, Kahan, schedules."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3).bfloat16())
    rounding = "stochastic" if name == "lpsgdm" else "kahan"
    opt = normopt.get_optimizer(name)(
        net.parameters(), lr=0.05, agr=True, weight_decay=0.1, decay="lp", decay_p=0.8, rounding=rounding
    )
    scheduled = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, TOTAL)]
    if opt.param_groups[0]["p"] is not None:
        scheduled.append(normopt.schedules.CosineP(opt, total_steps=TOTAL))
    return net, opt, scheduled


def train(name: str, folder: Path, crash_at: int | None = None, place: str = "before step") -> None:
    """Train to TOTAL steps from the checkpoint in ``folder``, if any; kill -9 this process at a place in a step."""
    torch.set_num_threads(1)

    def crash_if(here: str) -> None:
        if step == crash_at and here == place:
            os.kill(os.getpid(), signal.SIGKILL)

    net, opt, scheduled = make_run(name)
    checkpoint = folder / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
        for sched, state in zip(scheduled, saved["scheduled"], strict=True):
            sched.load_state_dict(state)
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, TOTAL):
        x = torch.randn(8, 5)
        opt.zero_grad()
        net[2](net[1](net[0](x)).bfloat16()).float().square().mean().backward()
        crash_if("before step")
        if step == crash_at and place == "in step":
            # Half of the parameters are already written when the process dies.
            half = list(net.parameters())[:2]
            for p in half:
                p.data.add_(1)
            os.kill(os.getpid(), signal.SIGKILL)
        opt.step()
        for sched in scheduled:
            sched.step()
        crash_if("after step")
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "net": net.state_dict(),
                "opt": opt.state_dict(),
                "scheduled": [s.state_dict() for s in scheduled],
                "rng": torch.get_rng_state(),
                "step": step + 1,
            }
            torch.save(state, folder / "checkpoint.tmp")
            crash_if("while saving")
            os.replace(folder / "checkpoint.tmp", checkpoint)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, folder / "end.pt")

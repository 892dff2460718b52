"""FSDP2: LPSGDM with AGR and a schedule of p, or Muon, on many ranks; saved at every epoch and resumed on any number.

pip install normopt scikit-learn
torchrun --nproc-per-node 2 examples/sharded_digits.py --folder run              # one machine
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
    examples/sharded_digits.py --folder /shared/run                              # the same on many
"""

from __future__ import annotations

import argparse
import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normopt


def build(optimizer: str, epochs: int) -> tuple[torch.nn.Module, normopt.SteepestDescent, Any]:
    """Return a sharded MLP, its optimizer, and a schedule of p if the optimizer has a p."""
    torch.manual_seed(0)  # the same weights on every rank, before sharding
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard: it replaces the parameters.
    if optimizer == "muon":
        return model, normopt.Muon(normopt.param_groups(model, "muon"), lr=0.02), None
    opt = normopt.LPSGDM(model.parameters(), lr=0.02, p=8.0, agr=True)
    return model, opt, normopt.schedules.CosineP(opt, total_steps=epochs)


def save(folder: Path, epoch: int, model: torch.nn.Module, opt: torch.optim.Optimizer, schedule: Any) -> None:
    """Every rank writes its own shards; a folder that is whole is given its name at the end."""
    weights, state = get_state_dict(model, opt)
    content = {"model": weights, "opt": state, "p": schedule.state_dict() if schedule else {}, "epoch": epoch}
    dcp.save(content, checkpoint_id=folder / f"unfinished-{epoch}")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"unfinished-{epoch}").rename(folder / f"epoch-{epoch:03}")
    dist.barrier()


def load(folder: Path, model: torch.nn.Module, opt: torch.optim.Optimizer, schedule: Any) -> int:
    """How many epochs are done: those of the last whole checkpoint, written by however many ranks."""
    found = sorted(folder.glob("epoch-*"))
    if not found:
        return 0
    weights, state = get_state_dict(model, opt)
    content = {"model": weights, "opt": state, "p": schedule.state_dict() if schedule else {}, "epoch": 0}
    dcp.load(content, checkpoint_id=found[-1])
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
    if schedule:
        schedule.load_state_dict(content["p"])
    return int(content["epoch"])


def train(given: argparse.Namespace) -> None:
    """From where the folder's last checkpoint is to the last epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, digit = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32, device=device), torch.tensor(digit, device=device)
    x, y, x_test, y_test = x[:1344], y[:1344], x[1344:], y[1344:]

    model, opt, schedule = build(given.optimizer, given.epochs)
    done = load(given.folder, model, opt, schedule)
    if rank == 0:
        print(f"{ranks} ranks, from epoch {done}; {opt.backend().splitlines()[0]}")
    for epoch in range(done, min(given.epochs, given.stop_after)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).to(device)
        for batch in order.split(64):
            mine = batch[rank::ranks]  # FSDP takes the mean of the ranks' gradients
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            opt.step()
        if schedule:
            schedule.step()
        save(given.folder, epoch + 1, model, opt, schedule)

    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()  # the same on every rank
    if rank == 0:
        print(f"epoch {min(given.epochs, given.stop_after)}: test accuracy {100 * right:.2f} %")


def main() -> None:
    """Read what is asked, meet the other ranks, and train."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, required=True, help="of the checkpoints, which all ranks can see")
    options.add_argument("--optimizer", choices=["lpsgdm", "muon"], default="lpsgdm")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--stop-after", type=int, default=1000, metavar="EPOCH", help="as if it were killed there")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A rank that is lost is noticed after this long, by an error in all others.
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    train(given)
    gc.collect()  # the model first: a group that is taken down while FSDP holds it can abort the process
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

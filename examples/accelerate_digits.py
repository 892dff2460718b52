"""Hugging Face Accelerate: LPSGDM with ℓp decay under gradient accumulation; saved and loaded by Accelerate.

pip install "normopt[frameworks]" scikit-learn
python examples/accelerate_digits.py        # or: accelerate launch examples/accelerate_digits.py
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import normopt


def make(epochs: int) -> tuple[torch.nn.Module, normopt.LPSGDM, DataLoader[Any]]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    opt = normopt.LPSGDM(net.parameters(), lr=0.02, p=8.0, weight_decay=0.05, decay="lp", decay_p=0.8)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    return net, opt, DataLoader(data, batch_size=32, shuffle=True)


def main(epochs: int = 8) -> tuple[float, float]:
    """Train; returns the accuracy on the training set and the share of weights that are exactly zero."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, opt, loader = make(epochs)
    steps = epochs * math.ceil(len(loader) / 2)  # of the optimizer: one for two batches
    schedule = normopt.schedules.CosineP(opt, total_steps=steps)  # made on our optimizer, before it is wrapped
    net, wrapped, loader, schedule = accelerator.prepare(net, opt, loader, schedule)
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(epochs):
            for x, y in loader:
                with accelerator.accumulate(net):
                    wrapped.zero_grad()
                    accelerator.backward(torch.nn.functional.cross_entropy(net(x), y))
                    wrapped.step()
                    schedule.step()  # prepared, it passes over the batches that only accumulate
            if epoch == epochs // 2:
                accelerator.save_state(folder)
                accelerator.load_state(folder)
    correct = [(net(x).argmax(1) == y).float().mean().item() for x, y in loader]
    accuracy = sum(correct) / len(correct)
    weights = torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() >= 2])
    zeros = float((weights.abs() < 1e-13).float().mean())
    print(f"training accuracy {accuracy:.3f}, {zeros:.0%} of the weights are zero, p = {opt.param_groups[0]['p']:.3g}")
    return accuracy, zeros


if __name__ == "__main__":
    main()

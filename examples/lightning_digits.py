"""Lightning: LPSGDM with AGR, a learning-rate schedule and the schedule of p, checkpointed and resumed.

pip install "normopt[frameworks]" scikit-learn
python examples/lightning_digits.py
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import normopt


class Digits(lightning.LightningModule):
    """An MLP on scikit-learn's digits."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def configure_optimizers(self) -> Any:
        """Lightning steps, saves and loads both schedules, of lr and of p."""
        opt = normopt.LPSGDM(self.parameters(), lr=0.02, p=8.0, agr=True)
        of_lr = torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.epochs)
        return [opt], [of_lr, normopt.schedules.CosineP(opt, total_steps=self.epochs)]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        logits = self.net(x)
        self.log("accuracy", (logits.argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
        return torch.nn.functional.cross_entropy(logits, y)


def loader() -> DataLoader[Any]:
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def main(epochs: int = 8) -> float:
    """Train half of the epochs, stop, resume from the checkpoint; returns the last epoch's accuracy."""
    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict(
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        accelerator="cpu",
        devices=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        first = lightning.Trainer(max_epochs=epochs // 2, default_root_dir=folder, **quiet)
        first.fit(Digits(epochs), loader())
        first.save_checkpoint(f"{folder}/half.ckpt")
        second = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **quiet)
        model = Digits(epochs)
        second.fit(model, loader(), ckpt_path=f"{folder}/half.ckpt", weights_only=True)
    group = second.optimizers[0].param_groups[0]
    accuracy = float(second.callback_metrics["accuracy"])
    print(f"training accuracy {accuracy:.3f}, p has gone from 8 to {group['p']:.3g}, lr to {group['lr']:.3g}")
    return accuracy


if __name__ == "__main__":
    main()

"""AGR and ℓp decay as add-ons for any torch.optim.Optimizer.

An add-on registers step hooks and stores its settings in the param groups. The optimizer object stays the same, so
schedulers, GradScaler and trainers keep working.
"""

from normopt.addons.agr import AGR
from normopt.addons.decay import LpDecay

__all__ = ["AGR", "LpDecay"]

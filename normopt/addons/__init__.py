"""AGR and ℓp decay for any torch.optim.Optimizer, of PyTorch's or of anyone else's.

An add-on hangs on an optimizer by its step hooks. The optimizer stays the object it was, so that schedulers,
GradScaler and trainers go on with it, and what the add-on is set to lives in its param groups.
"""

from normopt.addons.agr import AGR
from normopt.addons.decay import LpDecay

__all__ = ["AGR", "LpDecay"]

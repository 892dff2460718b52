"""The stages from a gradient to a weight update, one file per stage, in the order in which they run.

A stage owns everything about itself: its settings with their checks, its state, its arithmetic on lists of tensors,
and what a fused kernel needs to know of it; see `base`. Lists are parallel: entry i of each belongs to parameter i. A
function whose name ends in ``_`` writes to its first argument; all others leave their inputs unchanged.
"""

from normopt.stages.agr import Maximize, Regularization
from normopt.stages.base import Batch, Op, Slot, Stage, register_stage, setting
from normopt.stages.decay import Decay, DecayInside, register_decay  # also in the gradient, after AGR
from normopt.stages.momentum import Coefficients, Count, Difference, Momentum, register_momentum

from normopt.stages.constraint import Sphere  # isort: skip
from normopt.stages.direction import Direction, Rescale  # isort: skip
from normopt.stages.metric import Metric, Unwhiten  # isort: skip
from normopt.stages.rows import RowAverage
from normopt.stages.write import Round, Write

from normopt.stages.coupling import Coupling, Pull  # isort: skip

__all__ = ["Batch", "Coefficients", "Count", "Coupling", "Decay", "DecayInside", "Difference", "Direction"]
__all__ += ["Maximize", "Metric", "Momentum", "Op", "Pull", "Regularization", "Rescale", "Round", "RowAverage"]
__all__ += ["Slot", "Sphere", "Stage", "Unwhiten", "Write"]
__all__ += ["register_decay", "register_momentum", "register_stage", "setting"]

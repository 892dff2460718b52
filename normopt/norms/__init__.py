"""What a norm is: its size, its dual norm and its dual map, on one tensor or a list; and its name."""

from normopt.norms.base import Norm, TensorNorm
from normopt.norms.lp import Lp
from normopt.norms.operator import Mixed
from normopt.norms.registry import list_norms, register
from normopt.norms.schatten import Schatten

__all__ = ["Lp", "Mixed", "Norm", "Schatten", "TensorNorm", "list_norms", "register"]

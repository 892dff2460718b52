"""Norms, their dual norms and dual maps on one tensor or a list, and the registry of their names."""

from normopt.norms.base import Norm, TensorNorm
from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.norms.operator import Mixed
from normopt.norms.registry import list_norms, register
from normopt.norms.scales import NormPair
from normopt.norms.schatten import Schatten

__all__ = ["Lp", "MatrixNorm", "Mixed", "Norm", "NormPair", "Schatten", "TensorNorm", "list_norms", "register"]

"""Count zeros, prune small weights, remove dead units, and store weights in sparse layouts, with any optimizer."""

# Imports run one way: pruning → counting → weights → layouts; shrinking → removal → chain, shrinking → counting.

from normopt.sparsity.counting import Report, WeightCount, report
from normopt.sparsity.layouts import SparseLinear, dense_state_dict, sparse_state_dict, to_dense, to_sparse
from normopt.sparsity.pruning import prune_
from normopt.sparsity.shrinking import Shrunk, UnitCount, shrink

__all__ = ["Report", "Shrunk", "SparseLinear", "UnitCount", "WeightCount", "dense_state_dict", "prune_", "report"]
__all__ += ["shrink", "sparse_state_dict", "to_dense", "to_sparse"]

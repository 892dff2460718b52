"""What tests need of other packages, where not every version that normopt allows has it."""

import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from importlib.metadata import version

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon: 2.9 and newer do")
NEEDS_GRAD_DTYPE = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="under this torch a gradient has its parameter's dtype"
)
# Of torch 2.6, a stream of a CPU has no events.
NEEDS_FSDP_ON_CPUS = pytest.mark.skipif(torch.__version__ < (2, 7), reason="this torch has no FSDP2 on CPUs")
# Triton 3.2's interpreter lacks types, and its compiler takes constants otherwise.
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or version("triton").startswith("3.2."),
    reason="triton is for Linux, and 3.2's interpreter has not all that a kernel needs",
)
DCP_ALONE = {"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}


def shards_of(x: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Return a DTensor of what every rank has, without a broadcast where torch can do without: in 2.7 and newer."""
    known = inspect.signature(distribute_tensor).parameters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators")  # torch 2.6, of every mesh of CPUs
        return distribute_tensor(x, mesh, placements, **({"src_data_rank": None} if "src_data_rank" in known else {}))

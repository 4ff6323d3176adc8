"""linl: which nonlinearities does a network really need?

Importing linl is light: torchvision, timm and seaborn load where they are used.
"""

from linl import cost, data, devices, folding, graph, merge, models, planning, results, train, units, weights
from linl.advice import foldable
from linl.checking import verify
from linl.cost import measure
from linl.folding import fold
from linl.padding import pad_first
from linl.units import (
    LiNLU,
    PartialLinear,
    fuse_kernels_,
    harden,
    linearize,
    nonlinearity,
    param_groups,
    penalty,
    project_,
)

__version__ = "0.1.0"

__all__ = [
    "LiNLU", "PartialLinear", "cost", "data", "devices", "fold", "foldable", "folding", "fuse_kernels_", "graph",
    "harden", "linearize", "measure", "merge", "models", "nonlinearity", "pad_first", "param_groups", "penalty",
    "planning", "project_", "results", "train", "units", "verify", "weights",
]  # fmt: skip

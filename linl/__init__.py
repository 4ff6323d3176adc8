"""linl: which nonlinearities does a network really need?

Importing linl is light: torchvision, timm and seaborn load where they are used.
"""

from linl import (
    bounds,
    components,
    cost,
    data,
    devices,
    folding,
    graph,
    losses,
    merge,
    models,
    notebooks,
    planning,
    regions,
    results,
    stability,
    tables,
    train,
    units,
    weights,
)
from linl.advice import foldable
from linl.boxes import Box
from linl.certificates import verify_stability
from linl.checking import verify
from linl.compression import compress
from linl.cost import measure
from linl.folding import fold
from linl.guarding import guard
from linl.padding import pad_first
from linl.shallowing import shallow
from linl.stability import analyse
from linl.states import Stability
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
    "Box", "LiNLU", "PartialLinear", "Stability", "analyse", "bounds", "components", "compress", "cost", "data",
    "devices", "fold", "foldable", "folding", "fuse_kernels_", "graph", "guard", "harden", "linearize", "losses",
    "measure", "merge", "models", "nonlinearity", "notebooks", "pad_first", "param_groups", "penalty", "planning",
    "project_", "regions", "results", "shallow", "stability", "tables", "train", "units", "verify",
    "verify_stability", "weights",
]  # fmt: skip

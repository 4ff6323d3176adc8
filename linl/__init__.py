"""linl: which nonlinearities does a network really need?

Importing linl is light: torchvision, timm and seaborn load where they are used.
"""

from linl import (
    bounds,
    components,
    connections,
    cost,
    data,
    dead_rates,
    devices,
    distributed,
    folding,
    graph,
    losses,
    machines,
    masks,
    merge,
    models,
    notebooks,
    planning,
    pruning,
    published_proofs,
    regions,
    results,
    signals,
    sites,
    sliders,
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
from linl.cycles import prune_cycles
from linl.dead_rates import dead_rate
from linl.folding import fold, fold_norms
from linl.guarding import guard
from linl.masks import harden_masks
from linl.padding import pad_first
from linl.pruning import prune
from linl.reconstruction import reconstruct
from linl.refitting import refit
from linl.shallowing import shallow
from linl.shrinking import shrink
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
    "Box", "LiNLU", "PartialLinear", "Stability", "analyse", "bounds", "components", "compress", "connections",
    "cost", "data", "dead_rate", "dead_rates", "devices", "distributed", "fold", "fold_norms", "foldable",
    "folding", "fuse_kernels_", "graph", "guard", "harden", "harden_masks", "linearize", "losses", "machines",
    "masks", "measure", "merge", "models", "nonlinearity", "notebooks", "pad_first", "param_groups", "penalty",
    "planning", "project_", "prune", "prune_cycles", "pruning", "published_proofs", "reconstruct", "refit",
    "regions", "results", "shallow", "shrink", "signals", "sites", "sliders", "stability", "tables", "train",
    "units", "verify", "verify_stability", "weights",
]  # fmt: skip

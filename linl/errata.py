"""The errata: what published code gets wrong, that of the reproduced systems and of their neighbours.

`linl.faults` says what an erratum is; they stand in four files, by subject. notebooks/tables/errata.ipynb makes
the page.
"""

from __future__ import annotations

import pandas as pd

from linl import folding_faults, proof_faults, pruning_faults, training_faults
from linl.faults import Erratum

ERRATA: list[Erratum] = [
    found
    for file in (training_faults, folding_faults, proof_faults, pruning_faults)
    for found in vars(file).values()
    if isinstance(found, Erratum)
]
"""In the order they stand in."""


def table() -> pd.DataFrame:
    """A row an erratum, all figures computed anew: system, kind, what is wrong, figure, theirs, ours, right, source,
    shown by. Seconds."""
    return pd.DataFrame([entry.row() for entry in ERRATA])

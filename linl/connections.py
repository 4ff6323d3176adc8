"""Connections of a dense network, counted as the papers on exact compression count them: from hidden units on.

Serra et al.'s tables (arXiv 2102.07804v2, appendix) don't say what they count. Where only the first layer loses units,
their own figures tell: n removed units of w take n/w of what leads from that layer to the next, and of what leads into
it nothing is counted (`notebooks/tables/stability.ipynb` computes it for all their networks).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pandas as pd
from torch import nn

from linl.sources import SOURCES

PIXELS = {"digits": 64, "mnist": 784, "fashion_mnist": 784, "cifar10": 3072, "cifar100": 3072}


def count(net: nn.Module) -> tuple[int, int]:
    """Weights of a network's dense layers.

    Args:
        net: dense layers in a row; the first of them takes the input.

    Returns: how many there are in all; how many lead from a hidden unit, which are those of all layers but the first.
    """
    sizes = [module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear)]
    return sum(sizes), sum(sizes[1:])


def between(widths: list[int]) -> list[int]:
    """Connections of a dense network: each unit's with each unit of the next layer.

    Args:
        widths: of its layers in order, the input's and the output's among them.

    Returns: how many, from each layer to the next.
    """
    return [before * after for before, after in pairwise(widths)]


def widths(run: Mapping[str, Any]) -> list[int]:
    """Of a run's dense network: how wide its input, its hidden layers and its output are.

    Args:
        run: its `network` ("mlp" or "autoencoder"), `dataset` (a name in `PIXELS`) and `hidden` ("100 100").
    """
    pixels = PIXELS[run["dataset"]]
    outputs = pixels if run["network"] == "autoencoder" else SOURCES[run["dataset"]].num_classes
    return [pixels, *(int(word) for word in run["hidden"].split()), outputs]


def with_hidden(done: pd.DataFrame) -> pd.DataFrame:
    """Runs of `stability` with `hidden_connections_removed`, the share of the connections from hidden units on.

    Runs from before 22 November 2026 have no such figure. There it follows from those they have: what all dense layers
    lost, less what the first one did: it leads from every input to each unit left in the first layer that has any.
    """
    if done.empty:
        return done
    column = "hidden_connections_removed"
    known = done[column] if column in done else pd.Series(float("nan"), done.index)
    rows = zip(known, done.iterrows(), strict=True)
    return done.assign(**{column: [_derived(run) if pd.isna(share) else share for share, (_, run) in rows]})


def _derived(run: pd.Series) -> float:
    pixels, *_, outputs = sizes = widths(run)
    first, *rest = between(sizes)
    left = round((1 - run["connections_removed"]) * (first + sum(rest)))
    straight = outputs if left else 0  # with no hidden unit left, the output reads the input or is constant
    stay = next((units for units in run["left"] if units), straight)
    return 1 - (left - pixels * stay) / sum(rest)

"""Cheap signs of which activations a trained network could do without: no training, one pass or one gradient each.

| signal | of an activation | it seems dispensable where the signal is |
|---|---|---|
| rate | share of its units that are on (pre-activation above 0), over inputs | high: nearly the identity |
| entropy | mean over units of −p·log₂p − (1−p)·log₂(1−p), p the share of inputs that a unit is on for | low |
| dynamic | dead for an input, though not for all weights' sake (`linl.dead_rates`) | low |
| steady | share of units seen on one piece only, on all inputs | high |
| certified | share of units proved to stay on one piece on a whole box (`linl.analyse`) | high |
| pull | dLoss/dα at α = 0 of a Layer Folding unit in its place | low: below 0 the loss asks for it |
| untuned | how much the mean loss grows when it alone becomes the identity, nothing tuned | low |

*entropy* is that of EASIER (Quétu et al., ECML-PKDD 2024, section 3), with a unit's share taken over all inputs given
and not batch by batch; a unit is one number of the activation's output, a channel at a position of a convolution.
*rate* is one minus *dynamic* where a ReLU has no static units: two names for one thing, kept because papers use both.
A sign that is the same for every activation orders nothing. Whether one that orders them does it better than chance,
`by_chance` tells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.boxes import Box
from linl.dead_rates import dead_rate
from linl.graph import evaluating, input_of, trace
from linl.sites import Site, activation_sites
from linl.stability import analyse
from linl.units import harden, linearize, units_of

SIGNS = {
    "rate": 1, "entropy": -1, "dynamic": -1, "steady": 1, "certified": 1, "pull": -1, "untuned": -1,
}  # fmt: skip
"""Which way a signal points: 1 where a high one says "dispensable", −1 where a low one does."""


LEVEL = 0.05
"""A ρ is beyond chance if shuffled activations give one as far from 0, on either side, no more often than this."""
EXACT, DRAWS = 8, 20_000
"""Up to so many activations every order is tried; beyond, so many orders, always the same ones."""


def without(net: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of a network in which some activations are the identity; the others are as they were.

    Args:
        net: any network that `linl.linearize(net, "partial")` takes.
        names: of activations, as in `linl.nonlinearity(linl.linearize(net, "partial"))`.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    lin = linearize(net, "partial", start=0.0)
    units = units_of(lin)
    if unknown := [name for name in names if name not in units]:
        raise ValueError(f"no activation {unknown[0]!r}: choose from {', '.join(units)}")
    for name in names:
        nn.init.ones_(units[name].alpha)
    return harden(lin)


def read(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    box: Box | None = None,
    method: str = "interval",
    time_limit: float | None = None,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Every signal of every activation, as this file defines them.

    Args:
        net: a trained network; looked at in eval mode, left alone.
        images, labels: (N, *shape) and (N,), normalized as the network wants them; training images, not test ones.
        box: where stability is to be proved; None leaves `certified` empty (nan).
        method, time_limit: of `linl.analyse`.
        batch_size: how many images are looked at together.

    Returns: a row an activation, in the order of the forward pass, by name; the columns of `SIGNS`.

    Raises:
        ValueError: no image, as many labels as images not given, or what `linearize` and `analyse` refuse.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"{len(images)} images, {len(labels)} labels: as many of both, and at least one")
    table = signs(net, images, batch_size)
    table["dynamic"] = dead_rate(net, images, batch_size=batch_size).table["dynamic"].to_numpy()
    table["certified"] = math.nan
    if box is not None:
        with evaluating(net):
            state = analyse(net, box, method, time_limit, images=images)
        table["certified"] = [(codes >= 0).double().mean().item() for codes in state.codes]
    table["pull"] = pulls(net, images, labels, batch_size)
    table["untuned"] = untuned(net, images, labels, batch_size)
    return table[list(SIGNS)]


# --- from signs ------------------------------------------------------------------------------------


@torch.no_grad()
def signs(net: nn.Module, images: Tensor, batch_size: int = 256) -> pd.DataFrame:
    """rate, entropy and steady by activation; arguments as in `read`."""
    traced = trace(net).eval()
    sites = activation_sites(traced)
    seen = {site.name: _Seen(site.module) for site in sites}
    watching = _Watching(traced, sites, seen)
    for batch in images.split(batch_size):
        watching.run(batch)
    rows = {site.name: seen[site.name].row() for site in sites}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


class _Watching(fx.Interpreter):
    """A forward pass that shows every activation's values to those who count them."""

    def __init__(self, traced: fx.GraphModule, sites: list[Site], seen: dict[str, _Seen]) -> None:
        super().__init__(traced)
        self.sites, self.seen = {site.node: site for site in sites}, seen

    def run_node(self, node: fx.Node):
        site = self.sites.get(node)
        given = None if site is None or site.inner else self.env[input_of(node)]
        before = given.clone() if given is not None and getattr(site.module, "inplace", False) else given
        value = super().run_node(node)
        if site is not None:  # inside a norm only the output can be had; its sign is the same for a rectifier
            self.seen[site.name].add(value if before is None else before)
        return value


class _Seen:
    """How often each of an activation's units was on, and which pieces it was seen on."""

    def __init__(self, module: nn.Module) -> None:
        self.cap = float(getattr(module, "max_val", math.inf))  # a ReLU6 bends at 6 as well
        self.inputs, self.on, self.capped = 0, 0, 0

    def add(self, values: Tensor) -> None:
        self.inputs += len(values)
        self.on = self.on + (values > 0).sum(0, dtype=torch.float64)
        self.capped = self.capped + (values >= self.cap).sum(0, dtype=torch.float64)

    def row(self) -> dict[str, float]:
        p = self.on / self.inputs
        off, capped = self.on == 0, self.capped == self.inputs
        between = (self.on == self.inputs) & (self.capped == 0)
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
        shares = {"rate": p, "entropy": entropy, "steady": (off | capped | between).double()}
        return {"units": p.numel(), **{name: share.mean().item() for name, share in shares.items()}}


# --- from the loss ---------------------------------------------------------------------------------


def _batches(lin: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, float]]:
    """Each batch's mean cross-entropy, and its share of all images."""
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield F.cross_entropy(lin(x), y), len(y) / len(labels)


def pulls(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> list[float]:
    """dLoss/dα at α = 0 of each activation; arguments as in `read`.

    The first-order estimate of what the loss gains when α goes from 0 to 1; what Layer Folding's first step sees.
    """
    lin = linearize(net, "partial", start=0.0).eval()
    alphas = [unit.alpha for unit in units_of(lin).values()]
    total = torch.zeros(len(alphas), dtype=torch.float64)
    for loss, share in _batches(lin, images, labels, batch_size):
        total += share * torch.stack(torch.autograd.grad(loss, alphas)).double().cpu()
    return total.tolist()


@torch.no_grad()
def untuned(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> list[float]:
    """How much the mean loss grows when each activation alone becomes the identity; arguments as in `read`."""
    lin = linearize(net, "partial", start=0.0)

    def loss() -> float:
        with evaluating(lin):
            return sum(float(value) * share for value, share in _batches(lin, images, labels, batch_size))

    before, grown = loss(), []
    for unit in units_of(lin).values():
        unit.alpha.fill_(1.0)
        grown.append(loss() - before)
        unit.alpha.fill_(0.0)
    return grown


# --- against a referee -----------------------------------------------------------------------------


def by_chance(signs: Sequence[Sequence[float]], referees: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Spearman's ρ of a sign with a referee, and how often activations in another order give one as far from 0.

    A permutation test on both sides, ties as they are. Runs of one network judge the same activations, so these change
    places in all runs alike: more runs make ρ surer, they don't make activations more. Up to `EXACT` activations p is
    exact; beyond, an estimate from `DRAWS` orders, never below 1 in as many.

    Args:
        signs: a row a run, (runs, activations).
        referees: likewise, what each run's referee says.

    Returns: ρ, the mean over runs, and p.

    Raises:
        ValueError: shapes that differ, a nan, or a row that is the same for every activation.
    """
    x, y = (np.atleast_2d(np.asarray(rows, dtype=float)) for rows in (signs, referees))
    if x.shape != y.shape:
        raise ValueError(f"signs of shape {x.shape}, referees of {y.shape}: they must be alike")
    products = _standard(x).T @ _standard(y) / len(x)  # (n, n): what the sign of i gives with the referee's word on j
    places, orders = np.arange(x.shape[1]), _orders(x.shape[1])
    rho = float(np.trace(products))
    return rho, float((np.abs(products[places, orders].sum(1)) >= abs(rho) - 1e-9).mean())


def can_tell(activations: int) -> bool:
    """Whether any order of so many activations, the best and its reverse, is rarer than `LEVEL`."""
    return 2 / math.factorial(activations) <= LEVEL


def _standard(rows: np.ndarray) -> np.ndarray:
    """Ranks in each row, with mean 0 and length 1."""
    ranks = pd.DataFrame(rows.T).rank().to_numpy().T
    centred = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    if not (length > 0).all():  # so it is of nan, too
        raise ValueError("a sign or a referee that is nan, or the same for every activation, has no order")
    return centred / length


def _orders(n: int) -> np.ndarray:
    """Orders of n places, the unchanged one among them: all, or a sample."""
    if n <= EXACT:
        return np.array(list(itertools.permutations(range(n))))
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(n), (DRAWS, 1)), axis=1)
    return np.vstack([np.arange(n), shuffled])

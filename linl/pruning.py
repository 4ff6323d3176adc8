"""One step of pruning: the lowest scores go, and with AP some negative weights that hardly moved.

Activating-while-Pruning (Liu et al., arXiv 2212.06145, as their code has it): of the live weights a method X takes the
share p − q, AP takes q more, among those that are negative the ones that moved least in this cycle's training. A
negative weight less raises what a unit reads; one that hardly moved is missed least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from linl.checking import shown
from linl.graph import clone
from linl.losses import LOSSES
from linl.masks import mask_, masks_of, prunable, raw_weight
from linl.scores import SCORES, Given, Score, Weights


@dataclass(frozen=True)
class Choice:
    """Which weights AP takes.

    Attributes:
        value: from how far weights moved and a generator to numbers, the lowest go.
        negative: only among negative weights.
        wants_start: whether it must know where the weights started.
    """

    value: Callable[[Tensor, torch.Generator], Tensor]
    negative: bool = True
    wants_start: bool = True


CHOICES: dict[str, Choice] = {
    "least-moved negative": Choice(lambda moved, generator: moved),  # AP itself; the others are controls
    "most-moved negative": Choice(lambda moved, generator: -moved),
    "least-moved": Choice(lambda moved, generator: moved, negative=False),
    "random negative": Choice(
        lambda moved, generator: torch.rand(moved.shape, generator=generator, dtype=torch.float64), wants_start=False
    ),
}


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    `.table` has a row a layer: layer, weights, live (before), by_score and by_ap (how many each took), left, share.
    """

    table: pd.DataFrame

    @property
    def share(self) -> float:
        """Live weights of all weights."""
        return float(self.table["left"].sum() / self.table["weights"].sum())

    @property
    def collapsed(self) -> list[str]:
        """Layers without a live weight."""
        return self.table.loc[self.table["left"] == 0, "layer"].tolist()

    def _repr_html_(self) -> str:
        return f"<p>{self.share:.2%} of the weights left</p>" + shown(self.table)


def prune(
    net: nn.Module,
    score: str = "magnitude",
    rate: float = 0.2,
    ap: float = 0.0,
    start: Mapping[str, Tensor] | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
    *,
    activate: str = "least-moved negative",
    loss: str = "cross_entropy",
    seed: int = 0,
) -> nn.Module:
    """A copy of a network with a share of its live weights pruned.

    round(rate·live) weights go in all, round(ap·live) of them by AP, after the score has taken its own; what AP can't
    take, for want of negative weights, the score takes. Equal values go in the order of layers and positions.

    Args:
        net: masked already or not; left alone.
        score: a key of `linl.scores.SCORES`.
        rate: p, the share of the live weights of all dense and convolutional layers, in (0, 1).
        ap: q, AP's part of it, in [0, rate].
        start: a state_dict of the weights before this cycle's training, which AP measures movement from.
        batch: (images, labels) for "gradient" and "snip"; for "synflow" its shape, where the network names none.
        activate: a key of `CHOICES`: AP, or one of its controls.
        loss: a key of `linl.losses.LOSSES`, for the gradients.
        seed: of what is random.

    Returns: the network with masks of torch.nn.utils.prune and `.prune_report`. It trains and saves as any other; see
        `linl.harden_masks` for ordinary weights.

    Raises:
        ValueError: an unknown name, a rate outside (0, 1), ap outside [0, rate], a missing or unfitting start or batch,
            scores that are no numbers, nothing left to prune.

    Warns:
        UserWarning: a layer has lost its last weight.
    """
    refuse_settings(score, rate, ap, batch, activate, loss)
    live = sum(int(mask.sum()) for mask in masks_of(net).values())
    by_ap = round(ap * live)
    return pruned(
        net, score, round(rate * live) - by_ap, by_ap, start=start, batch=batch, activate=activate, loss=loss, seed=seed
    )


def refuse_settings(score: str, rate: float, ap: float, batch: object, activate: str, loss: str) -> None:
    """
    Raises:
        ValueError: as `prune`, for what can be told without a network.
    """
    for what, name, known in (("score", score, SCORES), ("activate", activate, CHOICES), ("loss", loss, LOSSES)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    if not 0 < rate < 1:
        raise ValueError(f"rate = {rate}: the share of the live weights to prune, above 0 and below 1")
    if not 0 <= ap <= rate:
        raise ValueError(f"ap = {ap}: AP's part of the rate, from 0 to {rate}")
    if SCORES[score].wants_batch and batch is None:
        raise ValueError(f"{score} is a gradient's score: pass batch=(images, labels)")


def pruned(
    net: nn.Module, score: str, by_score: int, by_ap: int, *, start=None, batch=None, activate, loss, seed
) -> nn.Module:
    """`prune` by numbers of weights."""
    choice, generator = CHOICES[activate], torch.Generator().manual_seed(seed)
    net = clone(net)
    before = masks_of(net)
    if not any(mask.any() for mask in before.values()):
        raise ValueError("no weight is left to prune")
    moved = _movement(net, start, choice) if by_ap else {}
    mask_(net, before)
    given = Given(batch, loss, generator)
    _prune_by_score_(net, SCORES[score], by_score, given)
    middle = masks_of(net)
    if by_ap:
        may = {n: m & (raw_weight(prunable(net)[n]) < 0) if choice.negative else m for n, m in middle.items()}
        values = {n: choice.value(m, generator) for n, m in moved.items()}
        able = min(by_ap, sum(int(mask.sum()) for mask in may.values()))
        mask_(net, without(middle, lowest(values, may, able)))
        ended = masks_of(net)
        _prune_by_score_(net, SCORES[score], by_ap - able, given)
    else:
        ended = middle
    net.prune_report = _report(before, middle, ended, masks_of(net))
    lost = [n for n in net.prune_report.collapsed if before[n].any()]
    if lost:
        warnings.warn(f"no weight is left in {', '.join(lost)}", stacklevel=3)
    return net


def _prune_by_score_(net: nn.Module, score: Score, count: int, given: Given) -> None:
    live = sum(int(mask.sum()) for mask in masks_of(net).values())
    left = live
    for done in range(1, score.rounds + 1 if count else 1):
        wanted = live - count if done == score.rounds else round(live * (1 - count / live) ** (done / score.rounds))
        if wanted < left:
            masks = masks_of(net)
            scores = score.of(net, given)
            gone = by_layer(scores, masks, left - wanted) if score.by_layer else lowest(scores, masks, left - wanted)
            mask_(net, without(masks, gone))
            left = wanted


def _movement(net: nn.Module, start: Mapping[str, Tensor] | None, choice: Choice) -> Weights:
    """|w − start| by layer; zeros where it doesn't matter."""
    layers = prunable(net)
    if not choice.wants_start:
        return {name: torch.zeros(raw_weight(layer).shape) for name, layer in layers.items()}
    if start is None:
        raise ValueError("AP looks for weights that hardly moved: pass start=, a state_dict from before the training")
    found = {}
    for name, layer in layers.items():
        now = raw_weight(layer).detach()
        keys = [f"{name}.{kind}" if name else kind for kind in ("weight_orig", "weight")]
        key = next((key for key in keys if key in start), None)
        if key is None or start[key].shape != now.shape:
            why = f"no {keys[1]}" if key is None else f"another shape of {key}"
            raise ValueError(f"start is of another network: it has {why}")
        found[name] = (now.double() - start[key].to(now.device).double()).abs()
    return found


# --- which go --------------------------------------------------------------------------------------


def lowest(values: Weights, among: Weights, count: int) -> Weights:
    """The weights with the lowest values, bool by layer: exactly so many, those first in order where values are equal.

    Args:
        values: a number for every weight.
        among: which weights may be taken, bool; at least `count` of them.
        count: how many.

    Raises:
        ValueError: a value that is no number.
    """
    for name, mask in among.items():
        if not values[name].to(mask.device)[mask].isfinite().all():
            raise ValueError(f"a score in {name} is no finite number: are the weights or the batch?")
    ranked = torch.cat([values[n].to(m.device)[m].double().cpu() for n, m in among.items()])
    taken = torch.zeros(len(ranked), dtype=torch.bool)
    if count:
        limit = ranked.kthvalue(count).values
        taken = ranked < limit
        taken[(ranked == limit).nonzero()[: count - int(taken.sum()), 0]] = True
    parts = taken.split([int(mask.sum()) for mask in among.values()])
    return {
        name: torch.zeros_like(mask).masked_scatter_(mask, part.to(mask.device))
        for (name, mask), part in zip(among.items(), parts, strict=True)
    }


def by_layer(values: Weights, among: Weights, count: int) -> Weights:
    """`lowest` of every layer on its own, the same share of each; whole numbers by largest remainder."""
    sizes = {name: int(mask.sum()) for name, mask in among.items()}
    exact = {name: count * size / sum(sizes.values()) for name, size in sizes.items()}
    counts = {name: math.floor(part) for name, part in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: count - sum(counts.values())]:
        counts[name] += 1
    return {name: lowest({name: values[name]}, {name: among[name]}, counts[name])[name] for name in among}


def without(masks: Weights, gone: Weights) -> Weights:
    """Masks less what is taken."""
    return {name: mask & ~gone[name] for name, mask in masks.items()}


def _report(before: Weights, middle: Weights, ended: Weights, after: Weights) -> PruneReport:
    rows = []
    for name, mask in before.items():
        counts = [int(masks[name].sum()) for masks in (before, middle, ended, after)]
        by_ap = counts[1] - counts[2]
        rows.append({
            "layer": name, "weights": mask.numel(), "live": counts[0], "by_score": counts[0] - counts[3] - by_ap,
            "by_ap": by_ap, "left": counts[3], "share": counts[3] / mask.numel(),
        })  # fmt: skip
    return PruneReport(pd.DataFrame(rows))

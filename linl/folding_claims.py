"""Layer Folding's claims beside our runs (Ben Dror et al., arXiv 2106.09309): accuracy, depth, similar depths."""

from __future__ import annotations

from typing import Any

import pandas as pd

from linl.claims import Trained, row, setting
from linl.results import mean_sd, paper
from linl.verdicts import otherwise, share, verdict

LEARNT = Trained(100, ("layer-folding", "layer-folding-vgg"))
TUNED = Trained(100, ("fine-tune", "fine-tune-vgg"), ("tune_epochs", "tune_recipe"))
ABSTRACT = "arXiv 2106.09309, abstract"
SIMILAR = 2
"""Depths that are at most so many layers apart are similar: as far apart as the published ones are on either data."""


def layer_folding(done: pd.DataFrame) -> list[dict]:
    """The published sets, imposed: accuracy; the depth that λ = 0.25 ends with, where it was learnt, beside that of the
    published table and of the published checkpoint; similar depths; and what needs ImageNet."""
    known = paper("layer_folding")
    rows = [_imposed(published, done) for _, published in known.iterrows()]
    rows += [found for _, published in known.iterrows() if (found := _learnt(published, done))]
    rows += [_learnt(published, done, "the published checkpoint") or _checkpoint(published)
             for _, published in paper("layer_folding_checkpoint").iterrows()]  # fmt: skip
    rows += [_similar(data, done) for data in ("cifar10", "cifar100")]
    faster = ("MobileNetV2 and EfficientNet-Lite made faster, ImageNet", "more efficient alternatives", ABSTRACT)
    return [*rows, row("Layer Folding", *faster, "needs ImageNet")]


AS_LEARNT = {"keep": "", "penalty": 0.25, "start": 0.0, "threshold": 0.9}
"""The settings of the published code; which penalty λ each published depth was learnt with isn't stated."""


def _place(published: pd.Series) -> dict[str, Any]:
    return {"network": published["network"], "dataset": published["dataset"], "width": float(published["width"])}


def _imposed(published: pd.Series, done: pd.DataFrame) -> dict:
    wide = "" if published["width"] == "1" else f" × {published['width']}"
    claim = f"{published['network']}{wide}, {published['dataset']}, {len(published['kept'].split())} kept"
    figures = f"{published['accuracy']} %, depth {published['depth']}"
    group = setting(done, TUNED, keep=published["kept"], **_place(published))
    if group is None:
        return row("Layer Folding", claim, figures, published["source"])
    first, accuracy = group.iloc[0], 100 * group["tuned_test_accuracy"]
    word = verdict(published["accuracy"], accuracy, within=0.5, unlike=TUNED.unlike(group))
    ours = f"{mean_sd(accuracy)} %, depth {first['depth_published']}"
    schedule = f"from {start(group)}; tuned {TUNED.told(first)}"
    return row("Layer Folding", claim, figures, published["source"], word, ours, schedule, group)


def start(group: pd.DataFrame) -> str:
    """What a setting's networks were folded from: "91.73 % (public weights)", "58.76 % (trained here, 20 epochs)"."""
    first = group.iloc[0]
    where = "public weights" if first["weights"] else f"trained here, {first['pretrain_epochs']} epochs"
    return f"{mean_sd(100 * group['start_test_accuracy'])} % ({where})"


def _learnt(published: pd.Series, done: pd.DataFrame, beside: str = "") -> dict | None:
    group = setting(done, LEARNT, **AS_LEARNT, **_place(published))
    if group is None:
        return None
    depth = published["depth"]
    word = verdict(depth, group["depth_published"], digits=0, unlike=LEARNT.unlike(group))
    claim = f"{published['network']}, {published['dataset']}, learnt{', ' + beside if beside else ''}"
    ours = f"depth {mean_sd(group['depth_published'], 0)}"
    schedule = f"λ {AS_LEARNT['penalty']}, from {start(group)}; {LEARNT.told(group.iloc[0])}"
    return row("Layer Folding", claim, f"depth {depth}", published["source"], word, ours, schedule, group)


def _checkpoint(published: pd.Series) -> dict:
    claim = f"{published['network']}, {published['dataset']}, learnt, the published checkpoint"
    return row("Layer Folding", claim, f"depth {published['depth']}", published["source"])


def _similar(data: str, done: pd.DataFrame) -> dict:
    claim = ("Layer Folding", f"similar depths, {data}", "similar", ABSTRACT)
    names = sorted(done.query("dataset == @data and width == 1")["network"].unique()) if len(done) else []
    how = {**AS_LEARNT, "dataset": data, "width": 1.0}
    groups = [g for name in names if (g := setting(done, LEARNT, network=name, **how)) is not None]
    groups.sort(key=lambda g: g.iloc[0]["activations"])
    if len(groups) < 3:
        return row(*claim)
    depths = [g["depth_published"].mean() for g in groups]
    word = otherwise(share([max(depths) - min(depths) <= SIMILAR]), LEARNT.unlike(*groups))
    told = [
        f"{g.iloc[0]['network']} {depth:.3g} of {g.iloc[0]['activations'] + 1:.0f}"
        for depth, g in zip(depths, groups, strict=True)
    ]
    ours = f"depths: {', '.join(told)}"
    schedules = sorted({f"λ {AS_LEARNT['penalty']}; {LEARNT.told(g.iloc[0])}" for g in groups})
    return row(*claim, word, ours, "; ".join(schedules), *groups)

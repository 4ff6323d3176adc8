"""Published claims beside our runs: a row a claim, with a verdict (`linl.verdicts`).

Each function takes the finished runs of one experiment (as `linl.results.runs` gives them) and returns rows: system,
claim, published, ours, verdict, seeds, schedule, hardware, source, run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from linl.connections import with_hidden
from linl.results import mean_sd, paper
from linl.tables import hardware, settings, short, unfolded
from linl.verdicts import share, together, verdict


def row(
    system: str, claim: str, published: str, source: str, word: str = "not run", ours: str = "", schedule: str = "",
    *groups: pd.DataFrame,
) -> dict[str, Any]:  # fmt: skip
    """One claim; `groups`: the settings that it is compared with, each a row a seed."""
    how = {"seeds": "", "schedule": schedule, "hardware": "", "source": source, "run": ""}
    if groups:
        runs = " ".join(short(group["key"].iloc[0]) for group in groups)
        how |= {"seeds": seeds_of(groups), "hardware": hardware(groups[0].iloc[0]), "run": runs}
    return {"system": system, "claim": claim, "published": published, "ours": ours, "verdict": word, **how}


def setting(done: pd.DataFrame, longest: str, **where: Any) -> pd.DataFrame | None:
    """The runs of one setting on all images, a row a seed: of those with these parameters the one that was trained
    longest (by the parameter `longest`), then the newest. None where there is none."""
    for name, value in ({"limit": 0, **where} if len(done) else {}).items():
        done = done[done[name] == value]
    if done.empty:
        return None
    best = done.sort_values([longest, "finished"]).iloc[-1]["key"]
    return done[done["key"] == best].sort_values("seed")


# --- LiNLNet ---------------------------------------------------------------------------------------


def linlnet(done: pd.DataFrame) -> list[dict]:
    """Accuracy and linear layers of the seven networks."""
    return [_linlnet(published, done) for _, published in paper("linlnet").iterrows()]


def _linlnet(published: pd.Series, done: pd.DataFrame) -> dict:
    network, data = published["network"], published["dataset"]
    claim = f"{network}, {data.replace('imagefolder', 'ImageNet')}"
    figures = f"{published['accuracy']} ± {published['sd']} %, {published['linear']} linear"
    group = setting(done, "epochs", network=network, dataset=data, width=1.0)
    if group is None:
        word = "needs ImageNet" if data == "imagefolder" else "not run"
        return row("LiNLNet", claim, figures, published["source"], word)
    first, accuracy = group.iloc[0], 100 * group["linl_test_accuracy"]
    same = first["epochs"] >= 200 and first["recipe"] in ("linlnet", "linlnet-imagenet")
    words = {
        "accuracy": verdict(f"{published['accuracy']}±{published['sd']}", accuracy, within=0.5, same=same),
        "linear layers": verdict(published["linear"], group["linear"], digits=0, same=same),
    }
    ours = f"{mean_sd(accuracy)} %, {mean_sd(group['linear'], 0)} linear"
    schedule = f"{first['epochs']} of 200 epochs, {first['recipe']}"
    return row("LiNLNet", claim, figures, published["source"], together(words), ours, schedule, group)


def memory(done: pd.DataFrame) -> dict:
    """The abstract's −27 % for LiNL-AlexNet on ImageNet, from an experiment that needs no training."""
    claim = ("LiNLNet", "AlexNet, ImageNet: size", "-27 %", "Jin & Jeong, abstract: memory at kept accuracy")
    change, run = alexnet_smaller(done)
    if change is None:
        return row(*claim)
    word = verdict("-27", [change], within=0.5, digits=1)
    return row(*claim, word, f"{change:.1f} % of the parameters", "no training", run)


def alexnet_smaller(done: pd.DataFrame) -> tuple[float | None, pd.DataFrame]:
    """By how many per cent AlexNet's parameters change at 224 pixels; the newest run of `last_layer` that says so."""
    for _, run in done.sort_values("finished", ascending=False).iterrows() if len(done) else ():
        cases = pd.DataFrame(run["cases"]).query("network == 'alexnet' and side == 224 and width == 1")
        if len(cases):
            change = 100 * (cases["parameters_after"] / cases["parameters_before"] - 1)
            return float(change.iloc[0]), done.loc[[run.name]]
    return None, done


# --- Layer Folding ---------------------------------------------------------------------------------


def layer_folding(done: pd.DataFrame) -> list[dict]:
    """The published sets, imposed: accuracy; the depth that λ = 0.25 ends with, where it was learnt; similar depths."""
    known = paper("layer_folding")
    rows = [_imposed(published, done) for _, published in known.iterrows()]
    rows += [found for _, published in known.iterrows() if (found := _learnt(published, done))]
    return [*rows, *(_similar(data, done) for data in ("cifar10", "cifar100"))]


def _place(published: pd.Series) -> dict[str, Any]:
    return {"network": published["network"], "dataset": published["dataset"], "width": float(published["width"])}


def _imposed(published: pd.Series, done: pd.DataFrame) -> dict:
    wide = "" if published["width"] == "1" else f" × {published['width']}"
    claim = f"{published['network']}{wide}, {published['dataset']}, {len(published['kept'].split())} kept"
    figures = f"{published['accuracy']} %, depth {published['depth']}"
    group = setting(done, "tune_epochs", keep=published["kept"], **_place(published))
    if group is None:
        return row("Layer Folding", claim, figures, published["source"])
    epochs, accuracy = group.iloc[0]["tune_epochs"], 100 * group["tuned_test_accuracy"]
    word = verdict(published["accuracy"], accuracy, within=0.5, same=epochs >= 100)
    ours = f"{mean_sd(accuracy)} %, depth {group.iloc[0]['depth_published']}"
    return row(
        "Layer Folding", claim, figures, published["source"], word, ours, f"{epochs} of 100 epochs of tuning", group
    )


def _learnt(published: pd.Series, done: pd.DataFrame) -> dict | None:
    group = setting(done, "epochs", keep="", penalty=0.25, start=0.0, **_place(published))
    if group is None:
        return None
    epochs, depth = group.iloc[0]["epochs"], published["depth"]
    word = verdict(depth, group["depth_published"], digits=0, same=epochs >= 100)
    claim = f"{published['network']}, {published['dataset']}, learnt"
    ours = f"depth {mean_sd(group['depth_published'], 0)}"
    return row(
        "Layer Folding", claim, f"depth {depth}", published["source"], word, ours, f"{epochs} of 100 epochs", group
    )


def _similar(data: str, done: pd.DataFrame) -> dict:
    claim = ("Layer Folding", f"similar depths, {data}", "similar", "arXiv 2106.09309, abstract")
    names = sorted(done.query("dataset == @data and width == 1")["network"].unique()) if len(done) else []
    how = {"keep": "", "penalty": 0.25, "start": 0.0, "dataset": data, "width": 1.0}
    groups = [g for name in names if (g := setting(done, "epochs", network=name, **how)) is not None]
    if len(groups) < 3:
        return row(*claim)
    depths, epochs = [g["depth_published"].mean() for g in groups], min(g.iloc[0]["epochs"] for g in groups)
    ours, word = (
        f"{min(depths):.0f} to {max(depths):.0f}, {len(groups)} networks",
        share([max(depths) - min(depths) <= 2]),
    )
    word = word if epochs >= 100 else f"shorter schedule: {word}"
    return row(*claim, word, ours, f"{epochs} of 100 epochs", *groups)


# --- ReLU stability --------------------------------------------------------------------------------

MEASURES = {  # ours, by what a percentage or a loss is multiplied, and what it may differ by
    "accuracy": ("accuracy", "test_accuracy", 100, 0.1),
    "loss": ("loss", "test_loss", 1, 0.002),
    "neurons": ("neurons_removed", "neurons_removed", 100, 0.5),
    "connections": ("connections_removed", "hidden_connections_removed", 100, 0.5),
}


def stability(done: pd.DataFrame) -> list[dict]:
    """The appendix's tables: a row a network and l1 that was run, and one for the rest of each network's."""
    rows: list[dict] = []
    done = with_hidden(done)
    for (network, data, hidden), part in paper("stability").groupby(["network", "dataset", "hidden"], sort=False):
        found = [_stable(published, done) for _, published in part.iterrows()]
        ran = [line for line in found if line["run"]]
        claim = f"{network} {hidden.replace(' ', '-')}, {data}, {len(found) - len(ran)}{' more' if ran else ''} of l1"
        rest = row("ReLU stability", claim, "", part["source"].iloc[0])
        rows += [*ran, *([rest] if len(ran) < len(found) else [])]
    return rows


def _stable(published: pd.Series, done: pd.DataFrame) -> dict:
    where = {name: published[name] for name in ("network", "dataset", "hidden")}
    group = setting(done, "epochs", l1=float(published["l1"]), adversary="none", **where)
    known = {name: how for name, how in MEASURES.items() if published[how[0]]}
    widths = published["hidden"].replace(" ", "-")
    claim = f"{published['network']} {widths}, {published['dataset']}, l1 {float(published['l1']):g}"
    figures = "; ".join(f"{name} {published[how[0]]}" for name, how in known.items())
    if group is None:
        return row("ReLU stability", claim, figures, published["source"])
    epochs, words, ours = group.iloc[0]["epochs"], {}, []
    for name, (column, mine, factor, within) in known.items():
        words[name] = verdict(published[column], factor * group[mine], within=within, same=epochs >= 120)
        ours.append(f"{name} {mean_sd(group[mine], 4 if name == 'loss' else 2, factor)}")
    schedule = f"{epochs} of 120 epochs"
    return row("ReLU stability", claim, figures, published["source"], together(words), "; ".join(ours), schedule, group)


# --- linear regions --------------------------------------------------------------------------------

REGIONS = "arXiv 1905.11428: l1 and adversarial training lower the number of linear regions"


def regions(done: pd.DataFrame) -> list[dict]:
    """What makes fewer regions: a direction, and no figure."""
    return [_fewer("l1", "l1", done), _fewer("adversarial training", "eps", done)]


def _fewer(word: str, column: str, done: pd.DataFrame) -> dict:
    groups = settings(done)
    found = [_ratio(group, column) for group in groups]
    told = [ratio for ratio in found if ratio is not None]
    claim = ("Linear regions", f"{word} makes fewer", "fewer", REGIONS)
    if not told:
        return row(*claim)
    left = f"; {len(found) - len(told)} not counted to the end" if len(told) < len(found) else ""
    ours = f"{min(told):.2f} to {max(told):.2f} times as many, {len(told)} settings{left}"
    return row(*claim, share([ratio < 1 for ratio in told]), ours, "", *groups)


def _ratio(group: pd.DataFrame, column: str) -> float | None:
    """Regions with the strongest such training, over those with plain training, mean over seeds; None where either is
    missing, or known only between bounds that are more than a twentieth apart."""
    counts = unfolded(group, "counts")
    plain, such = counts[counts["way"] == "plain"], counts[counts[column] > 0]
    strong = such[such[column] == such[column].max()]
    settled = all((part["upper"] <= 1.05 * part["lower"]).all() for part in (plain, strong))
    if plain.empty or strong.empty or not settled:
        return None
    return float(strong["lower"].mean() / plain["lower"].mean())


# --- Activating-while-Pruning ----------------------------------------------------------------------

AP = "arXiv 2212.06145, abstract; its code: 25 cycles of 50 epochs"
GAINS = {"cifar10": ("CIFAR-10", 3, 4), "cifar100": ("CIFAR-100", 3, 4), "imagefolder": ("ImageNet", 2, 3)}
"""The abstract's gains, in points, least and most."""


def pruning(done: pd.DataFrame) -> list[dict]:
    """AP's gain: AP-Lite less the method alone, at the end, paired by seed, median over methods."""
    return [_gain(data, done) for data in GAINS]


def _gain(data: str, done: pd.DataFrame) -> dict:
    name, least, most = GAINS[data]
    claim = ("AP", f"accuracy, {name}", f"+{least} to +{most} points", AP)
    groups = [g for g in settings(done) if g.iloc[0]["dataset"] == data and not g.iloc[0]["limit"]]
    found = [(g, points) for g in groups if (points := _points(g)) is not None]
    if not found:
        return row(*claim, "needs ImageNet" if data == "imagefolder" else "not run")
    points, first = pd.Series([points for _, points in found]), found[0][0].iloc[0]
    gain, same = points.median(), first["cycles"] >= 25 and first["epochs"] >= 50
    ours = f"{gain:+.2f} points ({points.min():+.2f} to {points.max():+.2f}, {len(points)} methods)"
    word = "reproduced" if gain >= least else f"{'differs by' if same else 'shorter schedule:'} {gain - least:+.2f}"
    word += ", on a shorter schedule" if word == "reproduced" and not same else ""
    schedule = f"{first['network']}, {first['cycles']} cycles of {first['epochs']} epochs"
    return row(*claim, word, ours, schedule, *(group for group, _ in found))


def _points(group: pd.DataFrame) -> float | None:
    last = unfolded(group, "cycles_table").query("cycle == cycle.max()")
    wide = last.pivot_table("test_accuracy", "seed", "arm")
    return float(100 * (wide["AP-Lite"] - wide["X"]).mean()) if {"AP-Lite", "X"} <= set(wide) else None


# --- words -----------------------------------------------------------------------------------------


def seeds_of(groups: Sequence[pd.DataFrame]) -> int | str:
    """How many seeds each setting has: 5, or "2 to 5"."""
    counts = sorted({len(group) for group in groups})
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

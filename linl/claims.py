"""Published claims beside our runs: a row a claim, with a verdict (`linl.verdicts`).

Each function takes the finished runs of one experiment (as `linl.results.runs` gives them) and returns rows: system,
claim, published, ours, verdict, seeds, schedule, hardware, source, run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from linl.connections import with_hidden
from linl.results import mean_sd, paper
from linl.tables import hardware, settings, short, unfolded
from linl.verdicts import differs, otherwise, share, together, verdict


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


@dataclass(frozen=True)
class Trained:
    """How a network was trained for a published figure.

    Attributes:
        epochs: how many.
        recipes: whose settings are the published ones.
        named: the parameters of an experiment that tell both.
    """

    epochs: int
    recipes: tuple[str, ...]
    named: tuple[str, str] = ("epochs", "recipe")

    def unlike(self, *groups: pd.DataFrame) -> str:
        """What is unlike in the runs of one or more settings, of `linl.verdicts.UNLIKE`; "" where nothing is."""
        told = [tuple(group.iloc[0][name] for name in self.named) for group in groups]
        if any(epochs < self.epochs for epochs, _ in told):
            return "shorter schedule"
        return "" if all(recipe in self.recipes for _, recipe in told) else "another recipe"

    def told(self, run: pd.Series) -> str:
        """A run's schedule beside the published one."""
        epochs, recipe = (run[name] for name in self.named)
        return f"{epochs} of {self.epochs} epochs, {recipe}"


def setting(done: pd.DataFrame, trained: Trained, **where: Any) -> pd.DataFrame | None:
    """The runs of one setting on all images, a row a seed: of those with these parameters the one that was trained
    longest, then one by a published recipe, then the newest. None where there is none."""
    for name, value in {"limit": 0, **where}.items():
        if name in done:  # a run from before there was such a parameter had what is its default now
            done = done[(done[name] == value) | done[name].isna()]
    if done.empty:
        return None
    epochs, recipe = trained.named
    done = done.assign(published=done[recipe].isin(trained.recipes))
    best = done.sort_values([epochs, "published", "finished"]).iloc[-1]["key"]
    return done[done["key"] == best].sort_values("seed")


# --- LiNLNet ---------------------------------------------------------------------------------------

LINLNET = Trained(200, ("linlnet", "linlnet-imagenet"))
NEAR = 0.99
"""Linear is p = 1 exactly, as published. From here on a unit is told as well: the clamp holds it at 1 while training
pushes it there, and the last step may leave it a little below."""


def nearly_linear(layers: list[float]) -> int:
    """How many of a network's p are `NEAR` or above, the linear ones among them."""
    return sum(p >= NEAR for p in layers)


def linlnet(done: pd.DataFrame) -> list[dict]:
    """Accuracy and linear layers of the seven networks."""
    return [_linlnet(published, done) for _, published in paper("linlnet").iterrows()]


def _linlnet(published: pd.Series, done: pd.DataFrame) -> dict:
    network, data = published["network"], published["dataset"]
    claim = f"{network}, {data.replace('imagefolder', 'ImageNet')}"
    figures = f"{published['accuracy']} ± {published['sd']} %, {published['linear']} linear"
    group = setting(done, LINLNET, network=network, dataset=data, width=1.0)
    if group is None:
        word = "needs ImageNet" if data == "imagefolder" else "not run"
        return row("LiNLNet", claim, figures, published["source"], word)
    first, accuracy = group.iloc[0], 100 * group["linl_test_accuracy"]
    unlike = LINLNET.unlike(group)
    words = {
        "accuracy": verdict(f"{published['accuracy']}±{published['sd']}", accuracy, within=0.5, unlike=unlike),
        "linear layers": verdict(published["linear"], group["linear"], digits=0, unlike=unlike),
    }
    ours = f"{mean_sd(accuracy)} %, {mean_sd(group['linear'], 0)} linear"
    near = group["p"].map(nearly_linear)
    ours += f" ({mean_sd(near, 0)} from {NEAR:g} on)" if near.mean() > group["linear"].mean() else ""
    return row("LiNLNet", claim, figures, published["source"], together(words), ours, LINLNET.told(first), group)


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

LEARNT = Trained(100, ("layer-folding", "layer-folding-vgg"))
TUNED = Trained(100, ("fine-tune", "fine-tune-vgg"), ("tune_epochs", "tune_recipe"))


def layer_folding(done: pd.DataFrame) -> list[dict]:
    """The published sets, imposed: accuracy; the depth that λ = 0.25 ends with, where it was learnt; similar depths."""
    known = paper("layer_folding")
    rows = [_imposed(published, done) for _, published in known.iterrows()]
    rows += [found for _, published in known.iterrows() if (found := _learnt(published, done))]
    return [*rows, *(_similar(data, done) for data in ("cifar10", "cifar100"))]


AS_LEARNT = {"keep": "", "penalty": 0.25, "start": 0.0, "threshold": 0.9}
"""The published settings of a set that is learnt."""


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
    schedule = f"tuned {TUNED.told(first)}"
    return row("Layer Folding", claim, figures, published["source"], word, ours, schedule, group)


def _learnt(published: pd.Series, done: pd.DataFrame) -> dict | None:
    group = setting(done, LEARNT, **AS_LEARNT, **_place(published))
    if group is None:
        return None
    first, depth = group.iloc[0], published["depth"]
    word = verdict(depth, group["depth_published"], digits=0, unlike=LEARNT.unlike(group))
    claim = f"{published['network']}, {published['dataset']}, learnt"
    ours = f"depth {mean_sd(group['depth_published'], 0)}"
    schedule = LEARNT.told(first)
    return row("Layer Folding", claim, f"depth {depth}", published["source"], word, ours, schedule, group)


def _similar(data: str, done: pd.DataFrame) -> dict:
    claim = ("Layer Folding", f"similar depths, {data}", "similar", "arXiv 2106.09309, abstract")
    names = sorted(done.query("dataset == @data and width == 1")["network"].unique()) if len(done) else []
    how = {**AS_LEARNT, "dataset": data, "width": 1.0}
    groups = [g for name in names if (g := setting(done, LEARNT, network=name, **how)) is not None]
    groups.sort(key=lambda g: g.iloc[0]["activations"])
    if len(groups) < 3:
        return row(*claim)
    depths = [g["depth_published"].mean() for g in groups]
    unlike = LEARNT.unlike(*groups)
    holds = max(depths) - min(depths) <= 2
    word = otherwise("reproduced", unlike) if holds else f"{unlike}: not reproduced" if unlike else "not reproduced"
    told = [
        f"{g.iloc[0]['network']} {depth:.3g} of {g.iloc[0]['activations'] + 1:.0f}"
        for depth, g in zip(depths, groups, strict=True)
    ]
    ours = f"depths: {', '.join(told)}"
    return row(*claim, word, ours, "; ".join(sorted({LEARNT.told(g.iloc[0]) for g in groups})), *groups)


# --- ReLU stability --------------------------------------------------------------------------------

STABLE, STABLE_CIFAR = Trained(120, ("stability",)), Trained(120, ("stability-cifar",))
STABLE_AUTOENCODER = Trained(120, ("stability-autoencoder",))
"""The paper distorts CIFAR's images, MNIST's not. How its autoencoders' weights are drawn isn't stated."""

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


def stable_as(published: pd.Series) -> Trained:
    """How the network of a published row was trained."""
    if published["network"] == "autoencoder":
        return STABLE_AUTOENCODER
    return STABLE_CIFAR if published["dataset"].startswith("cifar") else STABLE


def stable_setting(published: pd.Series, done: pd.DataFrame) -> pd.DataFrame | None:
    """Our runs of a published row's setting."""
    where = {name: published[name] for name in ("network", "dataset", "hidden")}
    plain = {"adversary": "none", "stability_loss": 0.0}
    return setting(done, stable_as(published), l1=float(published["l1"]), **plain, **where)


def _stable(published: pd.Series, done: pd.DataFrame) -> dict:
    trained, group = stable_as(published), stable_setting(published, done)
    known = {name: how for name, how in MEASURES.items() if published[how[0]]}
    widths = published["hidden"].replace(" ", "-")
    claim = f"{published['network']} {widths}, {published['dataset']}, l1 {float(published['l1']):g}"
    figures = "; ".join(f"{name} {published[how[0]]}" for name, how in known.items())
    if group is None:
        return row("ReLU stability", claim, figures, published["source"])
    unlike, words, ours = trained.unlike(group), {}, []
    for name, (column, mine, factor, within) in known.items():
        words[name] = verdict(published[column], factor * group[mine], within=within, unlike=unlike,
                              digits=4 if name == "loss" else 2)  # fmt: skip
        ours.append(f"{name} {mean_sd(group[mine], 4 if name == 'loss' else 2, factor)}")
    schedule = trained.told(group.iloc[0])
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
    """Regions with the strongest such training, at most, over those with plain training, at least, by seeds; None
    where either is missing, or known only between bounds that are more than a twentieth apart."""
    counts = unfolded(group, "counts")
    plain, such = counts[counts["way"] == "plain"], counts[counts[column] > 0]
    strong = such[such[column] == such[column].max()]
    settled = all((part["upper"] <= 1.05 * part["lower"]).all() for part in (plain, strong))
    if plain.empty or strong.empty or not settled:
        return None
    return float(strong["upper"].mean() / plain["lower"].mean())


# --- Activating-while-Pruning ----------------------------------------------------------------------

AP = "arXiv 2212.06145, abstract; its code: 25 cycles of 50 epochs"
GAINS = {"cifar10": ("CIFAR-10", 3, 4), "cifar100": ("CIFAR-100", 3, 4), "imagefolder": ("ImageNet", 2, 3)}
"""The abstract's gains, in points, least and most."""

AP_TRAINED = Trained(50, ("ap",))


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
    points = pd.Series([points for _, points in found])
    gain, groups = points.median(), [group for group, _ in found]
    short = any(group.iloc[0]["cycles"] < 25 for group in groups)
    unlike = "shorter schedule" if short else AP_TRAINED.unlike(*groups)
    ours = f"{gain:+.2f} points ({points.min():+.2f} to {points.max():+.2f}, {len(points)} methods)"
    word = otherwise("reproduced", unlike) if gain >= least else differs(gain - least, unlike)
    told = {f"{g.iloc[0]['network']}, {g.iloc[0]['cycles']} cycles of {g.iloc[0]['epochs']} epochs" for g in groups}
    return row(*claim, word, ours, "; ".join(sorted(told)), *groups)


def _points(group: pd.DataFrame) -> float | None:
    last = unfolded(group, "cycles_table").query("cycle == cycle.max()")
    wide = last.pivot_table("test_accuracy", "seed", "arm")
    return float(100 * (wide["AP-Lite"] - wide["X"]).mean()) if {"AP-Lite", "X"} <= set(wide) else None


# --- words -----------------------------------------------------------------------------------------


def seeds_of(groups: Sequence[pd.DataFrame]) -> int | str:
    """How many seeds each setting has: 5, or "2 to 5"."""
    counts = sorted({len(group) for group in groups})
    return counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

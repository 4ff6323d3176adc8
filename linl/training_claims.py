"""LiNLNet's claims beside our runs (Jin & Jeong, APL Mach. Learn. 1, 016108): accuracy, linear layers, size."""

from __future__ import annotations

import pandas as pd

from linl.claims import Trained, row, setting
from linl.results import mean_sd, paper
from linl.verdicts import otherwise, share, together, verdict

LINLNET = Trained(200, ("linlnet", "linlnet-imagenet"))
ABSTRACT = "Jin & Jeong, abstract"
NEAR = 0.99
"""Linear is p = 1 exactly, as published. From here on a unit is told as well: the clamp holds it at 1 while training
pushes it there, and the last step may leave it a little below."""


def nearly_linear(layers: list[float]) -> int:
    """How many of a network's p are `NEAR` or above, the linear ones among them."""
    return sum(p >= NEAR for p in layers)


def linlnet(done: pd.DataFrame) -> list[dict]:
    """Accuracy and linear layers of the seven networks, the ReLU twin's accuracy where one is published, and what the
    abstract says of the last hidden layer."""
    known = paper("linlnet")
    rows = [_linlnet(published, done) for _, published in known.iterrows()]
    rows += [_twin(published, done) for _, published in known.iterrows() if published["relu_accuracy"]]
    return [*rows, _last(known, done)]


def _trained(published: pd.Series, done: pd.DataFrame) -> pd.DataFrame | None:
    return setting(done, LINLNET, network=published["network"], dataset=published["dataset"], width=1.0)


def _linlnet(published: pd.Series, done: pd.DataFrame) -> dict:
    network, data = published["network"], published["dataset"]
    claim = f"{network}, {data.replace('imagefolder', 'ImageNet')}"
    figures = f"{published['accuracy']} ± {published['sd']} %, {published['linear']} linear"
    group = _trained(published, done)
    if group is None:
        word = "needs ImageNet" if data == "imagefolder" else "not run"
        return row("LiNLNet", claim, figures, published["source"], word)
    first, accuracy = group.iloc[0], 100 * group["linl_test_accuracy"]
    unlike, digits = LINLNET.unlike(group), int(len(set(group["linear"])) > 1)
    words = {
        "accuracy": verdict(f"{published['accuracy']}±{published['sd']}", accuracy, within=0.5, unlike=unlike),
        "linear layers": verdict(published["linear"], group["linear"], digits=digits, unlike=unlike),
    }
    ours = f"{mean_sd(accuracy)} %, {each(group['linear'])} linear"
    near = group["p"].map(nearly_linear)
    ours += f" ({each(near)} from {NEAR:g} on)" if near.mean() > group["linear"].mean() else ""
    return row("LiNLNet", claim, figures, published["source"], together(words), ours, LINLNET.told(first), group)


def each(counts: pd.Series) -> str:
    """A count of every seed: "1" where all have the same, else "0/1/0"."""
    return "/".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _twin(published: pd.Series, done: pd.DataFrame) -> dict:
    claim = f"{published['network']} with ReLUs, {published['dataset']}"
    figures = f"{published['relu_accuracy']} ± {published['relu_sd']} %"
    group = _trained(published, done)
    if group is None:
        return row("LiNLNet", claim, figures, published["relu_source"])
    accuracy, unlike = 100 * group["relu_test_accuracy"], LINLNET.unlike(group)
    word = verdict(f"{published['relu_accuracy']}±{published['relu_sd']}", accuracy, within=0.5, unlike=unlike)
    told = LINLNET.told(group.iloc[0])
    return row("LiNLNet", claim, figures, published["relu_source"], word, f"{mean_sd(accuracy)} %", told, group)


def _last(known: pd.DataFrame, done: pd.DataFrame) -> dict:
    """The last hidden layer's p, by network, of those that were trained on CIFAR-10 as published or shorter."""
    claim = ("LiNLNet", "the last hidden layer ends linear", "commonly", ABSTRACT)
    cifar = known[known["dataset"] == "cifar10"]
    groups = {line["network"]: group for _, line in cifar.iterrows() if (group := _trained(line, done)) is not None}
    if not groups:
        return row(*claim)
    told = ", ".join(f"{name} {mean_sd(group['p_last'], 3)}" for name, group in groups.items())
    linear = [(group["p_last"] == 1).mean() > 0.5 for group in groups.values()]
    word = otherwise(share(linear, "networks"), LINLNET.unlike(*groups.values()))
    schedules = "; ".join(dict.fromkeys(LINLNET.told(group.iloc[0]) for group in groups.values()))
    return row(*claim, word, f"its p: {told}", schedules, *groups.values(), settings=len(cifar))


def memory(done: pd.DataFrame) -> dict:
    """The abstract's −27 % for LiNL-AlexNet on ImageNet, from an experiment that needs no training."""
    claim = ("LiNLNet", "AlexNet, ImageNet: size", "-27 %", f"{ABSTRACT}: memory at kept accuracy")
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

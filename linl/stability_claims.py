"""Exact compression's claims beside our runs: Serra et al. (arXiv 2102.07804), and LEO before it (2001.00218)."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from linl.claims import Trained, row, setting
from linl.connections import with_hidden
from linl.results import mean_sd, paper
from linl.verdicts import differs, rounding, share, together, verdict

STABLE, STABLE_CIFAR = Trained(120, ("stability",)), Trained(120, ("stability-cifar",))
STABLE_AUTOENCODER = Trained(120, ("stability-autoencoder",))
"""The paper distorts CIFAR's images, MNIST's not. How its autoencoders' weights are drawn isn't stated."""

MEASURES = {  # ours, by what a percentage or a loss is multiplied, and what two trainings may differ by
    "accuracy": ("accuracy", "test_accuracy", 100, 0.1),
    "loss": ("loss", "test_loss", 1, 0.002),
    "neurons": ("neurons_removed", "neurons_removed", 100, 0.0),
    "connections": ("connections_removed", "hidden_connections_removed", 100, 0.0),
}
TEXT = "arXiv 2102.07804v2, text"
ABSTRACT = "arXiv 2102.07804v4, abstract"
PLAIN = {"adversary": "none", "stability_loss": 0.0}
"""Trained with l1 alone, as in the paper."""


def stability(done: pd.DataFrame) -> list[dict]:
    """The appendix's tables: a row a network and l1 that was run, and one for the rest of each network's; then what the
    paper says in words."""
    rows: list[dict] = []
    groups: list[pd.DataFrame] = []
    done = with_hidden(done)
    for (network, data, hidden), part in paper("stability").groupby(["network", "dataset", "hidden"], sort=False):
        asked = [(published, stable_setting(published, done)) for _, published in part.iterrows()]
        groups += [group for _, group in asked if group is not None]
        found = [_stable(published, group) for published, group in asked]
        ran = [line for line in found if line["run"]]
        claim = f"{network} {hidden.replace(' ', '-')}, {data}, {len(found) - len(ran)}{' more' if ran else ''} of l1"
        rest = row("ReLU stability", claim, "", part["source"].iloc[0], settings=len(found) - len(ran))
        rows += [*ran, *([rest] if len(ran) < len(found) else [])]
    return [*rows, *_in_words(groups)]


def stable_as(published: pd.Series) -> Trained:
    """How the network of a published row was trained."""
    if published["network"] == "autoencoder":
        return STABLE_AUTOENCODER
    return STABLE_CIFAR if published["dataset"].startswith("cifar") else STABLE


def stable_setting(published: pd.Series, done: pd.DataFrame) -> pd.DataFrame | None:
    """Our runs of a published row's setting."""
    where = {name: published[name] for name in ("network", "dataset", "hidden")}
    return setting(done, stable_as(published), l1=float(published["l1"]), **PLAIN, **where)


def _stable(published: pd.Series, group: pd.DataFrame | None) -> dict:
    trained = stable_as(published)
    known = {name: how for name, how in MEASURES.items() if published[how[0]]}
    widths = published["hidden"].replace(" ", "-")
    claim = f"{published['network']} {widths}, {published['dataset']}, l1 {float(published['l1']):g}"
    figures = "; ".join(f"{name} {published[how[0]]}" for name, how in known.items())
    if group is None:
        return row("ReLU stability", claim, figures, published["source"])
    unlike, words, ours = trained.unlike(group), {}, []
    for name, (column, mine, factor, within) in known.items():
        digits = 4 if name == "loss" else 2
        words[name] = verdict(published[column], factor * group[mine], unlike=unlike, digits=digits,
                              within=max(within, rounding(published[column])))  # fmt: skip
        ours.append(f"{name} {mean_sd(group[mine], digits, factor)}")
    ours += [f"{undecided(group):g} units undecided"] if undecided(group) else []
    schedule = trained.told(group.iloc[0])
    return row("ReLU stability", claim, figures, published["source"], together(words), "; ".join(ours), schedule, group)


def undecided(group: pd.DataFrame) -> float:
    """Units whose state no proof settled in time, mean over seeds: what is removed is a lower bound then."""
    return float(group["undecided"].mean())


# --- what the paper says in words ------------------------------------------------------------------


def _in_words(groups: list[pd.DataFrame]) -> list[dict]:
    return [
        _none_without_l1([g for g in groups if g.iloc[0]["l1"] == 0]),
        _no_whole_layer([g for g in groups if g.iloc[0]["network"] == "mlp" and g.iloc[0]["l1"] > 0]),
        _autoencoders([g for g in groups if g.iloc[0]["network"] == "autoencoder" and g.iloc[0]["l1"] == 0.0002]),
        _most("mnist", {"neurons": "20", "connections": "40"}, TEXT, groups),
        _most("cifar10", {"connections": "56"}, ABSTRACT, groups),
        *(_minutes(hidden, groups) for hidden in ("800 800", "100 100 100 100 100")),
    ]


def _row(claim: str, published: str, source: str, word: str, ours: str, groups: list[pd.DataFrame]) -> dict:
    schedules = dict.fromkeys(f"{g.iloc[0]['epochs']} epochs, {g.iloc[0]['recipe']}" for g in groups)
    return row("ReLU stability", claim, published, source, word, ours, "; ".join(schedules), *groups)


def _none_without_l1(groups: list[pd.DataFrame]) -> dict:
    claim = ("no l1, hardly a stable unit", "practically none", TEXT)
    if not groups:
        return row("ReLU stability", *claim)
    stable = [100 * ((g["inactive"] + g["active"]) / g["units"]).max() for g in groups]
    word = share([percent <= 1 for percent in stable], "networks")
    return _row(*claim, word, f"at most {max(stable):.2f} % of a network's units, {len(groups)} networks", groups)


def _whole_layers(group: pd.DataFrame) -> list[int]:
    """How many hidden layers of each seed's network are stable from the first unit to the last."""
    hidden = [(len(run["hidden"].split()), pd.DataFrame(run["by_layer"])) for _, run in group.iterrows()]
    return [int((layers[:count][["unstable", "undecided"]].sum(axis=1) == 0).sum()) for count, layers in hidden]


def _no_whole_layer(groups: list[pd.DataFrame]) -> dict:
    claim = ("no classifier's whole layer is stable", "none", TEXT)
    if not groups:
        return row("ReLU stability", *claim)
    whole = [sum(_whole_layers(group)) for group in groups]
    word = share([count == 0 for count in whole])
    return _row(*claim, word, f"{sum(whole)} layers of {sum(map(len, groups))} networks", groups)


def _autoencoders(groups: list[pd.DataFrame]) -> dict:
    claim = ("autoencoders, l1 0.0002: all hidden layers stable", "in 3 to 4 of 5 seeds", TEXT)
    if not groups:
        return row("ReLU stability", *claim)
    whole = [count == len(group.iloc[0]["hidden"].split()) for group in groups for count in _whole_layers(group)]
    word = "reproduced" if sum(whole) >= 0.6 * len(whole) else "not reproduced"
    return _row(*claim, word, f"in {sum(whole)} of {len(whole)} seeds of {len(groups)} networks", groups)


def _as_accurate(groups: list[pd.DataFrame], data: str) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Classifiers with l1 whose bar of accuracy, mean ± sd, touches that of the same network without, or is above."""
    mine = [g for g in groups if g.iloc[0]["dataset"] == data and g.iloc[0]["network"] == "mlp"]
    without = {g.iloc[0]["hidden"]: g for g in mine if g.iloc[0]["l1"] == 0}
    for group in mine:
        first = group.iloc[0]
        if first["l1"] > 0 and (base := without.get(first["hidden"])) is not None:
            sd = [g["test_accuracy"].std(ddof=1) if len(g) > 1 else 0.0 for g in (group, base)]
            if group["test_accuracy"].mean() >= base["test_accuracy"].mean() - sum(sd):
                yield group, base


def _most(data: str, published: dict[str, str], source: str, groups: list[pd.DataFrame]) -> dict:
    """The most that goes at no loss of accuracy, of the networks and l1 that were run."""
    told = ", ".join(f"{percent} % of {name}" for name, percent in published.items())
    claim = (f"removed at no loss of accuracy, {data}", f"up to {told}", source)
    kept = list(_as_accurate(groups, data))
    if not kept:
        return row("ReLU stability", *claim)
    best, base = max(kept, key=lambda pair: pair[0]["hidden_connections_removed"].mean())
    words, ours = {}, []
    for name, percent in published.items():
        _, mine, factor, _ = MEASURES[name]
        over = factor * best[mine].mean() - float(percent)
        words[name] = "reproduced" if over >= -rounding(percent) else differs(over)
        ours.append(f"{mean_sd(best[mine], 2, factor)} % of {name}")
    accuracy = [mean_sd(g["test_accuracy"], 2, 100) for g in (best, base)]
    first = best.iloc[0]
    ours.append(f"{first['hidden'].replace(' ', '-')}, l1 {first['l1']:g}: {accuracy[0]} %, without l1 {accuracy[1]} %")
    strongest = max(g.iloc[0]["l1"] for g in groups if g.iloc[0]["dataset"] == data and g.iloc[0]["network"] == "mlp")
    ours.append(f"l1 above {strongest:g} not run")
    return _row(*claim, together(words), "; ".join(ours), [best, base])


def _minutes(hidden: str, groups: list[pd.DataFrame], minutes: float = 10) -> dict:
    """Whether every seed's states took less than `minutes`, and none was left open."""
    claim = (f"mlp {hidden.replace(' ', '-')}: exact states", "within minutes", ABSTRACT)
    found = [g for g in groups if g.iloc[0]["hidden"] == hidden and g.iloc[0]["l1"] > 0]
    if not found:
        return row("ReLU stability", *claim)
    ran = pd.concat(found)
    seconds, left = ran["seconds"].tolist(), int(ran["undecided"].sum())
    word = share(((ran["seconds"] < 60 * minutes) & (ran["undecided"] == 0)).tolist(), "networks")
    told = f"{min(seconds):.1f} to {max(seconds):.1f} s" if len(seconds) > 1 else f"{seconds[0]:.1f} s"
    told += f"; {left} units undecided" if left else ""
    return _row(*claim, word, told, found)


# --- LEO -------------------------------------------------------------------------------------------


def leo(done: pd.DataFrame) -> list[dict]:
    """LEO's table, MNIST: accuracy, and units removed from each of two hidden layers. How it trained isn't known to us,
    so ours is another recipe at its best; a row a setting that was run, and one for the rest."""
    known = paper("leo")
    rows = [_leo(published, done) for _, published in known.iterrows()]
    ran = [line for line in rows if line["run"]]
    left = len(rows) - len(ran)
    claim = f"LEO: mlp, mnist, {left}{' more' if ran else ''} of width and l1"
    rest = row("ReLU stability", claim, "", known["source"].iloc[0], settings=left)
    return [*ran, *([rest] if left else [])]


def _leo(published: pd.Series, done: pd.DataFrame) -> dict:
    layers = [published["layer_1"], published["layer_2"]]
    claim = f"LEO: mlp {published['hidden'].replace(' ', '-')}, mnist, l1 {float(published['l1']):g}"
    figures = f"accuracy {published['accuracy']}; units {layers[0]} and {layers[1]}"
    where = {"network": "mlp", "dataset": "mnist", "hidden": published["hidden"], "l1": float(published["l1"])}
    group = setting(done, STABLE, **where, **PLAIN)
    if group is None:
        return row("ReLU stability", claim, figures, published["source"])
    widths = [int(width) for width in published["hidden"].split()]
    removed = [[width - left[i] for left in group["left"]] for i, width in enumerate(widths)]
    how = {"unlike": "another recipe"}
    words = {"accuracy": verdict(published["accuracy"], 100 * group["test_accuracy"], within=0.1, **how)}
    for i, theirs in enumerate(layers):
        words[f"units of layer {i + 1}"] = verdict(theirs, removed[i], within=rounding(theirs), digits=1, **how)
    ours = f"accuracy {mean_sd(group['test_accuracy'], 2, 100)}; units {' and '.join(mean_sd(r, 1) for r in removed)}"
    return row("ReLU stability", claim, figures, published["source"], together(words), ours,
               STABLE.told(group.iloc[0]), group)  # fmt: skip

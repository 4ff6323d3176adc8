"""Activating-while-Pruning's claims beside our runs (Liu et al., arXiv 2212.06145): the gain, and the dead rate."""

from __future__ import annotations

import pandas as pd

from linl.claims import Trained, row
from linl.tables import settings, unfolded
from linl.verdicts import differs, otherwise, share

AP = "arXiv 2212.06145, abstract; its code: 25 cycles of 50 epochs, a fifth of the weights each, rewound"
ABSTRACT = "arXiv 2212.06145, abstract"
GAINS = {"cifar10": ("CIFAR-10", 3, 4), "cifar100": ("CIFAR-100", 3, 4), "imagefolder": ("ImageNet", 2, 3)}
"""The abstract's gains, in points, least and most."""

AP_TRAINED = Trained(50, ("ap",))
AS_PUBLISHED = {"rate": 0.2, "ap": 0.02}
"""The code's rate of the weights left, a cycle, and AP's share of it; weights are rewound, not fine-tuned."""


def pruning(done: pd.DataFrame) -> list[dict]:
    """AP's gain: AP-Lite less the method alone, at the end, paired by seed, median over methods; and whether the
    dynamic dead neuron rate falls as weights go."""
    return [*(_gain(data, done) for data in GAINS), _falling(done)]


def _unlike(groups: list[pd.DataFrame]) -> str:
    firsts = [group.iloc[0] for group in groups]
    if any(run["cycles"] < 25 for run in firsts):
        return "shorter schedule"
    if any(
        run["rewind"] != "weights" or any(run[name] != AS_PUBLISHED[name] for name in AS_PUBLISHED) for run in firsts
    ):
        return "another recipe"
    return AP_TRAINED.unlike(*groups)


def told(run: pd.Series) -> str:
    """A run's cycles, epochs, rate, share and what follows a cycle."""
    after = {"weights": "rewound", "fine-tune": "fine-tuned, not rewound"}.get(run["rewind"], f"rewind {run['rewind']}")
    start = "public weights, " if run["weights"] else ""
    each = f"{run['cycles']} cycles of {run['epochs']} epochs, p {run['rate']:g}, q {run['ap']:g}"
    return f"{run['network']}, {start}{each}, {after}"


def _gain(data: str, done: pd.DataFrame) -> dict:
    name, least, most = GAINS[data]
    claim = ("AP", f"gain in accuracy, {name}", f"+{least} to +{most} points", AP)
    groups = [g for g in settings(done) if g.iloc[0]["dataset"] == data and not g.iloc[0]["limit"]]
    found = [(g, points) for g in groups if (points := _points(g)) is not None]
    if not found:
        return row(*claim, "needs ImageNet" if data == "imagefolder" else "not run")
    points = pd.Series([points for _, points in found])
    gain, groups = points.median(), [group for group, _ in found]
    unlike = _unlike(groups)
    ours = f"{gain:+.2f} points ({points.min():+.2f} to {points.max():+.2f}, {len(points)} methods)"
    word = otherwise("reproduced", unlike) if gain >= least else differs(gain - least, unlike)
    if gain <= 0:
        word = otherwise("no gain", unlike)
    schedules = sorted({told(group.iloc[0]) for group in groups})
    return row(*claim, word, ours, "; ".join(schedules), *groups)


def _points(group: pd.DataFrame) -> float | None:
    last = unfolded(group, "cycles_table").query("cycle == cycle.max()")
    wide = last.pivot_table("test_accuracy", "seed", "arm")
    return float(100 * (wide["AP-Lite"] - wide["X"]).mean()) if {"AP-Lite", "X"} <= set(wide) else None


def _falling(done: pd.DataFrame) -> dict:
    """The dynamic dead neuron rate after the last cycle beside that before the first, the method alone."""
    claim = ("AP", "the dynamic dead neuron rate falls as weights go", "falls", ABSTRACT)
    groups = [g for g in settings(done) if not g.iloc[0]["limit"] and g.iloc[0]["dataset"] != "digits"]
    holds, ends = [], []
    for group in groups:
        rate = unfolded(group, "cycles_table").query("arm == 'X'").pivot_table("dynamic", "cycle", "seed")
        holds.append(bool((rate.iloc[-1] < rate.iloc[0]).all()))  # every seed's
        ends.append((rate.iloc[0].mean(), rate.iloc[-1].mean()))
    if not groups:
        return row(*claim)
    apart = [after - before for before, after in ends]
    ours = (
        f"by {-max(apart):.2f} to {-min(apart):.2f}, from {min(e[0] for e in ends):.2f} or more; {len(groups)} settings"
    )
    unlike = _unlike(groups)
    word = otherwise(share(holds), unlike)
    return row(*claim, word, ours, "; ".join(sorted({told(group.iloc[0]) for group in groups})), *groups)

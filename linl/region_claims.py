"""Kumar et al.'s claims on linear regions beside our runs (arXiv 1905.11428): directions, and no figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy import stats

from linl.claims import row
from linl.tables import settings, unfolded
from linl.verdicts import share

REGIONS = "arXiv 1905.11428: l1 and adversarial training lower the number of linear regions, as stable units rise"
DOMAIN = "arXiv 1905.11428, abstract"
TOLD = 0.05
"""A setting tells two trainings apart if a paired t-test over its seeds would call them alike less often than this."""
TRAININGS = {"l1": "l1", "adversarial training": "eps"}


def regions(done: pd.DataFrame) -> list[dict]:
    """What makes fewer regions, and what makes more units stable: the strongest such training of each setting, beside
    plain training, paired by seed."""
    fewer = [_changed(f"{word} makes fewer regions", done, column, "upper", "lower", -1)
             for word, column in TRAININGS.items()]  # fmt: skip
    stable = [_changed(f"{word} makes more units stable", done, column, "unstable", "unstable", -1)
              for word, column in TRAININGS.items()]  # fmt: skip
    return [*fewer, *stable, *_shallow(done)]


def _pairs(group: pd.DataFrame, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Plain networks and those of the strongest such training, a row a seed that has both."""
    counts = unfolded(group, "counts")
    such = counts[counts[column] > 0]
    plain = counts[counts["way"] == "plain"].set_index("seed")
    strong = such[such[column] == such[column].max()].set_index("seed")
    both = plain.index.intersection(strong.index)
    return plain.loc[both], strong.loc[both]


def _settled(counts: pd.DataFrame) -> bool:
    """Counted, or known between bounds no more than a twentieth apart."""
    return bool((counts["upper"] <= 1.05 * counts["lower"]).all())


def direction(changes: Sequence[float]) -> int:
    """-1, 1, or 0 where the changes of one seed each don't tell: fewer than three, or a t-test that may be chance."""
    if len(changes) < 3:
        return 0
    mean = sum(changes) / len(changes)
    if all(change == changes[0] for change in changes):  # no scatter: nothing to test
        return int(math.copysign(1, mean)) if mean else 0
    return int(math.copysign(1, mean)) if stats.ttest_1samp(changes, 0.0).pvalue < TOLD else 0


def _changed(claim: str, done: pd.DataFrame, column: str, strong: str, plain: str, wanted: int) -> dict:
    """A claim about counts, judged over the settings that settle and tell the two trainings apart."""
    known, ratios, collapsed, left = [], [], 0, 0
    for group in settings(done):
        before, after = _pairs(group, column)
        if len(before) < 3 or not (strong == "unstable" or (_settled(before) and _settled(after))):
            left += 1
            continue
        known.append((group, direction([math.log(a / b) for a, b in zip(after[strong], before[plain], strict=True)])))
        ratios.append(after[strong].mean() / before[plain].mean())
        collapsed += bool((before["accuracy"] - after["accuracy"]).mean() > 0.1)
    what = ("Linear regions", claim, "fewer" if "fewer" in claim else "more", REGIONS)
    if not known:
        return row(*what)
    counts = {name: sum(sign == value for _, sign in known) for name, value in (("fewer", -1), ("more", 1))}
    thing = "regions" if "regions" in claim else "units that aren't stable"
    ours = f"{thing}: {min(ratios):.2f} to {max(ratios):.2f} times as many in {len(known)} settings; "
    ours += (
        f"fewer in {counts['fewer']}, more in {counts['more']}, not told apart in {len(known) - sum(counts.values())}"
    )
    ours += f"; accuracy lost, over 10 points, in {collapsed}" if collapsed else ""
    ours += f"; {left} more with too few seeds or not counted to the end" if left else ""
    word = share([sign == wanted for _, sign in known])
    return row(*what, word, ours, "", *(group for group, _ in known))


# --- a network with two hidden layers --------------------------------------------------------------


def _shallow(done: pd.DataFrame) -> list[dict]:
    """Every network is one with two hidden layers, nearly: where the two are promised to be equal, and how large it is
    from the regions that there are, beside all patterns."""
    equal = ("Linear regions", "two hidden layers are enough, nearly", "approximately equal", DOMAIN)
    small = ("Linear regions", "far smaller from real regions alone", "much smaller", DOMAIN)
    groups = [g for g in settings(done) if any(g["shallow_sizes"].map(len))]
    if not groups:
        return [row(*equal), row(*small)]
    errors = pd.concat([unfolded(group, "shallow_errors").assign(key=group["key"].iloc[0]) for group in groups])
    sizes = pd.concat([unfolded(group, "shallow_sizes") for group in groups])
    return [_equal(errors, equal, groups), _smaller(sizes, small, groups)]


def _equal(errors: pd.DataFrame, what: tuple[str, str, str, str], groups: list[pd.DataFrame]) -> dict:
    """Equality at more and more points as the construction's H grows, and to rounding where it is promised."""
    holds, last = [], []
    for _, net in errors.groupby(["key", "seed", "way"]):
        net = net.sort_values("sharpness")
        last.append(100 * net["exact"].iloc[-1])
        holds.append(bool((net["exact"].diff().dropna() >= 0).all() and (net["error_exact"].dropna() < 1e-9).all()))
    most = errors["sharpness"].max()
    ours = f"equal at {min(last):.1f} to {max(last):.1f} % of points for H = {most:g}, at more the greater H; "
    return row(*what, share(holds, "networks"), f"{ours}{len(holds)} networks", "no training of its own", *groups)


def _smaller(sizes: pd.DataFrame, what: tuple[str, str, str, str], groups: list[pd.DataFrame]) -> dict:
    """Units of both layers from the regions that there are, over those from all patterns."""
    real = sizes["first"] + sizes["second"]
    shares = 100 * real / (sizes["first, all patterns"] + sizes["second, all patterns"])
    word = share((shares < 50).tolist(), "networks")
    ours = f"{shares.min():.2g} to {shares.max():.2g} % of the units, {len(shares)} networks"
    return row(*what, word, ours, "no training of its own", *groups)


# --- smaller domains -------------------------------------------------------------------------------


def domains(done: pd.DataFrame) -> list[dict]:
    """On a smaller domain more units are stable: a network's share, proved, on all images with pixels from 0 to 1 and
    on a box around one image; runs of `linear_stable`, networks with ReLUs."""
    claim = ("Linear regions", "more units stable on a smaller domain", "more", DOMAIN)
    groups = [group for group in settings(done) if not group.iloc[0]["limit"]]
    wide, near = [], []
    for group in groups:
        states = unfolded(group, "states").query("linear == 0")  # a unit that is one line needs no domain
        proved = states.assign(proved=100 * (states["active"] + states["inactive"]))
        table = proved.pivot_table("proved", ["seed", "way"], "domain")
        table = table[~table.index.get_level_values("way").isin(["LiNLU", "Layer Folding"])]
        wide += table["all pixels"].tolist()
        near += table["around one"].tolist()
    if not wide:
        return [row(*claim)]
    word = share([b > a for a, b in zip(wide, near, strict=True)], "networks")
    ours = (
        f"{min(wide):.0f} to {max(wide):.0f} % stable on all images, {min(near):.0f} to {max(near):.0f} % around one; "
    )
    return [row(*claim, word, f"{ours}{len(wide)} networks", "", *groups)]

"""The claim that one program for all units is faster than one a unit (arXiv 2102.07804), beside our runs of both."""

from __future__ import annotations

import pandas as pd

from linl.claims import Trained, row, setting
from linl.published_proofs import A_UNIT, ONE
from linl.stability_claims import ABSTRACT, STABLE, STABLE_CIFAR, TEXT
from linl.tables import unfolded
from linl.verdicts import otherwise, share

SOLVER = "another solver"
"""HiGHS, where theirs was Gurobi."""


def faster(done: pd.DataFrame) -> list[dict]:
    """The factor in each network of a run of `proof_speed`, and how many reach the published median; and what linl is
    beside a program a unit."""
    return [
        _faster(done, "mnist", 77, f"{TEXT}: median over l1", STABLE),
        _faster(done, "cifar10", 183, f"{ABSTRACT}: median over widths and l1", STABLE_CIFAR),
    ]


def _faster(done: pd.DataFrame, data: str, published: int, source: str, trained: Trained) -> dict:
    hidden = "100 100"
    claim = f"a program for all units, not one a unit, mlp {hidden.replace(' ', '-')}, {data}"
    what = ("ReLU stability", claim, f"{published} × as fast, median", source)
    group = setting(done, trained, dataset=data, hidden=hidden)
    if group is None:
        return row(*what)
    schedule = trained.told(group.iloc[0])
    cases = unfolded(group, "cases").set_index(["seed", "name", "way"])
    seconds, late = (cases[column].unstack("way") for column in ("seconds", "undecided"))
    late = late > 0
    told = ~(late[A_UNIT] & late[ONE])  # of a way that was late only the least that it takes is known
    seconds, late, count = seconds[told], late[told], int(told.sum())
    if not count:
        return row(*what, otherwise("not reproduced", SOLVER), "no answer in time, either way", schedule, group)
    factors = {way: seconds[A_UNIT] / seconds[way] for way in (ONE, "linl")}
    reached = (factors[ONE] >= published) & ~late[ONE]
    ours = f"{_told(factors[ONE], late[A_UNIT], late[ONE])}; linl: {_told(factors['linl'], late[A_UNIT], late['linl'])}"
    ours += f"; {count} network{'s' * (count > 1)}"
    return row(*what, otherwise(share(reached.tolist(), "networks"), SOLVER), ours, schedule, group)


def _told(factors: pd.Series, slow_late: pd.Series, late: pd.Series) -> str:
    """ "at most 0.1 to 227 ×", with what is known of a way that wasn't done in time."""
    ends = [f"{end:.3g}" for end in (factors.min(), factors.max())]
    least, most = slow_late[factors.idxmax()], late[factors.idxmin()]
    words = f"{'at most ' * bool(most)}{ends[0]}"
    if ends[0] != ends[1]:
        words += f" to {'at least ' * bool(least)}{ends[1]}"
    else:
        words = f"{'at least ' * bool(least)}{words}"
    return f"{words} ×"

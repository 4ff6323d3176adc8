"""The claim that one program for all units is faster than one a unit (arXiv 2102.07804), beside our runs of both."""

from __future__ import annotations

import pandas as pd

from linl.claims import Trained, row, setting
from linl.published_proofs import A_UNIT, ONE
from linl.stability_claims import ABSTRACT, STABLE, STABLE_CIFAR, TEXT
from linl.tables import unfolded
from linl.verdicts import differs, otherwise

SOLVER = "another solver"
"""HiGHS, where theirs was Gurobi."""


def faster(done: pd.DataFrame) -> list[dict]:
    """The factor, median over the networks of a run of `proof_speed`; and what linl is beside a program a unit."""
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
    seconds, late = cases["seconds"].unstack("way"), cases["undecided"].unstack("way") > 0
    seconds = seconds[~late[ONE] & ~late["linl"]]  # a program a unit that was late took at least so long
    if seconds.empty:
        return row(*what, "not reproduced, by another solver", "no answer in time", schedule, group)
    one, linl = ((seconds[A_UNIT] / seconds[way]).median() for way in (ONE, "linl"))
    least = "at least " if late.loc[seconds.index, A_UNIT].any() else ""
    count = f"{len(seconds)} network{'s' * (len(seconds) > 1)}"
    ours = f"{least}{one:.3g} ×, {count}; linl: {least}{linl:.3g} ×"
    word = otherwise("reproduced", SOLVER) if one >= published else differs(one - published, SOLVER, 0)
    return row(*what, word, ours, schedule, group)

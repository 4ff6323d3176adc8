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
    one, linl = ((seconds[A_UNIT] / seconds[way])[told] for way in (ONE, "linl"))
    reached = (one >= published) & ~late[ONE][told]
    least = "at least " if late[A_UNIT][told].any() else ""
    ours = f"{least}{_span(one)} ×; linl: {least}{_span(linl)} ×; {len(one)} network{'s' * (len(one) > 1)}"
    unanswered = int(late[ONE][told].sum())
    ours += f", {unanswered} of them without an answer of the one program in time" if unanswered else ""
    return row(*what, otherwise(share(reached.tolist(), "networks"), SOLVER), ours, schedule, group)


def _span(factors: pd.Series) -> str:
    """ "0.3 to 227", or one figure."""
    ends = [f"{end:.3g}" for end in (factors.min(), factors.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)

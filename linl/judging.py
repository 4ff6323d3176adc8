"""How a target is judged: by every run of the newest setting, and the worst of them decides."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from linl.tables import machines, newest, short
from linl.verdicts import share

NOTEBOOKS = {
    "benchmark-units": "benchmarks", "benchmark-epoch": "experiments/epoch_speed", "runs": "experiments/linlnet",
    "benchmark-peers": "experiments/peers", "benchmark-folded": "experiments/kept_accuracy",
    "last_layer": "experiments/last_layer", "bounds_speed": "experiments/bounds_speed",
    "study_cost": "experiments/study_cost", "reproduction": "experiments/stability",
    "stability": "experiments/stability",
}  # fmt: skip
"""Of each table the notebook that its figures are from."""
STATED = "nothing: stated"
"""Asked of what is told and has no target."""


def row(
    what: str,
    rival: str,
    asked: str,
    where: str,
    measured: str = "",
    holds: Sequence[bool] = (),
    *,
    half: str = "",
    done=None,
    reached: str = "",
) -> dict[str, Any]:
    """One target; `holds`: of every figure whether it reaches it; `half`: how far its pairs went; `done`: the runs that
    they are from; `reached`: the word where figures don't decide it."""
    table, notebook = f"[{where}]({where}.md)", NOTEBOOKS.get(where)
    link = f"[{notebook}](../../notebooks/{notebook}.ipynb)" if notebook else ""
    how = {"runs": "", "hardware": "", "where": table if where else "", "how": link, "run": ""}
    if done is not None and len(done):
        how |= {"runs": len(done), "hardware": machines(done), "run": " ".join(dict.fromkeys(map(short, done["key"])))}
    told = {"what": what, "rival": rival, "asked": asked, "measured": measured, "middle half of pairs": half}
    return {**told, "reached": reached or share(holds, "", ("yes", "no")), **how}


def spread(values: Sequence[float], digits: int = 2, limit: float | None = None) -> str:
    """ "0.98 to 1.11", or the one figure that all are; a digit more where one rounds to the limit and isn't it."""
    ends = min(values), max(values)
    if limit is not None and any(round(end, digits) == limit != end for end in ends):
        digits += 1
    low, high = (f"{end:.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"


# --- every run counts ------------------------------------------------------------------------------


def every(done: pd.DataFrame) -> pd.DataFrame:
    """All runs of the newest setting on the machine of the newest run, in the order they finished."""
    if done.empty:
        return done
    last, machine = newest(done).iloc[0], ["key", "how_gpu", "how_cpu", "how_threads"]
    same = (done[machine] == last[machine]).all(axis=1)
    return done[same].sort_values("finished")


Found = Iterator[tuple[str, dict[str, float]]]


def figures(done: pd.DataFrame, of: Callable[[pd.Series], Found]) -> pd.DataFrame:
    """A row a figure and run: figure, middle, low, high (quartiles over pairs; nan where there were none).

    Args:
        done: the runs that count.
        of: gives a run's figures: a name, and {"middle": …, "low": …, "high": …}. Those without a middle are left out.
    """
    rows = [{"figure": name, **values} for _, run in done.iterrows() for name, values in of(run)]
    return pd.DataFrame(rows, columns=["figure", "middle", "low", "high"]).dropna(subset="middle")


def half_of(found: pd.DataFrame, digits: int = 2) -> str:
    """From the lowest lower quartile of these figures to the highest upper one; "" where there were no pairs."""
    ends = found.dropna(subset=["low", "high"])
    return f"{ends['low'].min():.{digits}f} to {ends['high'].max():.{digits}f}" if len(ends) else ""


def worst(found: pd.DataFrame, reaches: Callable[[float], bool]) -> list[bool]:
    """Of each figure whether it reaches a target in every run."""
    return [all(map(reaches, part)) for _, part in found.groupby("figure", sort=False)["middle"]]


SENSES = {"<=": ("≤", operator.le), ">=": ("≥", operator.ge)}


def judged(
    what: str,
    rival: str,
    sense: str,
    limit: float,
    where: str,
    found: pd.DataFrame,
    done: pd.DataFrame,
    *,
    digits: int = 2,
    unit: str = "",
    more: str = "",
) -> dict[str, Any]:
    """A row of one quantity: `sense` is "<=" or ">=", `more` what else is to be told of it."""
    sign, reaches = SENSES[sense]
    asked = f"{sign} {limit:,g}{unit}"
    if found.empty:
        return row(what, rival, asked, where)
    told = spread(found["middle"], digits, limit) + unit + more
    holds = worst(found, lambda value: reaches(value, limit))
    return row(what, rival, asked, where, told, holds, half=half_of(found, 0 if unit else 2), done=done)

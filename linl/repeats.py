"""What a benchmark measured side by side, run by run, and whether a second run of it finds the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from linl.provenance import between
from linl.tables import change


@dataclass(frozen=True)
class Compared:
    """One quantity of one run.

    Attributes:
        what: its name, the same in every run of a setting.
        middle: its median over the pairs that were timed in turn.
        low, high: quartiles over those pairs; nan where there were none, for one pair is no spread.
        unit: "×", "ms", "s" or "images/s".
        ours, rival: medians of what linl and its rival took, in one unit; nan where it isn't recorded.
        control: a thing beside itself: what it shows is noise.
    """

    what: str
    middle: float
    low: float = math.nan
    high: float = math.nan
    unit: str = "×"
    ours: float = math.nan
    rival: float = math.nan
    control: bool = False

    @property
    def paired(self) -> bool:
        """Whether there is a spread."""
        return not math.isnan(self.low) and not math.isnan(self.high)


@dataclass(frozen=True)
class Again:
    """The same quantity of two runs: `first` and `last`."""

    first: Compared
    last: Compared

    @property
    def apart(self) -> float:
        """By what share the last differs from the first."""
        return self.last.middle / self.first.middle - 1

    @property
    def overlap(self) -> bool | None:
        """Whether the middle halves of their pairs have something in common; None where one has no pairs."""
        if not (self.first.paired and self.last.paired):
            return None
        return max(self.first.low, self.last.low) <= min(self.first.high, self.last.high)

    @property
    def within(self) -> bool | None:
        """Whether each median lies in the other's middle half, which is more; None where one has no pairs."""
        if not (self.first.paired and self.last.paired):
            return None
        a, b = self.first, self.last
        return a.low <= b.middle <= a.high and b.low <= a.middle <= b.high

    @property
    def changed(self) -> str:
        """ "ours +48.0 %, rival -9.0 %": which of the two took longer; "" where that isn't recorded."""
        sides = ("ours", "rival")
        if any(math.isnan(getattr(run, side)) for run in (self.first, self.last) for side in sides):
            return ""
        return ", ".join(f"{side} {change(getattr(self.last, side), getattr(self.first, side))}" for side in sides)


def again(first: pd.Series, last: pd.Series) -> list[Again]:
    """What two runs of a setting both measured.

    Args:
        first, last: of `linl.results.runs`, each with its `experiment`.
    """
    before, after = ({one.what: one for one in compared(run)} for run in (first, last))
    return [Again(before[what], after[what]) for what in before if what in after]


def code_of(first: pd.Series, last: pd.Series) -> dict[str, str]:
    """Which revisions two runs were made at, and whether their code differs: that of the package and of their notebook.

    Returns: `revisions` ("abc, def"; one where they are one) and `code`: "the same", "3 files differ", or "unknown"
        where git doesn't know a revision or a run was made with uncommitted changes.
    """
    made = [run.get("source_revision") for run in (first, last)]
    told = {"revisions": ", ".join(dict.fromkeys(str(one or "none") for one in made))}
    if not all(isinstance(one, str) for one in made) or not all(run.get("source_clean") for run in (first, last)):
        return told | {"code": "unknown"}
    files = [] if made[0] == made[1] else between(first["experiment"], *made)
    if files is None:
        return told | {"code": "unknown"}
    count = f"{len(files)} files differ" if len(files) > 1 else "1 file differs"
    return told | {"code": count if files else "the same"}


# --- what each experiment compares -----------------------------------------------------------------


def compared(run: pd.Series) -> Iterator[Compared]:
    """What a benchmark's run measured, a quantity each that can be looked for in another run.

    Args:
        run: of `linl.results.runs`, with its `experiment`; an older one may lack quartiles, or both times.
    """
    yield from COMPARED[run["experiment"]](run)


def known(one: Mapping[str, Any], name: str) -> float:
    """A figure of a record; nan where it isn't there."""
    value = one.get(name)
    return math.nan if value is None else float(value)


def three(one: Mapping[str, Any], name: str) -> dict[str, float]:
    """A record's median and quartiles of a quantity over its pairs. One pair has none, whatever is recorded."""
    alone = one.get("pairs", 2) < 2
    ends = {end: math.nan if alone else known(one, f"{name}_{end}") for end in ("low", "high")}
    return {"middle": known(one, name), **ends}


def quartiles(values: pd.Series) -> dict[str, float]:
    """The same of what is recorded pair by pair."""
    low, middle, high = values.quantile([0.25, 0.5, 0.75])
    return {"middle": middle, **({"low": low, "high": high} if len(values) > 1 else {})}


def _units(run: pd.Series) -> Iterator[Compared]:
    for name in run.filter(regex="/ratio$").dropna().index:
        way, dtype = name.removesuffix("/ratio"), name.partition("/")[0]
        both = {"ours": known(run, f"{way}/ms"), "rival": known(run, f"{dtype}/nn.ReLU/ms")}
        yield Compared(f"a step, {way}, × nn.ReLU", **three(run, name), **both, control=way.endswith("/nn.ReLU"))


def _epochs(run: pd.Series) -> Iterator[Compared]:
    for name, group in pd.DataFrame(run["rows"]).groupby("network", sort=False):
        both = {"ours": 1e3 * group["linl"].median(), "rival": 1e3 * group["usual"].median()}
        yield Compared(f"an epoch of {name}", **quartiles(group["ratio"]), **both)


def _bounds(run: pd.Series) -> Iterator[Compared]:
    for one in [*run["cases"], *({"domain": "ResNet18, 1/255", **deep} for deep in run["residual"])]:
        if not math.isnan(known(one, "ratio")):
            rival = known(one, "ms") / one["ratio"]
            what = f"{one['bounds']}, {one['domain']}, × its time"
            yield Compared(what, **three(one, "ratio"), ours=known(one, "ms"), rival=rival)


def _kept(run: pd.Series) -> Iterator[Compared]:
    given = {(one["way"], one["batch"]): one["ms"] for one in run["times"] if one["network"] == "as given"}
    for one in run["times"]:
        if one["network"] != "as given":
            both = {"ours": one["ms"], "rival": given[one["way"], one["batch"]]}
            what = f"{run['network']}, {one['network']}: {one['way']}, batch {one['batch']}"
            yield Compared(what, **three(one, "times"), **both)


def _peers(run: pd.Series) -> Iterator[Compared]:
    for one in run["rows"]:
        what = f"{one['what']}: {one['rival']}" + (f", freed memory {one['memory']}" if "memory" in one else "")
        judged = "beyond_ms" if "beyond_ms" in one else "ours_ms" if one.get("part") == "merge" else ""
        both = {"ours": known(one, "ours_ms"), "rival": known(one, "rival_ms")}
        if judged and not math.isnan(known(one, judged)):  # milliseconds are what the target asks for
            yield Compared(f"{what}, {judged.removesuffix('_ms')}", **three(one, judged), unit="ms", **both)
        if not math.isnan(known(one, "times")):
            yield Compared(what, **three(one, "times"), **both)


def _layers(run: pd.Series) -> Iterator[Compared]:
    for one in run["cases"]:
        place = f"{one['network']}, {one['side']} px, without its linear layer"
        yield from _before_and_after(place, one, "ms_1")


def _folds(run: pd.Series) -> Iterator[Compared]:
    for one in run["cases"]:
        for name in dict.fromkeys(("ms_1", f"ms_{run['batch']}")):
            yield from _before_and_after(f"{one['kind']}, {one['layers']}, batch {name.removeprefix('ms_')}", one, name)


def _before_and_after(what: str, one: Mapping[str, Any], name: str) -> Iterator[Compared]:
    before, after = known(one, f"{name}_before"), known(one, f"{name}_after")
    if not (math.isnan(before) or math.isnan(after)):
        yield Compared(what, **faster_by(one, name), ours=after, rival=before)


def faster_by(one: Mapping[str, Any], name: str) -> dict[str, float]:
    """How many times as fast a thing is afterwards, as `three` tells it; an older record has two medians alone."""
    paired = three(one, f"{name}_ratio")
    alone = known(one, f"{name}_before") / known(one, f"{name}_after")
    return paired if not math.isnan(paired["middle"]) else {"middle": alone}


def _bill(run: pd.Series) -> Iterator[Compared]:
    for one in run["bill"]:
        what = f"a step of {one['network']} of width {one['width']:g}, {one['system']}"
        yield Compared(what, known(one, "images/s"), unit="images/s")


def _steps(run: pd.Series) -> Iterator[Compared]:
    for one in run["steps"]:
        yield Compared(one["step"], known(one, "seconds"), unit="s")


COMPARED: dict[str, Callable[[pd.Series], Iterator[Compared]]] = {
    "benchmarks": _units, "epoch_speed": _epochs, "bounds_speed": _bounds, "kept_accuracy": _kept, "peers": _peers,
    "last_layer": _layers, "fold_pays": _folds, "imagenet_cost": _bill, "study_cost": _steps,
}  # fmt: skip
"""Of each experiment that measures a speed, what it compares."""

"""What the notebooks of tables share: the runs they read, where they write, the words in a cell.

A notebook of `notebooks/tables/` makes the tables of one system:

    tables = linl.tables.Tables(**linl.results.parameters(globals()))
    done = tables.runs("linlnet")
    groups = linl.tables.settings(done, ["dataset"])
    tables.write(linl.tables.lines(groups, line), "linlnet", NOTE, done)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linl.results import ParameterError, mean_sd, results_folder, runs, write_figure, write_table

SOURCES = ("records", "runs")


@dataclass
class Tables:
    """The tables of one set of runs.

    Attributes:
        source: "records" (committed) or "runs" (everything done here).
        profile: only runs of this profile; empty for all.
        out_dir: where tables and figures are written; empty: they are shown, and nothing is written.
        written: the files written so far.

    Raises:
        ParameterError: another source.
    """

    source: str = "records"
    profile: str = ""
    out_dir: str | Path = ""
    written: list[Path] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ParameterError(f"unknown source {self.source!r}: choose from {', '.join(SOURCES)}")

    def __str__(self) -> str:
        return f"the {self.source}{f' of profile {self.profile}' if self.profile else ''}"

    def runs(self, experiment: str) -> pd.DataFrame:
        """The finished runs of an experiment, as `linl.results.runs` tells them; where there are none, it says so."""
        found = runs(experiment, self.source, self.profile)
        if found.empty:
            print(f"no finished runs of {experiment} among {self}")
        return found

    def counts(self) -> pd.Series:
        """How many finished runs there are of each experiment; empty when there are none at all."""
        folders = sorted(path for path in (results_folder() / self.source).glob("*") if path.is_dir())
        counted = {folder.name: len(runs(folder.name, self.source, self.profile)) for folder in folders}
        found = {name: count for name, count in counted.items() if count}
        return pd.Series(found, dtype=int, name="finished runs")

    def write(
        self, rows: pd.DataFrame | Sequence[dict], name: str, note: str = "", made_by: pd.DataFrame | None = None
    ) -> pd.DataFrame | None:
        """Writes a table, if anything is written, and returns it to be shown; None where it has no rows.

        Args:
            rows: what is in it; what is missing becomes an empty cell.
            name: of the files.
            note: the text below it.
            made_by: the runs that `note` speaks of: its {versions}, {processors} and {hardware} are theirs.
        """
        frame = pd.DataFrame(rows)
        if frame.empty:
            return None
        missing = frame.columns[frame.isna().any()]
        frame = frame.astype(dict.fromkeys(missing, object)).fillna("")
        if self.out_dir:
            told = note if made_by is None else note.format(**made_with(made_by))
            self.written += write_table(frame, name, Path(self.out_dir), told)
        return frame

    def figure(self, figure, name: str) -> None:
        """Writes a figure, if anything is written. A notebook shows it by itself when the cell ends."""
        if self.out_dir:
            self.written.append(write_figure(figure, name, Path(self.out_dir)))


# --- which runs ------------------------------------------------------------------------------------


def settings(
    done: pd.DataFrame,
    by: Iterable[str] = (),
    descending: Iterable[str] = (),
    **columns: Callable[[pd.DataFrame], Any],
) -> list[pd.DataFrame]:
    """The runs of each setting (each key), a row a seed; none of none.

    Args:
        done: as `Tables.runs` returns them.
        by: columns that put the settings in order, before their keys.
        descending: those of them that go from the last to the first.
        columns: columns to order by that runs don't have, each made of all runs.
    """
    if done.empty:
        return []
    by = [*by, "key", "seed"]
    ordered = done.assign(**columns).sort_values(by, ascending=[name not in set(descending) for name in by])
    return [group for _, group in ordered.groupby("key", sort=False)]


def lines(groups: Iterable[pd.DataFrame], line: Callable[[pd.DataFrame], Any]) -> pd.DataFrame:
    """The rows of a table, each with the run that it came from (see `runs.md`).

    Args:
        groups: as `settings` gives them.
        line: makes a row (a dict) of one, or several.
    """
    made = [(line(group), short(group["key"].iloc[0])) for group in groups]
    rows = [(row, run) for found, run in made for row in ([found] if isinstance(found, dict) else found)]
    return pd.DataFrame([{**row, "run": run} for row, run in rows])


def short(key: str) -> str:
    """What a row calls its run: the last word of its folder's name."""
    return key.rpartition("-")[2]


def newest(done: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Of runs that agree in these columns only the one that finished last; in the order they finished.

    Args:
        done: as `Tables.runs` returns them.
        by: columns; none: the last of all.
    """
    if done.empty:
        return done
    ordered = done.sort_values("finished")
    return ordered.drop_duplicates(list(by), keep="last") if by else ordered.tail(1)


def unfolded(group: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that each run of a setting keeps in one column, as one frame; a column `seed` says whose they are.

    Args:
        group: the runs of one setting, as from `settings`.
        column: holds a list of rows in each.
    """
    pairs = zip(group[column], group["seed"], strict=True)
    return pd.concat([pd.DataFrame(rows).assign(seed=seed) for rows, seed in pairs], ignore_index=True)


# --- words -----------------------------------------------------------------------------------------


def made_with(done: pd.DataFrame) -> dict[str, str]:
    """What runs were done with, for a note.

    Returns: `versions` of torch, `processors`, and `hardware`: processors with the threads that were used.
    """
    threads = done["how_cpu"] + ", " + done["how_threads"].map(_threads)
    return {
        "versions": ", ".join(sorted(done["version_torch"].unique())),
        "processors": "; ".join(sorted(done["how_cpu"].unique())),
        "hardware": "; ".join(sorted(threads.unique())),
    }


def device(row: pd.Series) -> str:
    """What one run was done on: its accelerator, or else its processor."""
    return row["how_gpu"] or row["how_cpu"]


def hardware(row: pd.Series) -> str:
    """ "AMD EPYC, 2 threads": what one run was done on, and how much of it was used."""
    return f"{device(row)}, {_threads(row['how_threads'])}"


def machines(done: pd.DataFrame) -> str:
    """What these runs were done on, each once and in their order: "AMD EPYC, 1 thread; AMD EPYC, 2 threads"."""
    return "; ".join(dict.fromkeys(hardware(run) for _, run in done.iterrows()))


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def loaded(row: pd.Series) -> str:
    """ "load 0.1 before, 1.9 after", of the last minute: whether the machine was quiet when a run began, and whether
    anything but the run was at work in the end; "load unknown" of an older record."""
    before, after = row.get("how_load_before"), row.get("how_load_after")
    if not isinstance(before, list) or not isinstance(after, list):
        return "load unknown"
    return f"load {before[0]:.1f} before, {after[0]:.1f} after"


def reduced(row: pd.Series) -> list[str]:
    """Words for what was made smaller than the original: its width, the number of images."""
    words = [f"width {row['width']:g}"] if row["width"] != 1 else []
    return [*words, *([f"first {row['limit']} images"] if row["limit"] else [])]


def change(now: float, before: float) -> str:
    """ "+1.5 %": how much more there is now."""
    return f"{100 * (now / before - 1):+.1f} %"


def counted(now: int, before: int) -> str:
    """ "1,100 (+10.0 %)": how much there is now, and how much more."""
    return f"{now:,} ({change(now, before)})"


def told(values: Iterable, between: str = "/") -> str:
    """One word where all seeds agree, else one for each: "12/13"."""
    words = [str(value) for value in values]
    return words[0] if len(set(words)) == 1 else between.join(words)


def numbers(kept: Iterable[int]) -> str:
    """ "0 3 7", or "none"."""
    return " ".join(map(str, kept)) or "none"


def latency(group: pd.DataFrame, batch: int, before: str = "start", after: str = "folded") -> str:
    """ "4.00 → 3.00": milliseconds for so many images, mean ± sd over seeds; "" where they weren't measured."""
    names = [f"{which}_ms_{batch}" for which in (before, after)]
    if any(group.get(name, pd.Series(dtype=float)).isna().all() for name in names):
        return ""
    return " → ".join(mean_sd(group[name]) for name in names)


# --- pictures --------------------------------------------------------------------------------------


def upper_half(part: pd.DataFrame) -> pd.DataFrame:
    """Of a curve the larger half of its sizes, the middle one among them: small ones cost what a call costs."""
    return part.sort_values("size").iloc[len(part) // 2 :]


def exponents(growth: pd.DataFrame) -> pd.DataFrame:
    """The power of the size that time grows by: a straight line through the logarithms of the upper half of the sizes,
    for each curve. Below it a curve is bent by what every call costs, whatever the size.

    Args:
        growth: columns what, along, size, ms.

    Returns: what, along, power, error (its standard error; nan of two points), sizes (how many were fitted); power is
        nan for a curve of one size.
    """
    rows = []
    for (what, along), part in growth.groupby(["what", "along"], sort=False):
        upper = upper_half(part)
        power, error = _slope(np.log(upper["size"].to_numpy(float)), np.log(upper["ms"].to_numpy(float)))
        rows.append({"what": what, "along": along, "power": power, "error": error, "sizes": len(upper)})
    return pd.DataFrame(rows)


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the least-squares line: its slope, and the slope's standard error."""
    if len(x) < 2:
        return math.nan, math.nan
    slope, height = np.polyfit(x, y, 1)
    missed = ((y - height - slope * x) ** 2).sum()
    error = math.sqrt(missed / (len(x) - 2) / ((x - x.mean()) ** 2).sum()) if len(x) > 2 else math.nan
    return float(slope), error


def growth_picture(growth: pd.DataFrame, labels: dict[str, str]):
    """Milliseconds over the size, both logarithmic; dashed, and with its exponent in the legend, the line through the
    upper half of each curve.

    Args:
        growth: as for `exponents`.
        labels: for each value of `along`, what its axis is called; a panel each.

    Returns: the figure.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(labels), figsize=(6.5 * len(labels), 4.5), layout="constrained", sharey=True)
    panels = dict(zip(labels, np.atleast_1d(axes), strict=True))
    powers = exponents(growth).set_index(["what", "along"])
    colors = {what: f"C{i}" for i, what in enumerate(growth["what"].unique())}
    for (what, along), part in growth.groupby(["what", "along"], sort=False):
        power, error, _ = powers.loc[(what, along)]
        told = f"{along}^{power:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        panels[along].loglog(part["size"], part["ms"], "o-", color=colors[what], label=f"{what} ({told})")
        if len(upper := upper_half(part)) > 1:
            x = upper["size"].to_numpy(float)
            middle = np.exp(np.log(upper["ms"]).mean() - power * np.log(x).mean())
            panels[along].loglog(x, middle * x**power, "--", color="0.3", lw=1)
    for along, ax in panels.items():
        sizes = sorted(growth[growth["along"] == along]["size"].unique())
        ax.set_xticks(sizes, labels=sizes, fontsize=7)
        ax.minorticks_off()
        ax.set(xlabel=labels[along])
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
        ax.legend(fontsize=7, frameon=False, title="slope of the upper half", title_fontsize=7, **below)
        ax.spines[["top", "right"]].set_visible(False)
    next(iter(panels.values())).set_ylabel("milliseconds")
    return fig

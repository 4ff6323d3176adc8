"""How far a profile has got: what is done, running, failed, stopped or waiting, and how much time is left.

    python -m linl.progress quick           what `make status` does
    python -m linl.progress quick --stale   what `make stale` does: finished runs that other code has made

Nothing is asked of whoever carries it out: a run's folder says it all, on any machine that shares the folder. A run is
done if its `result.json` is there, and running while its notebook's process holds the folder's lock.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from linl.checking import shown
from linl.locks import held
from linl.logs import error_of, last_words
from linl.provenance import changed_since
from linl.results import LOCK, ParameterError
from linl.study import Job, jobs

STATES = ("done", "running", "failed", "stopped", "waiting")
"""failed: its notebook raised an error; stopped: it was begun and is neither running nor failed (killed, say)."""


@dataclass(frozen=True)
class Progress:
    """A profile's state.

    Attributes:
        table: a row a run: run, state, seconds (of a done one), told (what a failed or running one said last).
        left: seconds of work left, by the seconds of finished runs; None as long as none is finished.
        unknown: runs of experiments of which none is finished: `left` knows nothing of them.
    """

    table: pd.DataFrame
    left: float | None
    unknown: int

    def __str__(self) -> str:
        counts = self.table["state"].value_counts()
        words = ", ".join(f"{counts[state]} {state}" for state in STATES if counts.get(state))
        if self.left is None:
            return f"{words}; nothing is finished yet that the time left could be told by"
        at_once = max(1, int(counts.get("running", 0)))
        time_left = _told(self.left / at_once)
        runs = f"{self.unknown} run{'s' * (self.unknown > 1)}"
        beside = f", not counting {runs} of experiments never finished" if self.unknown else ""
        return f"{words}; about {time_left} left with {at_once} at once{beside}" if self.left or beside else words

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>" + shown(self.table)


def status(profile: str, path: Path | None = None) -> Progress:
    """The state of every run of a profile.

    Args:
        profile: a name in `study.yaml`.
        path: of another such file.

    Raises:
        ParameterError: as `linl.study.jobs`.
    """
    wanted = jobs(profile, path)
    rows = [{"run": job.label, "state": state_of(job), "seconds": _seconds(job), "told": ""} for job in wanted]
    for row, job in zip(rows, wanted, strict=True):
        if row["state"] in ("failed", "running", "stopped"):
            row["told"] = last_words(job.log) or "begun, and left no log"
    table = pd.DataFrame(rows)
    return Progress(table, *_left(wanted, table))


def stale(profile: str, path: Path | None = None) -> pd.DataFrame:
    """The finished runs of a profile whose code has changed since: run, finished, changed (files, see `changed_since`).

    Nothing is done again by itself: `python -m linl.study run PROFILE --redo stale` does.
    """
    rows = []
    for job in jobs(profile, path):
        if job.done and (changed := changed_since(job.result)):
            rows.append(
                {"run": job.label, "finished": json.loads(job.result.read_text())["finished"], "changed": changed}
            )
    return pd.DataFrame(rows, columns=["run", "finished", "changed"])


def state_of(job: Job) -> str:
    """One of `STATES`."""
    if job.done:
        return "done"
    if held(job.folder / LOCK):
        return "running"
    if job.log.is_file():
        return "failed" if error_of(job.log) else "stopped"
    return "stopped" if (job.folder / "params.json").is_file() else "waiting"


def _seconds(job: Job) -> float | None:
    return json.loads(job.result.read_text())["how"]["seconds"] if job.done else None


def _left(wanted: list[Job], table: pd.DataFrame) -> tuple[float | None, int]:
    """Seconds of work left: each run takes what its other seeds took, or else its experiment's mean."""
    done = pd.DataFrame({
        "experiment": [job.experiment for job in wanted], "setting": [job.folder.parent.name for job in wanted],
        "seconds": table["seconds"].astype(float),
    })  # fmt: skip
    means = {column: done.groupby(column)["seconds"].mean().dropna() for column in ("experiment", "setting")}
    if means["experiment"].empty:
        return None, int((table["state"] != "done").sum())
    left, unknown = 0.0, 0
    for job, state in zip(wanted, table["state"], strict=True):
        if state != "done":
            known = means["setting"].get(job.folder.parent.name, means["experiment"].get(job.experiment))
            left, unknown = left + (known or 0.0), unknown + (known is None)
    return left, unknown


def _told(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m linl.progress", description="how far a profile has got")
    parser.add_argument("profile")
    parser.add_argument("--stale", action="store_true", help="finished runs that other code has made")
    asked = parser.parse_args(arguments)
    try:
        _print_stale(asked.profile) if asked.stale else _print_status(asked.profile)
    except ParameterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_status(profile: str) -> None:
    found = status(profile)
    rows = found.table.assign(seconds=found.table["seconds"].astype(float).map("{:.0f}".format).replace("nan", ""))
    print(rows.to_markdown(index=False, disable_numparse=True), found, sep="\n\n")


def _print_stale(profile: str) -> None:
    found = stale(profile)
    if found.empty:
        print("no finished run was made by other code than today's")
        return
    rows = found.assign(changed=found["changed"].map(_listed))
    print(rows.to_markdown(index=False, disable_numparse=True))
    print(f"\n{len(found)} finished runs; to do them again: python -m linl.study run {profile} --redo stale")


def _listed(files: list[str], most: int = 6) -> str:
    names = [Path(file).name if "(" not in file else file for file in files]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


if __name__ == "__main__":
    sys.exit(main())

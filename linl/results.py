"""One run's record: its parameters, its folder, its last word; and tables made of many.

A run's folder is `<results>/runs/<experiment>/<network-dataset-profile-hash>/s<seed>/`. It counts if and
only if it holds `result.json`, which is renamed into place when everything else is there. Runs worth
publishing are recorded: their small text files are copied to `<results>/records/`, and the committed
tables are made from records alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from linl.data import PROJECT, in_checkout, pictures_listed
from linl.files import atomic
from linl.locks import Held, hold, release
from linl.machines import load_average, machine, peak_memory, versions

NOT_IN_KEY = frozenset({"seed", "device", "threads", "processes", "overwrite", "results_dir", "data_dir"})
"""Parameters that say where and how a run is done, not what is run."""

_NOT_RECORDED = frozenset({"results_dir", "data_dir", "overwrite"})
RECORDED_FILES = ("params.json", "metrics.csv", "units.csv", "result.json")


LOCK = ".lock"
"""In the folder of a run that someone is at work on."""

_ANEW = ".anew"  # what says that a run was finished, while its folder is emptied to do it again
_PICTURES = ".pictures"  # which of the folders of that name


class ParameterError(ValueError):
    """A notebook parameter that is unknown or of the wrong kind."""


class Busy(RuntimeError):  # noqa: N818 - an answer, not a fault
    """Another process is at work on a run."""


# --- parameters ------------------------------------------------------------------------------------


def parameters(namespace: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook, checked: every annotated name at its top level, with its value.

    Call it with `globals()` right after the parameters cell. papermill injects a cell that starts with
    "# Parameters" and only warns of names that the notebook doesn't know; here they are refused.

    Args:
        namespace: a notebook's names, `globals()`.

    Returns: every parameter with its value.

    Raises:
        ParameterError: an unknown parameter, or a value of another type than annotated.
    """
    kinds = namespace.get("__annotations__", {})
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    given = {
        target.id
        for cell in injected
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }
    if unknown := sorted(given - set(kinds)):
        raise ParameterError(
            f"unknown parameter{'s' * (len(unknown) > 1)}: {', '.join(unknown)}. This notebook has: {', '.join(kinds)}"
        )
    found = {}
    for name, kind in kinds.items():
        value = namespace[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            wanted = "True or False" if kind is bool else f"of type {kind.__name__}"
            raise ParameterError(f"parameter {name} = {value!r}: must be {wanted}")
        found[name] = value
    return found


def key_of(params: dict[str, Any]) -> str:
    """network-dataset-profile and eight digits of a hash over all parameters that say what is run."""
    counted = {k: v for k, v in sorted(without_paths(params).items()) if k not in NOT_IN_KEY}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]
    words = [str(counted[k]) for k in ("network", "dataset", "profile") if counted.get(k)]
    return "-".join(w.replace(":", "_") for w in [*words, digest])


def without_paths(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as they are told to others: of a folder of pictures only its name."""
    told = {k: v for k, v in params.items() if k not in _NOT_RECORDED}
    kind, _, path = str(told.get("dataset", "")).partition(":")
    if path:
        told["dataset"] = f"{kind}:{Path(path).name}"
    return told


def results_folder(results_dir: str | Path | None = None) -> Path:
    """The folder of results: the one named, LINL_RESULTS, the project's `results/`; where there is no project (linl
    installed from a wheel) `results/` in the current folder.

    Args:
        results_dir: names one; None or "" for the others, in this order.
    """
    named = results_dir or os.environ.get("LINL_RESULTS")
    if named:
        return Path(named).expanduser().resolve()
    return PROJECT / "results" if in_checkout() else Path("results").resolve()


# --- one run ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run: what it was asked, where it lives, whether it is done.

    Attributes:
        experiment: name of the notebook.
        params: its checked parameters.
        folder: where it leaves everything.
        source: git revision when the run began.
        load_before: the machine's load then, as `load_average` gives it.
    """

    experiment: str
    params: dict[str, Any]
    folder: Path
    source: dict[str, Any] = field(default_factory=lambda: revision())
    load_before: list[float] | None = field(default_factory=lambda: load_average())
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def key(self) -> str:
        """The folder's name above the seed."""
        return self.folder.parent.name

    @property
    def finished(self) -> bool:
        """Whether `result.json` is there."""
        return (self.folder / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """What a finished run recorded."""
        return json.loads((self.folder / "result.json").read_text())

    def finish(self, figures: dict[str, Any], **how: Any) -> dict[str, Any]:
        """Writes `result.json`, the last word, and lets the checkpoints go. A finished run stays as it is.

        Args:
            figures: the run's numbers, flat.
            how: device, precision, training seconds and the like, beside what is found out here.

        Returns: what `result.json` holds.
        """
        if self.finished:
            return self.result()
        record = {
            "experiment": self.experiment,
            "key": self.key,
            "seed": self.params.get("seed", 0),
            "figures": _plain(figures),
            "how": {
                **how,
                **machine(),
                "threads": torch.get_num_threads(),
                "load_before": self.load_before,
                "load_after": load_average(),
                "seconds": round(time.perf_counter() - self._began, 1),
                "peak_memory_mb": peak_memory(),
            },
            "versions": versions(),
            "source": self.source,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + " UTC",
        }
        with atomic(self.folder / "result.json") as part:
            part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        for checkpoint in self.folder.rglob("checkpoint.pt"):
            checkpoint.unlink()
        release(self.folder / LOCK)
        return record


def begin(experiment: str, params: dict[str, Any]) -> Run:
    """Opens a run; nothing is computed yet. Until it is finished, or this process ends, nobody else can open it.

    Args:
        experiment: the notebook's name.
        params: as `parameters` returns them; `overwrite` does a finished run again, one that isn't goes on.

    Raises:
        Busy: another process is at work on it.
        ParameterError: it was begun with other pictures, in a folder of the same name.
        OSError: the folder can't be written.
    """
    folder = run_folder(experiment, params)
    listed = pictures_listed(str(params.get("dataset", "")), params.get("data_dir") or None)
    if not params.get("overwrite"):
        _refuse_other_pictures(folder, params, listed)
    if (folder / "result.json").is_file() and not params.get("overwrite"):  # it is only shown
        return Run(experiment, params, folder)
    try:
        hold(folder / LOCK)
    except Held as who:
        raise Busy(f"{who}: wait until it is done, or stop it (an open notebook: shut down its kernel)") from None
    if (folder / "result.json").is_file():
        if not params.get("overwrite"):  # finished by the other process, a moment ago
            release(folder / LOCK)
            return Run(experiment, params, folder)
        os.replace(folder / "result.json", folder / _ANEW)  # killed while emptying, it goes on with that
    if (folder / _ANEW).is_file():
        for path in sorted(folder.iterdir(), key=lambda path: path.name == _ANEW):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for part in folder.rglob(".*.part"):  # half-written by whoever was killed here
        part.unlink()
    for name, content in (("params.json", json.dumps(without_paths(params), indent=1) + "\n"), (_PICTURES, listed)):
        if content:
            with atomic(folder / name) as part:
                part.write_text(content)
    return Run(experiment, params, folder)


def _refuse_other_pictures(folder: Path, params: dict[str, Any], listed: str) -> None:
    """Folders of pictures are told apart by their names alone, so that a run is the same one on every machine."""
    before = (folder / _PICTURES).read_text() if (folder / _PICTURES).is_file() else ""
    if before and listed and before != listed:
        raise ParameterError(
            f"{params['dataset']}: {folder.parent.name}/{folder.name} was begun with another folder of this name ("
            "other classes or pictures): rename one of the two, choose another results_dir, or overwrite it"
        )


def set_aside(folder: Path) -> Path:
    """Makes room for a run's doing anew: its folder gets another name, beside, which no table reads.

    Returns: that folder, "s0-until-20261121-180000".
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = folder.with_name(f"{folder.name}-until-{stamp}")
    folder.rename(aside)
    return aside


def run_folder(experiment: str, params: dict[str, Any]) -> Path:
    """Where a run with these parameters lives."""
    top = results_folder(params.get("results_dir")) / "runs" / experiment
    return top / key_of(params) / f"s{params.get('seed', 0)}"


def revision() -> dict[str, Any]:
    """Git revision of the project, and whether the code (notebooks, package) was as committed; None of an installed
    package, which may lie inside of somebody else's repository."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if not in_checkout():
        return {"revision": None, "clean": None}
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "linl", "notebooks", "study.yaml", "Snakefile")
    except FileNotFoundError:
        head = changed = None
    return {"revision": head, "clean": None if changed is None else changed == ""}


def _plain(value: Any) -> Any:
    """Numbers that JSON knows; NaN becomes null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- many runs -------------------------------------------------------------------------------------


def record(run_folder: Path, results_dir: str | Path | None = None) -> Path:
    """Copies a finished run's small text files to `records/`; the same files twice change nothing.

    Raises:
        FileNotFoundError: the run isn't finished.
    """
    if not (run_folder / "result.json").is_file():
        raise FileNotFoundError(f"{run_folder} has no result.json: a run that isn't finished is not recorded")
    experiment, key, seed = run_folder.parts[-3:]
    target = results_folder(results_dir) / "records" / experiment / key / seed
    for gone in _recorded(target) - _recorded(run_folder):  # of an earlier run of the same key
        (target / gone).unlink()
    for file in sorted(_recorded(run_folder), key=lambda file: (file.name == "result.json", file)):  # last what says so
        with atomic(target / file) as part:
            shutil.copyfile(run_folder / file, part)
    return target


def _recorded(folder: Path) -> set[Path]:
    """Of a folder, the small text files."""
    return {file.relative_to(folder) for file in folder.rglob("*") if file.name in RECORDED_FILES}


def runs(
    experiment: str, source: str = "records", profile: str = "", results_dir: str | Path | None = None
) -> pd.DataFrame:
    """A row a finished run: its parameters, its figures, and how it was done.

    Args:
        experiment: name of the notebook.
        source: "records" (committed) or "runs" (everything done here).
        profile: only runs of that profile, if named.
        results_dir: instead of `results_folder()`.

    Returns: columns of params.json, of the figures, `how_…`, `version_…`, `source_…`, and `folder`; sorted by key
        and seed; empty when there are none.
    """
    rows = []
    root = results_folder(results_dir) / source / experiment
    for path in sorted(root.glob("*/*/result.json")):
        if not path.parent.name.removeprefix("s").isdecimal():  # set aside
            continue
        params = json.loads((path.parent / "params.json").read_text())
        result = json.loads(path.read_text())
        if profile and params.get("profile") != profile:
            continue
        rows.append(
            {
                **params,
                **result["figures"],
                **{f"how_{k}": v for k, v in result["how"].items()},
                **{f"version_{k}": v for k, v in result["versions"].items()},
                **{f"source_{k}": v for k, v in result["source"].items()},
                "key": result["key"],
                "finished": result["finished"],
                "folder": str(path.parent),
            }
        )
    return pd.DataFrame(rows)


def mean_sd(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """ "mean ± sd" of what isn't missing; the mean alone of one value, "" of none.

    Args:
        values: one a seed; None and nan are missing.
        digits: after the point.
        factor: times every value: 100 for percentages of shares.
    """
    numbers = [v * factor for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return ""
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    sd = math.sqrt(sum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def paper(experiment: str) -> pd.DataFrame:
    """Published figures with their source, from `results/paper/<experiment>.csv` of a clone.

    Args:
        experiment: "linlnet", "layer_folding" or "stability".

    Raises:
        FileNotFoundError: another experiment, or no clone: they aren't in the wheel.
    """
    path = PROJECT / "results" / "paper" / f"{experiment}.csv"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.csv")))
        raise FileNotFoundError(
            f"no published figures of {experiment!r}: "
            + (f"choose from {known}" if known else "they come with a clone of linl, not with the installed package")
        )
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def write_table(table: pd.DataFrame, name: str, folder: Path, note: str = "") -> list[Path]:
    """`<name>.csv` and `<name>.md` (with the note below), the same bytes for the same table."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{name}.csv") as part:
        table.to_csv(part, index=False, lineterminator="\n")
    text = table.to_markdown(index=False, disable_numparse=True)
    with atomic(folder / f"{name}.md") as part:
        part.write_text(text + "\n" + (f"\n{note}\n" if note else ""))
    return [folder / f"{name}.csv", folder / f"{name}.md"]


def write_figure(figure, name: str, folder: Path) -> Path:
    """`<name>.png` without dates or versions inside, so that the same picture is the same bytes.

    Args:
        figure: of matplotlib.
        name: of the file, without its ending.
        folder: made where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{name}.png") as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return folder / f"{name}.png"

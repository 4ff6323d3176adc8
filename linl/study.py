"""Profiles as data: from `study.yaml` to runs, and the one command that carries them out.

    python -m linl.study run quick          what `make study` does
    python -m linl.study list               the profiles
    python -m linl.study record cifar10     copy finished runs to results/records/
    python -m linl.study tables             results/tables/ anew, from records alone

Snakemake is the engine (see `Snakefile`), papermill runs the notebooks. Everything that can be wrong in
a profile is said before the first run starts.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from linl import engine
from linl.data import PROJECT, in_checkout
from linl.devices import PRECISIONS
from linl.files import atomic
from linl.locks import Held, only_one
from linl.logs import last_words
from linl.notebooks import notebook_defaults
from linl.provenance import changed_since
from linl.results import ParameterError, record, results_folder, run_folder, set_aside

_BLOCK = {"notebook", "with", "each", "seeds", "threads", "memory", "gpus", "minutes"}
FROM_A_CLONE = "profiles and notebooks come with a clone of linl, not with the installed package; run this from a clone"
_NEEDS = {"memory": float, "gpus": int, "minutes": int}


@dataclass(frozen=True)
class Job:
    """One run: a notebook with all its parameters.

    Attributes:
        experiment: the notebook's name.
        notebook: its path.
        params: every parameter, defaults included, but results_dir.
        threads: processor threads it may use; 0 for all there are.
        folder: where the run lives.
        memory: GiB that it needs.
        gpus: how many it can use.
        minutes: that it takes at most, for whoever wants to know beforehand (Slurm).
    """

    experiment: str
    notebook: Path
    params: dict[str, Any]
    threads: int
    folder: Path
    memory: float = 2.0
    gpus: int = 0
    minutes: int = 240

    @property
    def result(self) -> Path:
        """The file whose being there means done."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """What its notebook said, as it ran."""
        return self.folder / "log.txt"

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.result.is_file()

    @property
    def label(self) -> str:
        """Short name for people."""
        return f"{self.experiment} {self.folder.parent.name} s{self.params.get('seed', 0)}"


class _Once(yaml.SafeLoader):
    """YAML that says so where a name comes twice: by itself it keeps the last and forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def profiles(path: Path | None = None) -> dict[str, dict]:
    """All profiles of `study.yaml`: name to {about, runs}.

    Raises:
        ParameterError: a file that isn't what it should be.
    """
    path = path or PROJECT / "study.yaml"
    try:
        content = yaml.load(path.read_text(), _Once)  # a SafeLoader
    except FileNotFoundError:
        raise ParameterError(f"{path} is missing: {FROM_A_CLONE}") from None
    except yaml.YAMLError as error:
        raise ParameterError(f"{path.name} is not valid YAML: {error}") from error
    found = content.get("profiles") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ParameterError(f"{path.name} must have `profiles:` at its top")
    return found


def jobs(profile: str, path: Path | None = None) -> list[Job]:
    """The runs of a profile, checked.

    Raises:
        ParameterError: an unknown profile, key, notebook or parameter, or a value of another type.
    """
    known = profiles(path)
    if profile not in known:
        raise ParameterError(f"unknown profile {profile!r}: choose from {', '.join(known)}")
    try:
        return _jobs(profile, known[profile])
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"profile {profile} is not written as the others are: {error!r}") from error


def _jobs(profile: str, content: dict) -> list[Job]:
    found: dict[Path, Job] = {}
    for block in content["runs"]:
        if unknown := set(block) - _BLOCK:
            raise ParameterError(f"profile {profile}: unknown key {', '.join(sorted(unknown))}")
        notebook = PROJECT / "notebooks" / block["notebook"]
        defaults = notebook_defaults(notebook)
        for entry in block.get("each", [{}]):
            for seed in block.get("seeds", [0]):
                given = {**block.get("with", {}), **entry, "profile": profile, "seed": seed}
                params = {**defaults, **_checked(given, defaults, f"profile {profile}, {notebook.stem}")}
                params.pop("results_dir", None)
                _check_values(params, f"profile {profile}, {notebook.stem}")
                threads = block.get("threads", 1)
                needs = {key: kind(block[key]) for key, kind in _NEEDS.items() if key in block}
                job = Job(notebook.stem, notebook, params, 0 if threads == "all" else int(threads),
                          run_folder(notebook.stem, params), **needs)  # fmt: skip
                if job.folder in found:
                    raise ParameterError(f"profile {profile}: the same run twice, {job.label}")
                found[job.folder] = job
    return list(found.values())


def _checked(given: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(defaults)):
        raise ParameterError(f"{where}: unknown parameter {', '.join(unknown)}; it has {', '.join(defaults)}")
    checked = {}
    for name, value in given.items():
        kind = type(defaults[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ParameterError(f"{where}: {name} = {value!r} must be of type {kind.__name__}")
        checked[name] = value
    return checked


def _check_values(params: dict[str, Any], where: str) -> None:
    """What is known of common parameters without running anything."""
    from linl import cycles, data, losses, models, planning, scores, stability, train

    choices = {"network": models.NETWORKS, "dataset": data.SOURCES, "objective": planning.OBJECTIVES}
    choices |= dict.fromkeys(("recipe", "pretrain_recipe", "tune_recipe"), train.RECIPES)
    choices |= dict.fromkeys(("method", "certify"), stability.METHODS) | {"score": scores.SCORES}
    choices |= {"rewind": cycles.REWINDS, "adversary": ("none", *losses.ADVERSARIES), "precision": PRECISIONS}
    choices |= {"normalize": data.NORMALIZATIONS, "device": ("auto", "cpu", "cuda", "mps")}
    for name, known in choices.items():
        value = str(params.get(name, ""))  # empty ones say what that means in their notebook
        if value and value.partition(":")[0] not in known:
            raise ParameterError(f"{where}: unknown {name} {params[name]!r}; choose from {', '.join(known)}")
    for name in ("hidden", "keep", "widths", "depths"):
        if not all(word.isdecimal() for word in str(params.get(name, "")).split()):
            raise ParameterError(f'{where}: {name} = {params[name]!r}: whole numbers, as "64 64"')
    lowest = {"image_size": 0, "limit": 0, "threads": 0, "penalty": 0, "start": 0}
    lowest |= dict.fromkeys(("epochs", "pretrain_epochs", "tune_epochs", "batch", "pairs"), 1)
    for name, low in lowest.items():
        if params.get(name, low) < low:
            raise ParameterError(f"{where}: {name} = {params[name]} must be at least {low}")
    if not params.get("width", 1) > 0:
        raise ParameterError(f"{where}: width = {params['width']} must be above 0")
    if not 0 <= params.get("validation", 0) < 1:
        raise ParameterError(f"{where}: validation = {params['validation']} must be at least 0 and below 1")


# --- carrying out ----------------------------------------------------------------------------------


def as_yaml(params: dict) -> str:
    """Parameters on one line, as papermill's -y wants them. Not JSON: YAML reads JSON's 5e-05 as a word."""
    return yaml.safe_dump(params, default_flow_style=True, width=float("inf"), allow_unicode=True).strip()


def tables_folder(profile: str) -> Path:
    """Where the tables of a profile's own runs go (not committed)."""
    return results_folder() / "runs" / "tables" / profile


def check_kernel() -> None:
    """The notebooks' kernel must be there.

    Raises:
        ParameterError: it isn't.
    """
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise ParameterError(
            "Jupyter has no kernel named python3: install it with `python -m ipykernel install --sys-prefix`"
        ) from None


def run(
    profile: str, cores: int | None = None, redo: str = "", executor: str = "local", options: Sequence[str] = ()
) -> int:
    """Carries out what is missing of a profile and shows its table.

    Args:
        profile: a name in `study.yaml`.
        cores: None for all there are; on a cluster, of a run that wants all.
        executor: "local", or "slurm" (see `profiles/slurm/config.yaml`).
        options: more of Snakemake's.
        redo: finished runs to do again: "stale" (made by other code, see `linl.provenance`), "all", or none. What they
            left is set aside, not deleted.

    Returns: the exit status.
    """
    wanted, tables = jobs(profile), tables_folder(profile)
    if redo or _unfinished(wanted, tables):
        check_kernel()
        try:
            with only_one(results_folder() / ".lock"):
                _make_room(wanted, redo)
                (tables / "index.md").unlink(missing_ok=True)  # tables of what the profile was before
                print(f"profile {profile}: {sum(job.done for job in wanted)} of {len(wanted)} runs done, {executor}")
                sys.stdout.flush()
                command = [*engine.command(profile, cores, executor), *options]
                status = subprocess.run(command, check=False).returncode
        except Held as who:
            raise ParameterError(f"another study is running, {who}: wait for it, or stop it") from None
        if status or not all(job.done for job in wanted):
            _tell_failures(wanted)
            return status or 1
    else:
        print(f"profile {profile}: all {len(wanted)} runs are done")
    _show(wanted, tables)
    return 0


def _unfinished(wanted: list[Job], tables: Path) -> bool:
    """Whether a run is missing, or the tables are older than one."""
    shown = tables / "index.md"
    newest = max((job.result.stat().st_mtime for job in wanted if job.done), default=0.0)
    return not all(job.done for job in wanted) or not shown.is_file() or shown.stat().st_mtime < newest


def _make_room(wanted: list[Job], redo: str) -> None:
    for job in wanted if redo else ():
        if job.done and (redo == "all" or changed_since(job.result)):
            print(f"once more: {job.label}; the earlier one is in {set_aside(job.folder).name}", flush=True)


def _tell_failures(wanted: list[Job]) -> None:
    print("\nnot finished (run the same command again, finished runs stay):", file=sys.stderr)
    for job in wanted:
        if not job.done:
            print(f"  {job.label}: {last_words(job.log) or 'did not start'}", file=sys.stderr)


def _show(wanted: list[Job], tables: Path) -> None:
    root = Path.cwd()

    def short(path: Path) -> str:
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    for table in sorted(tables.glob("*.md")):
        if table.name == "index.md":
            continue
        print(f"\n{table.read_text()}")
    print("executed notebooks:")
    for job in wanted:
        print(f"  {short(job.folder / 'notebook.ipynb')}")
    print("figures:")
    for figure in [*sorted(tables.glob("*.png")), *(f for job in wanted for f in sorted(job.folder.glob("*.png")))]:
        print(f"  {short(figure)}")


def make_tables(source: str = "records", profile: str = "", out: Path | None = None) -> None:
    """Runs `notebooks/tables.ipynb`, and all of `notebooks/tables/` in it; from records to results/tables/ unless told
    otherwise.

    Raises:
        ParameterError: linl was installed without its notebooks.
    """
    import papermill

    if not in_checkout():
        raise ParameterError(f"the tables' notebooks are missing: {FROM_A_CLONE}")
    out = out or results_folder() / "tables"
    params = {"source": source, "profile": profile, "out_dir": str(out)}
    executed = results_folder() / "runs" / "tables" / (profile or "all") / "notebook.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    papermill.execute_notebook(PROJECT / "notebooks" / "tables.ipynb", executed, params, progress_bar=False)
    if source == "records" and (out / "linlnet.csv").is_file() and out == PROJECT / "results" / "tables":
        _table_into_readme(out / "linlnet.csv", PROJECT / "README.md")


README_COLUMNS = [
    "network",
    "data",
    "schedule",
    "ReLU %",
    "LiNL %",
    "paper LiNL %",
    "linear layers",
    "last p",
    "parameters",
]


def _table_into_readme(csv: Path, readme: Path) -> None:
    """The README's table is the committed one, some columns of it."""
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)[README_COLUMNS]
    head, rest = readme.read_text().split("<!-- linlnet: made by `make tables` -->")
    tail = rest.split("<!-- end -->", 1)[1]
    shown = table.to_markdown(index=False, disable_numparse=True)
    with atomic(readme) as part:
        part.write_text(f"{head}<!-- linlnet: made by `make tables` -->\n{shown}\n<!-- end -->{tail}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m linl.study", description="profiles of the study")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="do what is missing of a profile, then show its table")
    running.add_argument("profile")
    running.add_argument("--cores", type=int)
    running.add_argument("--executor", choices=engine.EXECUTORS, default="local")
    running.add_argument("--options", default="", help="more options of Snakemake, in quotes")
    running.add_argument("--redo", choices=["stale", "all"], default="", help="finished runs to do again")
    commands.add_parser("list", help="the profiles")
    recording = commands.add_parser("record", help="copy a profile's finished runs to results/records/")
    recording.add_argument("profile")
    tabling = commands.add_parser("tables", help="make results/tables/ from results/records/")
    tabling.add_argument("--source", default="records", choices=["records", "runs"])
    tabling.add_argument("--profile", default="")
    tabling.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "run":
            return run(asked.profile, asked.cores, asked.redo, asked.executor, shlex.split(asked.options))
        if asked.command == "record":
            for job in jobs(asked.profile):
                print(f"{'recorded' if job.done and record(job.folder) else 'not finished'}: {job.label}")
        elif asked.command == "tables":
            make_tables(asked.source, asked.profile, asked.out)
        else:
            for name, content in profiles().items():
                print(f"{name:10s} {len(jobs(name)):3d} runs  {content.get('about', '')}")
    except (ParameterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

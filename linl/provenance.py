"""Which finished runs today's code might not repeat: what has changed since the revision that made them."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from linl.results import PROJECT

BESIDE = frozenset(
    {
        "tables", "notebooks", "study", "progress", "provenance", "locks", "__init__", "webpage", "verdicts", "claims",
        "training_claims", "folding_claims", "stability_claims", "proof_claims", "region_claims", "pruning_claims",
        "faults", "training_faults", "folding_faults", "proof_faults", "pruning_faults", "errata", "api",
        "repeats", "judging", "targets", "engine", "logs", "lending", "sliders",
    }
)  # fmt: skip
"""Files of the package that carry runs out, or read them: no figure comes from them."""


def changed_since(result: Path) -> list[str]:
    """What of the code differs between a finished run and now, uncommitted edits included.

    A run depends on its notebook and on the package; which of the package's files it really uses isn't asked, so a
    changed file is a reason to look, no proof that a figure would be another.

    Args:
        result: its `result.json`.

    Returns: files, by their paths in the project; or one sentence where that can't be told. Empty: the same code.
    """
    record = json.loads(result.read_text())
    source = record.get("source") or {}
    revision = source.get("revision")
    if not revision:
        return ["made outside of a git checkout"]
    files = _changed(revision)
    if files is None:
        return [f"revision {revision} isn't known here (a shallow clone, or another repository?)"]
    mine = [file for file in files if _counts(file, record["experiment"])]
    return mine + (["(made with uncommitted changes)"] if source.get("clean") is False else [])


def _counts(file: str, experiment: str) -> bool:
    path = Path(file)
    if path.suffix == ".ipynb":
        return path.stem == experiment and path.parent.name != "tables"
    return path.parent == Path("linl") and path.suffix in (".py", ".cpp") and path.stem not in BESIDE


def between(experiment: str, before: str, after: str) -> list[str] | None:
    """What of an experiment's code differs between two revisions.

    Args:
        experiment: name of its notebook.
        before, after: git revisions.

    Returns: files, as in `changed_since`; None where one of the revisions isn't known here.
    """
    files = _changed(before, after)
    return None if files is None else [file for file in files if _counts(file, experiment)]


@functools.lru_cache(maxsize=256)
def _changed(*revisions: str) -> tuple[str, ...] | None:
    """Files of notebooks and package that differ between a revision and the working tree, or another revision; None: no
    such revision."""
    command = ["git", "-C", str(PROJECT), "diff", "--name-only", *revisions, "--", "linl", "notebooks"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return tuple(done.stdout.splitlines()) if done.returncode == 0 else None

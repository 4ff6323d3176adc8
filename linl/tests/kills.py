"""Kills a sweep again and again, and looks whether anything was lost: `python -m linl.tests.kills 50`.

The profile `tiny` is started; after a moment drawn by chance, kill -9 hits its kernel, papermill, Snakemake, the
command itself or all of them; then the same command is given again. Whatever is found afterwards must be whole: a
`result.json` can be read and has its run beside it, finished runs keep their bytes, and in the end all is as it is
without any kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from linl import study

TARGETS = ("kernel", "papermill", "snakemake", "study", "all")
_SIGNS = {
    "kernel": "ipykernel_launcher",
    "papermill": "-m papermill",
    "snakemake": "-m snakemake",
    "study": "linl.study",
}
_TIMED = ("seconds", "images_per_second", "ms", "finished", "memory", "when")


_LEFT = {"linlnet": ("metrics.csv", "units.csv", "model.safetensors")}
"""What a run must have beside its `result.json` and its parameters, by experiment."""


def start(folder: Path, profile: str = "tiny", **options) -> subprocess.Popen:
    """The sweep, its results in a folder."""
    command = [sys.executable, "-m", "linl.study", "run", profile]
    return subprocess.Popen(command, env={**os.environ, "LINL_RESULTS": str(folder)}, **options)


def members(folder: Path) -> dict[int, str]:
    """The processes of a sweep, with their command lines; known by its folder, kernels have sessions of their own."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LINL_RESULTS") == str(folder):
                found[process.pid] = " ".join(process.cmdline())
    return found


def wanted_of(folder: Path, target: str) -> list[int]:
    """A sweep's processes of one kind, or all."""
    return [pid for pid, line in members(folder).items() if target == "all" or _SIGNS[target] in line]


def kill(folder: Path, target: str) -> bool:
    """kill -9 of one kind of a sweep's processes, or of all; whether there was one."""
    wanted = wanted_of(folder, target)
    for pid in wanted if target == "all" else wanted[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(wanted)


def end(sweep: subprocess.Popen, folder: Path) -> None:
    """Waits until nothing of a sweep is left. What was orphaned must end by itself."""
    limit = time.monotonic() + 120
    while members(folder):
        sweep.poll()
        time.sleep(0.2)
        assert time.monotonic() < limit, f"still there two minutes after a kill: {members(folder)}"
    sweep.wait()


def bytes_of(folder: Path) -> dict[str, str]:
    """Every finished run's `result.json`, by a hash of its bytes."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("runs/*/*/s*/result.json")}


def check_whole(folder: Path) -> None:
    """What is there after a kill.

    Raises:
        AssertionError: a result without its run, or half a file.
    """
    for result in folder.glob("runs/*/*/s*/result.json"):
        record = json.loads(result.read_text())
        assert record["key"] == result.parent.parent.name
        for name in ("params.json", *_LEFT.get(record["experiment"], ())):
            assert (result.parent / name).is_file(), f"{result} without {name}"
        json.loads((result.parent / "params.json").read_text())


def figures(folder: Path) -> dict[str, dict]:
    """What the runs found out, by seed, without what a clock said."""

    def still(value):
        if isinstance(value, dict):
            return {k: still(v) for k, v in value.items() if not any(word in k for word in _TIMED)}
        return [still(v) for v in value] if isinstance(value, list) else value

    return {
        result.parent.name: still(json.loads(result.read_text())["figures"])
        for result in sorted(folder.glob("runs/linlnet/*/s*/result.json"))
    }


def complete(folder: Path) -> None:
    """Gives the command until it is done, at most three times: a run whose kernel was killed fails once."""
    for _ in range(3):
        done = start(folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        told, _ = done.communicate(timeout=600)
        if done.returncode == 0:
            return
    raise AssertionError(f"the same command doesn't complete it:\n{told[-3000:]}")


def campaign(kills: int, seed: int = 0, longest: float = 12.0) -> dict[str, int]:
    """So many kills at moments by chance, sweep after sweep.

    Args:
        kills: how many that hit something.
        seed: of moments and targets.
        longest: seconds that a target lives at most before it is hit.

    Returns: how often each target was hit.

    Raises:
        AssertionError: something was lost, or ended otherwise than without kills.
    """
    chance, hits = random.Random(seed), dict.fromkeys(TARGETS, 0)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as top:
        complete(Path(top) / "calm")
        wanted = figures(Path(top) / "calm")
        assert len(wanted) == len(study.jobs("tiny"))
        folder = Path(top) / "stormy"
        while sum(hits.values()) < kills:
            before = bytes_of(folder)
            sweep, target = start(folder, **quiet), chance.choice(TARGETS)
            while sweep.poll() is None and not wanted_of(folder, target):
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, longest))
            hits[target] += kill(folder, target)
            end(sweep, folder)
            check_whole(folder)
            after = bytes_of(folder)
            assert all(after.get(path) == mark for path, mark in before.items()), "a finished run has changed"
            if len(after) == len(wanted):
                complete(folder)
                assert figures(folder) == wanted, "it ended otherwise than without kills"
                shutil.rmtree(folder)
            print(f"{sum(hits.values())} of {kills}: {target}, {len(after)} of {len(wanted)} runs finished", flush=True)
        complete(folder)
        assert figures(folder) == wanted, "it ended otherwise than without kills"
    return hits


if __name__ == "__main__":
    print(campaign(int(sys.argv[1]) if len(sys.argv) > 1 else 50))

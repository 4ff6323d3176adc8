"""What a second core gains, and what a run costs beside its own work: `python -m linl.tests.speedup quick`.

The profile is carried out twice, in folders of its own: with one core, then with all. A run's own work is what its
notebook says of itself (`how.seconds`: from the cell that opens it to the one that ends it); the rest is papermill, the
kernel, imports and Snakemake. Let nothing else run beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from linl import engine, study


def carried_out(profile: str, cores: int, folder: Path) -> tuple[float, list[float]]:
    """Wall seconds of a whole profile from nothing to its table, and the seconds of each run's own work."""
    command = [sys.executable, "-m", "linl.study", "run", profile, "--cores", str(cores)]
    began = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "LINL_RESULTS": str(folder)}, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{profile} wasn't completed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    results = sorted(folder.glob("runs/*/*/s*/result.json"))
    return wall, [json.loads(path.read_text())["how"]["seconds"] for path in results]


def main(profile: str) -> None:
    """Prints both walls, their ratio, and the overhead."""
    runs, all_cores = len(study.jobs(profile)), engine.here().cores
    walls = {}
    for cores in (1, all_cores):
        with tempfile.TemporaryDirectory() as folder:
            walls[cores], own = carried_out(profile, cores, Path(folder))
        beside = (walls[cores] * cores - sum(own)) / runs
        print(
            f"{profile}, {runs} runs, {cores} cores: {walls[cores]:.0f} s; own work {sum(own):.0f} s in all", flush=True
        )
        print(
            f"  beside it {beside:.1f} core-seconds a run (papermill, kernel, imports, Snakemake, tables, idle cores)"
        )
    print(f"{all_cores} cores are {walls[1] / walls[all_cores]:.2f} times as fast as one")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quick")

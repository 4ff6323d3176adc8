"""How Snakemake is called: here or on Slurm, and what a run may have at most there."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from linl import devices
from linl.data import PROJECT
from linl.results import ParameterError

EXECUTORS = ("local", "slurm")


@dataclass(frozen=True)
class Capacity:
    """What there is for runs: on this machine, or for one job of a cluster.

    Attributes:
        cores, memory: processor cores and GiB.
        gpus: how many; None for as many as a run asks for.
    """

    cores: int
    memory: float
    gpus: int | None

    def threads(self, wanted: int) -> int:
        """Of a run that can use so many; 0: all."""
        return min(wanted or self.cores, self.cores)

    def megabytes(self, gib: float) -> int:
        """Of memory for a run that needs so much; never more than there is, so that it can start at all."""
        return round(1024 * min(gib, self.memory))

    def gpus_of(self, wanted: int) -> int:
        """Of a run that can use so many; it runs on the processor where there is none."""
        return wanted if self.gpus is None else min(wanted, self.gpus)


def capacity(config: dict[str, Any]) -> Capacity:
    """What the Snakefile may give to a run.

    Args:
        config: of Snakemake: `cores`, `memory` and `gpus`, as `command` gives them.
    """
    gpus = int(config.get("gpus", 0))
    return Capacity(int(config.get("cores", 1)), float(config.get("memory", 2)), None if gpus < 0 else gpus)


def here(cores: int | None = None) -> Capacity:
    """What this machine has."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Capacity(cores or devices.cores(), memory, torch.cuda.device_count())


def command(profile: str, cores: int | None = None, executor: str = "local") -> list[str]:
    """The command that carries out what is missing of a profile.

    Raises:
        ParameterError: Slurm is asked for and isn't there.
    """
    words = [
        sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--directory", str(PROJECT),
        "--rerun-triggers", "mtime", "--keep-going", "--nolock", "--ignore-incomplete", "--quiet", "rules",
    ]  # fmt: skip
    if executor == "local":
        own = here(cores)
        limits = [f"mem_mb={round(1024 * own.memory)}", f"gpu={own.gpus}"]
        words += ["--cores", str(own.cores), "--resources", *limits]
    else:
        own = Capacity(cores or CLUSTER_CORES, math.inf, -1)
        words += ["--workflow-profile", str(PROJECT / "profiles" / "slurm"), *_slurm_options()]
    return [
        *words,
        "--config",
        f"profile={profile}",
        f"cores={own.cores}",
        f"memory={own.memory}",
        f"gpus={own.gpus}",
    ]


CLUSTER_CORES = 8
"""Of a run that wants all there are, on a cluster; --cores says otherwise."""


def _slurm_options() -> list[str]:
    """How jobs are asked after: where Slurm keeps no accounts, sacct knows nothing and squeue must do."""
    try:
        told = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ParameterError(
            "no Slurm here (scontrol isn't found): start this on a machine that submits jobs"
        ) from None
    if told.returncode:
        raise ParameterError(f"Slurm doesn't answer: {(told.stderr or told.stdout).strip()}")
    kept = re.search(r"^AccountingStorageType\s*=\s*(\S+)", told.stdout, re.M)
    without = kept is None or kept[1] in ("accounting_storage/none", "(null)")
    return ["--slurm-status-command", "squeue", "--slurm-no-account"] if without else []

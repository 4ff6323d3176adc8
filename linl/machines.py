"""The machine that something is done on: its processor, accelerator and load, and the versions of what is installed."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from linl.devices import cores


def machine() -> dict[str, Any]:
    """Processor, cores and accelerator."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name, as its maker gives it where the system passes that on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    told = ""
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return told or platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Processes that wanted a core over the last minute, the last five and the last fifteen, other people's among them;
    None where the system doesn't count them. On a quiet machine it is near 0 before a run, and after it no more than
    the run's own threads and workers."""
    with contextlib.suppress(AttributeError, OSError):
        return [round(mean, 2) for mean in os.getloadavg()]
    return None


def peak_memory() -> int:
    """The most memory that this process has held so far, in MB."""
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3))


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {"python": platform.python_version(), **versions_of("torch", "torchvision", "timm", "numpy")}


def versions_of(*names: str) -> dict[str, str]:
    """Versions of packages, as a record keeps those of rivals under `rival_versions`.

    Args:
        names: as they are installed by: "torch-pruning", "auto_LiRPA".

    Returns: for each its version; of one that can only be imported what it says of itself; "not installed".
    """
    return {name: _version_of(name) for name in names}


def _version_of(name: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except ModuleNotFoundError:
        return "not installed"
    return getattr(module, "__version__", "unknown")

"""A GPU for a process, and no other gets it: `python -m linl.lending 1 -m papermill …`.

Takes as many free devices as asked for, names them in CUDA_VISIBLE_DEVICES, and becomes `python …`. The locks live as
long as that process. Who starts no more runs at once than there are devices (Snakemake, by `--resources gpu=`) never
waits here. Where a scheduler has given devices already (Slurm does), nothing is taken.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from linl.locks import Held, hold, release


def lend(count: int, devices: list[str], folder: Path, patience: float = 600.0) -> list[str]:
    """Takes locks on so many devices, for as long as this process lives, whatever it becomes.

    Args:
        count: how many.
        devices: what there are, as CUDA_VISIBLE_DEVICES names them.
        folder: for the locks, the same for everyone on this machine.
        patience: seconds to wait for others to end.

    Raises:
        ValueError: more are asked for than there are.
        TimeoutError: they didn't become free.
    """
    if count > len(devices):
        raise ValueError(f"{count} GPUs are asked for, {len(devices)} are here")
    end = time.monotonic() + patience
    while True:
        taken: list[str] = []
        for device in devices:
            try:
                hold(folder / f"gpu-{device}", inherit=True)
                taken.append(device)
            except Held:
                continue
            if len(taken) == count:
                return taken
        for device in taken:
            release(folder / f"gpu-{device}")
        if time.monotonic() > end:
            raise TimeoutError(f"no {count} GPUs became free within {patience:g} s")
        time.sleep(1)


def main(arguments: list[str]) -> None:
    """The command line: how many, then what python is to run."""
    count, rest = int(arguments[0]), arguments[1:]
    environment = dict(os.environ)
    if count and not any(name in environment for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")):
        import torch

        given = environment.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        folder = Path(tempfile.gettempdir()) / f"linl-gpus-{os.getuid()}"
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(lend(count, devices, folder))
    os.execve(sys.executable, [sys.executable, *rest], environment)


if __name__ == "__main__":
    main(sys.argv[1:])

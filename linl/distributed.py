"""One training by several processes, from a notebook or a shell.

    linl.distributed.fit(net, data, recipe, processes=4, folder=…)     starts them, waits, and gives the History
    torchrun --nnodes 2 --nproc-per-node 8 … -m linl.worker FOLDER     what it starts; by hand over machines

A kernel is never forked: torchrun starts processes of their own, which build the same network (it must come from
`linl.models.create`, perhaps linearized; code of a notebook can't be imported there), take its weights from a file, and
train it as `linl.train.fit` does, by the rules of `linl.worlds`. A process that dies ends them all, with its error; the
newest checkpoint stays, and the same call goes on from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from linl import train
from linl.checkpoints import save_weights
from linl.devices import cores, pick_device
from linl.files import atomic
from linl.images import Images
from linl.models import create
from linl.pictures import ImageFolderData
from linl.recipes import Recipe
from linl.units import linearize
from linl.worlds import World

WORK = "distributed"
"""Below a training's folder, what its processes are told."""


class WorkerError(RuntimeError):
    """A process of a training ended with an error; the message holds its last words."""


def fit(
    net: nn.Module,
    data: Images | ImageFolderData,
    settings: Recipe,
    processes: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    fused_units: bool = False,
    verbose: bool = True,
    save_every: float = 120.0,
) -> train.History:
    """`linl.train.fit` by several processes of this machine: one a GPU, or a few on the processor.

    Args:
        net: from `linl.models.create`, linearized or not; trained in place.
        data: from `linl.data.load`, or any `Images`.
        settings: its batch size, of the whole batch, must be a multiple of `processes`.
        processes: how many; 1 trains here.
        seed, folder, device, precision, fused_units, verbose, save_every: as in `linl.train.fit`. "cuda" and "auto"
            give each process a GPU of its own.

    Raises:
        ValueError: a network that can't be built elsewhere, a batch that can't be shared evenly, more processes than
            GPUs.
        WorkerError: a process ended with an error.
    """
    how = {"seed": seed, "device": device, "precision": precision, "fused_units": fused_units, "verbose": verbose}
    how["save_every"] = save_every
    if processes == 1:
        return train.fit(net, data, settings, folder=folder, **how)
    _refuse(net, data, settings, processes, device)
    with tempfile.TemporaryDirectory() as spare:
        own = Path(folder) if folder else Path(spare)
        work = own / WORK
        if not (own / "model.safetensors").is_file():
            _write(work, net, data, settings, processes, {**how, "folder": str(own.absolute())})
            _start(work, processes, verbose)
            shutil.rmtree(work)
        return train.fit(net, data, settings, folder=own, **how)  # it is finished: weights and tables are loaded


def sharing(batch_size: int, images: int, device: torch.device) -> int:
    """How many processes can share a batch evenly, each with a GPU of its own; 1 on the processor."""
    batch_size = min(batch_size, images)
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    return max(n for n in range(1, max(1, gpus) + 1) if batch_size % n == 0)


def _refuse(net: nn.Module, data, settings: Recipe, processes: int, device: str) -> None:
    if processes < 1:
        raise ValueError(f"processes = {processes}: at least 1")
    if not hasattr(net, "made_by"):
        raise ValueError(
            f"{type(net).__name__} can't be built in another process: take a network of linl.models.create, perhaps "
            "linearized, or start torchrun on a script of yours that builds it and calls linl.train.fit"
        )
    again = built(net.made_by)
    if repr(again) != repr(net) or again.state_dict().keys() != net.state_dict().keys():
        raise ValueError(
            f"{type(net).__name__} was changed since linl.models.create made it (folded, pruned, hardened, …), so it "
            "can't be built in another process: change it after the training, or train it by one process"
        )
    if not isinstance(data, Images | ImageFolderData):
        raise ValueError(f"{type(data).__name__} can't be handed to another process: take linl.data.load's")
    World(0, processes).refuse_batch(settings.batch_size, data.size("train"))
    where = pick_device(device)
    if where.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(f"{processes} processes, but {torch.cuda.device_count()} GPUs: one is for one process")


# --- what the processes are told -------------------------------------------------------------------


def _write(
    work: Path, net: nn.Module, data: Images | ImageFolderData, settings: Recipe, processes: int, how: dict
) -> None:
    from safetensors.torch import save_file

    work.mkdir(parents=True, exist_ok=True)
    save_weights(net, work / "start.safetensors")
    told = {"made_by": net.made_by, "settings": asdict(settings), "how": how}
    if isinstance(data, Images):
        splits = {s: [t.cpu().contiguous() for t in getattr(data, s)] for s in ("train", "validation", "test")}
        tensors = {f"{s}.{kind}": t for s, two in splits.items() for kind, t in zip(("x", "y"), two, strict=True)}
        save_file(tensors, work / "data.safetensors")
        told["images"] = {key: getattr(data, key) for key in ("name", "num_classes", "mean", "std", "augment")}
    else:
        told["folder"] = {
            "root": str(Path(data.root).absolute()), "crop": asdict(data.crop), "mean": data.mean, "std": data.std,
            "validation_share": data.validation_share, "seed": data.seed, "limit": data.limit,
            "workers": max(1, min(8, cores() // processes)) if data.workers is None else data.workers,
        }  # fmt: skip
    with atomic(work / "told.json") as part:
        part.write_text(json.dumps(told, indent=1) + "\n")


def _start(work: Path, processes: int, verbose: bool) -> None:
    """torchrun, its words passed on as they come."""
    threads = max(1, torch.get_num_threads() // processes)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}",
        "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "linl.worker", str(work),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=200)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            for line in run.stdout:
                last.append(line)
                if verbose and line.startswith(("epoch", "resumed")):
                    print(line, end="", flush=True)
        except BaseException:  # an interrupt in a notebook ends them as well
            run.terminate()
            raise
    if run.returncode:
        raise WorkerError(_last_words(list(last)))


def _last_words(lines: list[str]) -> str:
    """The signal that killed a process, or the error that one raised; torchrun's own report says less.

    A kill comes first: the others then fail for want of their peer. (torchrun ends those with SIGTERM.)
    """
    words = [line.split("]:", 1)[-1].strip() if line.startswith("[rank") else line.strip() for line in lines]
    named = [w for w in words if w.split(":")[0].endswith(("Error", "Exception")) and "ChildFailedError" not in w]
    killed = [w for w in words if re.search(r"Signal (?!15\b)\d+ \(SIG", w)]
    codes = [w for w in words if "exitcode" in w]
    return (killed or named or codes or words or ["a process ended without a word"])[0]


def built(made_by: dict) -> nn.Module:
    """A network by what it says of itself, with any weights."""
    made = dict(made_by)
    unit = made.pop("linearize", None)
    with torch.random.fork_rng(devices=[]):
        net = create(**made)
    return linearize(net, **unit) if unit else net

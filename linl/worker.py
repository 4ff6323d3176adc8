"""One of the processes that train together: `torchrun … -m linl.worker FOLDER`, a folder of `linl.distributed`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from linl import train
from linl.crops import Crop
from linl.devices import pick_device
from linl.distributed import built
from linl.images import Images
from linl.pictures import ImageFolderData
from linl.recipes import Recipe


def main(work: Path) -> None:
    """What every process does: meet the others, build, train."""
    told = json.loads((work / "told.json").read_text())
    how = told["how"]
    where = pick_device(how["device"])
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
        how["device"] = str(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        settings = Recipe(**told["settings"])
        train.fit(_network(told, work), _data(told, work), settings, **how)
    finally:
        dist.destroy_process_group()


def _network(told: dict, work: Path) -> nn.Module:
    from safetensors.torch import load_file

    net = built(told["made_by"])
    net.load_state_dict(load_file(work / "start.safetensors"))
    return net


def _data(told: dict, work: Path) -> Images | ImageFolderData:
    from safetensors.torch import load_file

    if "folder" in told:
        folder = told["folder"]
        tuples = {key: tuple(folder[key]) for key in ("mean", "std")}
        return ImageFolderData(**{**folder, **tuples, "root": Path(folder["root"]), "crop": Crop(**folder["crop"])})
    tensors, rest = load_file(work / "data.safetensors"), told["images"]
    splits = {split: (tensors[f"{split}.x"], tensors[f"{split}.y"]) for split in ("train", "validation", "test")}
    tuples = {key: tuple(rest[key]) for key in ("mean", "std", "augment")}
    return Images(rest["name"], **splits, num_classes=rest["num_classes"], **tuples)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

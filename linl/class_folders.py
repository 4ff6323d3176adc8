"""A data set of small pictures as a folder for each class, as many mirrors hand on CIFAR-10 and CIFAR-100.

`cifar100/train/<class>/*.png` and `cifar100/test/<class>/*.png` below a data folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from linl.pictures import decoded
from linl.sources import DataError

SHAPES = {"cifar10": (5000, 1000, 32), "cifar100": (500, 100, 32)}
"""What a data set consists of: training pictures a class, test pictures a class, pixels a side."""


def read(name: str, folder: Path, num_classes: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """All of a data set: for training and for the test, (N, 3, side, side) uint8 and (N,) labels.

    Labels number the classes by name, as CIFAR's own do. The order is a fixed mixture of the classes; it isn't that of
    CIFAR's own files, so a validation split of one seed holds other pictures than there.

    Args:
        name: a name in `SHAPES`; of any other there is nothing to find.
        folder: the data folder, which holds one of that name.

    Returns: None where there is no such folder.

    Raises:
        DataError: classes or pictures are missing, or one can't be read.
    """
    root = folder / name
    if name not in SHAPES or not (root / "train").is_dir():
        return None
    train, test, side = SHAPES[name]
    return _split(root / "train", num_classes, train, side), _split(root / "test", num_classes, test, side)


def _split(root: Path, num_classes: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(classes) != num_classes:
        raise DataError(
            f"{root} has {len(classes)} folders, one is due for each of {num_classes} classes. Unpack it anew."
        )
    files = []
    for name in classes:
        files += (found := sorted((root / name).glob("*.png")))
        if len(found) != count:
            raise DataError(f"{root / name} has {len(found)} pictures (*.png) of {count}. Unpack it anew.")
    images = torch.stack([_picture(file, side) for file in files])
    labels = torch.arange(num_classes).repeat_interleave(count)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def _picture(file: Path, side: int) -> Tensor:
    pixels = decoded(file)
    if pixels.shape[1:] != (side, side):
        size = f"{pixels.shape[2]}×{pixels.shape[1]}"
        raise DataError(f"{file} is {size} pixels, not {side}×{side}: it isn't the original.")
    return pixels

"""Datasets by name: small ones as tensors (`Images`), large ones as folders of pictures (`ImageFolderData`).

Both answer `batches`. What torchvision can fetch is downloaded to a data folder, checksums and all.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linl import class_folders
from linl.crops import Crop, sized
from linl.files import first_line
from linl.images import Images, mixed_seed, normalized  # noqa: F401 - offered here too
from linl.pictures import ImageFolderData
from linl.sources import (
    NORMALIZATIONS,
    PROJECT,  # noqa: F401 - offered here too
    SOURCES,
    DataError,
    Source,
    find_file,  # noqa: F401 - offered here too
    find_weights,  # noqa: F401 - offered here too
    folders,
    in_checkout,  # noqa: F401 - offered here too
)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    validation: float = 0.1,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    normalize: str | None = None,
    download: bool = True,
    workers: int | None = None,
    crop: Crop | None = None,
    apart: str = "",
):
    """A data set by name.

    Args:
        name: one of `SOURCES`; "imagefolder:PATH" (a path, or a folder below a data folder) or "imagefolder"
            (the data folder's `imagenet/`) for a folder with `train/<class>/` and `val/<class>/`.
        root: where to look instead of LINL_DATA and `data/`.
        validation: share of the training images set aside, by `seed`; 0 for none.
        size: height and width to enlarge to (digits and MNIST for convolutional networks: 32); for an
            ImageFolder the side of a crop, 224 when None.
        channels: 3 repeats a grey image.
        limit: at most that many images a split, for trial runs.
        normalize: a name in `NORMALIZATIONS`, for published weights; None for the data set's own.
        download: fetch what is missing, where torchvision can.
        workers: decoding processes of an ImageFolder.
        crop: how an ImageFolder's pictures are resized, as `linl.crops.standard(network)`; None: `size` pixels from
            8/7 as many, bilinear. Where both are given, a `size` other than the crop's takes the crop's proportions.
        apart: pictures of an ImageFolder's `train/` whose names begin so are kept out of training and validation, and
            are a split of their own, "apart": those that weights to start from haven't been trained on, for example.

    Returns: `Images`, or `ImageFolderData` with the same `batches`.

    Raises:
        ValueError: an unknown name, a share outside [0, 1), or `apart` for another data set than a folder of pictures.
        DataError: missing or corrupt data, or no picture to keep apart.
    """
    kind, _, path = name.partition(":")
    if kind not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SOURCES)} (imagefolder:PATH for your own)")
    if path and kind != "imagefolder":
        raise ValueError(f"unknown data set {name!r}: only imagefolder takes a path, {kind} is found through LINL_DATA")
    if not 0 <= validation < 1:
        raise ValueError(f"validation = {validation}: a share of the training images, at least 0 and below 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: at least 1 image, or None for all")
    if size is not None and size < 1:
        raise ValueError(f"size = {size}: at least 1 pixel, or None to leave images as they are")
    if channels is not None and channels < 1:
        raise ValueError(f"channels = {channels}: at least 1, or None for the data set's own")
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalize!r}: choose from {', '.join(NORMALIZATIONS)}, or None")
    source = SOURCES[kind]
    if normalize is not None:
        source = replace(source, mean=NORMALIZATIONS[normalize][0], std=NORMALIZATIONS[normalize][1])
    if source.loader == "imagefolder":
        return ImageFolderData.find(
            _of_pictures(path, root), source, sized(crop, size), validation, seed, limit, workers, apart
        )
    if apart:
        raise ValueError(f"apart = {apart!r}: names of pictures in a folder; {kind} is no folder of pictures")
    train, test = _digits() if source.loader == "digits" else _small(kind, source, root, download)
    train, validating = _split(train, validation, seed)
    splits = [tuple(t[:limit] for t in split) for split in (train, validating, test)]
    splits = [(_enlarged(images, size, channels), labels) for images, labels in splits]
    count = splits[0][0].shape[1]
    mean, std = ((source.mean * 3)[:count], (source.std * 3)[:count])
    return Images(kind, *splits, source.num_classes, mean, std, source.augment)


def pictures_listed(name: str, root: str | Path | None = None) -> str:
    """Eight digits of a folder of pictures: of its classes' names, how many each has, and the size of the first.

    Args:
        name, root: as in `load`.

    Returns: "" for another data set, or where there is no such folder.
    """
    kind, _, path = name.partition(":")
    found = [] if kind != "imagefolder" else [f for f in _of_pictures(path, root) if (f / "train").is_dir()]
    if not found:
        return ""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    told = []
    for folder in sorted(path for path in (found[0] / "train").iterdir() if path.is_dir()):
        files = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMG_EXTENSIONS))
        first = folder / files[0] if files else folder
        told += [f"{folder.name} {len(files)} {first.stat().st_size if first.is_file() else 0}"] if files else []
    return f"{zlib.crc32(' '.join(told).encode()):08x}"


def _of_pictures(path: str, root: str | Path | None) -> list[Path]:
    """Where a folder of pictures may be."""
    own = Path(path).expanduser()
    below = [] if own.is_absolute() else [folder / (path or "imagenet") for folder in folders(root)]
    return [*([own] if path else []), *below]


def _split(train: tuple[Tensor, Tensor], share: float, seed: int):
    images, labels = train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = round(len(labels) * share)
    keep, aside = order[count:].sort().values, order[:count].sort().values
    return (images[keep], labels[keep]), (images[aside], labels[aside])


def _enlarged(images: Tensor, size: int | None, channels: int | None) -> Tensor:
    if size and images.shape[-1] != size and len(images):
        small = images.float()
        images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
        images = images.round_().clamp_(0, 255).to(torch.uint8)
    elif size and images.shape[-1] != size:
        images = images.new_zeros(0, images.shape[1], size, size)
    if channels and images.shape[1] != channels:
        if images.shape[1] != 1:
            raise ValueError(f"channels = {channels}: these images have {images.shape[1]}; only one can be repeated")
        images = images.expand(-1, channels, -1, -1).contiguous()
    return images


def _digits():
    """scikit-learn's 1,797 real handwritten digits, 8×8: 1,437 for training, 360 for the test."""
    table = torch.from_numpy(_digits_table())
    images = table[:, :64].float().mul_(255 / 16).round_().to(torch.uint8).view(-1, 1, 8, 8)
    labels = table[:, 64].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def _digits_table() -> np.ndarray:
    """(1797, 65) uint8: 64 pixels from 0 to 16, and the label. From scikit-learn's file, since importing its reader
    takes a second, which every run on the digits would pay; by its reader where the file lies elsewhere."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    file = Path(package, "datasets", "data", "digits.csv.gz")
    if file.is_file():
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.uint8)


def _small(name: str, source: Source, root: str | Path | None, download: bool):
    """In torchvision's layout, or else as a folder for each class, or else downloaded."""
    import torchvision.datasets as tv

    make = getattr(tv, source.loader)
    looked, damaged = folders(root), []
    for folder in looked:
        if not folder.is_dir():
            continue
        try:
            return tuple(_tensors(make(folder, train=train, download=False)) for train in (True, False))
        except RuntimeError:  # torchvision's word for both missing and corrupt
            if _present(source.loader, folder):
                damaged.append(folder)
        except (EOFError, OSError, ValueError) as error:
            raise DataError(
                f"{source.loader} under {folder} is corrupt ({error}). Delete it there and run again: "
                "it is downloaded anew."
            ) from error
    if damaged:
        raise DataError(
            f"{source.loader} under {damaged[0]} is incomplete or corrupt: its checksums don't match. "
            "Delete it there and run again: it is downloaded anew."
        )
    for folder in looked:
        if found := class_folders.read(name, folder, source.num_classes):
            return found
    told = ", ".join(str(folder) for folder in looked)
    also = f", or {name}/train/<class>/*.png and {name}/test/" if name in class_folders.SHAPES else ""
    how = f"set LINL_DATA to a folder that holds it, or put it under {looked[-1]} (torchvision's layout{also})"
    if not download:
        raise DataError(f"{source.loader} not found; looked in {told}. To get it: {how}.")
    target = next((f for f in looked if os.access(f if f.exists() else f.parent, os.W_OK)), looked[-1])
    print(f"downloading {source.loader} ({source.download / 1e6:.0f} MB) to {target}", flush=True)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return tuple(_tensors(make(target, train=train, download=True)) for train in (True, False))
    except Exception as error:
        why = first_line(error)
        raise DataError(
            f"{source.loader} not found (looked in {told}) nor downloaded ({why}). Instead: {how}."
        ) from error


def _present(loader: str, folder: Path) -> bool:
    """Whether some of the data set is there."""
    inside = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}.get(loader, f"{loader}/raw")
    return (folder / inside).is_dir() and any((folder / inside).iterdir())


def _tensors(dataset) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(dataset.targets).long()

"""Which data sets there are, what is known of each before it is loaded, and where files are looked for.

Looked for: the folder named by the environment variable LINL_DATA, then `data/` under the current folder and the
project's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def in_checkout() -> bool:
    """Whether linl runs from a checkout of the project; else it is installed without notebooks, profiles, records."""
    return (PROJECT / "pyproject.toml").is_file()


class DataError(RuntimeError):
    """Data that is missing or corrupt: what, where it was looked for, how to get it."""


@dataclass(frozen=True)
class Source:
    """What is known of a data set before it is loaded.

    Attributes:
        mean, std: of each channel, pixels in [0, 1].
        augment: what training does to a batch: "crop" (pad 4, random crop), "flip" (left-right).
        download: about how many bytes a download takes; 0 where there is none.
    """

    loader: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int | None
    augment: tuple[str, ...] = ()
    download: int = 0


SOURCES: dict[str, Source] = {
    "digits": Source("digits", (0.3053,), (0.3760,), 10),
    "mnist": Source("MNIST", (0.1307,), (0.3081,), 10, (), 12_000_000),
    "fashion_mnist": Source("FashionMNIST", (0.2860,), (0.3530,), 10, ("flip",), 31_000_000),
    # the figures LiNLNet's code uses
    "cifar10": Source("CIFAR10", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), 10, ("crop", "flip"), 170_000_000),
    "cifar100": Source("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 100, ("crop", "flip"), 169_000_000),  # noqa: E501
    "imagefolder": Source("imagefolder", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None, ("resized-crop", "flip")),
}  # fmt: skip


NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's weights, and Layer Folding's
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # TensorFlow's weights: pixels to [-1, 1]
    "none": ((0.0,), (1.0,)),  # pixels from 0 to 1 as they are: the domain of the ReLU-stability papers
}
"""Mean and standard deviation that published weights were trained with, instead of the data set's own."""


def folders(root: str | Path | None = None) -> list[Path]:
    """Where data is looked for, in order."""
    if root:
        return [Path(root).expanduser()]
    found = [Path(os.environ["LINL_DATA"]).expanduser()] if os.environ.get("LINL_DATA") else []
    found.append(Path("data").resolve())
    if in_checkout() and PROJECT / "data" not in found:
        found.append(PROJECT / "data")
    return found


def find_file(name: str) -> Path:
    """A file below one of the data folders, as "weights/cifar10/….th".

    Raises:
        ValueError: an absolute path: records hold no paths of anyone's machine.
        DataError: no data folder has it.
    """
    told = ", ".join(map(str, folders()))
    if Path(name).expanduser().is_absolute():
        raise ValueError(f"{name!r}: name it below a data folder ({told}); records hold no paths of yours")
    found = next((folder / name for folder in folders() if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"no file {name} in {told}: put it there, or set LINL_DATA")
    return found


def find_weights(name: str) -> Path | str | None:
    """What `linl.models.create` takes as `pretrained`.

    Args:
        name: "" for None, "imagenet" as it is, or a file's name below a data folder.

    Raises:
        ValueError, DataError: as `find_file`.
    """
    if name in ("", "imagenet"):
        return name or None
    return find_file(name)

"""Datasets as tensors: small ones live on the device as uint8 and are augmented in whole batches there.

No loader processes: cropping, flipping and normalizing 128 CIFAR images as one tensor costs a few
milliseconds. ImageNet-sized data (`imagefolder`) is decoded by a DataLoader's workers instead; both
kinds answer `batches`.

Where data is looked for: the folder named by the environment variable LINL_DATA, then `data/` under
the current folder and the project's. What torchvision can fetch is downloaded there, checksums and all.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PROJECT = Path(__file__).resolve().parent.parent


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
    if (PROJECT / "pyproject.toml").is_file() and PROJECT / "data" not in found:
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


# --- small data sets: tensors ----------------------------------------------------------------------


@dataclass
class Images:
    """A data set as tensors on one device.

    Attributes:
        name: as in `SOURCES`.
        train, validation, test: (images uint8 (N, C, H, W), labels int64 (N,)).
        input_size: (C, H, W) of what a batch holds.
        num_classes: number of labels.
        mean, std: (C,) for normalization.
        augment: what training does to a batch.
    """

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.input_size = tuple(self.train[0].shape[1:])

    def size(self, split: str) -> int:
        """Number of images in "train", "validation" or "test"."""
        return len(getattr(self, split)[1])

    def fingerprint(self) -> str:
        """Short text that differs for different training data, or another normalization."""
        images, labels = (t.cpu() for t in self.train)
        pixels = images[:: max(1, len(labels) // 100)]
        digest = zlib.crc32(labels.numpy().tobytes() + pixels.contiguous().numpy().tobytes())
        scale = zlib.crc32(repr((self.mean, self.std)).encode())
        return f"{self.name} {len(labels)}x{self.input_size} {digest:08x} {scale:08x}"

    def to(self, device: str | torch.device) -> Images:
        """The same data on another device."""
        moved = {split: tuple(t.to(device) for t in getattr(self, split)) for split in ("train", "validation", "test")}
        return Images(self.name, **moved, num_classes=self.num_classes, mean=self.mean, std=self.std,
                      augment=self.augment)  # fmt: skip

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32, (pixel/255 − mean)/std."""
        return normalized(images, self.mean, self.std)

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (normalized float32 images (B, C, H, W), labels (B,)).

        With a seed: shuffled and augmented, the last short batch dropped; order and augmentation follow
        from (seed, epoch) alone, so a resumed run sees what an uninterrupted one sees. Without: in
        order, whole, untouched.
        """
        images, labels = getattr(self, split)
        if seed is None:
            for start in range(0, len(labels), batch_size):
                yield self.normalize(images[start : start + batch_size]), labels[start : start + batch_size]
            return
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
        order = torch.randperm(len(labels), generator=generator)
        batch_size = min(batch_size, len(labels))
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            index = order[start : start + batch_size].to(images.device)
            batch = images[index]
            if "crop" in self.augment:
                batch = random_crop(batch, 4, generator)
            if "flip" in self.augment:
                batch = random_flip(batch, generator)
            yield self.normalize(batch), labels[index]


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) to float32, (pixel/255 − mean)/std for each channel."""
    mean, std = (torch.tensor(t, device=images.device).view(-1, 1, 1) for t in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in.

    One gather for the whole batch: (B, C, H, W) to (B, C, H, W).
    """
    b, c, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    dy, dx = (torch.randint(0, 2 * padding + 1, (2, b), generator=generator)).to(images.device)
    rows = (dy[:, None] + torch.arange(h, device=images.device))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(w, device=images.device))[:, None, None, :]
    which = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[None, :, None, None]
    return padded[which, channel, rows, columns]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left-right with probability one half."""
    flip = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers (seed, epoch, index), different for each combination met in practice."""
    mixed = 12345
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return mixed


# --- large data sets: folders of pictures ---------------------------------------------------------


@dataclass
class ImageFolderData:
    """`train/<class>/*`, `val/<class>/*`: random resized crops for training, resize and centre crop to test.

    The test split is `val/` (ImageNet's public labels); "validation" is a share of `train/`.
    """

    root: Path
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_share: float
    seed: int
    limit: int | None = None
    workers: int | None = None
    device: str | torch.device = "cpu"
    name: str = "imagefolder"
    num_classes: int = field(init=False)
    input_size: tuple[int, int, int] = field(init=False)

    @classmethod
    def find(cls, folders: list[Path], source: Source, crop, validation, seed, limit, workers) -> ImageFolderData:
        """The first of the folders that holds `train/` and `val/`.

        Raises:
            DataError: none does.
        """
        for folder in folders:
            if (folder / "train").is_dir() and (folder / "val").is_dir():
                return cls(folder, crop, source.mean, source.std, validation, seed, limit, workers)
        raise DataError(
            f"no folder of pictures: looked for train/<class>/ and val/<class>/ in {', '.join(map(str, folders))}. "
            "ImageNet can't be downloaded freely: put it there, set LINL_DATA, or name it: imagefolder:PATH."
        )

    def __post_init__(self) -> None:
        from torchvision.datasets import ImageFolder

        self.input_size = (3, self.crop, self.crop)
        try:
            self._train, self._test = ImageFolder(self.root / "train"), ImageFolder(self.root / "val")
        except FileNotFoundError as error:
            raise DataError(f"{self.root} holds no pictures: {error}") from error
        if self._train.classes != self._test.classes:
            odd = sorted(set(self._train.classes) ^ set(self._test.classes))
            raise DataError(f"{self.root}: classes differ between train/ and val/, e.g. {', '.join(odd[:3])}")
        self.num_classes = len(self._train.classes)
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = round(len(order) * self.validation_share)
        self._index = {
            "train": sorted(order[count:]),
            "validation": sorted(order[:count]),
            "test": list(range(len(self._test))),
        }
        if self.limit:  # a spread over all classes, since files are ordered by class
            for split, index in self._index.items():
                count = min(self.limit, len(index))
                self._index[split] = [index[i * len(index) // count] for i in range(count)]

    def size(self, split: str) -> int:
        """Number of images in "train", "validation" or "test"."""
        return len(self._index[split])

    def fingerprint(self) -> str:
        """Short text that differs for different training data, or another normalization."""
        files = " ".join(Path(path).name for path, _ in self._train.samples) + repr((self.mean, self.std))
        return f"{self.name} {self.size('train')}x{self.input_size} {zlib.crc32(files.encode()):08x}"

    def to(self, device: str | torch.device) -> ImageFolderData:
        """The same data, its batches arriving on another device."""
        self.device = device
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32, (pixel/255 − mean)/std."""
        return normalized(images, self.mean, self.std)

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`; crops and flips follow from (seed, epoch) whatever the number of workers."""
        from torchvision.transforms import v2

        training = seed is not None
        steps = (
            [v2.RandomResizedCrop(self.crop, antialias=True), v2.RandomHorizontalFlip()]
            if training
            else [v2.Resize(round(self.crop / 0.875), antialias=True), v2.CenterCrop(self.crop)]
        )
        transform = v2.Compose([v2.PILToTensor(), *steps])
        base = self._test if split == "test" else self._train
        workers = min(8, os.cpu_count() or 1) if self.workers is None else self.workers
        generator = torch.Generator().manual_seed(mixed_seed(seed or 0, epoch))
        loader = torch.utils.data.DataLoader(
            _Pictures(base, self._index[split], transform, mixed_seed(seed or 0, epoch)),
            batch_size=min(batch_size, self.size(split)),
            shuffle=training,
            drop_last=training,
            num_workers=workers,
            generator=generator,
            pin_memory=torch.device(self.device).type == "cuda",
        )
        for images, labels in loader:
            yield self.normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


class _Pictures(torch.utils.data.Dataset):
    """Some pictures of a folder, each cropped and flipped by a seed of its own."""

    def __init__(self, base, index: list[int], transform, seed: int) -> None:
        self.base, self.index, self.transform, self.seed = base, index, transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int):
        path, label = self.base.samples[self.index[i]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, self.index[i]))
            return self.transform(self.base.loader(path)), label


# --- loading ---------------------------------------------------------------------------------------


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

    Returns: `Images`, or `ImageFolderData` with the same `batches`.

    Raises:
        ValueError: an unknown name or a share outside [0, 1).
        DataError: missing or corrupt data.
    """
    kind, _, path = name.partition(":")
    if kind not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(SOURCES)} (imagefolder:PATH for your own)")
    if not 0 <= validation < 1:
        raise ValueError(f"validation = {validation}: a share of the training images, at least 0 and below 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: at least 1 image, or None for all")
    if size is not None and size < 1:
        raise ValueError(f"size = {size}: at least 1 pixel, or None to leave images as they are")
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalize!r}: choose from {', '.join(NORMALIZATIONS)}, or None")
    source = SOURCES[kind]
    if normalize is not None:
        source = replace(source, mean=NORMALIZATIONS[normalize][0], std=NORMALIZATIONS[normalize][1])
    if source.loader == "imagefolder":
        own = Path(path).expanduser()
        below = [] if own.is_absolute() else [folder / (path or "imagenet") for folder in folders(root)]
        where = [*([own] if path else []), *below]
        return ImageFolderData.find(where, source, size or 224, validation, seed, limit, workers)
    train, test = _digits() if source.loader == "digits" else _torchvision(source, root, download)
    train, validating = _split(train, validation, seed)
    splits = [tuple(t[:limit] for t in split) for split in (train, validating, test)]
    splits = [(_enlarged(images, size, channels), labels) for images, labels in splits]
    count = splits[0][0].shape[1]
    mean, std = ((source.mean * 3)[:count], (source.std * 3)[:count])
    return Images(kind, *splits, source.num_classes, mean, std, source.augment)


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
        images = images.expand(-1, channels, -1, -1).contiguous()
    return images


def _digits():
    """scikit-learn's 1,797 real handwritten digits, 8×8: 1,437 for training, 360 for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().mul_(255 / 16).round_().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def _torchvision(source: Source, root: str | Path | None, download: bool):
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
    told = ", ".join(str(folder) for folder in looked)
    how = f"set LINL_DATA to a folder that holds it, or put it under {looked[-1]} (torchvision's layout)"
    if not download:
        raise DataError(f"{source.loader} not found; looked in {told}. To get it: {how}.")
    target = next((f for f in looked if os.access(f if f.exists() else f.parent, os.W_OK)), looked[-1])
    print(f"downloading {source.loader} ({source.download / 1e6:.0f} MB) to {target}", flush=True)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return tuple(_tensors(make(target, train=train, download=True)) for train in (True, False))
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else repr(error)
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

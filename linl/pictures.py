"""A folder of pictures as a data set, ImageNet-sized: decoded by a DataLoader's workers while the network trains.

It answers `batches` as `linl.images.Images` does.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from linl.images import Share, mixed_seed, normalized
from linl.sources import DataError, Source


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
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0, share: Share = None
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
            batch_sampler=_shares(self.size(split), batch_size, generator if training else None, share),
            num_workers=workers,
            pin_memory=torch.device(self.device).type == "cuda",
        )
        for images, labels in loader:
            yield self.normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def _shares(count: int, batch_size: int, generator: torch.Generator | None, share: Share) -> list[list[int]]:
    """A share of every batch, as numbers of pictures: shuffled and without a short last one, or in order and whole."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    batches = order.split(min(batch_size, count))
    if generator is not None and len(batches[-1]) < len(batches[0]):
        batches = batches[:-1]
    part = slice(share[0], None, share[1]) if share else slice(None)
    return [mine for batch in batches if (mine := batch[part].tolist())]


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

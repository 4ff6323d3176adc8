"""A folder of pictures as a data set, ImageNet-sized: decoded by a DataLoader's workers while the network trains.

It answers `batches` as `linl.images.Images` does.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from linl.crops import Crop
from linl.devices import cores
from linl.images import Share, mixed_seed, normalized
from linl.sources import DataError, Source


@dataclass
class ImageFolderData:
    """`train/<class>/*`, `val/<class>/*`: random resized crops for training, resize and centre crop to test.

    The test split is `val/` (ImageNet's public labels); "validation" is a share of `train/`. Pictures there whose names
    begin with `apart` are in neither, but in a split "apart". Workers decode, crop and resize in uint8; the rest is
    done on the device.
    """

    root: Path
    crop: Crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_share: float
    seed: int
    limit: int | None = None
    workers: int | None = None
    apart: str = ""
    device: str | torch.device = "cpu"
    name: str = "imagefolder"
    num_classes: int = field(init=False)
    input_size: tuple[int, int, int] = field(init=False)

    @classmethod
    def find(
        cls, folders: list[Path], source: Source, crop, validation, seed, limit, workers, apart=""
    ) -> ImageFolderData:
        """The first of the folders that holds `train/` and `val/`.

        Raises:
            DataError: none does.
        """
        for folder in folders:
            if (folder / "train").is_dir() and (folder / "val").is_dir():
                return cls(folder, crop, source.mean, source.std, validation, seed, limit, workers, apart)
        raise DataError(
            f"no folder of pictures: looked for train/<class>/ and val/<class>/ in {', '.join(map(str, folders))}. "
            "ImageNet can't be downloaded freely: put it there, set LINL_DATA, or name it: imagefolder:PATH."
        )

    def __post_init__(self) -> None:
        from torchvision.datasets import ImageFolder

        self.input_size = (3, self.crop.size, self.crop.size)
        try:
            self._train, self._test = ImageFolder(self.root / "train"), ImageFolder(self.root / "val")
        except FileNotFoundError as error:
            raise DataError(f"{self.root} holds no pictures: {error}") from error
        if self._train.classes != self._test.classes:
            odd = sorted(set(self._train.classes) ^ set(self._test.classes))
            raise DataError(f"{self.root}: classes differ between train/ and val/, e.g. {', '.join(odd[:3])}")
        self.num_classes = len(self._train.classes)
        names = [Path(path).name for path, _ in self._train.samples]
        apart = [i for i, name in enumerate(names) if self.apart and name.startswith(self.apart)]
        if self.apart and not apart:
            raise DataError(f"{self.root}/train: no picture's name begins with {self.apart!r}, so none is kept apart")
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        left_out = {*apart}
        order = [i for i in order if i not in left_out]
        count = round(len(order) * self.validation_share)
        self._index = {
            "train": sorted(order[count:]),
            "validation": sorted(order[:count]),
            "test": list(range(len(self._test))),
            "apart": apart,
        }
        if self.limit:  # a spread over all classes, since files are ordered by class
            for split, index in self._index.items():
                count = min(self.limit, len(index))
                self._index[split] = [index[i * len(index) // count] for i in range(count)]

    def size(self, split: str) -> int:
        """Number of images in "train", "validation", "test" or "apart"."""
        return len(self._index[split])

    def files(self, split: str | None = None) -> list[Path]:
        """The pictures of a split in the order of its unshuffled batches; None: all of `train/`, by class."""
        if split is None:
            return [Path(path) for path, _ in self._train.samples]
        samples = self._samples(split)
        return [Path(samples[i][0]) for i in self._index[split]]

    def _samples(self, split: str) -> list[tuple[str, int]]:
        """The folder's pictures, with their labels, that a split is taken from."""
        return (self._test if split == "test" else self._train).samples

    def fingerprint(self) -> str:
        """Short text that differs for different training data, or another normalization."""
        samples = [self._train.samples[i] for i in self._index["train"]]
        told = [f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in samples]
        told += [str(Path(path).stat().st_size) for path, _ in samples[:: max(1, len(samples) // 100)]]
        told += [repr((self.mean, self.std)), self.crop.interpolation]
        if self.crop.least != Crop.least:
            told += [repr(self.crop.least)]
        return f"{self.name} {len(samples)}x{self.input_size} {zlib.crc32(' '.join(told).encode()):08x}"

    def to(self, device: str | torch.device) -> ImageFolderData:
        """The same data, its batches arriving on another device."""
        moved = copy(self)
        moved.device = device
        return moved

    def augmented(self, names: Sequence[str]) -> NoReturn:
        """There are no other distortions than its own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{' '.join(names)}: distortions of data sets held as tensors; pictures are cropped and flipped"
        )

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32, (pixel/255 − mean)/std."""
        return normalized(images, self.mean, self.std)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        share: Share = None,
        first: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`; crops and flips follow from (seed, epoch) whatever the number of workers.

        Raises:
            DataError: a picture that can't be read, by its name.
        """
        training = seed is not None
        own = mixed_seed(seed or 0, epoch)
        generator = torch.Generator().manual_seed(own)
        batches = _shares(self.size(split), batch_size, generator if training else None, share)
        loader = torch.utils.data.DataLoader(
            _Pictures(self._samples(split), self._index[split], _transform(self.crop, training), own),
            batch_sampler=batches[first:] if training else batches,
            num_workers=min(8, cores()) if self.workers is None else self.workers,
            generator=generator,  # else it draws from the training's own chance, once more when that is taken up again
            pin_memory=torch.device(self.device).type == "cuda",
        )
        for images, labels in _plainly(loader):
            yield self.normalize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def _plainly(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader's batches; a worker's error in its own words, without the worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        said = str(error).strip().splitlines()[-1]
        raise DataError(said.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from None


def _transform(crop: Crop, training: bool):
    """uint8 (3, height, width) to uint8 (3, size, size)."""
    from torchvision.transforms import InterpolationMode, v2

    how = {"interpolation": InterpolationMode(crop.interpolation), "antialias": True}
    if training:
        part = v2.RandomResizedCrop(crop.size, scale=(crop.least, 1.0), **how)
        return v2.Compose([part, v2.RandomHorizontalFlip()])
    return v2.Compose([v2.Resize(crop.shorter, **how), v2.CenterCrop(crop.size)])


def _shares(count: int, batch_size: int, generator: torch.Generator | None, share: Share) -> list[list[int]]:
    """A share of every batch, as numbers of pictures: shuffled and without a short last one, or in order and whole."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    batches = order.split(min(batch_size, count))
    if generator is not None and len(batches[-1]) < len(batches[0]):
        batches = batches[:-1]
    part = slice(share[0], None, share[1]) if share else slice(None)
    return [mine for batch in batches if (mine := batch[part].tolist())]


class _Pictures(torch.utils.data.Dataset):
    """Some pictures of a folder, each cropped and flipped by a seed of its own.

    Names and labels are arrays: of Python objects, each worker's counting of references would make a copy.
    """

    def __init__(self, samples: list[tuple[str, int]], index: list[int], transform, seed: int) -> None:
        self.paths = np.array([os.fsencode(samples[i][0]) for i in index], dtype=bytes)
        self.labels = np.array([samples[i][1] for i in index])
        self.index, self.transform, self.seed = np.array(index), transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int):
        picture = decoded(Path(os.fsdecode(self.paths[i])))
        if torch.utils.data.get_worker_info() is None:  # in the process that trains: its own chance stays as it is
            with torch.random.fork_rng(devices=[]):
                return self._seen(picture, i)
        return self._seen(picture, i)

    def _seen(self, picture: Tensor, i: int):
        torch.default_generator.manual_seed(mixed_seed(self.seed, int(self.index[i])))  # not the GPUs' as well
        return self.transform(picture), int(self.labels[i])


def decoded(path: Path) -> Tensor:
    """A picture's pixels, uint8 (3, height, width).

    torchvision decodes what it can (1.5 times as fast as Pillow, and without its copies), Pillow the rest: odd colour
    spaces, other formats.

    Raises:
        DataError: neither can.
    """
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        pixels = decode_image(read_file(str(path)), ImageReadMode.RGB)
        if pixels.ndim == 3 and pixels.dtype == torch.uint8:
            return pixels
    except RuntimeError:
        pass
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as a picture ({error}): mend it, or take it out of the folder") from None

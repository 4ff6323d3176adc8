"""A data set as tensors on the device: uint8 there, cropped, flipped and normalized in whole batches.

No loader processes: cropping, flipping and normalizing 128 CIFAR images as one tensor costs a few milliseconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linl.distortions import distorted

Share = tuple[int, int] | None
"""(i, n): the i-th of n parts, from 0; None for the whole."""


@dataclass
class Images:
    """A data set as tensors on one device.

    Attributes:
        name: as in `SOURCES`.
        train, validation, test: (images uint8 (N, C, H, W), labels int64 (N,)).
        input_size: (C, H, W) of what a batch holds.
        num_classes: number of labels.
        mean, std: (C,) for normalization.
        augment: what training does to a batch, of `linl.distortions.DISTORTIONS`.
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
        """Short text that differs for different training data, another normalization or other distortions."""
        images, labels = (t.cpu() for t in self.train)
        pixels = images[:: max(1, len(labels) // 100)]
        digest = zlib.crc32(labels.numpy().tobytes() + pixels.contiguous().numpy().tobytes())
        scale = zlib.crc32(repr((self.mean, self.std, *([self.augment] if self.augment else []))).encode())
        return f"{self.name} {len(labels)}x{self.input_size} {digest:08x} {scale:08x}"

    def to(self, device: str | torch.device) -> Images:
        """The same data on another device."""
        moved = {split: tuple(t.to(device) for t in getattr(self, split)) for split in ("train", "validation", "test")}
        return Images(self.name, **moved, num_classes=self.num_classes, mean=self.mean, std=self.std,
                      augment=self.augment)  # fmt: skip

    def augmented(self, names: Sequence[str]) -> Images:
        """The same data with other distortions while training."""
        made = copy(self)
        made.augment = tuple(names)
        return made

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
        """Batches of (normalized float32 images (B, C, H, W), labels (B,)).

        With a seed: shuffled and augmented, the last short batch dropped; order and augmentation follow
        from (seed, epoch) alone, so a resumed run sees what an uninterrupted one sees. Without: in
        order, whole, untouched. With a share (i, n): of every batch the i-th of n parts alone, as every n-th image,
        cropped and flipped as in the whole. `first`: with a seed, the number of the first batch that is wanted.
        """
        images, labels = getattr(self, split)
        part = slice(share[0], None, share[1]) if share else slice(None)
        if seed is None:
            for start in range(0, len(labels), batch_size):
                mine = slice(start, start + batch_size)
                if len(labels[mine][part]):
                    yield self.normalize(images[mine][part]), labels[mine][part]
            return
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
        order = torch.randperm(len(labels), generator=generator)
        batch_size = min(batch_size, len(labels))
        for number, start in enumerate(range(0, len(labels) - batch_size + 1, batch_size)):
            index = order[start : start + batch_size].to(images.device)
            batch = distorted(images[index], self.augment, generator)
            if number >= first:  # what comes before has drawn its chance all the same
                yield self.normalize(batch[part]), labels[index[part]]


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) to float32, (pixel/255 − mean)/std for each channel."""
    mean, std = (torch.tensor(t, device=images.device).view(-1, 1, 1) for t in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers (seed, epoch, index), different for each combination met in practice."""
    mixed = 12345
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return mixed

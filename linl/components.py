"""A data set reduced to its principal components: images of a few numbers, for networks small enough to be counted."""

from __future__ import annotations

import torch
from torch import Tensor

from linl.data import Images


def principal(data: Images, components: int) -> tuple[Images, float]:
    """The first principal components of a data set, each from 0 to 1 over the training images.

    A component takes the place of a pixel and is kept as one: in 256 steps. Test images that lie beyond the training
    images' range are moved to its end, so every input lies in `Box.unit(data.input_size)`.

    Args:
        data: as `linl.data.load` gives it; its augmentation is dropped.
        components: how many, from 1 to the number of pixels.

    Returns: the reduced set, input size (1, 1, components), pixels from 0 to 1; and the share of the training images'
        variance that the components hold.

    Raises:
        ValueError: components out of range, pictures in a folder (`ImageFolderData`).
    """
    if not isinstance(data, Images):
        raise ValueError(f"{data.name}: principal components are taken of data sets held as tensors")
    pixels = torch.Size(data.input_size).numel()
    if not 1 <= components <= pixels:
        raise ValueError(f"components = {components}: must be from 1 to {pixels}, the number of pixels")
    flat = _flat(data.train[0])
    mean = flat.mean(0)
    variance, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean))  # ascending
    axes = axes[:, -components:].flip(1)
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # else their signs are a matter of chance
    given = (flat - mean) @ axes
    low, high = given.amin(0), given.amax(0)

    def reduced(images: Tensor) -> Tensor:
        place = ((_flat(images) - mean) @ axes - low) / (high - low)
        return (255 * place).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 1, components)

    splits = {name: (reduced(images), labels) for name in ("train", "validation", "test")
              for images, labels in [getattr(data, name)]}  # fmt: skip
    made = Images(f"{data.name}-{components}", **splits, num_classes=data.num_classes, mean=(0.0,), std=(1.0,))
    return made, float(variance[-components:].sum() / variance.sum())


def _flat(images: Tensor) -> Tensor:
    return images.cpu().flatten(1).double() / 255

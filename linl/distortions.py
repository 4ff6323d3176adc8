"""Batches of images changed by chance, a draw of its own for each image: what training does to them.

Each takes and gives uint8 (B, C, H, W) and draws from a generator, so a training that goes on sees what an
uninterrupted one sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GREY = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601), as torchvision's colour jitter takes it


def random_crop(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in: one gather for the batch."""
    b, c, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    dy, dx = (torch.randint(0, 2 * padding + 1, (2, b), generator=generator)).to(images.device)
    rows = (dy[:, None] + torch.arange(h, device=images.device))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(w, device=images.device))[:, None, None, :]
    which = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[None, :, None, None]
    return padded[which, channel, rows, columns]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image mirrored left-right with probability one half."""
    flip = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def random_affine(images: Tensor, generator: Generator) -> Tensor:
    """Each image turned by up to 10°, scaled by 0.8 to 1.2 and sheared along x by up to 10°, zeros coming in.

    The map is torchvision's `RandomAffine(10, scale=(0.8, 1.2), shear=10)`, about the centre and by the nearest pixel.
    """
    drawn = 2 * torch.rand(3, len(images), generator=generator).to(images.device) - 1
    turn, scale, shear = drawn[0] * math.radians(10), 1 + 0.2 * drawn[1], drawn[2] * math.radians(10)
    # where a pixel's value comes from: the inverse of turn · shear · scale, as grid_sample wants it
    cos, sin, tan = turn.cos(), turn.sin(), shear.tan()
    h, w = images.shape[-2:]
    rows = [(cos - tan * sin) / scale, (sin + tan * cos) / scale * (h / w), -sin / scale * (w / h), cos / scale]
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 1, 0], theta[:, 1, 1] = rows
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def colour_jitter(images: Tensor, generator: Generator) -> Tensor:
    """Each image's brightness, contrast and saturation, in this order, times 0.8 to 1.2; a grey image's has no last.

    Each as torchvision's `ColorJitter` defines it: a blend with black, with the mean grey, with the image's own grey.
    """
    factors = (0.8 + 0.4 * torch.rand(3, len(images), generator=generator)).to(images.device)
    bright, contrast, colour = factors[..., None, None, None]
    x = images.float().mul(bright).clamp_(0, 255)
    x = _blend(x, _grey(x).mean((2, 3), keepdim=True), contrast)
    if images.shape[1] == 3:
        x = _blend(x, _grey(x), colour)
    return x.round_().to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x
    return sum(share * x[:, i : i + 1] for i, share in enumerate(GREY))


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(x), x, factor.expand_as(x)).clamp_(0, 255)


DISTORTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "crop": random_crop,
    "flip": random_flip,
    "affine": random_affine,
    "jitter": colour_jitter,
}
"""By name, in the order in which they are done."""


def distorted(images: Tensor, names: Sequence[str], generator: Generator) -> Tensor:
    """A batch with the distortions named, in the order of `DISTORTIONS`."""
    for name, change in DISTORTIONS.items():
        if name in names:
            images = change(images, generator)
    return images

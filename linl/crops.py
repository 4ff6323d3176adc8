"""How pictures are brought to the size that a network was made for.

Scored: resized, then the centre. In training: a random part of each, resized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Crop:
    """A square in the middle of a resized picture; in training, of a random part of it.

    Attributes:
        size: its side, in pixels.
        resize: what the picture's shorter side becomes first; 0 for size / 0.875.
        interpolation: "bilinear" or "bicubic", antialiased; of training's random crops as well.
        least: share of a picture's area that a random crop of training takes at least; the most is all of it
            (Szegedy et al., CVPR 2015, section 6: 8 %). More shows a network that is trained already, and briefly
            tuned, pictures nearer to those that it is scored on. Crops are from 3:4 to 4:3, so a picture that is too
            long for a share, four times as long as wide for a third, gets its middle.

    Raises:
        ValueError: a size, an interpolation or a share that can't be.
    """

    size: int
    resize: int = 0
    interpolation: str = "bilinear"
    least: float = 0.08

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize and self.resize < self.size):
            raise ValueError(f"a crop of {self.size} pixels out of {self.resize}: at least 1, at most all")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}: choose from {', '.join(INTERPOLATIONS)}")
        if not 0 < self.least <= 1:
            raise ValueError(f"least = {self.least:g}: a share of a picture's area, above 0 and at most 1")

    @property
    def shorter(self) -> int:
        """What the picture's shorter side becomes."""
        return self.resize or round(self.size / 0.875)


def standard(network: str) -> Crop:
    """What a network's ImageNet figures are taken with.

    timm's for EfficientNet-Lite (224, 240, 260, 300, 380 pixels; Google's weights), and for everything else 224 from
    256, bilinear: torchvision's of its first weights, and LiNLNet's code's. (Layer Folding's evaluation of MobileNetV2
    crops 87.5 % of both sides and then resizes to 224 × 224, bicubic, which squeezes pictures that aren't square: that
    isn't done here.)
    """
    if not network.startswith("efficientnet_lite"):
        return Crop(224, 256)
    import timm

    known = timm.get_pretrained_cfg(f"tf_{network}")
    if known is None:
        raise ValueError(f"timm knows no {network!r}")
    size = known.input_size[-1]
    return Crop(size, int(size / known.crop_pct), known.interpolation)


def sized(crop: Crop | None, size: int | None) -> Crop:
    """A crop brought to another size, all else kept; 224 pixels where nothing is said."""
    if crop is None or size in (None, crop.size):
        return crop or Crop(size or 224)
    return replace(crop, size=size, resize=round(size * crop.shorter / crop.size))

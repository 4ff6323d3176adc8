"""How pictures are brought to the size that a network was made for, when it is scored: resized, then the centre."""

from __future__ import annotations

from dataclasses import dataclass

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Crop:
    """A square in the middle of a resized picture.

    Attributes:
        size: its side, in pixels.
        resize: what the picture's shorter side becomes first; 0 for size / 0.875.
        interpolation: "bilinear" or "bicubic", antialiased; of training's random crops as well.
    """

    size: int
    resize: int = 0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize and self.resize < self.size):
            raise ValueError(f"a crop of {self.size} pixels out of {self.resize}: at least 1, at most all")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}: choose from {', '.join(INTERPOLATIONS)}")

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
    """A crop brought to another size, its proportions kept; 224 pixels where nothing is said."""
    if crop is None or size in (None, crop.size):
        return crop or Crop(size or 224)
    return Crop(size, round(size * crop.shorter / crop.size), crop.interpolation)

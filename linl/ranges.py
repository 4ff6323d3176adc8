"""What a value can be: a lower and an upper end for each of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linl.boxes import Box


@dataclass
class Range:
    """What a value can be: lower and upper, (boxes, *shape)."""

    lower: Tensor
    upper: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def __and__(self, other: Range) -> Range:
        """The intersection. Two sound ranges that miss each other by rounding keep the common edge."""
        lower, upper = torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        return Range(torch.minimum(lower, self.upper), torch.maximum(upper, self.lower))

    def narrowed(self, units: Tensor, lower: Tensor | None = None, upper: Tensor | None = None) -> Range:
        """The same, some units (flat positions) cut to bounds of their own, (boxes, units); None: on no such side."""
        low, high = self.lower.flatten(1).clone(), self.upper.flatten(1).clone()
        mine = Range(low[:, units], high[:, units])
        better = mine & Range(mine.lower if lower is None else lower, mine.upper if upper is None else upper)
        low[:, units], high[:, units] = better.lower, better.upper
        return Range(low.view(self.lower.shape), high.view(self.upper.shape))

    def ball(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centre, radius (from the rounded centre to the farther end) and largest magnitude."""
        center = self.lower / 2 + self.upper / 2
        radius = torch.maximum(self.upper - center, center - self.lower)
        return center, radius * (1 + 2 * torch.finfo(center.dtype).eps), self.largest


def outward(box: Box, dtype: torch.dtype) -> Range:
    """A box in another dtype, rounded outward."""
    if dtype == torch.float64:
        return Range(box.lower, box.upper)
    lower, upper = box.lower.to(dtype), box.upper.to(dtype)
    inf = torch.tensor(torch.inf, dtype=dtype)
    lower = torch.where(lower.double() > box.lower, lower.nextafter(-inf), lower)
    return Range(lower, torch.where(upper.double() < box.upper, upper.nextafter(inf), upper))

"""Domains: boxes in a network's input space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_SLACK = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Box:
    """All inputs between two corners, position by position; or several such boxes at once.

    Attributes:
        lower, upper: float64, (boxes, *shape).
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, lower: Tensor, upper: Tensor, batch: bool = False) -> None:
        """
        Args:
            lower, upper: corners, of one example's shape; with `batch` (boxes, *shape).

        Raises:
            ValueError: shapes that differ, lower above upper, or a corner that is no finite number.
        """
        # copies: a corner changed elsewhere later, or both corners one tensor, must not matter
        lower, upper = (torch.as_tensor(t, dtype=torch.float64).detach().cpu().clone() for t in (lower, upper))
        if lower.shape != upper.shape:
            raise ValueError(f"lower has shape {tuple(lower.shape)}, upper {tuple(upper.shape)}: give both the same")
        for name, corner in (("lower", lower), ("upper", upper)):
            if not corner.isfinite().all():
                raise ValueError(f"{name} has {_first(~corner.isfinite(), corner)}: a box has finite corners")
        if (lower > upper).any():
            at = _first(lower > upper, lower, upper)
            raise ValueError(f"lower is above upper: {at}; swap them, or take less off")
        if batch and lower.ndim < 2:
            raise ValueError(f"several boxes want (boxes, *shape), not {tuple(lower.shape)}")
        object.__setattr__(self, "lower", lower if batch else lower[None])
        object.__setattr__(self, "upper", upper if batch else upper[None])

    @classmethod
    def unit(cls, shape: Sequence[int], mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Box:
        """Every image with pixels from 0 to 1, after normalization by channel.

        Args:
            shape: of one image, (C, H, W); or (F,).
            mean, std: one number a channel; the corners then reach four float32 roundings further out, so
                that an image normalized in float32 lies inside.
        """
        lower, upper = torch.zeros(tuple(shape), dtype=torch.float64), torch.ones(tuple(shape), dtype=torch.float64)
        if mean is None and std is None:
            return cls(lower, upper)
        channels = lower.shape[0]
        given = (0.0 if mean is None else mean, 1.0 if std is None else std)
        numbers = [torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in given]
        for name, given in zip(("mean", "std"), numbers, strict=True):
            if len(given) not in (1, channels):
                raise ValueError(f"{name} has {len(given)} numbers, the images {channels} channels")
        if not (numbers[1] > 0).all():
            raise ValueError(f"std = {std}: must be above 0")
        m, s = (v.view(-1, *[1] * (lower.ndim - 1)) for v in numbers)
        ends = [(t - m) / s for t in (lower, upper)]
        slack = FLOAT32_SLACK * torch.maximum(*(e.abs() for e in ends)).clamp(min=1.0)
        return cls(ends[0] - slack, ends[1] + slack)

    @classmethod
    def around(cls, x: Tensor, eps: float, within: Box | None = None, batch: bool = False) -> Box:
        """Every input that differs from x by at most eps at each position.

        Args:
            x: one example; with `batch` (boxes, *shape): a box around each.
            within: cut off what lies outside this box, e.g. `Box.unit(…)`.

        Raises:
            ValueError: eps below 0, or x outside of `within` by more than eps.
        """
        if not eps >= 0:
            raise ValueError(f"eps = {eps}: must be at least 0")
        x = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
        box = cls(x - eps, x + eps, batch=batch)
        return box if within is None else box & within

    @classmethod
    def hull(cls, images: Tensor) -> Box:
        """The smallest box around images (N, *shape)."""
        if not len(images):
            raise ValueError("no images: a hull needs at least one")
        return cls(images.amin(0), images.amax(0))

    def __and__(self, other: Box) -> Box:
        lower, upper = torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        if (lower > upper).any():
            raise ValueError("the boxes have no point in common")
        return Box(lower, upper, batch=True)

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, index: int) -> Box:
        return Box(self.lower[index], self.upper[index])

    @property
    def shape(self) -> torch.Size:
        """Of one example."""
        return self.lower.shape[1:]

    @property
    def center(self) -> Tensor:
        """(boxes, *shape)."""
        return self.lower + (self.upper - self.lower) / 2

    @property
    def radius(self) -> Tensor:
        """From the centre as it is rounded to the farther corner; (boxes, *shape)."""
        return torch.maximum(self.upper - self.center, self.center - self.lower)

    def contains(self, x: Tensor, slack: float = 0.0) -> Tensor:
        """Whether each input (N, *shape) lies inside one of the boxes, up to `slack` at each position; (N,) bool."""
        x = x.detach().to("cpu", torch.float64)
        inside = torch.zeros(len(x), dtype=torch.bool)
        for lower, upper in zip(self.lower - slack, self.upper + slack, strict=True):
            inside |= ((x >= lower) & (x <= upper)).flatten(1).all(1)
        return inside

    def clip(self, x: Tensor) -> Tensor:
        """Inputs (N, *shape) moved into the (one) box, in x's dtype and yet inside where a number of that dtype is."""
        lower, upper = self.lower[0].to(x), self.upper[0].to(x)
        if x.dtype != torch.float64:  # the corners rounded inwards
            inf = torch.full_like(lower, torch.inf)
            lower = torch.where(lower.double() < self.lower[0].to(x.device), lower.nextafter(inf), lower)
            upper = torch.where(upper.double() > self.upper[0].to(x.device), upper.nextafter(-inf), upper)
        return torch.minimum(torch.maximum(x, lower), upper)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points of the (one) box, evenly distributed; (n, *shape), float64."""
        share = torch.rand(n, *self.shape, dtype=torch.float64, generator=generator)
        return self.clip(self.lower[0] + share * (self.upper[0] - self.lower[0]))

    def corners(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n corners of the (one) box by chance; (n, *shape), float64."""
        high = torch.rand(n, *self.shape, dtype=torch.float64, generator=generator) < 0.5
        return torch.where(high, self.upper[0], self.lower[0])

    def __repr__(self) -> str:
        many = f"{len(self)} boxes" if len(self) > 1 else "Box"
        sides = self.upper - self.lower
        return f"{many} of shape {tuple(self.shape)}, sides {sides.min():.4g} to {sides.max():.4g}"


def _first(wrong: Tensor, *values: Tensor) -> str:
    at = tuple(int(i) for i in wrong.nonzero()[0])
    return f"{' > '.join(f'{v[at].item():g}' for v in values)} at {at}"

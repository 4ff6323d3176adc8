"""Slices as pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from linl.program import Program
from linl.slices import Slice, in_plane

COLORS = ("region", "class")


def draw_slice(
    net: nn.Module | Program | Slice,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    *,
    window: float | Sequence[float] | None = None,
    color: str = "region",
    classes: Sequence[str] | None = None,
    images: Sequence[Tensor] | None = None,
    lines: bool = True,
    time_limit: float | None = None,
    ax=None,
):
    """Draws the linear regions in the plane through three inputs, and marks the inputs.

    Several networks side by side: make the axes, call this once for each with the same inputs and window.

    Args:
        net: a network, or a `Slice` that is there already.
        a, b, c, window, time_limit: as for `linl.regions.in_plane`; left out for a slice.
        color: "region": by the region's affine map (neighbours with one map look alike); "class": by the class that
            the network gives at the region's centre, paler where its lead is small.
        classes: a name for each output, for a legend of color="class".
        images: three pictures (H, W) or (C, H, W) with numbers from 0 to 1, shown outside three corners of the axes;
            side by side that takes room: `plt.subplots(1, 2, gridspec_kw={"wspace": 0.4})`.
        lines: whether faces are drawn.
        ax: matplotlib axes; None makes some.

    Returns: the axes; `ax.slice` is the `Slice`.

    Raises:
        ValueError: an unknown color, inputs missing, not three images, not a name for each output; as
            `linl.regions.in_plane`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import PolyCollection

    if color not in COLORS:
        raise ValueError(f"unknown color {color!r}: choose from {', '.join(COLORS)}")
    if images is not None and len(images) != 3:
        raise ValueError(f"{len(images)} images: the inputs are three")
    made = net
    if not isinstance(net, Slice):
        if a is None or b is None or c is None:
            raise ValueError("a network is drawn in the plane through three inputs: give a, b and c")
        made = in_plane(net, a, b, c, window, time_limit)
    if classes is not None and len(classes) != made.outputs.shape[1]:
        raise ValueError(f"{len(classes)} classes: the network has {made.outputs.shape[1]} outputs, each wants a name")
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 6))
    shapes = [made.points[cell].numpy() for cell in made.cells]
    colors = _by_class(made) if color == "class" else _by_map(made)
    edges = {"edgecolors": (0, 0, 0, 0.5), "linewidths": 0.3} if lines else {"edgecolors": "face", "linewidths": 0.2}
    ax.add_collection(PolyCollection(shapes, facecolors=colors, **edges))
    left, right, bottom, top = made.window
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xlabel="L2 distance from the first input")
    ax.set_title(f"{made.count:,} regions" + ("" if made.complete else " (unfinished)"))
    _mark(ax, made, images)
    if classes is not None and color == "class":
        _legend(ax, made, classes)
    ax.slice = made
    return ax


def _by_map(made: Slice) -> np.ndarray:
    """A pale color for each region, the same for the same affine map."""
    matrices, values = made.maps()
    if not made.count:
        return np.zeros((0, 3))
    start = values - (matrices @ made.centers[:, :, None])[..., 0]
    # a number from the map's leading digits: equal maps, found from different corners, differ in the last ones
    numbers = torch.cat([matrices.flatten(1), start], 1)
    scale = numbers.abs().amax().clamp(min=1e-300)
    digits = (numbers / scale * 1e6).round()
    mix = torch.linspace(1, 2, digits.shape[1], dtype=torch.float64) * 0.618034
    hue = (digits @ mix) % 1.0
    light = (digits @ mix.flip(0)) % 1.0
    found = [colorsys.hls_to_rgb(float(h), 0.68 + 0.22 * float(v), 0.6) for h, v in zip(hue, light, strict=True)]
    return np.array(found).reshape(-1, 3)


def _by_class(made: Slice) -> np.ndarray:
    """The class's color, paler where its lead over the second is small."""
    values = made.maps()[1]
    if values.shape[1] < 2:
        raise ValueError("color='class' needs a network with at least two outputs")
    if not made.count:
        return np.zeros((0, 3))
    top = values.topk(2, 1)
    lead = (top.values[:, 0] - top.values[:, 1]) / (top.values[:, 0] - top.values[:, 1]).amax().clamp(min=1e-300)
    base = _palette(values.shape[1])[top.indices[:, 0].numpy()]
    strength = 0.35 + 0.5 * lead.numpy()[:, None]
    return 1 - strength * (1 - base)


def _palette(classes: int) -> np.ndarray:
    import matplotlib

    colors = matplotlib.colormaps["tab10"].colors
    return np.array([colors[i % 10] for i in range(classes)])


def _mark(ax, made: Slice, images: Sequence[Tensor] | None) -> None:
    """The three inputs as dots where the window shows them, and their pictures at the corners."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    left, right, bottom, top = made.window
    for name, (x, y) in zip("abc", made.marks.tolist(), strict=True):
        if left <= x <= right and bottom <= y <= top:
            ax.plot(x, y, "ko", ms=4)
            ax.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points")
    if images is None:
        return
    ax.set_yticks([])  # their place is needed
    # outside of the axes, at the corners: a picture's own corner that touches them
    places = (((-0.02, 0.0), (1.0, 0.0)), ((1.02, 0.0), (0.0, 0.0)), ((-0.02, 1.0), (1.0, 1.0)))
    for name, image, (corner, touching) in zip("abc", images, places, strict=True):
        shown = torch.as_tensor(image).detach().cpu().float().clamp(0, 1)
        shown = shown.permute(1, 2, 0) if shown.ndim == 3 else shown
        shown = shown[..., 0] if shown.ndim == 3 and shown.shape[-1] == 1 else shown
        picture = OffsetImage(shown.numpy(), zoom=48 / max(shown.shape[:2]), cmap="gray")
        frame = {"boxstyle": "square,pad=0.1", "edgecolor": "black"}
        box = AnnotationBbox(
            picture, corner, xycoords="axes fraction", box_alignment=touching, pad=0.1, bboxprops=frame
        )
        ax.add_artist(box)
        shift = (-24 if touching[0] else 24, 54 if not touching[1] else -66)
        ax.annotate(name, corner, xycoords="axes fraction", xytext=shift, textcoords="offset points", ha="center")


def _legend(ax, made: Slice, classes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    palette = _palette(made.outputs.shape[1])
    seen = sorted(set(made.table["class"]))
    ax.legend(handles=[Patch(color=palette[i], label=classes[i]) for i in seen], fontsize=7, loc="upper right")

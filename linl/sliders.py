"""A picture that follows sliders, in a notebook that is open and in one that papermill runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def picture(draw: Callable[..., Any], sliders: Mapping[str, Any]):
    """A widget with the picture that `draw(name=value, …)` makes, drawn again whenever a slider moves.

    In place of `ipywidgets.interactive_output`, whose Output widget makes nbclient, and so papermill, answer the
    kernel while it waits for a cell; now and then it then waits for ever (nbclient's issue 312). An image is only ever
    sent. The first picture is drawn here, so an error in `draw` is an error of the cell; a later one stands in words
    where the picture was.

    Args:
        draw: called with every slider's value by name; draws on matplotlib's current figure, a new one, or makes one.
        sliders: ipywidgets by the name that `draw` knows them by.

    Returns: an `ipywidgets.VBox`, for `display(*sliders.values(), …)`.

    Raises:
        ValueError: nothing was drawn.
    """
    import ipywidgets

    image = ipywidgets.Image(format="png", value=_png(draw, sliders))
    said = ipywidgets.Label()

    def follow(_change):
        try:
            image.value, said.value = _png(draw, sliders), ""
        except Exception as wrong:
            said.value = f"{type(wrong).__name__}: {wrong}"
        image.layout.display = "none" if said.value else ""

    for slider in sliders.values():
        slider.observe(follow, names="value")
    # a box would stretch the picture to its own width
    return ipywidgets.VBox([image, said], layout=ipywidgets.Layout(align_items="flex-start"))


def _png(draw: Callable[..., Any], sliders: Mapping[str, Any]) -> bytes:
    """The figure as a file, as JupyterLab shows it; closed, so that the cell doesn't show it a second time."""
    import matplotlib.pyplot as plt
    from IPython.core.pylabtools import print_figure

    others = set(plt.get_fignums())
    plt.figure()  # for a function that draws on whatever is there: not on a figure of the cell's
    try:
        draw(**{name: slider.value for name, slider in sliders.items()})
        if not plt.gcf().axes:
            raise ValueError("the function has drawn nothing on matplotlib's current figure")
        return print_figure(plt.gcf(), fmt="png")
    finally:
        for number in set(plt.get_fignums()) - others:
            plt.close(number)

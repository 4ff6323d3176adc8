"""A picture that follows sliders."""

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ipywidgets import FloatSlider
from PIL import Image

from linl.sliders import picture


@pytest.fixture(autouse=True)
def unseen():
    matplotlib.use("agg")
    plt.close("all")
    yield
    plt.close("all")


def shown(widget) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(widget.children[0].value)).convert("RGB"))


def draw(height, width):
    if height == 3:
        raise ValueError("no height is 3")
    plt.figure(figsize=(3, 2))
    plt.bar([0], [height], width=width)
    plt.axis((-1, 1, 0, 2))


def test_it_follows_every_slider_and_leaves_no_figure():
    sliders = {"height": FloatSlider(value=1, max=3), "width": FloatSlider(value=1, max=3)}
    widget = picture(draw, sliders)
    first = shown(widget)
    sliders["height"].value = 2
    second = shown(widget)
    sliders["width"].value = 0.5
    third = shown(widget)
    assert not np.array_equal(first, second) and not np.array_equal(second, third)
    sliders["width"].value, sliders["height"].value = 1, 1
    assert np.array_equal(first, shown(widget)), "the same values, the same picture"
    assert plt.get_fignums() == []


def test_an_error_at_first_is_the_cells_own():
    with pytest.raises(ValueError, match="no height is 3"):
        picture(draw, {"height": FloatSlider(value=3, max=3), "width": FloatSlider(value=1)})


def test_a_later_error_stands_where_the_picture_was():
    sliders = {"height": FloatSlider(value=1, max=3), "width": FloatSlider(value=1)}
    image, said = (widget := picture(draw, sliders)).children
    first = shown(widget)
    sliders["height"].value = 3
    assert said.value == "ValueError: no height is 3" and image.layout.display == "none"
    sliders["height"].value = 1
    assert said.value == "" and image.layout.display == "" and np.array_equal(first, shown(widget))


def test_a_figure_that_was_open_stays_open():
    other = plt.figure()
    picture(draw, {"height": FloatSlider(value=1, max=3), "width": FloatSlider(value=1)})
    assert plt.get_fignums() == [other.number]


def test_a_function_that_draws_on_what_is_there_leaves_the_cells_figure_alone():
    other, ax = plt.subplots()
    widget = picture(lambda height: plt.plot([0, height]), {"height": FloatSlider(value=1)})
    assert not ax.lines and plt.get_fignums() == [other.number] and shown(widget).std() > 0


def test_a_function_that_draws_nothing_is_told_so():
    with pytest.raises(ValueError, match="has drawn nothing"):
        picture(lambda height: plt.figure(), {"height": FloatSlider(value=1)})
    assert plt.get_fignums() == []

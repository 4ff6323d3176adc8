"""Verdicts: the same figures, the same words."""

import pytest

from linl.verdicts import KINDS, Figure, kind, rounding, share, together, verdict


def test_figures_are_read():
    assert Figure.read("97.92±0.09") == Figure.read("97.92 ± 0.09") == Figure(97.92, 0.09)
    assert Figure.read("67.88") == Figure(67.88) and Figure.read(" ") is None and Figure.read("-26.9") == Figure(-26.9)
    assert Figure.of([1.0, 3.0]) == Figure(2.0, 2**0.5) and Figure.of([4.0]) == Figure(4.0)
    assert Figure.of([]) is None and Figure.of([float("nan"), None]) is None
    with pytest.raises(ValueError, match="'about 3' is no figure"):
        Figure.read("about 3")


@pytest.mark.parametrize(
    ("published", "ours", "options", "word"),
    [
        ("", [1.0], {}, ""),
        ("90±1", [], {}, "not run"),
        ("90±1", [90.9], {}, "reproduced"),
        ("90±1", [91.1], {}, "differs by +1.10"),
        ("90±1", [90.5, 92.5], {}, "reproduced"),
        ("90±0.1", [60.0, 120.0], {}, "reproduced"),
        ("90±0.1", [60.0, 121.0], {}, "differs by +0.50"),
        ("90±1", [92.1], {}, "differs by +2.10"),
        ("90±1", [92.1], {"within": 2.5}, "reproduced"),
        ("90", [89.0, 91.0], {}, "reproduced"),
        ("90±1", [86.0, 86.0], {"unlike": "shorter schedule"}, "-4.00, on a shorter schedule"),
        ("90±1", [90.0], {"unlike": "shorter schedule"}, "reproduced, on a shorter schedule"),
        ("90±1", [90.0], {"unlike": "another recipe"}, "reproduced, by another recipe"),
        ("90±1", [93.0], {"unlike": "another recipe"}, "+3.00, by another recipe"),
        ("8", [7.0], {"digits": 0}, "differs by -1"),
    ],
)
def test_a_verdict_is_a_rule(published, ours, options, word):
    assert verdict(published, ours, **options) == word


def test_a_printed_figure_is_known_to_half_its_last_digit():
    printed = {"31±3": 0.5, "20.8±0.6": 0.05, "0": 0.5, "-26.9": 0.05, "0.0311±0.0009": 0.00005}
    assert {text: rounding(text) for text in printed} == pytest.approx(printed)


def test_several_verdicts_are_one_line():
    assert together({"accuracy": "reproduced", "neurons": "reproduced", "loss": ""}) == "reproduced"
    line = together({"accuracy": "reproduced", "neurons": "differs by +1", "seconds": "reproduced"})
    assert line == "accuracy, seconds: reproduced; neurons: differs by +1"
    words = {
        "reproduced": "reproduced",
        line: "in part",
        "accuracy: -1.00, on a shorter schedule; depth: -2, on a shorter schedule": "shorter schedule",
        "reproduced, on a shorter schedule": "reproduced, otherwise",
        "accuracy: reproduced, by another recipe": "reproduced, otherwise",
        "accuracy, neurons: -0.50, by another recipe": "another recipe",
        "not reproduced, on a shorter schedule": "shorter schedule",
        "no gain: -0.56, by another recipe": "another recipe",
        "in 3 of 7 settings": "in part",
        "accuracy: differs by -1": "differs",
        "smaller: +0.45": "differs",
        "not reproduced": "differs",
        "not run": "not run",
        "needs ImageNet": "needs ImageNet",
        "accuracy: reproduced; loss: not run": "in part",
        "accuracy, loss: not run": "not run",
        "loss: differs by +1; neurons: differs by +2": "differs",
        "a: reproduced, on a shorter schedule; b: -1, on a shorter schedule": "in part",
    }
    assert {word: kind(word) for word in words} == words and set(words.values()) <= set(KINDS)
    assert share([True, True]) == "reproduced" and share([False]) == "not reproduced" and share([]) == "not run"
    assert share([True, False, True], "networks") == "in 2 of 3 networks"

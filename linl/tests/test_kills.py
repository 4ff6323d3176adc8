"""The short form of `python -m linl.tests.kills 50`."""

from linl.tests import kills


def test_nothing_is_lost_by_kills():
    """A few of them; then everything is as it is without."""
    assert sum(kills.campaign(2, seed=1, longest=6.0).values()) == 2

"""Principal components as small images, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import linl
from linl.components import principal


def test_they_are_scikit_learns_in_256_steps_from_0_to_1():
    given = linl.data.load("digits", validation=0.0, normalize="none")
    made, share = principal(given, 3)
    flat = given.train[0].flatten(1).double().numpy() / 255
    pca = PCA(3, svd_solver="full").fit(flat)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-9)
    theirs = pca.transform(flat)
    mine = made.normalize(made.train[0]).flatten(1).double().numpy()
    for i in range(3):
        place = (theirs[:, i] - theirs[:, i].min()) / np.ptp(theirs[:, i])
        assert min(np.abs(mine[:, i] - p).max() for p in (place, 1 - place)) < 0.51 / 255
        assert mine[:, i].min() == 0 and mine[:, i].max() == 1
    assert made.input_size == (1, 1, 3) and made.size("test") == given.size("test")
    assert torch.equal(made.train[1], given.train[1]) and made.augment == ()
    assert linl.Box.unit(made.input_size).contains(made.normalize(made.test[0])).all()


@pytest.mark.parametrize("components", [0, 65])
def test_their_number_is_checked(components):
    with pytest.raises(ValueError, match=rf"components = {components}: must be from 1 to 64"):
        principal(linl.data.load("digits"), components)

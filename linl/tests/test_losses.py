"""Losses besides cross-entropy: what they compute, and what training with them does."""

import pytest
import torch
from torch import nn

import linl
from linl.losses import ADVERSARIES, l1, pixel_range, stability
from linl.tests.small_nets import make


def digits(limit=200):
    return linl.data.load("digits", validation=0.0, normalize="none", limit=limit)


def mlp(data, **options):
    torch.manual_seed(0)
    return linl.models.create("mlp", 10, data.input_size, hidden=(16, 16), norm=False, dropout=0.0, **options)


def test_l1_counts_the_weights_of_dense_layers_alone():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert l1(net).item() == pytest.approx(sum(net[i].weight.abs().sum().item() for i in (2, 4)))


def test_l1_makes_weights_small_and_units_stable():
    data, kept = digits(None), []
    for weight in (0.0, 1e-2):
        net = mlp(data, init="kaiming")
        linl.train.fit(net, data, linl.train.recipe("stability-digits", 25, l1=weight), precision="fp32", verbose=False)
        state = linl.analyse(net, linl.Box.unit(data.input_size))
        kept.append(sum(int((codes >= 0).sum()) for codes in state.codes))
    assert kept[0] < kept[1]


@pytest.mark.parametrize("name", ADVERSARIES)
def test_attacked_images_stay_near_and_valid_and_raise_the_loss(name):
    data = digits(None)
    net = mlp(data)
    linl.train.fit(net, data, linl.train.recipe("stability-digits", 5), precision="fp32", verbose=False)
    images, labels = next(data.batches("train", 100))
    settings = linl.train.recipe("stability-digits", 1, adversary=name, eps=0.1)
    batches = ADVERSARIES[name](net, images, labels, settings, pixel_range(data))
    assert len(batches) == (2 if name == "single" else 1)
    attacked = batches[-1]
    assert (attacked - images).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(net(attacked), labels) > 1.2 * loss(net(images), labels)


def test_the_stability_loss_is_what_intervals_say():
    data = digits()
    net, (images, _) = mlp(data).eval(), next(data.batches("train", 20))
    eps = 0.05
    box = linl.Box.around(images, eps, within=linl.Box.unit(data.input_size), batch=True)
    found = linl.bounds.bound(net, box, "interval")
    expected = -sum(torch.tanh(1 + r.lower * r.upper).flatten(1).sum(1).mean() for r in found.inputs)
    assert stability(net, images, eps, pixel_range(data)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_stability_loss_makes_units_stable():
    data, values = digits(), []
    for weight in (0.0, 0.1):
        net = mlp(data)
        settings = linl.train.recipe("stability-digits", 6, stability=weight, stability_eps=0.05)
        linl.train.fit(net, data, settings, precision="fp32", verbose=False)
        images, _ = next(data.batches("train", 100))
        values.append(stability(net, images, 0.05, pixel_range(data)).item())
    assert values[1] < values[0]


def test_layers_that_intervals_are_not_carried_through_are_named():
    net, shape = make("residual", "relu")
    limits = (torch.zeros(2, 1, 1), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="BatchNorm2d"):
        stability(net.float(), torch.rand(3, *shape), 0.1, limits)


def test_an_autoencoder_learns_its_images():
    data = digits(None)
    torch.manual_seed(0)
    net = linl.models.create("autoencoder", 10, data.input_size, hidden=(32, 8, 32), init="kaiming")
    settings = linl.train.recipe("stability-digits", 8, loss="reconstruction", lr=0.1)
    history = linl.train.fit(net, data, settings, precision="fp32", verbose=False)
    assert history.metrics["train_loss"].iloc[-1] < 0.8 * history.metrics["train_loss"].iloc[0]
    score = linl.train.evaluate(net, data, loss="reconstruction")
    images = data.normalize(data.test[0])
    assert score.loss == pytest.approx(((net(images) - images) ** 2).mean().item(), rel=1e-3)
    assert net(images).shape == images.shape and score.accuracy != score.accuracy


def test_settings_that_came_later_leave_old_trainings_as_they_were():
    assert "l1" not in linl.train.recipe("linlnet").identity()
    assert linl.train.recipe("linlnet", l1=1e-4).identity()["l1"] == 1e-4
    with pytest.raises(ValueError, match="loss = 'mse'"):
        linl.train.recipe("linlnet", loss="mse")
    with pytest.raises(ValueError, match="adversary"):
        linl.train.recipe("linlnet", adversary="fgsm")
    with pytest.raises(ValueError, match="l1"):
        linl.train.recipe("linlnet", l1=-1.0)

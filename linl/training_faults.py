"""Errata of LiNLNet's code, and of how accuracies are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from linl.faults import Figures, convolutions, erratum, mlp, numbers, off, tested
from linl.folding import fold
from linl.models import create
from linl.train import evaluate
from linl.units import linearize, nonlinearity, param_groups

LINLNET = "LiNLNet (JinSeongmin/LiNLU)"


@erratum(LINLNET, "trap", "difference from the trained ReLU network", "networks_and_functions.py, LiNLU")
def half_a_relu() -> Figures:
    """Both slopes depend on p: at p = ½ the unit is half a ReLU, and at no p a ReLU. Put into a trained network it
    changes what that computes. Ours is the published unit as well; to start from a trained network there is
    linearize(net, "partial"), which at α = 0 is that network."""
    net, x = mlp(8, 16, 16, 3), torch.randn(64, 8, dtype=torch.float64)
    h = x
    for layer in net:
        h = 0.5 * h - 0.5 * h.clamp(max=0) if isinstance(layer, nn.ReLU) else layer(h)
    return off(net(x), h), off(net(x), linearize(net, "partial")(x)), 0


@erratum(LINLNET, "fault", "LiNLUs of the MLP that are made on the CPU, of 4", "networks_and_functions.py, LiNLU")
def made_on_the_gpu() -> Figures:
    """A unit's constructor puts p on the GPU, whatever was asked for, while the rest of the code picks a device by what
    is there. Without a GPU no network with LiNLUs can be made at all. Here a unit is made where everything is made, and
    moves with its network."""

    def published() -> torch.Tensor:
        return nn.Parameter(torch.tensor(0.75, device="cpu").cuda())

    theirs = 0
    for _ in range(4):
        try:
            theirs += published().device.type == "cpu"
        except (AssertionError, RuntimeError):  # torch without CUDA; no GPU
            break
    ours = param_groups(linearize(create("mlp", width=0.125)), lr=0.01)[1]["params"]
    return theirs, sum(p.device.type == "cpu" for p in ours), 4


@erratum(LINLNET, "fault", "units of ResNet18 that the optimizer is given", "networks_and_functions.py, param_load")
def lost_units() -> Figures:
    """The optimizer asks the network for a list of its units, which ResNet18 doesn't keep: training ResNet18 with
    LiNLUs stops with an AttributeError. The published row of ResNet18 can't come from the published code."""
    net = linearize(create("resnet18", width=0.125), "linlu")
    try:
        theirs = len(net.linlus)
    except AttributeError:
        theirs = 0
    return theirs, len(param_groups(net, lr=0.01)[1]["params"]), 17


@erratum(LINLNET, "fault", "activations of LiNL-ResNet18", "networks_and_functions.py, conv_layer_module")
def linear_stem() -> Figures:
    """A layer applies its activation only where that is a ReLU; LiNLUs are applied by the network, and ResNet18
    doesn't apply any after its stem. So LiNL-ResNet18 has 16 activations, its ReLU twin 17: they aren't the same
    network."""
    published = create("resnet18", width=0.125)
    published.act = nn.Identity()  # the stem's
    return len(nonlinearity(linearize(published))), len(nonlinearity(linearize(create("resnet18", width=0.125)))), 17


@erratum(
    LINLNET, "fault", "convolutions of ResNet18 that start from N(0, 0.01)", "networks_and_functions.py, param_init"
)
def not_initialized() -> Figures:
    """Weights are drawn anew by the type of the layer that holds a convolution. The blocks of ResNet18 hold theirs
    without one: all but the stem keep torch's own start."""

    def small(net: nn.Module) -> int:
        return sum(0.009 < m.weight.std().item() < 0.011 for m in net.modules() if isinstance(m, nn.Conv2d))

    published = create("resnet18", width=0.25)
    nn.init.normal_(published.conv1.weight, std=0.01)
    ours = create("resnet18", width=0.25, init="linlnet")
    return small(published), small(ours), convolutions(ours)


@erratum(LINLNET, "fault", "points of accuracy gained by choosing", "main.py and utils.py, save_model", within=0.1)
def best_on_the_test_set() -> Figures:
    """The weights kept are those of the epoch with the best accuracy on the test images, and that accuracy is
    reported. Here 400 networks that stay at 90 % for 200 epochs, 10,000 test images: what the choice alone gains.
    linl's test images are read once, after the last epoch."""
    generator = torch.Generator().manual_seed(0)
    epochs = torch.binomial(torch.full((400, 200), 1e4), torch.full((400, 200), 0.9), generator=generator) / 100
    return (epochs.amax(1) - 90).mean().item(), (epochs[:, -1] - 90).mean().item(), 0


@erratum(
    "LiNLNet, Activate-While-Pruning", "fault", "accuracy of a perfect classifier, 10,000 images in batches of 64, %",
    "utils.py, load_data and main.py, test; resnet_20.py, test",
)  # fmt: skip
def dropped_test_images() -> Figures:
    """The last short batch of test images is dropped, yet hits are divided by the number of all images: who is
    dropped counts as wrong. Nothing is lost at LiNLNet's default of 100; at 64, the default of Activate-While-Pruning,
    it is 0.16 points, as much as LiNLNet's standard deviations."""
    labels = torch.arange(10_000) % 10
    images = (255 * F.one_hot(labels, 10)).to(torch.uint8).view(-1, 1, 1, 10)
    net, data = nn.Flatten(), tested(images, labels, 10)
    whole = [(x, y) for x, y in data.batches("test", 64) if len(y) == 64]
    hits = sum((net(x).argmax(1) == y).sum().item() for x, y in whole)
    return 100 * hits / len(labels), 100 * evaluate(net, data, batch_size=64).accuracy, 100


@erratum(
    LINLNET, "gap", "parameters left of LiNL-MLP when its last hidden layer is linear", "README; the whole repository"
)
def nothing_merged() -> Figures:
    """The README says that layers with p = 1 are compressed. The repository trains and evaluates: no line of it
    merges a layer, and the paper's 27 % for AlexNet can't be computed with it."""
    net = create("mlp", hidden=(64, 512, 512), dropout=0.0)
    net.hidden[-1] = nn.Identity()  # p = 1
    net.eval()
    small = fold(net, torch.zeros(1, 3, 32, 32), objective="parameters")
    right = (3072 * 64 + 64) + (64 * 512 + 512) + (512 * 10 + 10)  # BatchNorms and the last 512 × 512 are merged
    return numbers(net), numbers(small), right

"""Errata of pruning: the code of Activating-while-Pruning, torch's masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from linl.cycles import prune_cycles
from linl.dead_rates import dead_rate
from linl.distortions import random_crop, random_flip
from linl.faults import EQUAL, Figures, erratum, mlp, numbers, off, pictures, tested
from linl.masks import masks_of, raw_weight
from linl.models import create
from linl.pruning import prune
from linl.shrinking import shrink

AP = "Activate-While-Pruning (Martin1937)"


@erratum(AP, "fault", "% of the weights that AP takes when 2 % are asked for", "resnet_20.py, prune_by_percentile_lt")
def counted_twice() -> Figures:
    """Weights are collected one parameter at a time, and what was collected last is added again at every parameter
    that isn't a weight: a layer with a bias counts twice. In a dense network AP takes twice its share."""
    net = mlp(20, 50, 10)
    start = copy.deepcopy(net.state_dict())
    for parameter in net.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    collected, last = [], ""
    for name, _ in net.named_parameters():
        last = name if "weight" in name else last
        collected.append(last)
    number = int(sum(net.get_parameter(name).numel() for name in collected) * 0.02)
    weights = torch.cat([net[i].weight.flatten() for i in (0, 2)])
    moved = (weights - torch.cat([start[f"{i}.weight"].flatten() for i in (0, 2)])).abs()
    limit = moved[weights < 0].sort().values[number]
    theirs = ((weights < 0) & (moved <= limit)).sum().item()
    report = prune(net, rate=0.2, ap=0.02, start=start).prune_report.table
    return 100 * theirs / len(weights), 100 * report["by_ap"].sum() / len(weights), 2


@erratum(AP, "fault", "% of the weights pruned last that are alive after one more step", "resnet_20.py, main and train")
def revived() -> Figures:
    """After AP, training goes on with the optimizer it had, and pruned weights are held by setting their gradients to
    0. Their momentum isn't 0: the next step moves them, and from then on they aren't recognized as pruned. The
    accuracy that is written down is of a network with them. Masks hold here, whatever the optimizer remembers."""
    net, x = mlp(20, 50, 10), torch.randn(64, 20, dtype=torch.float64)
    label = torch.randint(0, 10, (64,))

    def step(trained: nn.Module, optimizer: torch.optim.Optimizer, frozen: Sequence[nn.Parameter] = ()) -> None:
        optimizer.zero_grad()
        F.cross_entropy(trained(x), label).backward()
        for parameter in frozen:
            parameter.grad[parameter == 0] = 0
        optimizer.step()

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    kept = torch.optim.SGD(net.parameters(), **options)
    step(net, kept)
    masked = prune(net, rate=0.2)
    masks = masks_of(masked)
    weights = {name: net.get_submodule(name).weight for name in masks}
    for name, weight in weights.items():
        weight.data *= masks[name]
    step(net, kept, list(weights.values()))
    other = torch.optim.SGD(masked.parameters(), **options)
    for _ in range(2):
        step(masked, other)
    masked(x)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    alive = [sum(int((of(name)[~mask] != 0).sum()) for name, mask in masks.items()) for of in (
        weights.__getitem__, lambda name: masked.get_submodule(name).weight,
    )]  # fmt: skip
    return 100 * alive[0] / gone, 100 * alive[1] / gone, 0


@erratum(AP, "fault", "BatchNorm scales pruned to 0, of 16", 'resnet_20.py: every parameter whose name has "weight"')
def norms_pruned() -> Figures:
    """What is pruned is told by its name, and a BatchNorm's scale is called weight too. Of a trained network's small
    scales some go, each with a whole channel; the rate of "weights" isn't one of weights."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    nn.init.normal_(net[1].weight, std=0.1)
    named = torch.cat([p.detach().abs().flatten() for name, p in net.named_parameters() if "weight" in name])
    limit = named.quantile(0.2)
    ours = prune(net, rate=0.2)
    return int((net[1].weight.abs() < limit).sum()), int((ours[1].weight == 0).sum()), 0


@erratum(
    AP, "fault", "% of the test images that are changed before they are scored", "resnet_20.py, one transform for both"
)
def test_images_changed() -> Figures:
    """Test images are cropped and mirrored by chance, as training images are: each evaluation scores other images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (1000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    published = random_flip(random_crop(images, generator), generator)
    data = tested(images, torch.zeros(1000, dtype=torch.long), 2)
    ours = torch.cat([x for x, _ in data.batches("test", 256)])
    same = [(found == images).flatten(1).all(1).double().mean().item() for found in (published, (255 * ours).round())]
    return 100 * (1 - same[0]), 100 * (1 - same[1]), 0


@erratum(
    AP,
    "trap",
    "difference of the second cycle's start from the first one's",
    'resnet_20.py, default prune_type "reinit"',
)
def not_rewound() -> Figures:
    """AP is described with rewinding: the weights that are left go back to where they started. The script's default
    draws new ones instead in every cycle."""
    net, starts = mlp(6, 16, 3), []

    def train(trained: nn.Module) -> None:
        starts.append([raw_weight(m).detach().clone() for m in trained.modules() if isinstance(m, nn.Linear)])
        for parameter in trained.parameters():
            parameter.data += 0.1

    done = prune_cycles(net, train, rate=0.2, cycles=1)
    masks = list(masks_of(done.net).values())
    fresh = [nn.init.xavier_normal_(torch.empty_like(weight)) for weight in starts[0]]
    first, second = (torch.cat([(w * m).flatten() for w, m in zip(s, masks, strict=True)]) for s in starts)
    drawn = torch.cat([(w * m).flatten() for w, m in zip(fresh, masks, strict=True)])
    return off(first, drawn), off(first, second), 0


@erratum(AP, "gap", "% of a layer's ReLUs said to be dead, 24 of 48 off for every image", "the whole repository")
def dead_rate_never_computed() -> Figures:
    """AP is about the dynamic dead-neuron rate: what pruning does to it, and how AP lowers it. No line of the code
    computes one; what it counts are weights that are 0, and a neuron that its bias keeps off has all its weights. So
    whether AP lowers the rate can't be looked at with it. Here the rate is a column of every cycle."""
    net, x = mlp(8, 48, 3), torch.rand(64, 8, dtype=torch.float64)
    nn.init.constant_(net[0].bias, 10.0)
    nn.init.constant_(net[0].bias[:24], -10.0)
    weights = torch.cat([net[i].weight.flatten() for i in (0, 2)])
    done = prune_cycles(net, lambda trained: None, rate=0.2, cycles=1, images=x).table
    rate = 100 * done["dynamic"].iloc[0]
    assert rate == 100 * dead_rate(net, x).dynamic
    return 100 * (weights == 0).double().mean().item(), rate, 50


@erratum(AP, "fault", "cycles whose accuracies are written down, of 3", "resnet_20.py, record.to_csv")
def never_written() -> Figures:
    """After the first cycle that prunes, the epochs' accuracies go to a file whose name asks for a variable that is
    nowhere set: a NameError, after three trainings. The script never comes to its second cycle."""
    theirs = 0
    for cycle in range(1, 4):
        try:
            theirs += bool(eval("f'cycle {cycle}, {on}'", {"cycle": cycle}))
        except NameError:
            break
    done = prune_cycles(mlp(6, 16, 3), lambda trained: {"accuracy": 1.0}, rate=0.2, cycles=3).table
    return theirs, done.loc[done["cycle"] > 0, "accuracy"].notna().sum().item(), 3


@erratum(AP, "fault", "networks that can be made, of ResNet-20 and VGG16", 'resnet_20.py, arch_type "vgg16"')
def vgg_not_imported() -> Figures:
    """--arch_type vgg16 asks a module that is nowhere imported (another one, vgg, is): a NameError. The paper's VGG on
    CIFAR-10 can't come from the published driver."""
    imported, asked = {"resnet_3", "vgg"}, {"resnet20": "resnet_3", "vgg16": "vgg_initial"}
    return len(imported & set(asked.values())), len([create(name, width=0.125) for name in asked]), 2


@erratum(
    "torch.nn.utils.prune",
    "trap",
    "parameters left when half of 16 channels are pruned",
    "torch 2.13, called; pytorch issue 58846",
)
def nothing_smaller() -> Figures:
    """Pruning writes zeros and keeps every number, and a mask beside it: nothing gets smaller or faster. shrink cuts
    the channels out."""
    from torch.nn.utils import prune as torchs

    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3)).double().eval()
    torchs.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    x = pictures()
    small = shrink(net, x)
    assert off(net(x), small(x)) < EQUAL
    return numbers(net), numbers(small), 8 * 3 * 9 + 8 * 8 * 9 + 8

"""Errata of merging and fusing: Layer Folding's code, depth compression's, torch's."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linl.faults import EQUAL, Figures, batchnorm, convolutions, erratum, off, pictures, tested, two
from linl.folding import fold
from linl.models import create
from linl.padding import pad_first
from linl.recipes import recipe
from linl.train import fit
from linl.units import linearize, nonlinearity

FOLDING = "Layer Folding (LayerFolding/Layer-Folding)"


def _kernel_by_gradient(net: nn.Module, channels: int, size: int) -> nn.Conv2d:
    """One convolution from the gradient of the middle output at an image of zeros, a channel at a time."""
    x = torch.zeros(1, channels, 13, 13, dtype=torch.float64, requires_grad=True)
    middle = net(x)[0, :, 6, 6]
    at, reach = 6, size // 2
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in middle]
    made = nn.Conv2d(channels, len(rows), size, padding=reach).double()
    made.weight.data = torch.stack(rows)[..., at - reach : at + reach + 1, at - reach : at + reach + 1].contiguous()
    made.bias.data = middle.detach()
    return made


@erratum(
    FOLDING, "fault", "difference of the merged convolution", "ResNet_Cifar10_postfold.py, VGG_Cifar10_postfold.py"
)
def border() -> Figures:
    """3×3 and 3×3 with padding become 5×5 with padding 2. Between the two, the original pads with zeros; the merged
    one sees the first convolution continued there. Inside they agree, on the outermost ring they don't: 12 % of 32×32
    outputs, 44 % of 8×8. Fine-tuning afterwards hides it. Here padding moves ahead first, and the merge is exact."""
    net, x = two(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)), pictures()
    published = _kernel_by_gradient(net, 3, 5)
    assert off(net(x), published(x), ring=1) < EQUAL
    padded = pad_first(net, x)
    small = fold(padded, x, objective="depth")
    assert convolutions(small) == 1
    return off(net(x), published(x)), off(padded(x), small(x)), 0


@erratum(FOLDING, "fault", "slopes of VGG16 that can be read", "VGG_Cifar10_postfold.py, its last lines")
def unread_slopes() -> Figures:
    """VGG's units are torch's PReLUs, whose slope is called weight; the script asks for alpha and stops, after 100
    epochs of tuning (if its first lines are mended, which stop it before: rate_not_set)."""
    published = [nn.PReLU(init=0) for _ in range(15)]
    ours = nonlinearity(linearize(create("vgg16", width=0.125), "partial"))
    return sum(hasattr(unit, "alpha") for unit in published), len(ours), 15


@erratum(
    FOLDING, "fault", "epochs of VGG16 that are trained, of 1", "VGG_Cifar10_prefold.py and VGG_Cifar10_postfold.py"
)
def rate_not_set() -> Figures:
    """Both scripts of VGG begin by printing their settings, the learning rate under a name that gets its value only
    further down: a NameError before the network is made. The published rows of VGG can't come from the published code;
    the scripts of ResNet set it first."""
    try:
        exec("told = f'rate {now}'; now = given; epochs = 1", found := {"given": 1e-3})
    except NameError:
        found["epochs"] = 0
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    data = dataclasses.replace(tested(images, labels, 2), train=(images, labels))
    net, settings = linearize(create("vgg16", num_classes=2, width=0.125), "partial"), recipe("layer-folding-vgg", 1)
    history = fit(net, data, settings, device="cpu", precision="fp32", verbose=False)
    return found["epochs"], len(history.metrics), 1


# --- others that merge and fuse ---------------------------------------------------------------------

DEPTH = "Efficient-CNN-Depth-Compression (snu-mllab)"


@erratum(DEPTH, "fault", "difference of the merged convolution, border left out", "models/model_op.py, conv_with_new")
def forgotten_stride() -> Figures:
    """The first convolution's stride is multiplied into the merged one's, but not into its kernel: after a stride of
    2, 3×3 and 3×3 are 7×7, not 5×5. The search leaves such pairs out; the function that merges doesn't refuse
    them."""
    first, second = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    net, x = nn.Sequential(first, second).double().eval(), pictures(24)
    kernel = F.conv2d(first.weight.transpose(0, 1), second.weight.flip(2, 3), padding=2).transpose(0, 1)
    published = F.conv2d(x, kernel, stride=2, padding=2)
    small = fold(net, x, border="interior", objective="depth")
    assert [tuple(m.kernel_size) for m in small.modules() if isinstance(m, nn.Conv2d)] == [(7, 7)]
    return off(net(x), published, ring=2), off(net(x), small(x), ring=2), 0


@erratum(DEPTH, "fault", "difference after merging a BatchNorm with eps = 0.001", "models/model_op.py, adjust_with_bn")
def fixed_eps() -> Figures:
    """BatchNorm's eps is written into the code as 1e-5. TensorFlow's networks (EfficientNet, MobileNet) have 1e-3,
    and channels of small variance come out larger by a factor."""
    conv, norm, x = nn.Conv2d(3, 8, 3, bias=False), batchnorm(8, eps=1e-3), pictures()
    norm.running_var.mul_(1e-3)
    net = nn.Sequential(conv, norm).double().eval()
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    published = F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale)
    return off(net(x), published), off(net(x), fold(net, x, objective="macs")(x)), 0


@erratum("DepthShrinker (facebookresearch)", "fault", "difference of the merged block", "models/efficientnet_blocks.py")
def fresh_weights() -> Figures:
    """A block is merged by putting a convolution of the right size in its place, with weights by chance: none are
    computed. Throughput is measured on that, accuracy on the network that isn't merged. Here an inverted residual
    block, 1×1, 3×3 by channel, 1×1, becomes one 3×3 that computes the same, its border included."""
    block = nn.Sequential(
        nn.Conv2d(3, 18, 1, bias=False), batchnorm(18),
        nn.Conv2d(18, 18, 3, padding=1, groups=18, bias=False), batchnorm(18),
        nn.Conv2d(18, 8, 1, bias=False), batchnorm(8),
    ).double().eval()  # fmt: skip
    x, published = pictures(), nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    small = fold(block, x, objective="depth")
    assert convolutions(small) == 1
    return off(block(x), published(x)), off(block(x), small(x)), 0


@erratum("DiverseBranchBlock (DingXiaoH)", "fault", "difference of the merged convolution", "issue 9 of its repository")
def bias_at_the_border() -> Figures:
    """1×1, BatchNorm and 3×3 with padding: the BatchNorm's shift goes into one bias a channel. At the border the
    original pads the shifted map with zeros, the merged one doesn't know. There is an exact merge: a bias of its own
    for each position."""
    net, x = two(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)), pictures()
    published = _kernel_by_gradient(net, 3, 3)
    small = fold(net, x, objective="depth")
    assert convolutions(small) == 1
    return off(net(x), published(x)), off(net(x), small(x)), 0


@erratum(
    "EASIER, LaCoOT",
    "gap",
    "convolutions in a row that are left of two",
    "the repositories; no line merges",
)
def depth_not_reduced() -> Figures:
    """Activations are found that can go, and the network is called shallower; but the activation is only replaced by
    an identity. As many layers run as before."""
    net, x = two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), pictures()
    small = fold(net, x, objective="depth")
    assert off(net(x), small(x)) < EQUAL
    return convolutions(net), convolutions(small), 1


class _Shared(nn.Module):
    """A convolution that is used with its BatchNorm and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), batchnorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


@erratum("torch.fx, experimental fuse", "fault", "difference after fusing", "torch 2.13, called; pytorch issue 197539")
def shared_convolution() -> Figures:
    """A convolution used twice, once with a BatchNorm behind it: the BatchNorm is fused into both uses. No
    warning."""
    from torch.fx.experimental.optimization import fuse

    net, x = _Shared().double().eval(), pictures()
    return off(net(x), fuse(net)(x)), off(net(x), fold(net, x, objective="macs")(x)), 0


@erratum(
    "torch.fx, experimental fuse",
    "fault",
    "BatchNorms left of 3",
    "torch 2.13 and timm 1.0, called; pytorch issue 122070",
)
def hidden_batchnorms() -> Figures:
    """timm's BatchNormAct2d is traced into a call of a function, which fuse doesn't look for: none of timm's
    MobileNets' and EfficientNets' BatchNorms are fused, and nothing is said."""
    from timm.layers import BatchNormAct2d
    from torch.fx.experimental.optimization import fuse

    sizes = itertools.pairwise((3, 4, 5, 6))
    net = nn.Sequential(*[m for a, b in sizes for m in (nn.Conv2d(a, b, 3, bias=False), BatchNormAct2d(b))]).eval()
    x = pictures().float()
    fused, small = fuse(net), fold(net, x, objective="macs")
    assert torch.allclose(small(x), net(x), atol=1e-5)
    left = sum("batch_norm" in str(node.target) for node in fused.graph.nodes)
    return left, sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()), 0


@erratum("RepVGG (DingXiaoH)", "trap", "difference after converting", "issue 9 of its repository, and six like it")
def converted_in_train_mode() -> Figures:
    """A network that is still in train mode is converted without a word: its BatchNorms used the batch, the merged
    ones use the running statistics. fold refuses a network in train mode, by name."""
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), batchnorm(8)).double().train(), pictures()
    seen, published = copy.deepcopy(net)(x), copy.deepcopy(net).eval()(x)
    try:
        fold(net, x)
    except ValueError:
        return off(seen, published), off(net.eval()(x), fold(net, x, objective="macs")(x)), 0
    raise AssertionError("fold took a network in train mode")

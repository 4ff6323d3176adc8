"""Published weights: files for a layout of ours, and archives that bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from linl.graph import evaluating
from linl.rewriting import neutral_norm


def load_weights_(net: nn.Module, path: str | Path) -> None:
    """Loads a file of weights into a network of the same layout.

    Understands safetensors and torch files (opened without running code), checkpoints that hold their
    weights under "state_dict" or "model", names with a leading "module.", and a head called "linear".

    Raises:
        FileNotFoundError, ValueError: no such file, or weights that don't fit, naming the first few.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = net.state_dict()
    state = {key.replace("linear.", "fc.") if "fc.weight" in own else key: value for key, value in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [
        f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if missing or unknown or wrong:
        parts = {"missing": missing, "unknown": unknown, "of another shape": wrong}
        told = "; ".join(f"{what}: {', '.join(keys[:3])} ({len(keys)})" for what, keys in parts.items() if keys)
        raise ValueError(f"{path.name} holds weights of another network: {told}")
    net.load_state_dict(state, strict=False)


# --- archives --------------------------------------------------------------------------------------


def is_archive(path: str | Path | None) -> bool:
    """Whether a file of weights is a numpy archive, which brings a layout of its own."""
    return path is not None and Path(path).suffix == ".npz"


def archived(name: str, num_classes: int, path: str | Path) -> nn.Module:
    """MobileNetV2 as TensorFlow has it, from int8 weights with their scales.

    The archive holds, for each layer of torchvision's network, `<name>.weight_q` (int8, OIHW),
    `<name>.weight_scale` (a number an output channel) and `<name>.bias`; its BatchNorms are folded in.
    TensorFlow pads a stride-2 convolution after the image only ("same"), so those get a padding layer of
    their own. Inputs are pixels / 127.5 − 1 (`normalize="half"`); output 0 is "background", the thousand
    classes follow in the order of their sorted names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another network than mobilenetv2, an archive of another network, or another number of
            classes than it has.
    """
    import numpy as np
    from torchvision.models import MobileNetV2

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if name != "mobilenetv2":
        raise ValueError(f"{path.name} is an archive of mobilenetv2's weights, not of {name}'s")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    layers = sorted(key.removesuffix(".weight_q") for key in arrays if key.endswith(".weight_q"))
    head = arrays.get("classifier.1.weight_q")
    if head is None or any(f"{layer}.{part}" not in arrays for layer in layers for part in ("weight_scale", "bias")):
        raise ValueError(f"{path.name} holds no weights of mobilenetv2: wanted *.weight_q, *.weight_scale and *.bias")
    if len(head) != num_classes:
        raise ValueError(f"{path.name} has {len(head)} classes, not {num_classes}: ask for those, then `only_classes_`")
    net = MobileNetV2(num_classes=len(head), norm_layer=_NoNorm)
    for layer in layers:
        module = net.get_submodule(layer)
        weight = arrays[f"{layer}.weight_q"].float()
        weight = weight * arrays[f"{layer}.weight_scale"].view(-1, *[1] * (weight.ndim - 1))
        module.weight = nn.Parameter(weight.reshape(module.weight.shape))
        module.bias = nn.Parameter(arrays[f"{layer}.bias"].float())
    _drop_norms(net)
    for owner in list(net.modules()):
        for key, child in list(owner.named_children()):
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                child.padding = (0, 0)
                setattr(owner, key, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), child))
    return net


class _NoNorm(nn.Identity):
    """In the place of a BatchNorm that the weights have taken in."""


def _drop_norms(net: nn.Module) -> None:
    for owner in net.modules():
        for key, child in list(owner.named_children()):
            if isinstance(child, _NoNorm):
                setattr(owner, key, nn.Identity())


@torch.no_grad()
def restore_norms_(net: nn.Module, images: Tensor) -> nn.Module:
    """Puts a BatchNorm back behind every convolution of an archived network; returns the network.

    An archive's BatchNorms are folded into its weights, and a network without any is hard to train further.
    Each new one has the statistics of its convolution's outputs on some images, and scale and shift that
    undo them: in evaluation the network computes what it did, in training it is normalized again.

    Args:
        net: with nn.Identity where BatchNorms were, right behind a convolution in an nn.Sequential.
        images: a batch for the statistics, the larger the better.
    """
    rows = [module for module in net.modules() if isinstance(module, nn.Sequential)]
    places = [
        (row, i)
        for row in rows
        for i in range(1, len(row))
        if type(row[i]) is nn.Identity and _ends_in_conv(row[i - 1])
    ]
    outputs: dict[int, Tensor] = {}
    hooks = [
        owner[i].register_forward_hook(lambda _, inputs, y, n=n: outputs.__setitem__(n, torch.var_mean(y, (0, 2, 3))))
        for n, (owner, i) in enumerate(places)
    ]
    with evaluating(net):
        net(images)
    for hook in hooks:
        hook.remove()
    for n, (owner, i) in enumerate(places):
        variance, mean = outputs[n]
        owner[i] = neutral_norm(mean, variance).train(owner.training)
    return net


def _ends_in_conv(module: nn.Module) -> bool:
    return isinstance(list(module.modules())[-1], nn.Conv2d)


def only_classes_(net: nn.Module, classes: Sequence[int]) -> nn.Module:
    """Keeps some outputs of a network's last dense layer, in the order given; returns the network.

    Args:
        net: changed.
        classes: numbers of the outputs that stay.

    Raises:
        ValueError: no dense layer, or a number that it has no output for.
    """
    name, head = next(((n, m) for n, m in reversed(list(net.named_modules())) if isinstance(m, nn.Linear)), ("", None))
    if head is None:
        raise ValueError(f"{type(net).__name__} has no dense layer to take classes from")
    if not classes or not all(0 <= c < head.out_features for c in classes):
        raise ValueError(f"classes {list(classes)}: {name} has outputs 0 to {head.out_features - 1}")
    index = torch.tensor(list(classes))
    small = nn.Linear(head.in_features, len(index), head.bias is not None)
    small.weight = nn.Parameter(head.weight.detach()[index].clone())
    if head.bias is not None:
        small.bias = nn.Parameter(head.bias.detach()[index].clone())
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner) if owner else net, leaf, small)
    net.num_classes = len(index)
    return net


IMAGENETTE: dict[str, int] = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip
"""Imagenette's ten classes and their numbers among ImageNet's thousand."""

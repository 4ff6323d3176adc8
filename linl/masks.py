"""Masks on the weights of layers: torch.nn.utils.prune's own, in a form that can be copied and trained.

A masked layer holds the parameter `weight_orig` and the buffer `weight_mask` (1 live, 0 pruned); before every forward
pass its `weight` becomes their product. What an optimizer does to a pruned weight (momentum, decay) never shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from linl.graph import clone

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Whose weights are pruned. Biases never are, nor weights of norms, embeddings, activations."""


class Mask(torch_prune.CustomFromMask):
    """torch's mask, for a layer that can be deep-copied after a forward pass in training as well.

    torch leaves the product of that pass in the layer, a part of a graph, which torch refuses to copy: a copy gets its
    value.
    """

    made: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        super().__call__(module, inputs)
        self.made = module.weight

    def __deepcopy__(self, memo: dict) -> Mask:
        twin = memo[id(self)] = Mask(None)
        twin._tensor_name = self._tensor_name
        if self.made is not None:  # torch copies a module's hooks before the attributes that were added later
            memo[id(self.made)] = self.made.detach().clone()
        return twin

    def __getstate__(self) -> dict:
        return {**self.__dict__, "made": None}


def prunable(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are pruned, by name: all dense and convolutional ones.

    Left out: the output layer inside `nn.MultiheadAttention`, whose weight is read past its hooks.

    Args:
        net: any network.

    Raises:
        ValueError: no such layer; a weight that two layers share, or that is computed from others, by name.
    """
    hidden = {id(m.out_proj) for m in net.modules() if isinstance(m, nn.MultiheadAttention)}
    found = {n: m for n, m in net.named_modules() if isinstance(m, LAYERS) and id(m) not in hidden}
    if not found:
        raise ValueError(f"{type(net).__name__} has no dense or convolutional layer: nothing to prune")
    owners: dict[int, str] = {}
    for name, layer in found.items():
        raw = layer._parameters.get("weight_orig" if is_masked(layer) else "weight")
        if raw is None or isinstance(raw, nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"{name} has no weight of its own (weight_norm, spectral_norm, a parametrization, a lazy layer): make "
                "it a plain parameter first"
            )
        other = owners.setdefault(id(raw), name)
        if other != name:
            raise ValueError(f"{other} and {name} share one weight, which can't have two masks: untie them first")
    return found


def is_masked(layer: nn.Module) -> bool:
    """Whether a layer's weight is under a mask."""
    return "weight_orig" in layer._parameters and "weight_mask" in layer._buffers


def masked_layers(net: nn.Module) -> list[str]:
    """Names of the layers under a mask."""
    return [name for name, module in net.named_modules() if is_masked(module)]


def raw_weight(layer: nn.Module) -> nn.Parameter:
    """The parameter that is trained: a layer's weight before the mask."""
    return layer.weight_orig if is_masked(layer) else layer.weight


def masks_of(net: nn.Module) -> dict[str, Tensor]:
    """Which weights are live; all of them where there is no mask.

    Args:
        net: with dense or convolutional layers.

    Returns: a bool tensor of the weight's shape for each layer, by its name.

    Raises:
        ValueError: as `prunable`.
    """
    return {
        name: layer.weight_mask != 0 if is_masked(layer) else torch.ones_like(layer.weight, dtype=torch.bool)
        for name, layer in prunable(net).items()
    }


@torch.no_grad()
def mask_(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts masks on a network's layers, in place; those it has are replaced.

    Args:
        net: changed.
        masks: as from `masks_of`, a mask for every layer.

    Raises:
        ValueError: masks of other layers or shapes.
    """
    layers = prunable(net)
    odd = sorted(set(layers) ^ set(masks)) or [n for n, m in masks.items() if m.shape != raw_weight(layers[n]).shape]
    if odd:
        raise ValueError(f"the masks don't fit {type(net).__name__}: {odd[0]} differs in name or shape")
    for name, layer in layers.items():
        if is_masked(layer):
            layer.weight_mask.copy_(masks[name])
            layer.weight = layer.weight_orig * layer.weight_mask
        else:
            Mask.apply(layer, "weight", masks[name].to(layer.weight.device))
            _forget_second_copy(layer)


def _forget_second_copy(layer: nn.Module) -> None:
    """torch keeps the mask in the hook too, where no `.to` and no checkpoint reaches it; the layer's own is used."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, Mask):
            hook.mask = None


def harden_masks(net: nn.Module) -> nn.Module:
    """A copy whose masks are permanent: pruned weights are zeros in ordinary parameters.

    `fold`, `analyse` and whatever reads weights want this form; it trains like any network, so that pruned weights may
    come back.

    Args:
        net: masked by `prune`, `mask_` or torch.nn.utils.prune, or not at all; left alone.
    """
    net = clone(net)
    for module in net.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                torch_prune.remove(module, hook._tensor_name)
    return net


def refuse_masks(net: nn.Module) -> None:
    """
    Raises:
        ValueError: masks that aren't permanent yet.
    """
    masked = masked_layers(net)
    if masked:
        raise ValueError(f"{len(masked)} layers are under masks: call linl.harden_masks(net) first")

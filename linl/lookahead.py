"""The layers around a layer, for lookahead pruning (Park et al., ICLR 2020, arXiv 2002.04809).

A weight that leads from channel j to channel k is worth |w|·‖what leads into j‖·‖what leads out of k‖, Frobenius norms
of the neighbouring layers' weights (section 2, eq. 4). For convolutions the norms go over the kernel as well, and a
BatchNorm's factor γ/√(variance + ε) counts with the layer before it (section 2.3). Where the published code lists the
neighbours of each network by hand, here they are found in its graph, by the same rules: of several neighbours the
squares are added; a shortcut without a layer counts as a neighbour of norm 1; so does the network's input, its output,
and whatever mixes channels in another way (a LayerNorm, attention).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from linl.calls import SUMS
from linl.graph import input_of, is_norm_act
from linl.masks import LAYERS
from linl.sites import activation_sites

_PASSES = {torch.flatten, torch.reshape, torch.mean, "flatten", "reshape", "view", "mean", "contiguous"}
_PASSING = (
    nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


class Lookahead:
    """The neighbours of every layer of a traced network in eval mode."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.modules = dict(traced.named_modules())
        self.bends = {site.node for site in activation_sites(traced)}
        self.calls: dict[str, list[fx.Node]] = {}
        for node in traced.graph.nodes:
            if node.op == "call_module" and isinstance(self.modules[node.target], LAYERS):
                self.calls.setdefault(node.target, []).append(node)

    def score(self, name: str) -> Tensor:
        """|w|·‖before‖·‖after‖ of every weight of a layer; of one that is called at several places, the sum."""
        layer = self.modules[name]
        inputs, outputs = _channels(layer)
        total = torch.zeros_like(layer.weight)
        for node in self.calls.get(name, []):
            before = _matched(self._before(input_of(node), inside=False), inputs, layer.weight)
            after = _matched(self._after(node, bent=False), outputs, layer.weight)
            total += _per_weight(layer, before.sqrt(), after.sqrt())
        return total

    def _before(self, value: object, inside: bool) -> Tensor:
        """Squares of what leads into a value's channels, () or (channels,); `inside` a sum, up to its own branch."""
        module = self.modules.get(value.target) if isinstance(value, fx.Node) and value.op == "call_module" else None
        if isinstance(module, LAYERS):
            return _squares(module)[1]
        if value in self.bends and inside:
            return torch.ones(())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            return _times(self._before(input_of(value), inside), _factor(module))
        if getattr(value, "target", None) in SUMS and not inside:
            terms = [self._before(operand, inside=True) for operand in value.all_input_nodes]
            return _added(terms)
        return self._before(input_of(value), inside) if self._passes(value, module) else torch.ones(())

    def _after(self, value: fx.Node, bent: bool) -> Tensor:
        """Squares of what leads out of a value's channels; `bent`: an activation or a sum lies in between already."""
        return _added([self._towards(reader, bent) for reader in value.users])

    def _towards(self, reader: fx.Node, bent: bool) -> Tensor:
        module = self.modules.get(reader.target) if reader.op == "call_module" else None
        if isinstance(module, LAYERS):
            return _squares(module)[0]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            return _times(self._after(reader, bent or is_norm_act(module)), _factor(module))
        if reader in self.bends:
            return self._after(reader, True)
        if reader.target in SUMS and not bent:
            return self._after(reader, True)
        return self._after(reader, bent) if self._passes(reader, module) else torch.ones(())

    def _passes(self, node: object, module: nn.Module | None) -> bool:
        if not isinstance(node, fx.Node):
            return False
        return node in self.bends or isinstance(module, _PASSING) or node.target in _PASSES


def _channels(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _by_group(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (groups, outputs of a group, inputs of a group, kernel)."""
    inputs, outputs = _channels(layer)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.reshape(groups, inputs // groups, outputs // groups, -1).transpose(1, 2)
    return weight.reshape(groups, outputs // groups, inputs // groups, -1)


def _squares(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Sums of squared weights by input and by output channel."""
    squares = _by_group(layer, layer.weight.detach().double() ** 2)
    return squares.sum((1, 3)).flatten(), squares.sum((2, 3)).flatten()


def _per_weight(layer: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """|w| times a number of its input channel and one of its output channel, in the weight's own shape."""
    scaled = _by_group(layer, layer.weight.detach().abs())
    groups, outputs, inputs, _ = scaled.shape
    scaled = scaled * before.view(groups, 1, inputs, 1) * after.view(groups, outputs, 1, 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        scaled = scaled.transpose(1, 2)
    return scaled.reshape(layer.weight.shape)


def _factor(norm: nn.Module) -> Tensor:
    squares = 1 / (norm.running_var.double() + norm.eps)
    return squares if norm.weight is None else squares * norm.weight.detach().double() ** 2


def _matched(squares: Tensor, channels: int, like: Tensor) -> Tensor:
    """Numbers of an image's channels for its flattened positions, or of these for the channels; (channels,)."""
    squares = squares.to(device=like.device, dtype=torch.float64)
    count = squares.numel()
    if count < channels and channels % count == 0:
        return squares.reshape(-1).repeat_interleave(channels // count)
    if count > channels and count % channels == 0:
        return squares.view(channels, -1).sum(1)
    return squares if count == channels else torch.ones(channels, dtype=torch.float64, device=like.device)


def _times(squares: Tensor, factor: Tensor) -> Tensor:
    return _matched(squares, len(factor), factor) * factor


def _added(terms: list[Tensor]) -> Tensor:
    """The sum over neighbours; 0 where there is none."""
    vectors = [term for term in terms if term.ndim]
    if not vectors:
        return sum(terms, torch.zeros(()))
    fewest = min(len(vector) for vector in vectors)
    return sum(_matched(t, fewest, vectors[0]) if t.ndim else t.to(vectors[0]) for t in terms)

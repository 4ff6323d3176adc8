"""A network read channel by channel: which channels go together, and which hold one constant.

Channels of different values go together if an operation takes one to the other (an activation, a pool), adds them (a
shortcut) or spreads one over several (a flattening): either all of them can be cut out or none. A channel is constant
if it has one value at every position for every input: no weight reads anything, or only constants.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.affine import batchnorm
from linl.calls import DIFFERENCES, IN_PLACE, SUMS, works_in_place
from linl.graph import attribute, input_of, is_activation, is_norm_act
from linl.obstacles import shared_names


@dataclass
class Value:
    """The channels of one value.

    Attributes:
        ids: a number for each, (C,); `Channels.classes` tells which go together.
        axis: where they are.
        constant: float64 (C,), nan where a channel isn't constant.
        whole: whether nothing of it is cut along any axis.
    """

    ids: Tensor
    axis: int
    constant: Tensor
    whole: bool = False

    @property
    def is_constant(self) -> Tensor:
        """Which are, bool (C,)."""
        return ~self.constant.isnan()


@dataclass
class Layer:
    """A dense layer or convolution that channels can be cut from.

    Attributes:
        node: its call.
        module: itself.
        source, value: what it reads and gives.
        padded: whether zeros are put around what it reads.
    """

    node: fx.Node
    module: nn.Module
    source: Value
    value: Value
    padded: bool

    @property
    def groups(self) -> int:
        """Of its channels; 1 for a dense layer."""
        return getattr(self.module, "groups", 1)

    def weight(self) -> Tensor:
        """Its weight, float64, as (outputs, inputs, kernel): 0 between groups."""
        weight = self.module.weight.detach().double().cpu()
        weight = weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1)
        whole = weight.new_zeros(self.groups, weight.shape[1], self.groups, *weight.shape[2:])
        at = torch.arange(self.groups)
        whole[at, :, at] = weight
        return whole.reshape(len(self.value.ids), len(self.source.ids), -1)

    def lost_at_border(self) -> Tensor:
        """Inputs that are constant and yet reach the outputs as something else, near the border; bool (inputs,)."""
        return self.source.is_constant & (self.source.constant != 0) & self.padded


class Channels:
    """The channels of every value of a traced network in eval mode.

    Attributes:
        values: by node.
        layers: in the order of the forward pass.
        classes: by channel number, which channels go together, (n,).
        fixed: by class, whether it must stay: the input, the output, what is mixed in an unknown way; bool.
        by_channel: modules with a number for each channel (norms, activations), and their value.
        pads: calls that add channels of zeros, and their value.
        sums: additions of two values.
        attributes: names of parameters that are added or multiplied by channel, and their value.
        notes: by node, why its channels must stay.
    """

    def __init__(self, traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
        self.traced, self.known = traced, known
        self.modules, self.shared = dict(traced.named_modules()), shared_names(traced)
        self.values: dict[fx.Node, Value] = {}
        self.layers: list[Layer] = []
        self.by_channel: list[tuple[nn.Module, Value]] = []
        self.pads: list[tuple[fx.Node, Value]] = []
        self.sums: list[fx.Node] = []
        self.attributes: list[tuple[str, Value]] = []
        self.notes: dict[fx.Node, str] = {}
        self._count, self._held, self._edges = 0, [], []
        for node in traced.graph.nodes:
            self._take(node)
        self.classes = self._together()
        self.fixed = torch.zeros(int(self.classes.max()) + 1 if self._count else 0, dtype=torch.bool)
        for ids in self._held:
            self.fixed[self.classes[ids]] = True

    def _together(self) -> Tensor:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = torch.cat([torch.stack(edge) for edge in self._edges], 1) if self._edges else torch.zeros(2, 0).long()
        graph = coo_array((torch.ones(pairs.shape[1]).numpy(), pairs.numpy()), shape=(self._count, self._count))
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()

    # --- values --------------------------------------------------------------------------------------

    def _fresh(self, count: int, axis: int = 1, constant: Tensor | None = None) -> Value:
        ids = torch.arange(self._count, self._count + count)
        self._count += count
        return Value(ids, axis, torch.full((count,), math.nan, dtype=torch.float64) if constant is None else constant)

    def _hold(self, value: Value) -> None:
        self._held.append(value.ids)

    def _untouched(self, node: fx.Node, axis: int) -> Value:
        """A value all of whose channels stay, looked at along an axis."""
        found = self._fresh(self.known[node][axis] if len(self.known[node]) > axis else 0, axis)
        found.whole = True
        self._hold(found)
        return found

    def _take(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if n in self.values]
        if node.op == "get_attr":
            return  # whoever reads it decides
        if node.op == "output" or (node not in self.known and not _asks_for_the_batch(node)):
            for source in sources:
                self._hold(self.values[source])
        if node.op == "output" or node not in self.known:
            return
        try:
            found = None if node.op == "placeholder" else self._rule(node)
            why = f"no rule for {self._told(node)}"
        except _MustStay as reason:
            found, why = None, str(reason)
        if found is None:  # nothing is known of what it does with channels
            for source in sources:
                self._hold(self.values[source])
            found = self._untouched(node, 1)
            if sources:
                self.notes[node] = why
        self.values[node] = found
        if node.target in IN_PLACE or works_in_place(self.modules.get(node.target), node):
            self.values[input_of(node)] = found  # whoever reads it from here on sees it changed

    def _told(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[node.target]).__name__})"
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def _rule(self, node: fx.Node) -> Value | None:
        if node.op != "call_module":
            rule = _CALLS.get(node.target)
            return rule(self, node) if rule else None
        module = self.modules[node.target]
        source = self.values.get(input_of(node))
        if source is None or len(node.all_input_nodes) != 1:
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            raise _MustStay("a layer with a hook on it")
        if node.target in self.shared and next(module.parameters(), None) is not None:
            raise _MustStay(self.shared[node.target])
        if is_activation(module):
            return self._bent(module, source)
        rule = next((rule for kind, rule in _MODULES.items() if isinstance(module, kind)), None)
        rule = _BY_NAME.get(type(module).__name__, rule)
        return rule(self, node, module, source) if rule else None

    # --- modules -------------------------------------------------------------------------------------

    def _conv(self, node: fx.Node, module: nn.Module, source: Value) -> Value | None:
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and type(module).__name__ != "Conv2dSame":
            return None
        if source.axis != 1 or len(self.known[node]) != module.weight.ndim:
            return None
        none = (0,) * len(module.kernel_size)
        at_all = "valid" if isinstance(module.padding, str) else none
        padded = module.padding_mode == "zeros" and module.padding != at_all
        return self._layer(node, module, source, 1, padded or type(module).__name__ == "Conv2dSame")

    def _dense(self, node: fx.Node, module: nn.Module, source: Value) -> Value | None:
        last = len(self.known[node]) - 1
        if source.whole:
            source = self._untouched(input_of(node), last)
        if type(module) is not nn.Linear or source.axis != last:
            return None
        return self._layer(node, module, source, last, padded=False)

    def _layer(self, node: fx.Node, module: nn.Module, source: Value, axis: int, padded: bool) -> Value:
        made = Layer(node, module, source, self._fresh(len(module.weight), axis), padded)
        weight = made.weight()
        blurred = ~source.is_constant | made.lost_at_border()
        value = weight.sum(2) @ source.constant.nan_to_num()
        if module.bias is not None:
            value = value + module.bias.detach().double().cpu()
        value[(weight != 0).any(2)[:, blurred].any(1)] = math.nan
        made.value.constant = value
        self.layers.append(made)
        return made.value

    def _norm(self, node: fx.Node, module: nn.Module, source: Value) -> Value | None:
        if source.axis != 1 or module.running_mean is None:
            return None
        layer = batchnorm(module.running_mean, module.running_var, module.eps, module.weight, module.bias, 0)
        factor, shift = layer.weight.flatten().detach().cpu(), layer.bias.detach().cpu()
        constant = torch.where(factor == 0, 0.0, source.constant * factor) + shift
        value = Value(source.ids, 1, constant)
        self.by_channel.append((module, value))
        return self._bent(module.act, value) if is_norm_act(module) else value

    def _bent(self, module: nn.Module, source: Value) -> Value | None:
        """An activation, on each constant."""
        if any(t.numel() > 1 for t in [*module.parameters(), *module.buffers()]):
            if source.axis != 1:
                return None
            self.by_channel.append((module, source))
        wide = copy.deepcopy(module).double().cpu().eval()
        with torch.no_grad():
            bent = wide(source.constant.nan_to_num()[None])[0]
        return Value(source.ids, source.axis, torch.where(source.is_constant, bent, math.nan))

    def _same(self, node: fx.Node, module: nn.Module | None = None, source: Value | None = None) -> Value | None:
        """Every number stays, or goes where numbers of its channel were."""
        return source or self.values.get(input_of(node))

    def _average(self, node: fx.Node, module: nn.Module, source: Value) -> Value:
        padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        plain = not (any(padding) and module.count_include_pad) and not getattr(module, "divisor_override", None)
        return source if plain else self._zeros_stay(source)

    def _zeros_stay(self, source: Value) -> Value:
        return Value(source.ids, source.axis, torch.where(source.constant == 0, source.constant, math.nan))

    def _constant_pad(self, node: fx.Node, module: nn.Module, source: Value) -> Value | None:
        return self._padded(node, source, list(module.padding), module.value)

    def _padded(self, node: fx.Node, source: Value, sides: list, value: float | None) -> Value | None:
        dims = len(self.known[node]) - 2
        if source.axis != 1 or not all(isinstance(side, int) and side >= 0 for side in sides):
            return None
        if len(sides) <= 2 * dims:
            return self._zeros_stay(source) if not value else Value(source.ids, 1, source.constant * math.nan)
        if value or any(sides[: 2 * dims]) or len(sides) != 2 * dims + 2:
            return None
        zeros = [self._fresh(side, 1, torch.zeros(side, dtype=torch.float64)) for side in sides[-2:]]
        parts = (zeros[0], source, zeros[1])
        made = Value(torch.cat([p.ids for p in parts]), 1, torch.cat([p.constant for p in parts]))
        self.pads.append((node, made))
        return made

    # --- functions and methods -----------------------------------------------------------------------

    def _pad_call(self, node: fx.Node) -> Value | None:
        given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
        source = self.values.get(input_of(node))
        if source is None or given.get("mode", "constant") != "constant":
            return None
        return self._padded(node, source, list(given["pad"]), given.get("value"))

    def _flat(self, node: fx.Node, module: nn.Module | None = None, source: Value | None = None) -> Value | None:
        before, source = input_of(node), self._same(node)
        shape = self.known.get(before)
        if source is None or source.axis != 1 or self.known[node] != (shape[0], shape[1:].numel()):
            return None
        positions = shape[2:].numel()
        ids, constant = (t.repeat_interleave(positions) for t in (source.ids, source.constant))
        return Value(ids, 1, constant)

    def _mean(self, node: fx.Node) -> Value | None:
        source = self._same(node)
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if source is None or source.axis != 1 or dims is None:
            return None
        ndim = len(self.known[input_of(node)])
        averaged = {d % ndim for d in (dims if isinstance(dims, list | tuple) else [dims])}
        return source if min(averaged) > 1 else None

    def _sliced(self, node: fx.Node) -> Value | None:
        source, index = self._same(node), node.args[1]
        whole = slice(None, None, None)
        if source is None or source.axis != 1 or not isinstance(index, tuple) or len(index) < 3:
            return None
        return source if index[:2] == (whole, whole) and all(isinstance(i, slice) for i in index) else None

    def _joined(self, node: fx.Node) -> Value | None:
        parts = [self.values.get(n) for n in node.args[0]]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if any(p is None or p.axis != dim % len(self.known[node]) for p in parts):
            return None
        return Value(torch.cat([p.ids for p in parts]), parts[0].axis, torch.cat([p.constant for p in parts]))

    def _sum(self, node: fx.Node, sign: int = 1) -> Value | None:
        made = self._pair(node, lambda a, b: a + sign * b)
        if made is not None and len([n for n in node.all_input_nodes if n in self.values]) == 2:
            self.sums.append(node)
        return made

    def _product(self, node: fx.Node) -> Value | None:
        def product(a: Tensor, b: Tensor) -> Tensor:
            return torch.where((a == 0) | (b == 0), 0.0, a * b)

        return self._pair(node, product)

    def _pair(self, node: fx.Node, of: Callable[[Tensor, Tensor], Tensor]) -> Value | None:
        """Two values combined number by number, or one with a number or a parameter by channel."""
        if node.kwargs or len(node.args) != 2:
            return None
        like = next((self.values[a] for a in node.args if isinstance(a, fx.Node) and a in self.values), None)
        operands = [self._operand(a, like, node) for a in node.args]
        if like is None or any(o is None or o.axis != like.axis or len(o.ids) != len(like.ids) for o in operands):
            return None
        self._edges += [(like.ids, o.ids) for o in operands if o is not like]
        return Value(like.ids, like.axis, of(*(o.constant for o in operands)))

    def _operand(self, operand: object, like: Value | None, node: fx.Node) -> Value | None:
        if isinstance(operand, int | float) and like is not None:
            return Value(like.ids, like.axis, torch.full((len(like.ids),), float(operand), dtype=torch.float64))
        if not isinstance(operand, fx.Node) or like is None:
            return None
        if operand in self.values:
            spread = len(self.known[operand]) == len(self.known[node])  # of one position, over more of them, is well
            return self.values[operand] if spread else None
        if operand.op != "get_attr" or len(operand.users) != 1:
            return None
        tensor, from_last = attribute(self.traced, operand.target).detach(), len(self.known[node]) - like.axis
        alone = tensor.ndim >= from_last and tensor.numel() == tensor.shape[-from_last] == len(like.ids)
        uses = [n for n in self.traced.graph.nodes if n.op == "get_attr" and n.target == operand.target]
        if not alone or len(uses) != 1:
            return None
        made = self._fresh(len(like.ids), like.axis, tensor.flatten().double().cpu())
        self.attributes.append((operand.target, made))
        return made


class _MustStay(Exception):  # noqa: N818 - an answer, not a fault
    """Channels that can't be cut; the message says why."""


def _asks_for_the_batch(node: fx.Node) -> bool:
    """Whether a call asks for no more of a shape than the number of examples."""
    if node.target is getattr and node.args[1] == "shape":
        return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return node.target == "size" and node.args[1:] == (0,)


_MODULES: dict[type[nn.Module], Callable[..., Value | None]] = {
    nn.modules.conv._ConvTransposeNd: lambda channels, node, module, source: None,
    nn.modules.conv._ConvNd: Channels._conv,
    nn.Linear: Channels._dense,
    nn.modules.batchnorm._BatchNorm: Channels._norm,
    nn.Identity: Channels._same,
    nn.modules.dropout._DropoutNd: Channels._same,
    nn.modules.pooling._MaxPoolNd: Channels._same,
    nn.modules.pooling._AdaptiveMaxPoolNd: Channels._same,
    nn.modules.pooling._AdaptiveAvgPoolNd: Channels._same,
    nn.modules.pooling._AvgPoolNd: Channels._average,
    nn.modules.padding._ConstantPadNd: Channels._constant_pad,
    nn.Flatten: Channels._flat,
}
_BY_NAME = dict.fromkeys(("DropPath", "StochasticDepth", "FastAdaptiveAvgPool"), Channels._same)
_CALLS: dict[object, Callable[..., Value | None]] = {
    **dict.fromkeys(SUMS - DIFFERENCES, Channels._sum),
    **dict.fromkeys(DIFFERENCES, lambda channels, node: channels._sum(node, -1)),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), Channels._product),
    **dict.fromkeys((torch.mean, "mean"), Channels._mean),
    **dict.fromkeys(
        (F.max_pool1d, F.max_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "contiguous"),
        Channels._same,
    ),
    operator.getitem: Channels._sliced, torch.cat: Channels._joined, F.pad: Channels._pad_call,
    torch.flatten: Channels._flat,
}  # fmt: skip

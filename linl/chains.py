"""The linear runs of a traced network: which calls are affine, and which follow each other alone.

A chain is a maximal row of linear operations in which every value in between has one reader. Its links are
single operations (`Link`) or sums of branches that leave one value and meet again (`Fork`: a residual block
without activations). What can't be a link says why.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl import merge as algebra
from linl.graph import input_of, is_norm_act
from linl.merge import Affine, CannotMerge, Geometry, Padding, Size


@dataclass
class Link:
    """One linear operation.

    Attributes:
        nodes: its calls, in order; the last one gives its value.
        geometry: of its layer.
        size: spatial size of its input, () for features.
        layer: makes the record, in float64.
        kind: "conv" (a convolution or dense layer), "scale", "pool" or "copy".
        flat: whether its value is features, (N, F), although it read an image.
        last_axis: works on the last axis of (N, …, F), as a dense layer on tokens does.
    """

    nodes: list[fx.Node]
    geometry: Geometry
    size: Size
    layer: Callable[[], Affine]
    kind: str = "conv"
    flat: bool = False
    last_axis: bool = False

    @property
    def end(self) -> fx.Node:
        """The node that gives its value."""
        return self.nodes[-1]

    @property
    def source(self) -> fx.Node:
        """The node it reads."""
        return input_of(self.nodes[0])

    @property
    def readers(self) -> set[fx.Node]:
        """Its calls that read the source."""
        return {self.nodes[0]}


@dataclass
class Fork:
    """Σ of branches that read one value; an empty branch is that value itself.

    Attributes:
        end: the addition.
        branches: links from the source to the addition.
        signs: of each branch, 1 or −1.
        size, channels: of the source.
        last_axis: as in `Link`.
    """

    end: fx.Node
    branches: list[list[Link | Fork]]
    signs: list[int]
    size: Size
    channels: int
    last_axis: bool = False
    flat: bool = False

    @property
    def source(self) -> fx.Node:
        """The value that all branches read."""
        return next((branch[0].source for branch in self.branches if branch), self.end.args[0])

    @property
    def nodes(self) -> list[fx.Node]:
        """Every call inside, the addition last."""
        return [node for branch in self.branches for link in branch for node in link.nodes] + [self.end]

    @property
    def readers(self) -> set[fx.Node]:
        """Calls inside that read the source."""
        return {node for branch in self.branches for node in (branch[0].readers if branch else {self.end})}


@dataclass
class Chain:
    """A maximal linear run: links in order, all single readers of what is before them."""

    links: list[Link | Fork]

    @property
    def source(self) -> fx.Node:
        """The node that the run reads."""
        return self.links[0].source

    @property
    def end(self) -> fx.Node:
        """The node that gives its value."""
        return self.links[-1].end


@dataclass
class Chains:
    """All linear runs of a network.

    Attributes:
        chains: in the order of the forward pass.
        reasons: for calls that are linear, or nearly, and yet no link: why.
    """

    chains: list[Chain]
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def find(traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> Chains:
    """The linear runs of a traced network in eval mode; `known` are the shapes of its values."""
    finder = _Finder(traced, known)
    chains, covered = [], set()
    for node in reversed(traced.graph.nodes):
        if node in covered or (element := finder.element(node)) is None:
            continue
        links = finder.trail(node, element)
        covered.update(n for link in links for n in link.nodes)
        chains.append(Chain(links))
    return Chains(chains[::-1], finder.reasons)


class _Finder:
    """The search, with what it has found so far."""

    def __init__(self, traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
        self.traced, self.known = traced, known
        self.modules = dict(traced.named_modules())
        self.shared = shared_names(traced)
        self.reasons: dict[fx.Node, str] = {}
        self.elements: dict[fx.Node, Link | Fork | None] = {}

    def element(self, node: fx.Node) -> Link | Fork | None:
        """The link or fork that gives a node's value."""
        if node not in self.elements:
            self.elements[node] = None
            if node.op.startswith("call") and node in self.known:
                try:
                    _refuse_aliases(node)
                    self.elements[node] = self._fork(node) if _is_sum(node) else self._link(node)
                except CannotMerge as reason:
                    self.reasons[node] = str(reason)
        return self.elements[node]

    def trail(self, value: fx.Node, element: Link | Fork | None) -> list[Link | Fork]:
        """The links that end in a value, from as far back as they go."""
        links: list[Link | Fork] = []
        while element is not None and (not links or element.last_axis == links[0].last_axis):
            links.insert(0, element)
            value = element.source
            if set(value.users) != element.readers:
                break
            element = self.element(value)
        return links

    def _link(self, node: fx.Node) -> Link | None:
        source = input_of(node)
        if not isinstance(source, fx.Node) or source not in self.known:
            return None
        if node.op == "call_module":
            return self._module_link(node, self.modules[node.target])
        if node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, node)
        return None

    # --- modules ---------------------------------------------------------------------------------

    def _module_link(self, node: fx.Node, module: nn.Module) -> Link | None:
        if type(module) is nn.Flatten:
            return self._flatten(node)
        make = next((make for kind, make in _MODULES.items() if isinstance(module, kind)), None)
        if make is None:
            if isinstance(module, _NEARLY) or type(module).__name__ in _NEARLY_NAMES:
                raise CannotMerge(f"{type(module).__name__} is no layer that can be merged")
            return None
        if node.target in self.shared:
            raise CannotMerge(self.shared[node.target])
        if module._forward_hooks or module._forward_pre_hooks:
            raise CannotMerge("a layer with a hook on it")
        if len(node.all_input_nodes) != 1:
            raise CannotMerge("a layer with further inputs")
        return make(self, node, module)

    def conv(self, node: fx.Node, module: nn.Module) -> Link:
        if type(module) not in _CONVS and type(module).__name__ != "Conv2dSame":
            raise CannotMerge(f"{type(module).__name__} is not one of torch's own convolutions")
        size = self.spatial(node)
        padding = _module_padding(module, size)
        options = (module.stride, padding, module.dilation, module.groups, module.padding_mode)
        geometry = algebra.conv_geometry(tuple(module.weight.shape), module.bias is not None, *options)
        return Link([node], geometry, size, lambda: algebra.conv(module.weight, module.bias, *options))

    def dense(self, node: fx.Node, module: nn.Module) -> Link:
        if type(module) is not nn.Linear:
            raise CannotMerge(f"{type(module).__name__} is not torch's own dense layer")
        geometry = Geometry(module.in_features, module.out_features, bias="none" if module.bias is None else "channel")
        made = partial(algebra.dense, module.weight, module.bias)
        return self.dense_link(node, geometry, made)

    def dense_link(self, node: fx.Node, geometry: Geometry, made: Callable[[], Affine]) -> Link:
        """A dense layer, together with the flattening before it where there is one."""
        last_axis = len(self.known[input_of(node)]) != 2
        before = input_of(node)
        if not last_axis and len(before.users) == 1 and (image := self._image_before(before)) is not None:
            channels, *size = self.known[image][1:]
            over = algebra.over_image(geometry, channels, tuple(size))
            return Link(
                [before, node], over, tuple(size), lambda: algebra.as_image_layer(made(), channels, size), flat=True
            )
        return Link([node], geometry, (), made, last_axis=last_axis)

    def batchnorm(self, node: fx.Node, module: nn.Module) -> Link:
        if module.running_mean is None:
            raise CannotMerge("BatchNorm without running statistics")
        if is_norm_act(module) and not isinstance(module.act, nn.Identity):
            raise CannotMerge("a norm with an activation inside")
        if type(module).__name__ not in _NORMS:
            raise CannotMerge(f"{type(module).__name__} is not a BatchNorm that can be merged")
        return self.norm_link(node, module.running_mean, module.running_var, module.eps, module.weight, module.bias)

    def norm_link(self, node: fx.Node, mean: Tensor, variance: Tensor, eps: float, weight, bias) -> Link:
        size = self.spatial(node)
        made = partial(algebra.batchnorm, mean, variance, eps, weight, bias, len(size))
        return Link([node], algebra.scale_geometry(len(mean), len(size)), size, made, "scale")

    def avg_pool(self, node: fx.Node, module: nn.Module) -> Link:
        return self.pool_link(
            node, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            getattr(module, "divisor_override", None),
        )  # fmt: skip

    def pool_link(self, node, kernel, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor=None):
        size, channels = self.spatial(node), self.known[node][1]
        kernel = algebra._each(kernel, len(size))
        stride = kernel if stride is None or stride == [] else algebra._each(stride, len(size))
        pairs = tuple((p, p) for p in algebra._each(padding, len(size)))
        geometry = algebra.pool_geometry(channels, kernel, stride, pairs)
        if geometry.output_size(size) != tuple(self.known[node][2:]):
            raise CannotMerge("an average pool with ceil_mode")
        if geometry.padded and not count_include_pad:
            raise CannotMerge("an average pool that leaves the padding out of its count")
        made = partial(algebra.average_pool, channels, kernel, stride, pairs, divisor)
        return Link([node], geometry, size, made, "pool")

    def adaptive_pool(self, node: fx.Node, module: nn.Module | None = None) -> Link:
        size, out = self.spatial(node), tuple(self.known[node][2:])
        if size == out:
            return self.copy_link(node, (1,) * len(size), ((0, 0),) * len(size))
        if any(n % m for n, m in zip(size, out, strict=True)):
            raise CannotMerge(f"an adaptive pool from {_by(size)} to {_by(out)} positions is no even average")
        kernel = tuple(n // m for n, m in zip(size, out, strict=True))
        return self.pool_link(node, kernel)

    def mean(self, node: fx.Node, dims, keepdim: bool) -> Link:
        shape = self.known[input_of(node)]
        wanted = {d % len(shape) for d in (dims if isinstance(dims, list | tuple) else [dims])}
        size = self.spatial(node)
        if not size or wanted != set(range(2, len(shape))):
            raise CannotMerge("a mean over other axes than the image's")
        made = partial(algebra.average_pool, shape[1], size, size, ((0, 0),) * len(size))
        geometry = algebra.pool_geometry(shape[1], size, size, ((0, 0),) * len(size))
        return Link([node], geometry, size, made, "pool", flat=not keepdim)

    def global_pool(self, node: fx.Node, module: nn.Module) -> Link | None:
        """timm's global pools; only the averaging ones are linear."""
        if type(module).__name__ == "FastAdaptiveAvgPool":
            return self.mean(node, (2, 3), not module.flatten)
        return None

    def zero_pad(self, node: fx.Node, module: nn.Module) -> Link:
        return self.pad_link(node, list(module.padding), getattr(module, "value", 0))

    def pad_link(self, node: fx.Node, pad, value=0) -> Link:
        size = self.spatial(node)
        if value or not all(isinstance(p, int) for p in pad):
            raise CannotMerge("padding with something else than zeros")
        pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]  # torch names the last axis first
        spatial = [(0, 0)] * (len(size) - len(pairs)) + pairs[-len(size) :]
        channels = pairs[-len(size) - 1] if len(pairs) > len(size) else (0, 0)
        if len(pairs) > len(size) + 1 or min(channels) < 0 or (len(pairs) > 0 and not size):
            raise CannotMerge("padding over another axis")
        if any(channels):
            if any(side for pair in spatial for side in pair):
                raise CannotMerge("padding over channels and positions at once")
            return self._more_channels(node, channels)
        return self.copy_link(node, (1,) * len(size), tuple(spatial))

    def copy_link(self, node: fx.Node, stride: Size, padding: Padding) -> Link:
        channels = self.known[node][1]
        geometry = algebra.copy_geometry(channels, stride, padding)
        return Link([node], geometry, self.spatial(node), lambda: algebra.copy(channels, stride, padding), "copy")

    def _more_channels(self, node: fx.Node, extra: tuple[int, int]) -> Link:
        """Channels of zeros around the given ones (He's option-A shortcut): a 1×1 layer of ones and zeros."""
        inputs, size = self.known[input_of(node)][1], self.spatial(node)
        weight = F.pad(torch.eye(inputs, dtype=torch.float64), (0, 0, *extra)).view(-1, inputs, *[1] * len(size))
        made = algebra.conv(weight)
        return Link([node], made.geometry, size, lambda: made, "copy")

    def factor(self, node: fx.Node, value: float) -> Link:
        """A constant factor on every channel."""
        channels, size = self.known[node][1], self.spatial(node)
        geometry = algebra.scale_geometry(channels, len(size), "none")
        made = lambda: algebra.scale(torch.full((channels,), float(value)), None, len(size))  # noqa: E731
        return Link([node], geometry, size, made, "scale")

    # --- views -----------------------------------------------------------------------------------

    def _flatten(self, node: fx.Node) -> Link | None:
        """Flattening an image of one position: its channels as features."""
        image = self._image_before(node)
        if image is None:
            return None
        channels, *size = self.known[image][1:]
        if math.prod(size) > 1:
            readers = [self.modules.get(user.target) for user in node.users if user.op == "call_module"]
            if len(node.users) > 1 or not readers or not isinstance(readers[0], nn.Linear):
                raise CannotMerge("a flattening that moves numbers about, with no dense layer right after it")
            return None  # the dense layer's link takes it in
        one, none = (1,) * len(size), ((0, 0),) * len(size)
        return Link(
            [node], algebra.copy_geometry(channels, one, none), one, lambda: algebra.copy(channels, one, none), "copy",
            flat=True,
        )  # fmt: skip

    def _image_before(self, node: fx.Node) -> fx.Node | None:
        """The image (N, C, *size) that a node flattens to (N, C·size); None if it does something else."""
        if not isinstance(node, fx.Node) or node not in self.known:
            return None
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if type(module) is not nn.Flatten and node.target not in (torch.flatten, torch.reshape, *_VIEWS):
            return None
        image = input_of(node)
        if image not in self.known or len(self.known[image]) < 3 or len(self.known[node]) != 2:
            return None
        n, *rest = self.known[image]
        return image if self.known[node] == (n, math.prod(rest)) else None

    # --- sums ------------------------------------------------------------------------------------

    def _fork(self, node: fx.Node) -> Fork | None:
        a, b = node.args[:2]
        if not all(isinstance(v, fx.Node) and v in self.known for v in (a, b)):
            raise CannotMerge("an addition of something that isn't computed from the input")
        if self.known[a] != self.known[b] or node.kwargs.get("alpha", 1) != 1:
            raise CannotMerge("an addition of different shapes")
        branches, sources = [], []
        for value in (a, b):
            alone = set(value.users) == {node} and a is not b
            links = self.trail(value, self.element(value)) if alone else []
            branches.append(links)
            sources.append(links[0].source if links else value)
        if sources[0] is not sources[1]:
            raise CannotMerge("an addition of values from different places")
        if any(link.flat for branch in branches for link in branch):
            raise CannotMerge("an addition of flattened branches")
        shape = self.known[sources[0]]
        last_axis = any(link.last_axis for branch in branches for link in branch)
        minus = node.target in (operator.sub, torch.sub, "sub", "sub_", operator.isub)
        size = () if last_axis else tuple(shape[2:])
        channels = shape[-1] if last_axis else shape[1]
        return Fork(node, branches, [1, -1 if minus else 1], size, channels, last_axis)

    def spatial(self, node: fx.Node) -> Size:
        """Spatial size of a call's input."""
        return tuple(self.known[input_of(node)][2:])


def _refuse_aliases(node: fx.Node) -> None:
    """An operation in place on a value that others read too changes it for them: it must stay."""
    in_place = node.target in _IN_PLACE or (isinstance(node.target, str) and node.target.endswith("_"))
    if node.op != "call_module" and in_place and len(getattr(input_of(node), "users", ())) > 1:
        raise CannotMerge("an operation in place on a value that is used elsewhere too")


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _by(size: Size) -> str:
    return "×".join(map(str, size))


def shared_names(traced: fx.GraphModule) -> dict[str, str]:
    """Modules that must stay as they are because something else uses them or their parameters: name to reason."""
    calls: dict[str, int] = {}
    owners: dict[int, set[str]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
            for tensor in traced.get_submodule(node.target).parameters():
                owners.setdefault(id(tensor), set()).add(node.target)
        elif node.op == "get_attr":
            owner, _, leaf = node.target.rpartition(".")
            holder = traced.get_submodule(owner) if owner else traced
            owners.setdefault(id(getattr(holder, leaf)), set()).add(f"the attribute {node.target}")
    reasons = {name: "a layer that is used more than once" for name, n in calls.items() if n > 1}
    for names in owners.values():
        if len(names) > 1:
            for name in names:
                others = ", ".join(sorted(names - {name}))
                reasons.setdefault(name, f"shared parameters: with {others}")
    return reasons


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d", "BatchNormAct1d",
          "FrozenBatchNorm2d")  # fmt: skip
_NEARLY = (nn.modules.conv._ConvTransposeNd, nn.Bilinear, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm,
           nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample,
           nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd, nn.LPPool2d)  # fmt: skip
_NEARLY_NAMES = ("Conv2dSame", "QuantizedConv2d", "FastAdaptiveAvgPool")
_VIEWS = ("view", "reshape", "flatten")

_MODULES: dict[type, Callable] = {
    nn.modules.conv._ConvTransposeNd: lambda finder, node, module: _refuse("a transposed convolution"),
    nn.modules.conv._ConvNd: _Finder.conv,
    nn.Linear: _Finder.dense,
    nn.modules.batchnorm._BatchNorm: _Finder.batchnorm,
    nn.AvgPool1d: _Finder.avg_pool, nn.AvgPool2d: _Finder.avg_pool, nn.AvgPool3d: _Finder.avg_pool,
    nn.AdaptiveAvgPool1d: _Finder.adaptive_pool, nn.AdaptiveAvgPool2d: _Finder.adaptive_pool,
    nn.AdaptiveAvgPool3d: _Finder.adaptive_pool,
    nn.modules.padding._ConstantPadNd: _Finder.zero_pad,
}  # fmt: skip


def _refuse(reason: str) -> None:
    raise CannotMerge(reason)


def _module_padding(module: nn.Module, size: Size) -> Padding:
    """(before, after) in each dimension, also for "same" and for TensorFlow's dynamic padding (timm)."""
    if type(module).__name__ == "Conv2dSame":  # as much as an output of ⌈n/stride⌉ needs, the odd one after
        pairs = []
        for n, k, s, d in zip(size, module.kernel_size, module.stride, module.dilation, strict=True):
            total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        return tuple(pairs)
    if isinstance(module.padding, str):
        flat = module._reversed_padding_repeated_twice
        return tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]
    return tuple((p, p) for p in module.padding)


# --- functions and methods -------------------------------------------------------------------------


def _is_sum(node: fx.Node) -> bool:
    return (
        node.target in _SUMS and len(node.all_input_nodes) >= 1 and all(isinstance(a, fx.Node) for a in node.args[:2])
    )


_SUMS = {operator.add, torch.add, operator.iadd, "add", "add_", operator.sub, torch.sub, "sub", "sub_", operator.isub}


def _bound(node: fx.Node, *names: str, **defaults) -> dict:
    """A call's arguments by name, after its first one."""
    given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "input"}
    return {**defaults, **given}


def _times(finder: _Finder, node: fx.Node) -> Link | None:
    a, b = (*node.args, *node.kwargs.values())[:2]
    if isinstance(a, numbers.Real):
        return None  # a number times a tensor has its tensor second: handled by `input_of` only for the first
    return finder.factor(node, b) if isinstance(b, numbers.Real) else None


def _divided(finder: _Finder, node: fx.Node) -> Link | None:
    b = (*node.args, *node.kwargs.values())[1]
    return finder.factor(node, 1 / b) if isinstance(b, numbers.Real) and b and not node.kwargs else None


def _negated(finder: _Finder, node: fx.Node) -> Link:
    return finder.factor(node, -1.0)


def _pool(finder: _Finder, node: fx.Node) -> Link:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = _bound(node, *names)
    given["divisor"], given["kernel"] = given.pop("divisor_override", None), given.pop("kernel_size")
    return finder.pool_link(node, **given)


def _mean(finder: _Finder, node: fx.Node) -> Link:
    given = _bound(node, "dim", "keepdim", keepdim=False)
    if "dim" not in given:
        raise CannotMerge("a mean over everything")
    return finder.mean(node, given["dim"], given["keepdim"])


def _pad(finder: _Finder, node: fx.Node) -> Link:
    given = _bound(node, "pad", "mode", "value", mode="constant", value=0)
    if given["mode"] != "constant":
        raise CannotMerge(f"{given['mode']} padding")
    return finder.pad_link(node, given["pad"], given["value"] or 0)


def _sliced(finder: _Finder, node: fx.Node) -> Link | None:
    """x[:, :, ::2, ::2]: every n-th position."""
    index = node.args[1]
    size = finder.spatial(node)
    whole = slice(None, None, None)
    if not isinstance(index, tuple) or len(index) != 2 + len(size) or not size:
        return None
    if any(i != whole for i in index[:2]) or not all(
        isinstance(i, slice) and i.start is None and i.stop is None for i in index
    ):
        return None
    stride = tuple(i.step or 1 for i in index[2:])
    return finder.copy_link(node, stride, ((0, 0),) * len(size)) if all(isinstance(s, int) for s in stride) else None


def _functional_norm(finder: _Finder, node: fx.Node) -> Link:
    given = _bound(
        node, "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", weight=None, bias=None,
        training=False, eps=1e-5,
    )  # fmt: skip
    values = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    if given["training"] or values[0] is None:
        raise CannotMerge("BatchNorm without running statistics")
    if not all(v is None or (isinstance(v, fx.Node) and v.op == "get_attr") for v in values):
        raise CannotMerge("a functional BatchNorm with computed arguments")
    mean, variance, weight, bias = (None if v is None else attribute(finder.traced, v.target) for v in values)
    return finder.norm_link(node, mean, variance, given["eps"], weight, bias)


def attribute(traced: fx.GraphModule, target: str):
    """What a `get_attr` node reads."""
    owner, _, leaf = target.rpartition(".")
    return getattr(traced.get_submodule(owner) if owner else traced, leaf)


_FUNCTIONS: dict = {
    operator.mul: _times, torch.mul: _times, "mul": _times, "mul_": _times, operator.imul: _times,
    operator.truediv: _divided, torch.div: _divided, "div": _divided, "div_": _divided,
    operator.itruediv: _divided,
    operator.neg: _negated, torch.neg: _negated, "neg": _negated,
    F.avg_pool1d: _pool, F.avg_pool2d: _pool, F.avg_pool3d: _pool,
    F.adaptive_avg_pool1d: lambda finder, node: finder.adaptive_pool(node),
    F.adaptive_avg_pool2d: lambda finder, node: finder.adaptive_pool(node),
    torch.mean: _mean, "mean": _mean, F.pad: _pad, operator.getitem: _sliced, F.batch_norm: _functional_norm,
    torch.flatten: _Finder._flatten, **dict.fromkeys(_VIEWS, _Finder._flatten), torch.reshape: _Finder._flatten,
}  # fmt: skip

"""Which calls of a traced network are affine layers, and which layer each is.

`Reader.link` answers for one call: a `Link`, None for what bends the signal, or `CannotMerge` for what is
linear, or nearly, and can't be taken in; its message says why.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl import affine
from linl.affine import Affine, CannotMerge, Geometry, Padding, Size
from linl.calls import DIFFERENCES, SUMS
from linl.constants import by_channel, read_by, reads_nothing, value_of, written
from linl.graph import attribute, input_of, is_norm_act
from linl.obstacles import is_hooked, is_plain_conv, norm_trouble, refuse_aliases, shared_names


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
        numbers: parameters that it has, where that isn't as its geometry says (a factor has none).
        last_axis: works on the last axis of (N, …, F), as a dense layer on tokens does.
        at: its geometry for another size, where that is another: a pool over all positions, padding that follows the
            size. It raises CannotMerge where there is none.
    """

    nodes: list[fx.Node]
    geometry: Geometry
    size: Size
    layer: Callable[[], Affine]
    kind: str = "conv"
    flat: bool = False
    last_axis: bool = False
    numbers: int | None = None
    at: Callable[[Size], Geometry] | None = None

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

    @property
    def reshapes(self) -> bool:
        """Whether it only turns the positions of an image into features."""
        return self.kind == "copy" and self.flat and math.prod(self.size) > 1


class Reader:
    """The calls of one network, read as layers."""

    def __init__(self, traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
        self.traced, self.known = traced, known
        self.modules = dict(traced.named_modules())
        self.shared, self.written = shared_names(traced), written(traced.graph)

    def link(self, node: fx.Node) -> Link | None:
        """The layer that a call is."""
        source = input_of(node)
        if not isinstance(source, fx.Node) or len(self.known.get(source, ())) < 2:  # no axis of channels
            return None
        refuse_aliases(node)
        if node.op == "call_module":
            return self._module_link(node, self.modules[node.target])
        if node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, node)
        return None

    # --- modules ---------------------------------------------------------------------------------

    def _module_link(self, node: fx.Node, module: nn.Module) -> Link | None:
        if type(module) is nn.Flatten:
            return self._flatten(node)
        kind = type(module)
        make = _MODULES_BY_NAME.get(kind.__name__) or next(
            (make for base, make in _MODULES.items() if isinstance(module, base)), None
        )
        if "quantized" in kind.__module__:
            raise CannotMerge(f"a quantized layer ({kind.__name__})")
        if make is None:
            if isinstance(module, _NEARLY):
                raise CannotMerge(f"{kind.__name__} in between")
            return None
        if node.target in self.shared:
            raise CannotMerge(self.shared[node.target])
        if any(t.is_complex() for t in module.parameters()):
            raise CannotMerge("complex weights")
        if is_hooked(module):
            raise CannotMerge("a layer with a hook on it")
        if len(node.all_input_nodes) != 1:
            raise CannotMerge("a layer with further inputs")
        return make(self, node, module)

    def conv(self, node: fx.Node, module: nn.Module) -> Link:
        if not is_plain_conv(module):
            raise CannotMerge(f"{type(module).__name__} is not one of torch's own convolutions")
        size = self.spatial(node)
        padding = _module_padding(module, size)
        if module.padding_mode != "zeros" and any(low != high for low, high in padding):
            raise CannotMerge(f"{module.padding_mode} padding, more on one side")
        mode = module.padding_mode if any(side for pair in padding for side in pair) else "zeros"
        options = (module.stride, padding, module.dilation, module.groups, mode)
        geometry = affine.conv_geometry(tuple(module.weight.shape), module.bias is not None, *options)
        made = partial(affine.conv, module.weight, module.bias, *options)
        same = type(module).__name__ == "Conv2dSame"
        at = (lambda size: replace(geometry, padding=_module_padding(module, size))) if same else None
        return Link([node], geometry, size, made, at=at)

    def dense(self, node: fx.Node, module: nn.Module) -> Link:
        if type(module) is not nn.Linear:
            raise CannotMerge(f"{type(module).__name__} is not torch's own dense layer")
        geometry = Geometry(module.in_features, module.out_features, bias="none" if module.bias is None else "channel")
        made = partial(affine.dense, module.weight, module.bias)
        return self.dense_link(node, geometry, made)

    def dense_link(self, node: fx.Node, geometry: Geometry, made: Callable[[], Affine]) -> Link:
        """A dense layer, together with the flattening before it where there is one."""
        last_axis = len(self.known[input_of(node)]) != 2
        before = input_of(node)
        if not last_axis and len(before.users) == 1 and (image := self._image_before(before)) is not None:
            channels, *size = self.known[image][1:]
            over = affine.over_image(geometry, channels, tuple(size))
            return Link(
                [before, node], over, tuple(size), lambda: affine.as_image_layer(made(), channels, size), flat=True
            )
        return Link([node], geometry, (), made, last_axis=last_axis)

    def batchnorm(self, node: fx.Node, module: nn.Module) -> Link:
        if is_norm_act(module) and not isinstance(module.act, nn.Identity):
            raise CannotMerge("a norm with an activation inside")
        if trouble := norm_trouble(module):
            raise CannotMerge(trouble)
        return self.norm_link(node, module.running_mean, module.running_var, module.eps, module.weight, module.bias)

    def norm_link(self, node: fx.Node, mean: Tensor, variance: Tensor, eps: float, weight, bias) -> Link:
        size = self.spatial(node)
        made = partial(affine.batchnorm, mean, variance, eps, weight, bias, len(size))
        numbers = sum(len(t) for t in (weight, bias) if t is not None)
        return Link([node], affine.scale_geometry(len(mean), len(size)), size, made, "scale", numbers=numbers)

    def avg_pool(self, node: fx.Node, module: nn.Module) -> Link:
        return self.pool_link(
            node, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            getattr(module, "divisor_override", None),
        )  # fmt: skip

    def pool_link(self, node, kernel, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor=None):
        size, channels = self.spatial(node), self.known[node][1]
        kernel = affine._each(kernel, len(size))
        stride = kernel if stride is None or stride == [] else affine._each(stride, len(size))
        pairs = tuple((p, p) for p in affine._each(padding, len(size)))
        geometry = affine.pool_geometry(channels, kernel, stride, pairs)
        if geometry.output_size(size) != tuple(self.known[node][2:]):
            raise CannotMerge("an average pool with ceil_mode")
        if geometry.padded and not count_include_pad:
            raise CannotMerge("an average pool that leaves the padding out of its count")
        made = partial(affine.average_pool, channels, kernel, stride, pairs, divisor)
        at = partial(affine.unrounded, geometry) if ceil_mode else None
        return Link([node], geometry, size, made, "pool", at=at)

    def adaptive_pool(self, node: fx.Node, module: nn.Module | None = None) -> Link:
        size, out = self.spatial(node), tuple(self.known[node][2:])
        at = partial(affine.adaptive_geometry, self.known[node][1], out)
        if size == out:
            return replace(self.copy_link(node, (1,) * len(size), ((0, 0),) * len(size)), at=at)
        return replace(self.pool_link(node, at(size).kernel), at=at)

    def mean(self, node: fx.Node, dims, keepdim: bool) -> Link:
        shape = self.known[input_of(node)]
        wanted = {d % len(shape) for d in (dims if isinstance(dims, list | tuple) else [dims])}
        size = self.spatial(node)
        if not size or wanted != set(range(2, len(shape))):
            raise CannotMerge("a mean over other axes than the image's")
        made = partial(affine.average_pool, shape[1], size, size, ((0, 0),) * len(size))
        at = lambda size: affine.pool_geometry(shape[1], size, size, ((0, 0),) * len(size))  # noqa: E731
        return Link([node], at(size), size, made, "pool", flat=not keepdim, at=at)

    def global_pool(self, node: fx.Node, module: nn.Module) -> Link:
        """timm's FastAdaptiveAvgPool."""
        return self.mean(node, (2, 3), not module.flatten)

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
        geometry = affine.copy_geometry(channels, stride, padding)
        return Link([node], geometry, self.spatial(node), lambda: affine.copy(channels, stride, padding), "copy")

    def _more_channels(self, node: fx.Node, extra: tuple[int, int]) -> Link:
        """Channels of zeros around the given ones (He's option-A shortcut): a 1×1 layer of ones and zeros."""
        inputs, size = self.known[input_of(node)][1], self.spatial(node)
        weight = F.pad(torch.eye(inputs, dtype=torch.float64), (0, 0, *extra)).view(-1, inputs, *[1] * len(size))
        made = affine.conv(weight)
        return Link([node], made.geometry, size, lambda: made, "copy")

    def factor(self, node: fx.Node, value: Tensor, shift: Tensor | None = None, **how) -> Link:
        """A constant factor on every channel, (C,), and a shift."""
        size = () if how.get("last_axis") else self.spatial(node)
        geometry = affine.scale_geometry(len(value), len(size), "none" if shift is None else "channel")
        return Link([node], geometry, size, partial(affine.scale, value, shift, len(size)), "scale", **how)

    def constant(self, node: fx.Node, operand: object) -> tuple[Tensor, dict] | None:
        """What a constant operand is to each channel of the other, (C,) in float64, and what `Link` is to be told
        of it; None where it is no constant.

        Raises:
            CannotMerge: it differs by position, the network changes it, or it is a parameter that something else uses.
        """
        if isinstance(operand, numbers.Real):
            return torch.full(self.known[node][1:2], float(operand), dtype=torch.float64), {"numbers": 0}
        if not reads_nothing(operand):
            return None
        value, (*_, held) = value_of(self.traced, operand), read_by(operand)
        told = by_channel(value, self.known[node]) if self.known[node] == self.known[input_of(node)] else None
        if told is None or value.is_complex():
            raise CannotMerge("a constant that isn't a number for each channel")
        if held.target in self.written:
            raise CannotMerge("a constant that the network changes")
        learnt = isinstance(attribute(self.traced, held.target), nn.Parameter)
        if learnt and (reason := self.shared.get(f"the attribute {held.target}")):
            raise CannotMerge(reason)
        return affine.wide(told[0]), {"numbers": value.numel() if learnt else 0, "last_axis": told[1]}

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
            [node], affine.copy_geometry(channels, one, none), one, lambda: affine.copy(channels, one, none), "copy",
            flat=True,
        )  # fmt: skip

    def view(self, node: fx.Node) -> Link | None:
        """Flattening an image of many positions, where no dense layer's link takes it in."""
        image = self._image_before(node)
        if image is None or len(node.users) != 1 or math.prod(self.known[image][2:]) == 1:
            return None
        (reader,) = node.users
        if reader.op == "call_module" and isinstance(self.modules[reader.target], nn.Linear):
            return None
        features, (channels, *size) = self.known[node][1], self.known[image][1:]
        geometry = affine.over_image(Geometry(features, features, bias="none"), channels, tuple(size))
        made = lambda: affine.as_image_layer(affine.dense(torch.eye(features, dtype=torch.float64)), channels, size)  # noqa: E731
        return Link([node], geometry, tuple(size), made, "copy", flat=True)

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

    def spatial(self, node: fx.Node) -> Size:
        """Spatial size of a call's input."""
        return tuple(self.known[input_of(node)][2:])


_NEARLY = (
    nn.Bilinear, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.LPPool2d,
    nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
)  # fmt: skip
"""Neither activations nor layers that can be merged: what stands between two runs."""

_MODULES_BY_NAME = {
    "FastAdaptiveAvgPool": Reader.global_pool,
    **dict.fromkeys(("LayerScale", "LayerScale2d"), lambda *found: _layer_scale(*found)),
}
_VIEWS = ("view", "reshape", "flatten")

_MODULES: dict[type, Callable] = {
    nn.modules.conv._ConvTransposeNd: lambda reader, node, module: _refuse("a transposed convolution"),
    nn.modules.conv._ConvNd: Reader.conv,
    nn.Linear: Reader.dense,
    nn.modules.batchnorm._BatchNorm: Reader.batchnorm,
    nn.AvgPool1d: Reader.avg_pool, nn.AvgPool2d: Reader.avg_pool, nn.AvgPool3d: Reader.avg_pool,
    nn.AdaptiveAvgPool1d: Reader.adaptive_pool, nn.AdaptiveAvgPool2d: Reader.adaptive_pool,
    nn.AdaptiveAvgPool3d: Reader.adaptive_pool,
    nn.modules.padding._ConstantPadNd: Reader.zero_pad,
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


def _bound(node: fx.Node, *names: str, **defaults) -> dict:
    """A call's arguments by name, after its first one."""
    given = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "input"}
    return {**defaults, **given}


def _times(reader: Reader, node: fx.Node) -> Link | None:
    found = reader.constant(node, (*node.args, *node.kwargs.values())[1])
    return found and reader.factor(node, found[0], **found[1])


def _divided(reader: Reader, node: fx.Node) -> Link | None:
    found = None if node.kwargs else reader.constant(node, node.args[1])
    if found is None or not found[0].all():  # nobody's layer divides by 0
        return None
    return reader.factor(node, 1 / found[0], **found[1])


def _shifted(reader: Reader, node: fx.Node) -> Link | None:
    """x + c and x − c; two values that are both computed are no link (but see `linl.chains.Fork`)."""
    found = None if node.kwargs or len(node.args) != 2 else reader.constant(node, node.args[1])
    if found is None:
        return None
    shift, how = found
    return reader.factor(node, torch.ones_like(shift), -shift if node.target in DIFFERENCES else shift, **how)


def _negated(reader: Reader, node: fx.Node) -> Link:
    return reader.factor(node, -torch.ones(reader.known[node][1], dtype=torch.float64), numbers=0)


def _layer_scale(reader: Reader, node: fx.Node, module: nn.Module) -> Link | None:
    """timm's factor for each channel, of an image or on the last axis."""
    refuse_aliases(node, module)
    last_axis = not type(module).__name__.endswith("2d") and len(reader.known[node]) > 2
    return reader.factor(node, module.gamma, numbers=len(module.gamma), last_axis=last_axis)


def _pool(reader: Reader, node: fx.Node) -> Link:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = _bound(node, *names)
    given["divisor"], given["kernel"] = given.pop("divisor_override", None), given.pop("kernel_size")
    return reader.pool_link(node, **given)


def _mean(reader: Reader, node: fx.Node) -> Link:
    given = _bound(node, "dim", "keepdim", keepdim=False)
    if "dim" not in given:
        raise CannotMerge("a mean over everything")
    return reader.mean(node, given["dim"], given["keepdim"])


def _pad(reader: Reader, node: fx.Node) -> Link:
    given = _bound(node, "pad", "mode", "value", mode="constant", value=0)
    if given["mode"] != "constant":
        raise CannotMerge(f"{given['mode']} padding")
    return reader.pad_link(node, given["pad"], given["value"] or 0)


def _sliced(reader: Reader, node: fx.Node) -> Link | None:
    """x[:, :, ::2, ::2]: every n-th position."""
    index = node.args[1]
    size = reader.spatial(node)
    whole = slice(None, None, None)
    if not isinstance(index, tuple) or len(index) != 2 + len(size) or not size:
        return None
    if any(i != whole for i in index[:2]) or not all(
        isinstance(i, slice) and i.start is None and i.stop is None for i in index
    ):
        return None
    stride = tuple(i.step or 1 for i in index[2:])
    return reader.copy_link(node, stride, ((0, 0),) * len(size)) if all(isinstance(s, int) for s in stride) else None


def _functional_norm(reader: Reader, node: fx.Node) -> Link:
    given = _bound(
        node, "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", weight=None, bias=None,
        training=False, eps=1e-5,
    )  # fmt: skip
    values = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    if given["training"] or values[0] is None:
        raise CannotMerge("BatchNorm without running statistics")
    if not all(v is None or (isinstance(v, fx.Node) and v.op == "get_attr") for v in values):
        raise CannotMerge("a functional BatchNorm with computed arguments")
    mean, variance, weight, bias = (None if v is None else attribute(reader.traced, v.target) for v in values)
    return reader.norm_link(node, mean, variance, given["eps"], weight, bias)


_FUNCTIONS: dict = {
    operator.mul: _times, torch.mul: _times, "mul": _times, "mul_": _times, operator.imul: _times,
    operator.truediv: _divided, torch.div: _divided, "div": _divided, "div_": _divided,
    operator.itruediv: _divided, **dict.fromkeys(SUMS, _shifted),
    operator.neg: _negated, torch.neg: _negated, "neg": _negated,
    F.avg_pool1d: _pool, F.avg_pool2d: _pool, F.avg_pool3d: _pool,
    F.adaptive_avg_pool1d: lambda reader, node: reader.adaptive_pool(node),
    F.adaptive_avg_pool2d: lambda reader, node: reader.adaptive_pool(node),
    torch.mean: _mean, "mean": _mean, F.pad: _pad, operator.getitem: _sliced, F.batch_norm: _functional_norm,
    torch.flatten: Reader._flatten, **dict.fromkeys(_VIEWS, Reader._flatten), torch.reshape: Reader._flatten,
}  # fmt: skip

"""A traced network put into the plain form that chains are found in, and planned steps put into its graph."""

from __future__ import annotations

import copy
import itertools
import operator

import torch
from torch import Tensor, fx, nn

from linl import affine
from linl.affine import Affine, Geometry, Size
from linl.chains import Fork
from linl.constants import read_by, reads_nothing
from linl.graph import free_name, holder_of, input_of, is_norm_act
from linl.obstacles import shared_names
from linl.operations import Link
from linl.planning import Step
from linl.units import FixedPartial, FixedTwoSlope

# --- the plain form --------------------------------------------------------------------------------


def plain_(traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
    """`open_`, and units' fixed forms in torch's own operations, for a network that is to load without linl."""
    open_(traced, known)
    for node in list(traced.graph.nodes):
        if isinstance(called(traced, node), FixedTwoSlope):
            _absorb_factor(traced, node)
    for node in list(traced.graph.nodes):
        if isinstance(called(traced, node), FixedTwoSlope | FixedPartial):
            _spell_out(traced, node, known)
    traced.recompile()


def open_(traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
    """Rewrites a network in eval mode, without changing what it computes, so that its linear runs lie open.

    Identities and dropout leave; views that flatten become `torch.flatten`; timm's norms with an activation
    inside become two calls.
    """
    for node in list(traced.graph.nodes):
        if _is_nothing(traced, node) or _moves_nothing(traced, node, known):
            node.replace_all_uses_with(input_of(node))
            traced.graph.erase_node(node)
        elif node.target in (operator.mul, torch.mul, operator.add, torch.add) and _constant_first(node):
            node.args = (node.args[1], node.args[0])
    _plain_views(traced, known)
    shared = shared_names(traced)
    for node in list(traced.graph.nodes):
        if is_norm_act(called(traced, node)) and node.target not in shared:
            _split_norm_act(traced, node, known)
    traced.recompile()


def called(traced: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls."""
    return traced.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


_NOTHINGS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NOTHING_NAMES = ("StochasticDepth", "DropPath", "DropBlock2d")


def _is_nothing(traced: fx.GraphModule, node: fx.Node) -> bool:
    """An identity, or what is one in evaluation."""
    module = called(traced, node)
    if module is not None:
        named = type(module).__name__ in _NOTHING_NAMES
        return (isinstance(module, _NOTHINGS) or named) and not module._forward_hooks and not module._forward_pre_hooks
    return node.op == "call_method" and node.target == "contiguous" and isinstance(input_of(node), fx.Node)


def _moves_nothing(traced: fx.GraphModule, node: fx.Node, known: dict[fx.Node, torch.Size]) -> bool:
    """Flattening or reshaping to the shape that is there already."""
    view = node.target in (torch.flatten, torch.reshape) or (
        node.op == "call_method" and node.target in ("view", "reshape", "flatten")
    )
    source = input_of(node)
    asks = any(isinstance(a, fx.Node) for a in node.args[1:])
    if not (view or type(called(traced, node)) is nn.Flatten) or source not in known or asks:
        return False
    return known.get(node) == known[source]


def _constant_first(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], fx.Node) or reads_nothing(node.args[1]):
        return False
    return isinstance(node.args[0], int | float) or reads_nothing(node.args[0])


def _plain_views(traced: fx.GraphModule, known: dict[fx.Node, torch.Size]) -> None:
    """x.view(x.size(0), -1) and its like: torch.flatten(x, 1), which asks x for nothing."""
    for node in list(traced.graph.nodes):
        source = input_of(node)
        if node.op != "call_method" or node.target not in ("view", "reshape") or source not in known:
            continue
        shape = known[source]
        if len(known[node]) == 2 and len(shape) > 2 and known[node] == (shape[0], shape[1:].numel()):
            if len(node.args) > 1 and node.args[1] == shape[0] and shape[0] != 1:
                continue  # a literal batch size: not what flatten does for another batch
            with traced.graph.inserting_before(node):
                flat = traced.graph.call_function(torch.flatten, (source, 1))
            known[flat] = known[node]
            node.replace_all_uses_with(flat)
            asked = [a for a in node.args[1:] if isinstance(a, fx.Node)]
            traced.graph.erase_node(node)
            _erase_unused(traced, asked)


def _erase_unused(traced: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Removes questions about shapes that nobody listens to any more."""
    for node in nodes:
        if not node.users and node.target in ("size", operator.getitem, getattr):
            before = [a for a in node.args if isinstance(a, fx.Node)]
            traced.graph.erase_node(node)
            _erase_unused(traced, before)


def _split_norm_act(traced: fx.GraphModule, node: fx.Node, known: dict[fx.Node, torch.Size]) -> None:
    """timm's BatchNorm with an activation inside becomes a BatchNorm and an activation."""
    module = called(traced, node)
    drop = getattr(module, "drop", None)
    if module.running_mean is None or not isinstance(drop, nn.Identity | nn.Dropout | None):
        return
    kind = nn.BatchNorm1d if "1d" in type(module).__name__ else nn.BatchNorm2d
    norm = kind(module.num_features, module.eps, affine=module.weight is not None, device="meta").eval()
    norm.weight, norm.bias = module.weight, module.bias
    norm.running_mean, norm.running_var = module.running_mean, module.running_var
    norm.num_batches_tracked = module.num_batches_tracked
    traced.add_submodule(node.target, norm)
    if isinstance(module.act, nn.Identity):
        return
    name = free_name(traced, f"{node.target}_act")
    traced.add_submodule(name, module.act)
    with traced.graph.inserting_after(node):
        act = traced.graph.call_module(name)
    node.replace_all_uses_with(act)
    act.args = (node,)
    known[act] = known[node]


def _absorb_factor(traced: fx.GraphModule, node: fx.Node) -> None:
    """positive·leaky(x) = leaky(positive·x): the factor joins the layer before, torch's own activation stays."""
    module, shared = called(traced, node), shared_names(traced)
    before = input_of(node)
    if node.target in shared or module.positive.ndim or module.positive.item() <= 0:
        return
    while isinstance(called(traced, before), nn.MaxPool1d | nn.MaxPool2d) and len(before.users) == 1:
        before = input_of(before)  # a positive factor passes through a max
    first = called(traced, before)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)
    if not isinstance(first, kinds) or before.target in shared or len(before.users) > 1 or is_norm_act(first):
        return
    if first._parameters.get("weight") is None or first._forward_hooks or first._forward_pre_hooks:
        return
    weight = first.weight.double() * module.positive.double()
    first.weight = nn.Parameter(weight.to(first.weight.dtype), first.weight.requires_grad)
    if first.bias is not None:
        bias = first.bias.double() * module.positive.double()
        first.bias = nn.Parameter(bias.to(first.bias.dtype), first.bias.requires_grad)
    before.meta["factor"] = module.positive.double().item()
    traced.add_submodule(node.target, _leaky(module.negative.double() / module.positive.double()))


def _spell_out(traced: fx.GraphModule, node: fx.Node, known: dict[fx.Node, torch.Size]) -> None:
    """A unit's fixed form in torch's own operations: a folded network must load without linl."""
    module, x, name, graph = called(traced, node), input_of(node), node.target, traced.graph
    dims = len(known[node]) - 2

    def number(label: str, value: Tensor) -> fx.Node:
        held = free_name(traced, f"{name}_{label}")
        holder, leaf = holder_of(traced, held)
        shaped = value.view(-1, *[1] * dims) if value.ndim else value
        holder.register_buffer(leaf, shaped.detach().clone())
        return graph.get_attr(held)

    own, partial = free_name(traced, f"{name}_activation"), isinstance(module, FixedPartial)
    # a module, for a function with a tensor of slopes is no activation to whoever reads the folded network next
    traced.add_submodule(own, module.activation if partial else _leaky(module.negative / module.positive))
    with graph.inserting_before(node):
        bent = graph.call_module(own, (x,))
        if partial:  # number by number what FixedPartial does: act + α·(x − act)
            new = graph.call_function(torch.lerp, (bent, x, number("alpha", module.alpha)))
        else:
            factor = number("positive", module.positive) if module.positive.ndim else module.positive.item()
            new, known[bent] = graph.call_function(torch.mul, (bent, factor)), known[node]  # the next layer may take it
    known[new] = known[node]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _leaky(slope: Tensor) -> nn.Module:
    """torch's own activation with a slope () or (C,) for x <= 0, which no training changes."""
    if slope.ndim:
        made = nn.PReLU(len(slope), device="meta")
        del made.weight  # a parameter; as a buffer it is saved and moved all the same
        made.register_buffer("weight", slope.detach().clone())
    else:
        made = nn.LeakyReLU(slope.item()) if slope.item() else nn.ReLU()
    return made.eval()


# --- from records to modules -----------------------------------------------------------------------

_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_GLOBAL_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PADS = {1: nn.ConstantPad1d, 2: nn.ZeroPad2d, 3: nn.ConstantPad3d}


def modules_of(layer: Affine, size: Size, flat: bool) -> tuple[list[tuple[str, nn.Module]], Tensor | None]:
    """A layer as torch's own modules, in order, each with a suffix for its name; and its bias map.

    Args:
        size: spatial size of the input.
        flat: an image goes in, features come out.
    """
    g, found = layer.geometry, []
    if not g.dims:
        return [("", _linear(affine.as_dense(layer, ())))], None
    if g.uniform and g.kernel != (1,) * g.dims and set(g.dilation) == {1}:
        found, layer = _pool(g, size), affine.pooled(layer)
        size, g = g.output_size(size), layer.geometry
    if flat:
        return [*found, ("_flatten", nn.Flatten()), ("", _linear(affine.as_dense(layer, size)))], None
    pad = [] if _symmetric(g) or g.mode != "zeros" else [("_pad", pad_module(g.padding))]
    is_map = layer.bias is not None and layer.bias.ndim > 1
    module = empty_conv(g, padded=not pad, bias=layer.bias is not None and not is_map)
    module.weight = nn.Parameter(layer.weight.contiguous())
    if module.bias is not None:
        module.bias = nn.Parameter(layer.bias)
    return [*found, *pad, ("", module)], layer.bias if is_map else None


def _linear(layer: Affine) -> nn.Linear:
    made = nn.Linear(layer.geometry.inputs, layer.geometry.outputs, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(layer.weight)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias)
    return made


def _pool(g: Geometry, size: Size) -> list[tuple[str, nn.Module]]:
    if g.kernel == size and not g.padded:
        return [("_pool", _GLOBAL_POOLS[g.dims](1))]
    fits = _symmetric(g) and all(p[0] <= k // 2 for p, k in zip(g.padding, g.kernel, strict=True))
    padding = tuple(p[0] for p in g.padding) if fits else (0,) * g.dims
    pool = ("_pool", _POOLS[g.dims](g.kernel, g.stride, padding))
    return [pool] if fits else [("_pad", pad_module(g.padding)), pool]


def average_pool_module(g: Geometry) -> nn.Module:
    """torch's average pool of a geometry's kernel and stride, without padding."""
    return _POOLS[g.dims](g.kernel, g.stride)


def _symmetric(g: Geometry) -> bool:
    return all(low == high >= 0 for low, high in g.padding)


def pad_module(padding: affine.Padding) -> nn.Module:
    """Zero padding (before, after) as a module; below 0 it cuts off."""
    numbers = tuple(affine.pad_argument(padding))
    kind = _PADS[len(padding)]
    return kind(numbers) if kind is nn.ZeroPad2d else kind(numbers, 0.0)


def empty_conv(g: Geometry, padded: bool, bias: bool) -> nn.Module:
    """torch's convolution of a geometry, its weights on the meta device."""
    padding = tuple(p[0] for p in g.padding) if padded else 0
    return _CONVS[g.dims](
        g.inputs, g.outputs, g.kernel, g.stride, padding, g.dilation, g.groups, bias, g.mode, device="meta"
    )


def with_norm(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A convolution or dense layer that has taken in the BatchNorm behind it; computed in float64."""
    given = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    scale = affine.batchnorm(*given, layer.weight.ndim - 2)
    factor, bias = scale.weight, scale.bias
    if layer.bias is not None:
        bias = bias + factor.flatten() * affine.wide(layer.bias)
    new = _times(layer.weight.detach(), factor), bias.to(device=layer.weight.device, dtype=layer.weight.dtype)
    weight, bias = (nn.Parameter(value, layer.weight.requires_grad) for value in new)
    made = copy.deepcopy(layer, {id(layer.weight): weight, id(layer.bias): bias})
    made.bias = bias
    return made


def neutral_norm(mean: Tensor, variance: Tensor) -> nn.BatchNorm2d:
    """A BatchNorm that changes nothing in evaluation, of a channel's mean and variance; in training it normalizes."""
    norm = nn.BatchNorm2d(len(mean)).to(mean)
    with torch.no_grad():
        norm.running_mean.copy_(mean), norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt()), norm.bias.copy_(mean)
    return norm


def _times(weight: Tensor, factor: Tensor, numbers: int = 2**17) -> Tensor:
    """weight · factor (outputs, 1, …) in float64, in weight's dtype, some outputs at a time: they stay in the cache."""
    made, rows = torch.empty_like(weight), max(1, numbers // max(1, weight[0].numel()))
    for new, old, times in zip(made.split(rows), weight.split(rows), factor.split(rows), strict=True):
        new.copy_(affine.wide(old).mul_(times) if old.dtype != times.dtype else old * times)
    return made


# --- steps into the graph --------------------------------------------------------------------------


def weight_of(traced: fx.GraphModule, step: Step) -> tuple[str, Tensor | None]:
    """The name of the first layer with weights among a step's calls, and its weight."""
    named = [(node.target, getattr(called(traced, node), "weight", None)) for link in step.links for node in link.nodes]
    found = [(name, weight) for name, weight in named if isinstance(weight, Tensor)]
    layers = [pair for pair in found if pair[1].ndim > 1]
    if layers or found:
        return (layers or found)[0]
    return str(step.links[0].end.name), None


def write_(traced: fx.GraphModule, step: Step, layer: Affine, like: Tensor) -> tuple[str, fx.Node]:
    """Puts a step's one layer into the graph in place of its calls.

    Args:
        layer: the merged record.
        like: whose dtype and device the weights get, where the step has no weights of its own.

    Returns: the layer's name, and the node that now gives the step's value.
    """
    name, weight = weight_of(traced, step)
    like = like if weight is None else weight
    modules, bias_map = modules_of(layer, step.size, step.flat)
    end, value, graph = step.links[-1].end, step.links[0].source, traced.graph
    gone = {node for link in step.links for node in link.nodes}
    # where the run began: later, something may have worked in place on the value it reads
    start = min(gone)
    for suffix, module in modules:
        own = name if not suffix and _has_module(traced, name) else free_name(traced, f"{name}{suffix}")
        module.to(device=like.device, dtype=like.dtype).requires_grad_(like.requires_grad)
        if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) and isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        traced.add_submodule(own, module.eval())
        with graph.inserting_before(start):
            value = graph.call_module(own, (value,))
    if bias_map is not None:
        held = free_name(traced, f"{name}_border")
        holder, leaf = holder_of(traced, held)
        holder.register_parameter(leaf, nn.Parameter(bias_map.to(device=like.device, dtype=like.dtype)))
        with graph.inserting_before(start):
            # in place: a map of another size is then an error, not a broadcast
            value = graph.call_method("add_", (value, graph.get_attr(held)))
    end.replace_all_uses_with(value)
    for node in sorted(gone, reverse=True):
        graph.erase_node(node)
    return own, value


def _has_module(traced: fx.GraphModule, name: str) -> bool:
    try:
        traced.get_submodule(name)
    except AttributeError:
        return False
    return True


def part(traced: fx.GraphModule, links: list[Link | Fork]) -> fx.GraphModule:
    """Consecutive links as a network of their own, sharing its layers."""
    graph, mapping = fx.Graph(), {}
    mapping[links[0].source] = graph.placeholder("x")
    inside = {node for link in links for node in link.nodes}
    for node in traced.graph.nodes:
        if node in inside:
            constants = (reversed(list(read_by(read))) for read in node.all_input_nodes if reads_nothing(read))
            for read in itertools.chain.from_iterable(constants):
                if read not in mapping:
                    mapping[read] = graph.node_copy(read, lambda n: mapping[n])
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(mapping[links[-1].end])
    return fx.GraphModule(traced, graph)

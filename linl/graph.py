"""The one tracer: a network as a torch.fx graph, and its shapes.

Everything in linl that must know how a network is wired (which activation is used where, see `linl.sites`; what is
linear, what may be merged) asks this file. A traced network is a `torch.fx.GraphModule`: an ordinary
`nn.Module` with the original's parameter names, that trains, saves and moves like the original.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.aliases import ChangingProxy, second_name
from linl.calls import positional_
from linl.files import first_line


class UntraceableError(ValueError):
    """The network's forward can't be written as a graph; the message says where and what to do."""


# --- what counts as an activation ------------------------------------------------------------------

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold,
)  # fmt: skip
"""Element-wise activation modules."""


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an element-wise activation (torch's, timm's or one of linl's units)."""
    if isinstance(module, ACTIVATIONS) or getattr(module, "is_linl_activation", False):
        return True
    cls = type(module)
    return cls.__module__.startswith("timm.layers.activations") and not list(module.children())


# --- tracing ---------------------------------------------------------------------------------------

_LEAF_PACKAGES = ("torch.nn", "torch.ao.nn", "timm.layers", "torchvision.ops")


class Tracer(fx.Tracer):
    """torch.fx's tracer, with the leaves that keep a traced network trainable.

    A leaf is called whole. Traced through, a module's `self.training` would be frozen into the graph:
    timm's BatchNormAct2d would never train again, and StochasticDepth never be switched off.
    """

    proxy_buffer_attributes = True  # buffers stay attributes, they are not frozen into constants

    def __init__(self) -> None:
        functions: tuple = ()
        features = sys.modules.get("timm.models._features_fx")
        if features is not None:  # timm's own list of functions that look at shapes
            functions = tuple(features.get_notrace_functions())
        super().__init__(autowrap_functions=functions)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that notes `+=`."""
        return ChangingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_activation(m) or is_norm_act(m):
            return True
        package = type(m).__module__
        if package.startswith("torch.nn"):
            return super().is_leaf_module(m, module_qualified_name)
        # A layer of a known library without layers inside: a drop path, a convolution, a norm. An
        # unknown module is traced through, because an activation may be hidden in its forward.
        return package.startswith(_LEAF_PACKAGES) and not list(m.children())


def is_norm_act(module: nn.Module) -> bool:
    """timm's BatchNorm with an activation inside (BatchNormAct2d and its relatives)."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(getattr(module, "act", None), nn.Module)


def trace(net: nn.Module, own: bool = True) -> fx.GraphModule:
    """A traced copy of a network; the argument is left alone.

    Functional dropout becomes a module, so that `.train()` and `.eval()` still switch it.

    Args:
        own: whether the copy has weights of its own, as in `clone`.

    Raises:
        UntraceableError: control flow that depends on data, or a forward that does different things in
            training and evaluation in a way that one graph can't hold.
    """
    if isinstance(net, fx.GraphModule):
        copied = clone(net, own)
        if positional_(copied.graph):
            copied.recompile()
        return copied
    modes = {name: module.training for name, module in net.named_modules()}
    # the first is only compared, so it needs no weights of its own
    copies = [clone(net, own=False).train(), clone(net, own).eval()]
    graphs = [graph_of(each) for each in copies]
    for name in _dropout_to_modules(copies, graphs):
        modes[name] = modes[""]
    if _calls(graphs[0]) != _calls(graphs[1]):
        sources = [graph.python_code("self").src.splitlines() for graph in graphs]
        differ = next((a.strip() for a, b in zip(*sources, strict=False) if a != b), "its last lines")
        raise UntraceableError(
            f"{type(net).__name__} computes something else in training than in evaluation, from `{differ}` on: "
            "one graph can't hold both. Switch that branch off (auxiliary classifiers: aux_logits=False)."
        )
    return _traced(copies[1], graphs[1], modes)


def trace_evaluation(net: nn.Module) -> fx.GraphModule:
    """A traced copy of a network as it is in evaluation, for those who only read it: half of `trace`'s time.

    What training does isn't looked at; functional dropout that is switched off is gone.

    Raises:
        UntraceableError: as `graph_of`.
    """
    if isinstance(net, fx.GraphModule):
        traced = trace(net).eval()
    else:
        copied = clone(net).eval()
        traced = _traced(copied, graph_of(copied), {"": False})
    off = [n for n in traced.graph.nodes if n.target in _DROPOUTS and not _argument(n, 2, "training", True)]
    for node in off:
        node.replace_all_uses_with(input_of(node))
        traced.graph.erase_node(node)
    if off:
        traced.recompile()
    return traced


def _traced(copied: nn.Module, graph: fx.Graph, modes: dict[str, bool]) -> fx.GraphModule:
    """A network's graph around its modules, each in its mode; a module without one has the network's."""
    traced = fx.GraphModule(copied, graph, type(copied).__name__)
    for name, module in traced.named_modules():
        module.training = modes.get(name, modes[""])
    return _carry(copied, _hooked(copied, traced))


_CARRIED = (
    "input_size", "num_classes", "made_by", "default_cfg", "pretrained_cfg", "linearize_notes", "fold_report",
    "prune_report", "shrink_report",
)  # fmt: skip


def _carry(source: nn.Module, target: nn.Module) -> nn.Module:
    for name in _CARRIED:
        if hasattr(source, name) and not hasattr(target, name):
            setattr(target, name, getattr(source, name))
    return target


def _calls(graph: fx.Graph) -> list[tuple]:
    """What a graph computes, call by call; two graphs that say the same have the same code."""
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def clone(net: nn.Module, own: bool = True) -> nn.Module:
    """A deep copy that keeps what linl noted on a traced network (torch.fx drops such attributes).

    Weights that a hook computes anew before every pass (torch.nn.utils.prune, weight_norm) are copied by value.

    Args:
        own: False for modules that are copies, around the very parameters and buffers of `net`: for a network that
            is only looked at, or whose weights become its own later (`part_from_`).
    """
    held = [v for module in net.modules() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]
    memo = {id(v): v.detach().clone() for v in held}
    copied = copy.deepcopy(net, memo if own else {id(t): t for t in _tensors(net)} | memo)
    return _carry(net, _hooked(net, copied) if isinstance(net, fx.GraphModule) else copied)


def part_from_(copied: nn.Module, net: nn.Module) -> None:
    """Gives a copy that was made with `own=False` weights of its own, wherever they still lie in memory of `net`."""
    theirs, memo = {_memory(t) for t in _tensors(net)}, {}
    for module in copied.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_leaf and _memory(tensor) in theirs:
                    held[name] = copy.deepcopy(tensor, memo)  # one memo: what was tied stays tied


def standing_alone(
    net: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], made: dict[str, nn.Module]
) -> fx.GraphModule:
    """A graph of `net`'s calls as a network for inference that shares nothing with it.

    Args:
        modules: by the names that the graph calls them; they are copied, what is tied stays tied.
        made: those that are new, and go in as they are.
    """
    root, memo = dict(made), {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in root:
            root[node.target] = copy.deepcopy(modules[node.target], memo)
        elif node.op == "get_attr" and node.target not in root:
            owner, _, leaf = node.target.rpartition(".")
            root[node.target] = copy.deepcopy(getattr(net.get_submodule(owner), leaf), memo)
    alone = fx.GraphModule(root, graph, type(net).__name__).eval()
    alone._tracer_cls = graph._tracer_cls = None  # else a saved network asks for linl's tracer
    return _carry(net, _hooked(net, alone))


def _hooked(net: nn.Module, traced: fx.GraphModule) -> fx.GraphModule:
    """A traced network with the hooks that the original itself has: its modules have theirs still.

    Those of torch.nn.utils compute its own weight, which a copy has by value.
    """
    for name, hooks in vars(net).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            kept = {k: hook for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")}
            setattr(traced, name, type(hooks)(kept))
    return traced


@contextlib.contextmanager
def run_by(traced: fx.GraphModule, interpreter: fx.Interpreter) -> Iterator[None]:
    """Calls of a traced network are interpreted, its own hooks around them."""
    traced.forward = interpreter.run
    try:
        yield
    finally:
        del traced.forward


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


@contextlib.contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode comes back, whatever happens."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def graph_of(net: nn.Module) -> fx.Graph:
    """A network's graph in the mode it is in.

    Raises:
        UntraceableError: control flow that depends on data, or a value changed in place that is read later too.
    """
    later = list(inspect.signature(net.forward).parameters.values())[1:]  # optional arguments keep their defaults
    defaults = {p.name: p.default for p in later if p.default is not inspect.Parameter.empty}
    try:
        graph = Tracer().trace(net, defaults or None)
    except Exception as error:
        why = first_line(error)
        raise UntraceableError(
            f"{type(net).__name__} can't be traced: {why}. Its forward must not branch on the values of "
            "tensors; hand over the part that matters, or rewrite that branch."
        ) from error
    if trouble := second_name(graph, dict(net.named_modules(remove_duplicate=False))):
        raise UntraceableError(f"{type(net).__name__} can't be traced: {trouble}. Write y = y + z instead of y += z.")
    positional_(graph)
    return graph


_DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}


def _dropout_to_modules(nets: list[nn.Module], graphs: list[fx.Graph]) -> list[str]:
    """Functional dropout that follows the mode becomes nn.Dropout, in both graphs alike.

    Tracing froze its `training` argument; one that is the same in both modes (switched off, or on for
    good) is left as it is.
    """
    pairs = zip(*[[n for n in graph.nodes if n.target in _DROPOUTS] for graph in graphs], strict=False)
    names = []
    for pair in pairs:
        if [_argument(node, 2, "training", True) for node in pair] != [True, False]:
            continue
        name = free_name(nets[0], "dropout")
        names.append(name)
        for net, node in zip(nets, pair, strict=True):
            net.add_module(name, _DROPOUTS[node.target](_argument(node, 1, "p", 0.5)).train(net.training))
            with node.graph.inserting_before(node):
                new = node.graph.call_module(name, (input_of(node),))
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)
    return names


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def input_of(node: fx.Node) -> Any:
    """A call's first argument, given by position or as `input=`."""
    return node.args[0] if node.args else node.kwargs.get("input")


def attribute(traced: fx.GraphModule, target: str):
    """What a `get_attr` node reads."""
    return getattr(*holder_of(traced, target))


def holder_of(traced: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that has a name, and what it calls it: "a.b.c" is `c` of a.b."""
    owner, _, leaf = target.rpartition(".")
    return (traced.get_submodule(owner) if owner else traced), leaf


def free_name(net: nn.Module, name: str) -> str:
    """`name`, or `name_1`, `name_2`, … — the first that no submodule or attribute bears yet."""
    owner, _, leaf = name.rpartition(".")
    parent = net.get_submodule(owner) if owner else net
    candidate, n = leaf, 0
    while hasattr(parent, candidate):
        n += 1
        candidate = f"{leaf}_{n}"
    return f"{owner}.{candidate}" if owner else candidate


# --- shapes ----------------------------------------------------------------------------------------


def example_for(net: nn.Module, example: Tensor | None, trouble: str) -> Tensor:
    """The example given, or two inputs of zeros of the size that the network names, or that its first layer reads.

    Raises:
        ValueError: `trouble`, where neither is known.
    """
    if example is not None:
        return example
    size = getattr(net, "input_size", None) or getattr(net, "default_cfg", {}).get("input_size")
    first = next((module for module in net.modules() if module._parameters), None)
    if size is None and isinstance(first, nn.Linear):
        size = (first.in_features,)
    if size is None:
        raise ValueError(trouble)
    parameter = next(net.parameters())
    return torch.zeros(2, *size, device=parameter.device, dtype=parameter.dtype)


def shapes(traced: fx.GraphModule, example: Tensor) -> dict[fx.Node, torch.Size]:
    """The shape of every node that is a tensor, from one forward pass on an example in eval mode."""
    return shapes_and_output(traced, example)[0]


def shapes_and_output(traced: fx.GraphModule, example: Tensor) -> tuple[dict[fx.Node, torch.Size], Any]:
    """`shapes`, and what that pass gave."""

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor):
                found[node] = value.shape
            return value

    found: dict[fx.Node, torch.Size] = {}
    with evaluating(traced), torch.no_grad(), run_by(traced, Record(traced, garbage_collect_values=True)):
        output = traced(example)
    return found, output

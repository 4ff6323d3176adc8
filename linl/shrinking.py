"""Pruned networks made smaller for real: channels and units whose weights are all gone are cut out.

A channel goes if nothing reads it, or if it is a constant that its readers can take over: into their biases, or, where
zeros are padded around it (there a constant isn't one: at the border part of it is missing), all such constants of a
layer onto one of them, which stays and takes over the others' weights in proportion. Both are exact at every position
and for every size of image. Channels that are tied (by a sum, a group, a flattening) go together or not at all.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, fx, nn

from linl.channels import Channels, Layer, Value
from linl.checking import difference, shown, values
from linl.folding import ROUNDING, finish_, refuse_example, refuse_other_function
from linl.graph import example_for, free_name, input_of, shapes, trace
from linl.masks import LAYERS, harden_masks
from linl.sites import activation_sites, replace_activations


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink` did.

    Attributes:
        table: a row a layer: layer, inputs, outputs, weights (numbers in its weight), each also with `_left`; 0 for a
            layer that went as a whole, its branch of a sum being constant.
        notes: by operation, why the channels that go into it and come from it had to stay.
    """

    table: pd.DataFrame
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Weights left of all weights."""
        return float(self.table["weights_left"].sum() / max(1, self.table["weights"].sum()))

    def _repr_html_(self) -> str:
        return f"<p>{self.share:.2%} of the weights left</p>" + shown(self.table)


@torch.no_grad()
def shrink(net: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A smaller network of ordinary layers that computes the same in eval mode.

    Convolutions (with any groups), dense layers, norms, activations by channel, shortcuts, concatenations, pools and
    flattenings become narrower; a branch of a sum that is constant goes. What can't be read channel by channel
    (attention, LayerNorm, a layer that is used twice) keeps all its channels, and the report says so. Of a layer that
    lost every channel one is kept.

    Args:
        net: masked or not (zeros count as pruned); left alone.
        example: one input batch; may be left out where the network has an `input_size` or begins with a dense layer.

    Returns: a traced copy in eval mode, activations as modules, `.shrink_report` attached. Equal to 1e-10 in float64,
        checked on random inputs; should it ever not be, nothing is cut and the report's notes say so.

    Raises:
        ValueError: an example is needed, or doesn't fit; an operation that bends a signal and can't be named.
        UntraceableError: as `linl.graph.trace`.
    """
    net = harden_masks(net).eval()
    example = _example(net, example)
    refuse_example(net, example)
    traced = trace(net)
    refuse_other_function(net, traced, example)
    _normal_form_(traced, example)
    before = _sizes(traced)
    untouched = trace(traced)
    while _pass_(traced, example):
        pass
    notes = {node.name: why for node, why in Channels(traced, shapes(traced, example)).notes.items()}
    finish_(traced)
    off = _difference(net, traced, example)
    if not off <= ROUNDING.get(example.dtype, 1e-2):
        traced, notes = untouched, {"output": f"the check failed, off by {off:.1e}: nothing was cut"}
    traced.shrink_report = ShrinkReport(_table(before, _sizes(traced)), notes)
    return traced.eval()


def _example(net: nn.Module, example: Tensor | None) -> Tensor:
    """Two random inputs, of the example's shape or the one that the network is known to take."""
    example = example_for(net, example, "shrink must know how large an input is: pass example=, one input batch")
    if not example.is_floating_point():
        return example
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *example.shape[1:], generator=generator).to(next(net.parameters(), example))


def _normal_form_(traced: fx.GraphModule, example: Tensor) -> None:
    """Activations become modules, one for each place, out of place; reshapings that flatten say so."""
    sites = activation_sites(traced)
    for site in sites:
        if hasattr(site.module, "inplace"):
            site.module.inplace = False
    replace_activations(traced, sites, [site.module for site in sites])
    known = shapes(traced, example)
    for node in list(traced.graph.nodes):
        source = input_of(node)
        if node.target in ("view", "reshape", "flatten", torch.reshape) and source in known:
            shape = known[source]
            if known[node] == (shape[0], shape[1:].numel()):
                with traced.graph.inserting_before(node):
                    flat = traced.graph.call_function(torch.flatten, (source, 1))
                node.replace_all_uses_with(flat)
                traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _difference(net: nn.Module, other: nn.Module, example: Tensor) -> float:
    found = difference(values(net, example)[""], values(other, example)[""], None)
    return found["largest"] / found["scale"]


def _sizes(traced: fx.GraphModule) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and numbers of every layer's weight."""
    found = {}
    for name, module in traced.named_modules():
        if isinstance(module, LAYERS):
            features = "features" if isinstance(module, nn.Linear) else "channels"
            sides = (getattr(module, f"{side}_{features}") for side in ("in", "out"))
            found[name] = (*sides, module.weight.numel())
    return found


def _table(before: dict, after: dict) -> pd.DataFrame:
    rows = []
    for name, sizes in before.items():
        left = after.get(name, (0, 0, 0))
        rows.append((name, *(number for pair in zip(sizes, left, strict=True) for number in pair)))
    columns = ["layer", "inputs", "inputs_left", "outputs", "outputs_left", "weights", "weights_left"]
    return pd.DataFrame(rows, columns=columns)


# --- one pass --------------------------------------------------------------------------------------


def _pass_(traced: fx.GraphModule, example: Tensor) -> bool:
    """Drops constant branches, else cuts what can be cut now; whether anything was."""
    channels = Channels(traced, shapes(traced, example))
    if _drop_branches_(traced, channels):
        return True
    plan = _Plan(channels)
    if not plan.cut.any():
        return False
    plan.write_(traced)
    return True


def _drop_branches_(traced: fx.GraphModule, channels: Channels) -> bool:
    """The first sum of a value and a constant one: the constant becomes a parameter, or nothing where it is 0."""
    for node in channels.sums:
        operands = [channels.values[operand] for operand in node.args]
        constant = [bool(value.is_constant.all()) for value in operands]
        if sum(constant) != 1 or channels.known[node.args[0]] != channels.known[node.args[1]]:
            continue
        place = constant.index(True)
        number, kept = operands[place].constant, node.args[1 - place]
        minus = node.target in (operator.sub, operator.isub, torch.sub, "sub", "sub_")
        if number.any() or (minus and place == 0):
            like, name = next(traced.parameters()), free_name(traced, f"{node.args[place].name}_constant")
            behind = len(channels.known[node]) - operands[place].axis - 1
            held = number.view(-1, *[1] * behind).to(like)
            traced.register_parameter(name, nn.Parameter(held, requires_grad=like.requires_grad))
            with traced.graph.inserting_before(node):
                pair = [kept, kept]
                pair[place] = traced.graph.get_attr(name)
                kept = traced.graph.call_function(operator.sub if minus else operator.add, tuple(pair))
        node.replace_all_uses_with(kept)
        traced.graph.erase_node(node)
        traced.graph.eliminate_dead_code()
        traced.delete_all_unused_submodules()
        traced.recompile()
        return True
    return False


class _Plan:
    """What is cut in one pass.

    Attributes:
        cut: by class of channels, bool.
        keeper: by class, the class that takes over its weights where zeros are padded; −1 for none.
    """

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        self.reads = {id(layer): (layer.weight() != 0).any(2) for layer in channels.layers}
        count = len(channels.fixed)
        self.keeper = torch.full((count,), -1)
        forced = channels.fixed.clone()
        self._merge(forced)
        while True:
            self.cut = ~self._needed(forced, self.keeper >= 0)
            more = self._uneven()
            if not more:
                return
            forced[torch.tensor(more)] = True

    def _classes(self, value: Value) -> Tensor:
        return self.channels.classes[value.ids]

    def _needed(self, forced: Tensor, merged: Tensor) -> Tensor:
        """Classes that something reads that must be computed; `merged` ones are taken over where zeros are padded."""
        needed, before = forced.clone(), None
        while before is None or (needed != before).any():
            before = needed.clone()
            for layer in reversed(self.channels.layers):
                inputs = self._classes(layer.source)
                read = self.reads[id(layer)][needed[self._classes(layer.value)]].any(0)
                lost = layer.lost_at_border() & ~(merged[inputs] & (layer.groups == 1))
                needed[inputs[read & (~layer.source.is_constant | lost)]] = True
        return needed

    def _merge(self, forced: Tensor) -> None:
        """Of the constants that only padding keeps, those in the same values go onto the largest of them."""
        everything = torch.ones_like(forced)
        candidates = self._needed(forced, ~everything) & ~self._needed(forced, everything)
        held: dict[int, list[int]] = {}
        for number, value in enumerate(self.channels.values.values()):
            for each in set(self._classes(value)[candidates[self._classes(value)]].tolist()):
                held.setdefault(each, []).append(number)
        groups: dict[tuple, list[int]] = {}
        for each, where in held.items():
            groups.setdefault(tuple(where), []).append(each)
        for members in groups.values():
            sizes = self._sizes(members)
            best = max(members, key=lambda each: (sizes[each], -each))
            if sizes[best] > 0 and len(members) > 1:
                forced[best] = True
                self.keeper[[each for each in members if each != best]] = best

    def _sizes(self, members: list[int]) -> dict[int, float]:
        """The least magnitude of each class where layers with padding read constants of any of them."""
        sizes = dict.fromkeys(members, math.inf)
        for layer in self.channels.layers:
            inputs = self._classes(layer.source)
            if layer.groups == 1 and (layer.lost_at_border() & torch.isin(inputs, torch.tensor(members))).any():
                for each in members:
                    found = layer.source.constant[inputs == each].nan_to_num().abs()
                    sizes[each] = min(sizes[each], float(found[0]) if len(found) else 0.0)
        return sizes

    def _uneven(self) -> list[int]:
        """Classes that must stay after all: groups of a layer stay equally large, and none without a channel."""
        more = []
        for layer in self.channels.layers:
            sides = [self._classes(value).view(layer.groups, -1) for value in (layer.source, layer.value)]
            stay = [~self.cut[side] for side in sides]
            alive = stay[0].any(1) | stay[1].any(1)
            if not alive.any():
                alive[0] = True
            for side, keep in zip(sides, stay, strict=True):
                most = max(1, int(keep.sum(1).max()))
                for group, row in zip(side[alive], keep[alive], strict=True):
                    more += group[~row][: most - int(row.sum())].tolist()
        return more

    # --- into the network ----------------------------------------------------------------------------

    def write_(self, traced: fx.GraphModule) -> None:
        """Cuts."""
        for layer in self.channels.layers:
            self._write_layer_(layer)
        for module, value in self.channels.by_channel:
            _cut_by_channel_(module, self._stay(value))
        for node, value in self.channels.pads:
            self._write_pad_(node, self._stay(value))
        for name, value in self.channels.attributes:
            old = getattr(traced, name) if "." not in name else traced.get_parameter(name)
            axis = next(i for i, n in enumerate(old.shape) if n == old.numel())
            old.data = old.data.index_select(axis, self._stay(value).nonzero()[:, 0].to(old.device))
        traced.recompile()

    def _stay(self, value: Value) -> Tensor:
        return ~self.cut[self._classes(value)]

    def _write_layer_(self, layer: Layer) -> None:
        module, weight, inputs = layer.module, layer.weight(), self._classes(layer.source)
        rows, columns = self._stay(layer.value), self._stay(layer.source)
        if rows.all() and columns.all():
            return
        constant = layer.source.constant.nan_to_num()
        gone = ~columns & (constant != 0)
        if layer.padded:
            for column in gone.nonzero()[:, 0].tolist():
                if weight[rows, column].any():
                    keeper = int((inputs == self.keeper[inputs[column]]).nonzero()[0, 0])
                    weight[:, keeper] += constant[column] / constant[keeper] * weight[:, column]
        else:
            shift = weight[:, gone].sum(2) @ constant[gone]
            if shift[rows].any():
                bias = 0 if module.bias is None else module.bias.detach().double().cpu()
                module.bias = _like(module.weight, shift + bias)
        self._put_(layer, weight, rows, columns)

    def _put_(self, layer: Layer, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        """The rest of a weight (outputs, inputs, kernel) into its module, groups that went left out."""
        module, g = layer.module, layer.groups
        alive = columns.view(g, -1).any(1)
        blocks = [
            weight[rows_of, :][:, columns_of]
            for rows_of, columns_of in (
                (_only(rows, i, g), _only(columns, i, g)) for i in alive.nonzero()[:, 0].tolist()
            )
        ]
        left = torch.cat(blocks).reshape(-1, blocks[0].shape[1], *module.weight.shape[2:])
        made = _like(module.weight, left)
        if module.weight.ndim == 4 and module.weight.is_contiguous(memory_format=torch.channels_last):
            made.data = made.data.contiguous(memory_format=torch.channels_last)
        module.weight = made
        if module.bias is not None:
            module.bias = _like(module.bias, module.bias.detach()[rows.to(module.bias.device)])
        sides = int(columns.sum()), int(rows.sum())
        if isinstance(module, nn.Linear):
            module.in_features, module.out_features = sides
        else:
            module.in_channels, module.out_channels, module.groups = *sides, int(alive.sum())

    @staticmethod
    def _write_pad_(node: fx.Node, stay: Tensor) -> None:
        given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
        sides = list(given["pad"])
        low, high = (int(part.sum()) for part in (stay[: sides[-2]], stay[len(stay) - sides[-1] :]))
        given["pad"] = [*sides[:-2], low, high]
        node.args, node.kwargs = node.args[:1], given


def _only(mask: Tensor, group: int, groups: int) -> Tensor:
    """A mask's part in one of so many groups, False elsewhere."""
    size = len(mask) // groups
    return mask & (torch.arange(len(mask)) // size == group)


def _like(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)


def _cut_by_channel_(module: nn.Module, stay: Tensor) -> None:
    """Leaves some channels' numbers of a norm or an activation."""
    for name, tensor in [*itertools.chain(module.named_parameters(), module.named_buffers())]:
        if tensor.shape == stay.shape and tensor.numel() > 1:
            owner, _, leaf = name.rpartition(".")
            held = getattr(module.get_submodule(owner) if owner else module, leaf)
            held.data = held.data[stay.to(held.device)]
    for count in ("num_features", "num_parameters"):
        if hasattr(module, count):
            setattr(module, count, int(stay.sum()))

"""Are two networks the same function? In float64, interior and border apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from linl.calls import doubled_
from linl.chains import Fork
from linl.graph import clone, evaluating, is_norm_act, run_by, trace
from linl.operations import Link


@dataclass(frozen=True)
class Verification:
    """Two networks on the same inputs, in float64.

    Attributes:
        largest: max |a(x) − b(x)| over the outputs.
        scale: max(1, max |a(x)|).
        tolerance: what counts as equal, relative to the scale.
        rows: the same for each run that was merged, where the second network has a fold report.
    """

    largest: float
    scale: float
    tolerance: float = 1e-10
    rows: list[dict] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether the outputs' difference is within the tolerance."""
        return self.largest <= self.tolerance * self.scale

    @property
    def table(self) -> pd.DataFrame:
        """A row for the outputs, then one a merged run: where, largest, interior, border, scale, relative, equal."""
        rows = [{"where": "output", "largest": self.largest, "interior": math.nan, "border": math.nan,
                 "scale": self.scale}, *self.rows]  # fmt: skip
        table = pd.DataFrame(rows)
        table["relative"] = table["largest"] / table["scale"]
        table["equal"] = table["relative"] <= self.tolerance
        return table

    def _repr_html_(self) -> str:
        return shown(self.table)


def shown(table: pd.DataFrame) -> str:
    """A table for a notebook, its sentences whole."""
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(index=False)


@torch.no_grad()
def verify(net: nn.Module, other: nn.Module, example: Tensor, tolerance: float | None = None) -> Verification:
    """Compares two networks in float64 on an example, each in eval mode; both are left alone.

    Args:
        net, other: of the same outputs.
        example: one input batch.
        tolerance: what counts as equal, relative to the largest output; None: 1e-10, or 1e-4 where either
            network's weights were rounded to less than float64.

    Where `other` was folded from `net` (hardened, perhaps, or padded first), every merged run is compared as well, at
    its own output, the positions that padding inside the run reaches (border) apart from the others (interior).

    Raises:
        ValueError: outputs of different shapes.
    """
    report = getattr(other, "fold_report", None)
    places = report.places if report is not None and report.source == shape_of(net) else {}
    a_all = values(net, example, [place.end for place in places.values()])
    b_all = values(other, example, [place.value for place in places.values()])
    a, b = a_all[""], b_all[""]
    if a.shape != b.shape:
        raise ValueError(f"outputs of different shapes: {tuple(a.shape)} and {tuple(b.shape)}")
    if tolerance is None:
        wide = all(p.dtype == torch.float64 for p in [*net.parameters(), *other.parameters()])
        tolerance = 1e-10 if wide else 1e-4
    rows = []
    for name, place in places.items():
        if place.end in a_all and place.value in b_all:
            u, v = place.factor * a_all[place.end], b_all[place.value]
            rows.append({"where": name, **difference(u, v.reshape(u.shape), place.interior)})
    return Verification(_largest(a - b), max(1.0, _largest(a)), tolerance, rows)


def shape_of(net: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a network's weights: units, pads and precision don't change them, what is cut out does."""
    return tuple((name, tuple(p.shape)) for name, p in net.named_parameters() if p.ndim > 1)


def values(net: nn.Module, example: Tensor, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """A network's output (under "") and the values of some nodes of its graph, in float64 and eval mode."""
    double = clone(net).eval().double()
    x = example.detach().to(next((p.device for p in double.parameters()), example.device))
    x = x.double() if x.is_floating_point() else x
    names = set(names)
    if not isinstance(double, fx.GraphModule):
        if not names:
            try:
                return {"": one_tensor(double(x))}
            except RuntimeError:  # its forward casts to another precision
                pass
        double = trace(double)
    if doubled_(double.graph):
        double.recompile()
    found: dict[str, Tensor] = {}

    class Listen(fx.Interpreter):
        def run_node(self, node: fx.Node):
            module = double.get_submodule(node.target) if node.op == "call_module" else None
            if node.name in names and is_norm_act(module):  # a run ends with its norm, before its activation

                def keep(_, inputs) -> None:
                    found[node.name] = inputs[0].clone()

                handle = module.act.register_forward_pre_hook(keep)
                value = super().run_node(node)
                handle.remove()
                return value
            value = super().run_node(node)
            if node.name in names and isinstance(value, Tensor):
                found[node.name] = value.clone()  # an in-place operation may come
            return value

    with evaluating(double), run_by(double, Listen(double, garbage_collect_values=True)):
        found[""] = one_tensor(double(x))
    return found


def one_tensor(output: object) -> Tensor:
    """A network's output; several (a tuple, a dict) in a row, as one vector."""
    if isinstance(output, Tensor):
        return output
    return torch.cat([leaf.flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])


def difference(a: Tensor, b: Tensor, interior: Sequence[Tensor] | None) -> dict[str, float]:
    """largest, interior, border (nan where there is none) and scale of two values."""
    apart = (a - b).abs()
    row = {"largest": _largest(apart), "interior": _largest(apart), "border": math.nan, "scale": max(1.0, _largest(a))}
    if interior is not None and not all(mask.all() for mask in interior):
        inside = torch.ones((), dtype=torch.bool)
        for mask in interior:
            inside = inside[..., None] & mask
        inside = inside.to(apart.device)
        row["interior"] = _largest(apart[..., inside])
        row["border"] = _largest(apart[..., ~inside])
    return row


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else math.nan


def error(
    layer: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, interior: Sequence[Tensor] | None
) -> dict[str, float]:
    """How far a merged layer is from what it replaces: `difference` of y and layer(x), all float64."""
    return difference(y, layer(x).reshape(y.shape), interior)


def interior_of(links: Sequence[Link | Fork], size: Sequence[int]) -> list[Tensor] | None:
    """Output positions that no padding inside the run reaches, a mask for each dimension; None for features."""
    return _interior(links, [torch.ones(n, dtype=torch.bool) for n in size], head=True) or None


def _interior(links: Sequence[Link | Fork], valid: list[Tensor], head: bool) -> list[Tensor]:
    for i, link in enumerate(links):
        first = head and i == 0
        if isinstance(link, Fork):
            branches = [_interior(branch, valid, first) for branch in link.branches]
            valid = [torch.stack(masks).all(0) for masks in zip(*branches, strict=True)]
        elif link.geometry.dims:
            valid = _read(link, valid, first)
        if link.flat:
            return []
    return valid


def _read(link: Link, valid: list[Tensor], first: bool) -> list[Tensor]:
    """Outputs all of whose inputs are valid; beyond the input, padding counts as valid only at the run's head."""
    g, found = link.geometry, []
    for mask, k, d, s, (low, _), out in zip(
        valid, g.kernel, g.dilation, g.stride, g.padding, g.output_size([len(m) for m in valid]), strict=True
    ):
        at = torch.arange(out)[:, None] * s + torch.arange(k) * d - low
        outside = (at < 0) | (at >= len(mask))
        seen = mask[at.clamp(0, len(mask) - 1)]
        found.append(torch.where(outside, torch.tensor(first), seen).all(1))
    return found

"""Folding is exact, pays, and misses nothing, on networks at random; 1,000 of them by `linl.tests.random_networks`."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import sys
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import linl
from linl.tests.random_networks import FAMILIES, network
from linl.tests.random_pieces import (
    FACTORS,
    FLATTENINGS,
    IMAGE_TRAPS,
    SKIPPED,
    SUMS,
    TRAPS,
    ZEROS,
    Network,
    Pad,
    Piece,
    Pool,
    left,
)

TOLERANCE = 1e-10
OBJECTIVES = ("depth", "macs", "parameters")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
PADS = (Pad, *ZEROS.values())
POSITIONAL = (nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, Pool, *PADS)


# --- measured here, not by linl ------------------------------------------------------------------------


@torch.no_grad()
def apart(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Largest difference of two networks' outputs over all positions, relative to max(1, max |net(x)|)."""
    a, b = net(x.clone()), other(x.clone())
    if a.shape != b.shape or not (a - b).isfinite().all():
        return math.inf
    return ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()


@torch.no_grad()
def layers_called(net: nn.Module, x: Tensor) -> int:
    """How many times a convolution or a dense layer is called in one forward pass."""
    called = []
    hooks = [m.register_forward_hook(lambda *_: called.append(1)) for m in net.modules() if isinstance(m, LAYERS)]
    net(x.clone())
    for hook in hooks:
        hook.remove()
    return len(called)


@torch.no_grad()
def price(net: nn.Module, x: Tensor, objective: str) -> float:
    """What an objective makes small."""
    if objective == "depth":
        return linl.cost.depth(net)
    if objective == "parameters":
        return sum(p.numel() for p in net.parameters())
    with FlopCounterMode(display=False) as counter:
        net(x.clone())
    return counter.get_total_flops() / 2


def state(net: nn.Module) -> tuple:
    """Everything of a network that must stay as it was."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return repr(net), [m.training for m in net.modules()], [(name, id(t), t.tolist()) for name, t in tensors]


@torch.no_grad()
def inside(net: nn.Module, x: Tensor) -> Tensor:
    """Which outputs of a linear run read no padding but that before its first calls.

    All other padding is made of NaN, and whatever it reaches is not inside.
    """
    marked, sides = copy.deepcopy(net), {}

    def widen(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (value,) = inputs
        first = value.shape == x.shape and value.data_ptr() == x.data_ptr()
        channels = len(sides[module]) > 2 * (x.ndim - 2)
        return F.pad(value, sides[module], value=0.0 if first or channels else math.nan)

    for module in marked.modules():
        if isinstance(module, POSITIONAL):
            sides[module] = _sides(module)
            module.padding = (0,) * (len(sides[module]) if isinstance(module, PADS) else x.ndim - 2)
            module.ceil_mode = False  # which changes nothing here, but does behind a padding of its own
            module.register_forward_pre_hook(widen)
    return marked(x).isfinite()


def _sides(module: nn.Module) -> tuple[int, ...]:
    """A module's padding as `F.pad` wants it."""
    if isinstance(module, PADS):
        return tuple(module.padding)
    if isinstance(module, LAYERS):
        return tuple(module._reversed_padding_repeated_twice)
    return tuple(side for side in reversed(module.padding) for _ in range(2))


def trains(net: nn.Module, x: Tensor) -> list[bool]:
    """One forward and one backward pass in train mode: which parameters have a finite gradient."""
    net.train().zero_grad()
    try:
        net(x.clone()).square().mean().backward()
        return [p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters()]
    finally:
        net.eval()


# --- the properties --------------------------------------------------------------------------------------


class Tally(collections.Counter):
    """Verdicts so far, and the largest relative error."""

    largest = 0.0

    def see(self, given: Network, net: nn.Module, small: nn.Module) -> None:
        """Equal on the example, on another batch and on another batch size."""
        for x in (given.example, given.batch(2), given.batch(3)):
            error = apart(net, small, x)
            assert error <= TOLERANCE, f"off by {error:.1e}"
            self.largest = max(self.largest, error)


def check_exact(given: Network, objective: str, tally: Tally) -> None:
    """Equal everywhere, the argument left alone, never worse by its objective, a report that says what was done."""
    net, x = given.net, given.example
    before, seen = state(net), x.clone()
    small = linl.fold(net, x, objective=objective)
    assert state(net) == before and torch.equal(x, seen), "the argument was changed"
    tally.see(given, net, small)
    assert linl.verify(net, small, x).equal, "linl.verify says no"
    if x.ndim > 2 and not small.fold_report.table["reason"].str.contains("positions|one dense matrix").any():
        other_sizes(net, small, x, tally)
    owned = [{t.data_ptr() for t in (*n.parameters(), *n.buffers()) if t.numel()} for n in (net, small)]
    assert not owned[0] & owned[1], "the folded network shares memory with the given one"
    if objective in OBJECTIVES:
        was, became = price(net, x, objective), price(small, x, objective)
        assert became <= was, f"{objective} rose from {was} to {became}"
    table = small.fold_report.table
    tally.update(table["verdict"])
    assert set(table["verdict"]) <= {"exact", "refused"}
    assert (table["reason"].str.len() > 0)[table["verdict"] == "refused"].all(), "refused without a reason"
    assert not table["reason"].str.contains("check failed|whole network was off").any(), "planned, then undone"
    assert removed(small) == layers_called(net, x) - layers_called(small, x), "the report miscounts layers"
    if given.family == "bare" and objective == "depth":
        assert layers_called(small, x) == given.left, f"{layers_called(small, x)} layers are left, not {given.left}"


def other_sizes(net: nn.Module, small: nn.Module, x: Tensor, tally: Tally) -> None:
    """Where no row is for the example's positions alone: equal at every other size that the network takes."""
    generator = torch.Generator().manual_seed(0)
    for more in (*range(-1, 5), 24):
        size = [n + more for n in x.shape[2:]]
        other = torch.randn(*x.shape[:2], *size, generator=generator, dtype=x.dtype)
        try:
            net(other.clone())
        except (RuntimeError, ValueError, AssertionError):
            continue
        error = apart(net, small, other)
        assert error <= TOLERANCE, f"off by {error:.1e} at {size} positions"
        tally["other sizes"] += more != 0


def removed(small: nn.Module) -> int:
    """Layers that a fold report says are gone."""
    table = small.fold_report.table
    merged = table[table["verdict"] != "refused"]
    return int((merged["layers"] - 1).sum())


def check_padded(given: Network, tally: Tally) -> None:
    """`pad_first` keeps the shape, and the function where nothing pads inside, and trains; then nothing is missed."""
    net, x = given.net, given.example
    before = state(net)
    padded = linl.pad_first(net, x)
    assert state(net) == before, "pad_first changed its argument"
    assert padded(x.clone()).shape == net(x.clone()).shape
    shapes = [{name: p.shape for name, p in n.named_parameters()} for n in (net, padded)]
    assert shapes[0] == shapes[1], "pad_first changed the parameters"
    if given.family == "bare" and not given.inner:
        assert apart(net, padded, x) <= TOLERANCE, "pad_first changed a network that pads nowhere inside"
    try:
        wanted = trains(copy.deepcopy(net), x)
    except (RuntimeError, ValueError):
        wanted = None  # a wild network that works in place can't be trained, padded or not
    if wanted is not None:
        assert trains(copy.deepcopy(padded), x) == wanted, "the padded network doesn't train as the given one"
    small = linl.fold(padded, x, objective="depth")
    tally.see(given, padded, small)
    if given.left is not None:
        count = layers_called(small, x)
        assert count == given.left, f"{count} layers are left after pad_first, not {given.left}"


def check_interior(given: Network, tally: Tally) -> None:
    """border="interior": runs are right where nothing was padded inside; what is called exact is exact."""
    net, x = given.net, given.example
    small = linl.fold(net, x, border="interior", objective="depth")
    table = small.fold_report.table
    tally.update(table["verdict"])
    rows = table[table["verdict"] == "interior only"]
    errors = rows["error_interior"].dropna()
    spatial = rows["error_interior"].notna() & (rows["error_interior"] != rows["error_border"])
    assert (errors[spatial] <= TOLERANCE).all(), f"interior off by {errors[spatial].max():.1e}"
    if rows.empty:
        tally.see(given, net, small)
    if given.single:
        mask = inside(net, x)
        a, b = net(x), small(x)
        error = ((a - b)[mask].abs().max() / a.abs().max().clamp(min=1)).item() if mask.any() else 0.0
        assert error <= TOLERANCE, f"off by {error:.1e} inside"
        assert layers_called(small, x) == given.left, f"one run is {layers_called(small, x)} layers"
        tally["interior positions"] += int(mask[0, 0].sum())
        tally["border positions"] += int((~mask[0, 0]).sum())


def given(seed: int) -> Network:
    """A seed's network: the families in turn, now and then one run alone."""
    return network(seed, "padded", runs=True) if seed % 8 == 7 else network(seed, FAMILIES[seed % 3])


def check(seed: int, tally: Tally, objectives: tuple[str, ...] = OBJECTIVES) -> None:
    """All properties of one seed's network; an AssertionError that names it where one fails."""
    made = given(seed)
    checks: list[Callable[[], None]] = [lambda o=o: check_exact(made, o, tally) for o in objectives]
    checks += [lambda: check_padded(made, tally), lambda: check_interior(made, tally)]
    for one in checks:
        torch.manual_seed(seed)
        try:
            one()
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{made}") from error


def campaign(count: int, start: int = 0) -> int:
    """Checks seeds until one fails; prints one line, or the failing network. Returns an exit status."""
    warnings.filterwarnings("ignore", "Using padding='same'")
    tally = Tally()
    for seed in range(start, start + count):
        try:
            check(seed, tally)
        except AssertionError:
            traceback.print_exc(file=sys.stdout)
            return 1
    print(
        f"{count} networks: {tally['exact']} merges exact, {tally['interior only']} interior only, "
        f"{tally['refused']} refused; {tally['other sizes']} further sizes; largest relative error {tally.largest:.1e}"
    )
    return 0


# --- the suite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(96))
def test_random_networks_fold(seed):
    check(seed, Tally(), (OBJECTIVES[seed // 3 % 3],))


@pytest.mark.parametrize("seed", [1, 6])
def test_random_networks_fold_for_latency(seed):
    check_exact(given(seed), "latency", Tally())


def test_the_generator_draws_everything():
    seeds = [*((seed, "wild") for seed in range(400)), *((seed, "bare") for seed in range(100))]
    drawn = "\n".join(str(network(*of)) for of in seeds)
    calls = [f"«{name}»" for name in [*FACTORS, *TRAPS, *IMAGE_TRAPS, *FLATTENINGS] if name not in SKIPPED]
    kinds = (
        "Conv1d Conv2d Linear BatchNorm1d BatchNorm2d AvgPool1d AvgPool2d Pool AdaptiveAvgPool2d ZeroPad2d Pad Dropout "
    )
    kinds += "Identity ReLU LeakyReLU MaxPool2d GroupNorm Twice Between Scale ConvTranspose2d InstanceNorm2d Upsample"
    options = (
        "padding=same padding_mode=reflect padding_mode=circular ceil_mode=True count_include_pad=False affine=False "
    )
    options += "dilation=(2, groups=2 bias=False inplace=True track_running_stats=False"
    wanted = calls + [f": {kind}(" for kind in kinds.split()] + options.split() + [f"    {how}\n" for how in SUMS]
    assert not [one for one in wanted if one not in drawn]


def test_what_is_left_is_counted_from_the_pieces():
    layer, nothing, bend, twice = (Piece(nn.Identity(), *of) for of in [(1,), (0,), (None,), (None, 2)])
    reflect = Piece(nn.Identity(), 1, begins=True)
    assert left([layer, nothing, layer, nothing]) == left([nothing, layer]) == 1 and left([nothing, bend]) == 0
    assert left([layer, bend, nothing, bend, layer, layer]) == 2
    assert left([layer, twice, nothing, layer]) == 4 and left([nothing, reflect, layer]) == 1
    assert left([layer, reflect, layer]) == 2
    last = Piece(nn.Identity(), 1, single=True)
    assert left([layer, reflect, last]) == left([layer, reflect, nothing, last, layer]) == 1
    assert left([layer, reflect, bend, last]) == 3 and left([last, reflect, layer]) == 2


# --- a check that can't fail is no check -------------------------------------------------------------------


def scaled(net: nn.Module, small: nn.Module) -> nn.Module:
    """One weight of the folded network off by a ten-millionth."""
    layer = next((m for m in small.modules() if isinstance(m, LAYERS)), None)
    if layer is not None:
        layer.weight.data[0] *= 1 + 1e-7
    return small


def without_maps(net: nn.Module, small: nn.Module) -> nn.Module:
    """No bias maps: wrong at the border alone."""
    for name, parameter in small.named_parameters():
        if name.endswith("_border"):
            parameter.data[:] = parameter.data.mean((1, 2), keepdim=True) if parameter.ndim == 3 else 0
    return small


def idle(net: nn.Module, small: nn.Module) -> nn.Module:
    """Nothing folded."""
    report, small = small.fold_report, linl.graph.trace(net)
    small.fold_report = dataclasses.replace(report, table=report.table.iloc[:0], places={})
    return small


def forgetful(net: nn.Module, small: nn.Module) -> nn.Module:
    """A report with its last merge left out."""
    report = small.fold_report
    small.fold_report = dataclasses.replace(report, table=report.table[report.table["layers"] < 2])
    return small


def meddling(net: nn.Module, small: nn.Module) -> nn.Module:
    """The given network changed."""
    for parameter in net.parameters():
        parameter.data *= 1
        parameter.data += 1e-12
    return small


def fixed_size(net: nn.Module, small: nn.Module) -> nn.Module:
    """Right for one batch size alone."""
    small.register_forward_pre_hook(lambda module, inputs: inputs[0] * (1 if len(inputs[0]) == 2 else 2))
    return small


SABOTAGE = [
    (scaled, "off by"), (without_maps, "off by"), (idle, "layers are left"), (forgetful, "miscounts"),
    (meddling, "argument was changed"), (fixed_size, "off by"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), SABOTAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_fold_is_found(wrong, words, monkeypatch):
    true = linl.fold
    monkeypatch.setattr(linl, "fold", lambda net, *args, **options: wrong(net, true(net, *args, **options)))
    with pytest.raises(AssertionError, match=words):
        for seed in range(48):
            check_exact(given(seed), "depth", Tally())


def test_a_wrong_interior_and_a_missed_padding_are_found(monkeypatch):
    true, moved = linl.fold, linl.pad_first
    monkeypatch.setattr(linl, "pad_first", lambda net, x: linl.graph.trace(net))
    with pytest.raises(AssertionError, match="layers are left after pad_first"):
        for seed in range(1, 48, 3):
            check_padded(given(seed), Tally())
    monkeypatch.setattr(linl, "pad_first", lambda net, x: scaled(net, moved(net, x)))
    with pytest.raises(AssertionError, match="pads nowhere inside"):
        for seed in range(2, 48, 3):
            check_padded(given(seed), Tally())
    monkeypatch.setattr(linl, "fold", lambda net, *args, **options: scaled(net, true(net, *args, **options)))
    with pytest.raises(AssertionError, match="inside"):
        for seed in range(7, 200, 8):
            check_interior(given(seed), Tally())

"""Trainable activations whose nonlinearity is a number, and the functions that handle them.

| unit | formula | linear at | source |
|---|---|---|---|
| `LiNLU` | p·x − (1−p)·min(0, x), p in [½, 1] | p = 1 | Jin & Jeong, APL Mach. Learn. 1, 016108 (2023), eq. for LiNLU |
| `PartialLinear` | α·x + (1−α)·σ(x), α >= 0 | α = 1 | Ben Dror et al., Layer Folding, BMVC 2022, section 3 |

Around a ReLU the two span one family: LiNLU_p = p · PartialLinear with α = 2 − 1/p.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from linl.graph import clone, example_for, shapes, trace
from linl.kernels import two_slope
from linl.sites import activation_sites, replace_activations


class Unit(nn.Module):
    """What every trainable unit can do. A subclass names its `kind`, its parameter and its slopes."""

    is_linl_activation = True  # the tracer keeps it whole
    kind: str
    parameter_name: str
    linear_threshold: float  # `harden` calls the unit linear from here on, unless told otherwise
    fused = False  # set by `fuse_kernels_`

    @classmethod
    def instead_of(cls, activation: nn.Module, channels: int | None = None, **start: float) -> Unit:
        """The unit that takes an activation's place; `start`: its parameter, by name."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, activation: nn.Module) -> str:
        """Why it can't take an activation's place; empty where it can."""
        return ""

    @classmethod
    def loses(cls, activation: nn.Module) -> str:
        """What of an activation it can't reproduce; empty where nothing."""
        return ""

    @property
    def theta(self) -> nn.Parameter:
        """The trainable parameter, () or (C,)."""
        return getattr(self, self.parameter_name)

    def _new_parameter(self, value: float, channels: int | None) -> nn.Parameter:
        return nn.Parameter(torch.full(() if channels is None else (channels,), float(value)))

    def is_linear(self, threshold: float | None = None) -> bool:
        """Whether every channel's parameter has reached the threshold."""
        return bool((self.theta >= (self.linear_threshold if threshold is None else threshold)).all())

    def slopes(self) -> tuple[Tensor, Tensor]:
        """(slope for x < 0, slope for x > 0); nan where the wrapped activation is no two-slope one."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """The unit's share of the linearity penalty, a scalar."""
        return self.theta.new_zeros(())

    @torch.no_grad()
    def project_(self) -> None:
        """Puts the parameter back into its range."""
        raise NotImplementedError

    def harden(self, threshold: float | None = None) -> nn.Module:
        """Identity where the unit is linear, otherwise the fixed activation it has become."""
        raise NotImplementedError

    def fuse(self) -> nn.Module:
        """`harden()`, under the name that timm's reparameterize_model looks for."""
        return self.harden()


class LiNLU(Unit):
    """Linear-to-nonlinear unit: f(x) = p·x − (1−p)·min(0, x).

    p·x for x > 0 and (2p−1)·x for x <= 0: p = ½ is ½·ReLU, p = 1 the identity. One trainable p a layer
    as published, one a channel with `channels` (our extension). The published code clamps p inside
    forward; here `project_` does, after the optimizer's step.

    Args:
        p: where training starts, in [0.5, 1]; published 0.75.
        channels: None, or the number of channels (dimension 1 of the input).

    Shape: (*) to (*); (N, C, *) with `channels`.

    Raises:
        ValueError: p outside [0.5, 1].
    """

    kind, parameter_name, linear_threshold = "linlu", "p", 1.0

    @classmethod
    def instead_of(cls, activation: nn.Module, channels: int | None = None, **start: float) -> LiNLU:
        return cls(channels=channels, **start)

    @classmethod
    def refuses(cls, activation: nn.Module) -> str:
        known = isinstance(activation, nn.ReLU | nn.LeakyReLU | nn.ReLU6)
        return "" if known else 'a LiNLU replaces ReLU, LeakyReLU and ReLU6 only; use "partial"'

    @classmethod
    def loses(cls, activation: nn.Module) -> str:
        return "cap of ReLU6 dropped" if isinstance(activation, nn.ReLU6) else ""

    def __init__(self, p: float = 0.75, channels: int | None = None) -> None:
        super().__init__()
        if not 0.5 <= p <= 1:
            raise ValueError(f"p = {p} is outside [0.5, 1]: 0.5 is half a ReLU, 1 is linear")
        self.p = self._new_parameter(p, channels)

    def forward(self, x: Tensor) -> Tensor:
        return two_slope(x, self.p, (0.0, 1.0), (-1.0, 2.0), self.fused)

    def slopes(self) -> tuple[Tensor, Tensor]:
        p = self.p.detach()
        return 2 * p - 1, p

    @torch.no_grad()
    def project_(self) -> None:
        self.p.clamp_(0.5, 1.0)

    def harden(self, threshold: float | None = None) -> nn.Module:
        if self.is_linear(threshold):
            return nn.Identity()
        return TwoSlope(*self.slopes())

    def extra_repr(self) -> str:
        return _describe("p", self.p)


class PartialLinear(Unit):
    """Layer Folding's unit: α·x + (1−α)·σ(x) around any activation σ.

    α = 0 is σ itself, α = 1 the identity. Around ReLU and LeakyReLU it is a two-slope activation and
    as fast as LiNLU. The published start is α = 0.

    Args:
        activation: σ; copied, and used out of place.
        alpha: where training starts, >= 0.
        channels: None, or the number of channels (dimension 1 of the input).

    Shape: (*) to (*); (N, C, *) with `channels`.

    Raises:
        ValueError: alpha < 0.
    """

    kind, parameter_name, linear_threshold = "partial", "alpha", 0.9

    @classmethod
    def instead_of(cls, activation: nn.Module, channels: int | None = None, **start: float) -> PartialLinear:
        return cls(activation, channels=channels, **start)

    def __init__(self, activation: nn.Module | None = None, alpha: float = 0.0, channels: int | None = None) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha = {alpha} is negative: 0 is the original activation, 1 is linear")
        self.activation = _out_of_place(nn.ReLU() if activation is None else activation)
        self.alpha = self._new_parameter(alpha, channels)

    def forward(self, x: Tensor) -> Tensor:
        slope = _leaky_slope(self.activation)
        if slope is not None:
            return two_slope(x, self.alpha, (1.0, 0.0), (slope, 1.0 - slope), self.fused)
        alpha = self.alpha.view(-1, *[1] * (x.ndim - 2)) if self.alpha.ndim else self.alpha
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return torch.lerp(self.activation(wide), wide, alpha.to(wide.dtype)).to(x.dtype)

    def slopes(self) -> tuple[Tensor, Tensor]:
        alpha, slope = self.alpha.detach(), _leaky_slope(self.activation)
        if slope is None:
            return torch.full_like(alpha, torch.nan), torch.full_like(alpha, torch.nan)
        return slope + (1 - slope) * alpha, torch.ones_like(alpha)

    def penalty(self) -> Tensor:
        return (1 - self.alpha**2).abs().sum()

    @torch.no_grad()
    def project_(self) -> None:
        self.alpha.clamp_(min=0.0)

    def harden(self, threshold: float | None = None) -> nn.Module:
        if self.is_linear(threshold):
            return nn.Identity()
        if not self.alpha.any():
            return copy.deepcopy(self.activation)
        if _leaky_slope(self.activation) is not None:
            return TwoSlope(*self.slopes())
        return FixedPartial(self.activation, self.alpha)

    def extra_repr(self) -> str:
        return _describe("alpha", self.alpha)


UNITS: dict[str, type[Unit]] = {"linlu": LiNLU, "partial": PartialLinear}


# --- what a unit becomes when training is over -----------------------------------------------------


def TwoSlope(negative: Tensor, positive: Tensor) -> nn.Module:  # noqa: N802 - reads as the layer it makes
    """A fixed two-slope activation: torch's own ReLU or LeakyReLU where one is the same.

    Args:
        negative, positive: slopes for x <= 0 and x > 0, () or (C,).
    """
    if positive.ndim == 0 and positive.item() == 1:
        return nn.ReLU() if negative.item() == 0 else nn.LeakyReLU(negative.item())
    return FixedTwoSlope(negative, positive)


class FixedTwoSlope(nn.Module):
    """positive·x for x > 0, negative·x otherwise; the slopes are buffers, () or (C,)."""

    is_linl_activation = True

    def __init__(self, negative: Tensor, positive: Tensor) -> None:
        super().__init__()
        self.register_buffer("negative", negative.detach().clone())
        self.register_buffer("positive", positive.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, (self.negative / self.positive).to(x.dtype)) * self._wide(self.positive, x).to(x.dtype)

    @staticmethod
    def _wide(t: Tensor, x: Tensor) -> Tensor:
        return t.view(-1, *[1] * (x.ndim - 2)) if t.ndim else t

    def extra_repr(self) -> str:
        return f"{_describe('negative', self.negative)}, {_describe('positive', self.positive)}"


class FixedPartial(nn.Module):
    """α·x + (1−α)·σ(x) with a fixed α, () or (C,)."""

    is_linl_activation = True

    def __init__(self, activation: nn.Module, alpha: Tensor) -> None:
        super().__init__()
        self.activation = copy.deepcopy(activation)
        self.register_buffer("alpha", alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        alpha = FixedTwoSlope._wide(self.alpha, x).to(x.dtype)
        return torch.lerp(self.activation(x), x, alpha.expand_as(x))


# --- a whole network -------------------------------------------------------------------------------


def linearize(
    net: nn.Module,
    unit: str = "linlu",
    *,
    per: str = "layer",
    start: float | None = None,
    example: Tensor | None = None,
) -> nn.Module:
    """A copy of a network in which every activation is a trainable unit.

    Works on any network that can be traced: modules, functional calls and the activations inside
    timm's BatchNormAct2d. One unit for each place where an activation is used. Parameters keep their
    names, so a state_dict of the original loads with `strict=False`.

    Args:
        net: any network.
        unit: "linlu" (ReLU, LeakyReLU, and ReLU6 with its cap dropped) or "partial" (any activation).
        per: "layer", as both papers; "channel" for one parameter a channel (dimension 1).
        start: first value of p or α; the published one (0.75, 0) when None.
        example: one input batch, needed by per="channel" where the network has no `input_size`.

    Returns: the linearized network; `.linearize_notes` lists what was changed on the way (dropped caps).

    Raises:
        ValueError: an unknown unit, an activation that the unit can't replace (all of them, by name),
            a network without activations, or one that can't be traced.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}: choose from {', '.join(UNITS)}")
    if per not in ("layer", "channel"):
        raise ValueError(f'per={per!r}: choose "layer" or "channel"')
    if units_of(net):
        raise ValueError(f"{type(net).__name__} has trainable units already: linearize the original, or harden first")
    traced = trace(net)
    sites = activation_sites(traced)
    if not sites:
        raise ValueError(f"{type(net).__name__} has no activation: nothing to linearize")
    kind = UNITS[unit]
    channels: dict = {}
    if per == "channel":
        trouble = 'per="channel" must know how many channels there are: pass example=, one input batch'
        known = shapes(traced, example_for(net, example, trouble))
        channels = {site.name: known[site.node][1] for site in sites}
    refused = [(f"{s.name} ({type(s.module).__name__})", why) for s in sites if (why := kind.refuses(s.module))]
    if refused:
        raise ValueError(f"{refused[0][1]} for: {', '.join(name for name, _ in refused)}")
    units, options = [], {} if start is None else {kind.parameter_name: start}
    for site in sites:
        made = kind.instead_of(site.module, channels.get(site.name), **options)
        reference = next(net.parameters(), None)
        if reference is not None:
            made.to(device=reference.device, dtype=reference.dtype)
        units.append(made.train(net.training))
    traced = replace_activations(traced, sites, units)
    traced.linearize_notes = [f"{s.name}: {lost}" for s in sites if (lost := kind.loses(s.module))]
    if hasattr(traced, "made_by"):
        traced.made_by = {**traced.made_by, "linearize": {"unit": unit, "per": per}}
    return traced


def units_of(net: nn.Module) -> dict[str, Unit]:
    """The trainable units by name, in the order of the forward pass (of modules, where nothing was traced).

    Args:
        net: from `linearize`, or any module; the units are its own, not copies.
    """
    units = {name: module for name, module in net.named_modules() if isinstance(module, Unit)}
    if not isinstance(net, fx.GraphModule):
        return units
    calls: dict[str, int] = {}
    for i, node in enumerate(net.graph.nodes):
        if node.op == "call_module":
            calls.setdefault(node.target, i)

    def place(name: str) -> int:  # a unit inside a called module (timm's norms) stands where that is called
        while name and name not in calls:
            name = name.rpartition(".")[0]
        return calls.get(name, len(calls))

    return dict(sorted(units.items(), key=lambda item: place(item[0])))


def nonlinearity(net: nn.Module) -> pd.DataFrame:
    """How linear every unit is now.

    Args:
        net: from `linearize`; no rows where it has no units.

    Returns: a row a unit (its mean over channels), in the order of the forward pass: name, kind, parameter (p or α),
        slope_neg, slope_pos, linear (whether `harden` makes it an identity).
    """
    rows = []
    for name, unit in units_of(net).items():
        negative, positive = unit.slopes()
        rows.append(
            {
                "name": name,
                "kind": unit.kind,
                "parameter": unit.theta.detach().float().mean().item(),
                "slope_neg": negative.float().mean().item(),
                "slope_pos": positive.float().mean().item(),
                "linear": unit.is_linear(),
            }
        )
    return pd.DataFrame(rows, columns=["name", "kind", "parameter", "slope_neg", "slope_pos", "linear"])


def param_groups(
    net: nn.Module,
    lr: float,
    unit_lr: float | None = None,
    weight_decay: float = 0.0,
    unit_weight_decay: float | None = None,
) -> list[dict]:
    """Two optimizer groups, weights and units, each parameter once.

    Args:
        net: from `linearize`, or without units: then there is one group.
        lr, weight_decay: of the weights.
        unit_lr, unit_weight_decay: of p or α; as the weights' where None (Layer Folding). LiNLNet
            trains p at a tenth of the weights' rate, with the same decay.
    """
    units = [unit.theta for unit in units_of(net).values()]
    ids = {id(p) for p in units}
    weights = [p for p in net.parameters() if id(p) not in ids and p.requires_grad]
    groups = [{"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay}]
    if units:
        groups.append(
            {
                "name": "units",
                "params": units,
                "lr": lr if unit_lr is None else unit_lr,
                "weight_decay": weight_decay if unit_weight_decay is None else unit_weight_decay,
            }
        )
    return groups


def penalty(net: nn.Module, weight: float = 0.25) -> Tensor:
    """weight · Σ |1 − α²| over all PartialLinear units (Layer Folding, p = 2); zero for LiNLUs.

    Args:
        net: from `linearize`.
        weight: λ of the paper, published 0.25.

    Returns: a scalar to be added to the loss, differentiable in α.
    """
    terms = [unit.penalty() for unit in units_of(net).values()]
    if not terms:
        return torch.zeros(())
    return weight * torch.stack(terms).sum()


def project_(net: nn.Module) -> None:
    """Puts every unit's parameter back into its range: p in [0.5, 1], α >= 0. Call after each step.

    Args:
        net: from `linearize`; changed.
    """
    for unit in units_of(net).values():
        unit.project_()


def fuse_kernels_(net: nn.Module, fused: bool = True) -> None:
    """Lets compiled kernels compute the units (or no longer). Needs a C++ compiler; see linl.kernels.

    Args:
        net: from `linearize`; changed.
        fused: False for torch's own operations again.
    """
    for unit in units_of(net).values():
        unit.fused = fused


def harden(net: nn.Module, threshold: float | None = None) -> nn.Module:
    """A copy without trainable units: linear ones are Identity, the others fixed activations.

    Args:
        net: from `linearize`; left alone.
        threshold: from which p or α on a unit counts as linear; 1 exactly for LiNLU and 0.9 for
            PartialLinear (both as published) when None.
    """
    net = clone(net)
    made: dict[int, nn.Module] = {}
    for name, unit in list(net.named_modules(remove_duplicate=False)):  # a shared unit is met at each of its places
        if not isinstance(unit, Unit):
            continue
        hard = made.setdefault(id(unit), unit.harden(threshold).to(unit.theta.device).train(unit.training))
        if not name:
            return hard
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner) if owner else net, leaf, hard)
    return net


# --- small helpers ---------------------------------------------------------------------------------


def _leaky_slope(activation: nn.Module) -> float | None:
    """The slope for x < 0 of a ReLU or LeakyReLU, None for anything else."""
    if type(activation) is nn.ReLU:
        return 0.0
    return activation.negative_slope if type(activation) is nn.LeakyReLU else None


def _out_of_place(activation: nn.Module) -> nn.Module:
    activation = copy.deepcopy(activation)
    if getattr(activation, "inplace", False):
        activation.inplace = False
    return activation


def _describe(name: str, value: Tensor) -> str:
    if value.ndim == 0:
        return f"{name}={value.item():.4g}"
    return f"{name}: {value.numel()} channels, mean {value.mean().item():.4g}"

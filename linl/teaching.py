"""A network that learns from another: from its outputs, and from what it computes on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from linl.devices import autocast, has_convolutions
from linl.graph import clone, evaluating
from linl.identities import network_identity
from linl.losses import distillation
from linl.recipes import Recipe

Hints = Mapping[str, Tensor | None]
"""Modules by the name that both networks call them, each with the channels of the teacher's that it is compared with:
their numbers, or None for all."""


class Teacher:
    """A network whose outputs are the aim, and whose values at some modules are aimed at as well.

    A hint (FitNets: Romero et al., ICLR 2015) is what a module's output misses of the teacher's, as `missed`.

    While it is entered, the modules of both are listened to.

    Args:
        net: left alone; a copy is moved to where the student is.
        student: on `where`.
        hints: as `Hints`.
        like: with hints, an input of the student's shape, (1, …).

    Raises:
        ValueError: a module that one of the two lacks or doesn't call, one that gives them values of different shapes
            or no tensor, or channels that the teacher hasn't got.
    """

    def __init__(
        self, net: nn.Module, student: nn.Module, settings: Recipe, where: torch.device, precision: str,
        hints: Hints, like: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.net = clone(net).to(where).eval().requires_grad_(False)
        if has_convolutions(self.net):
            self.net.to(memory_format=torch.channels_last)
        self.student, self.settings, self.where, self.precision = student, settings, where, precision
        self.hints = {name: None if at is None else torch.as_tensor(at) for name, at in hints.items()}
        self.identity: dict = {"teacher": network_identity(net)}
        if self.hints:
            chosen = {name: "all" if at is None else at.tolist() for name, at in self.hints.items()}
            self.identity["hints"] = chosen
            self._refuse(like)
        self.hints = {name: None if at is None else at.to(where) for name, at in self.hints.items()}

    def __enter__(self) -> Teacher:
        self._mine, mine = _listen(self.student, self.hints)
        self._its, its = _listen(self.net, self.hints)
        self._listening = mine + its
        return self

    def __exit__(self, *_) -> None:
        for handle in self._listening:
            handle.remove()
        self._mine = self._its = {}

    def mixed(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The batch's loss, the distance to the teacher's outputs as its share, with what its hints miss.

        Raises:
            ValueError: a module that wasn't called, or whose output was changed in place since.
        """
        with torch.no_grad(), autocast(self.where, self.precision):
            wanted = self.net(images)
        apart = distillation(logits, wanted.float(), self.settings.temperature)
        total = (1 - self.settings.distill) * loss + self.settings.distill * apart
        for name in self.hints:
            total = total + self.settings.hint * missed(*self._both(name))
        return total

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        """The values of the student's module and those that it should have. Each is taken once."""
        mine, its = (_taken(kept, name, who) for kept, who in ((self._mine, "network"), (self._its, "teacher")))
        channels = self.hints[name]
        return mine.float(), (its if channels is None else its.index_select(1, channels)).float()

    def _refuse(self, like: Tensor) -> None:
        for name, at in self.hints.items():
            for who, net in (("network", self.student), ("teacher", self.net)):
                if not name or name not in dict(net.named_modules()):
                    raise ValueError(f"hints: no module {name!r} in the {who}, {type(net).__name__}")
            if at is not None and (at.ndim != 1 or at.dtype not in (torch.int64, torch.int32) or at.lt(0).any()):
                raise ValueError(f"hints: {name}: {at} aren't the numbers of channels")
        with self, torch.no_grad(), evaluating(self.student):
            self.student(like), self.net(like)
            for name, at in self.hints.items():
                its = self._its.get(name, (like,))[0]
                if at is not None and isinstance(its, Tensor) and at.max() >= its.shape[1]:
                    raise ValueError(f"hints: {name}: no channel {at.max()}, the teacher's has {its.shape[1]}")
                mine, its = self._both(name)
                if mine.shape != its.shape:
                    told = tuple(mine.shape[1:]), tuple(its.shape[1:])
                    raise ValueError(f"hints: {name} gives {told[0]} where the teacher's gives {told[1]}")


def _listen(net: nn.Module, names: Iterable[str]) -> tuple[dict, list]:
    """What modules will give, and the handles of their hooks. An output is kept with how often it had been changed."""
    kept: dict[str, tuple] = {}

    def into(name: str):
        return lambda module, inputs, output: kept.__setitem__(name, (output, getattr(output, "_version", None)))

    return kept, [net.get_submodule(name).register_forward_hook(into(name)) for name in names]


def _taken(kept: dict, name: str, who: str) -> Tensor:
    if name not in kept:
        raise ValueError(f"hints: {name} isn't called in the {who}")
    value, version = kept.pop(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"hints: {name} gives a {type(value).__name__} in the {who}, not a tensor")
    if value._version != version:
        raise ValueError(f"hints: what {name} gives is changed in place afterwards in the {who}: name what changes it")
    return value


def missed(mine: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance of values from those wanted, in the variance of those, as `linl.refit` reports it: 0 for the
    same, 1 for their means. Where those don't vary, the mean squared distance.

    Args:
        mine, wanted: (N, channels, …); the variance is about each channel's mean, summed over channels.
    """
    axes = [axis for axis in range(wanted.ndim) if axis != 1]
    about = ((wanted - wanted.mean(axes, keepdim=True)) ** 2).sum()
    varies = about > torch.finfo(wanted.dtype).eps * (wanted**2).sum()
    return ((mine - wanted) ** 2).sum() / torch.where(varies, about, wanted.numel())

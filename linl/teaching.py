"""A network that learns from another: from its outputs, and from what it computes on the way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linl.devices import autocast, has_convolutions
from linl.graph import clone, evaluating
from linl.identities import network_identity
from linl.losses import distillation
from linl.recipes import Recipe

Hints = Mapping[str, Tensor | None]
"""Modules by the name that both networks call them, each with the channels of the teacher's that it is compared with:
their numbers in a tensor, or None for all."""


class Teacher:
    """A network whose outputs are the aim, and whose values at some modules are aimed at as well.

    A hint (FitNets: Romero et al., ICLR 2015) is the squared distance of a module's output from the teacher's, as a
    share of the variance over images and places of the teacher's: what `linl.refit` reports as missed.

    While it is entered, the student's modules are listened to.

    Args:
        net: left alone; a copy is moved to where the student is.
        student: on `where`.
        hints: as `Hints`; empty where the recipe's `hint` is 0.
        like: an input of the student's shape, (1, …).

    Raises:
        ValueError: a hint without weight or the other way round, a module that one of the two lacks, or one that gives
            them values of different shapes.
    """

    def __init__(
        self, net: nn.Module, student: nn.Module, settings: Recipe, hints: Hints, like: Tensor, precision: str
    ) -> None:
        self.where = like.device
        self.net = clone(net).to(self.where).eval().requires_grad_(False)
        if has_convolutions(self.net):
            self.net.to(memory_format=torch.channels_last)
        self.student, self.settings, self.precision = student, settings, precision
        self.identity = network_identity(net)
        if hints:
            self.identity["hints"] = {name: at.tolist() if at is not None else "all" for name, at in hints.items()}
        self.hints = {name: at.to(self.where) if at is not None else None for name, at in hints.items()}
        self._mine: dict[str, Tensor] = {}
        self._its: dict[str, Tensor] = {}
        self._refuse(like)
        self._listening: list = []

    def __enter__(self) -> Teacher:
        self._listening = self._listen()
        return self

    def __exit__(self, *_) -> None:
        for handle in self._listening:
            handle.remove()

    def mixed(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The batch's loss, the distance to the teacher's outputs as its share, with what its hints miss."""
        with torch.no_grad(), autocast(self.where, self.precision):
            wanted = self.net(images)
        apart = distillation(logits, wanted.float(), self.settings.temperature)
        total = (1 - self.settings.distill) * loss + self.settings.distill * apart
        for name in self.hints:
            total = total + self.settings.hint * missed(self._mine[name].float(), self._wanted(name).float())
        return total

    def _wanted(self, name: str) -> Tensor:
        its, channels = self._its[name], self.hints[name]
        return its if channels is None else its.index_select(1, channels)

    def _listen(self) -> list:
        def into(kept: dict, name: str):
            return lambda module, inputs, output: kept.__setitem__(name, output)

        both = ((self.student, self._mine), (self.net, self._its))
        return [net.get_submodule(n).register_forward_hook(into(kept, n)) for net, kept in both for n in self.hints]

    def _refuse(self, like: Tensor) -> None:
        if bool(self.hints) != bool(self.settings.hint):
            raise ValueError(
                f"hint = {self.settings.hint}: a recipe with hint above 0 needs hints=, the modules that are compared; "
                "another takes none"
            )
        for name in self.hints:
            for who, net in (("network", self.student), ("teacher", self.net)):
                if not name or name not in dict(net.named_modules()):
                    raise ValueError(f"hints: no module {name!r} in the {who}, {type(net).__name__}")
        handles = self._listen()
        try:
            with torch.no_grad(), evaluating(self.student):
                self.student(like), self.net(like)
            for name in self.hints:
                if not (name in self._mine and name in self._its):
                    raise ValueError(f"hints: {name} isn't called")
                mine, its = self._mine[name].shape, self._wanted(name).shape
                if mine != its:
                    raise ValueError(
                        f"hints: {name} gives {tuple(mine[1:])} where the teacher's gives {tuple(its[1:])}"
                    )
        finally:
            for handle in handles:
                handle.remove()


def missed(mine: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance of values from those wanted, in the variance of those: 0 for the same, 1 for their means.

    Args:
        mine, wanted: (N, channels, …); the variance is about each channel's mean, summed over channels.
    """
    axes = [axis for axis in range(wanted.ndim) if axis != 1]
    about = wanted - wanted.mean(axes, keepdim=True)
    return ((mine - wanted) ** 2).sum() / (about**2).sum().clamp_min(torch.finfo(wanted.dtype).tiny)

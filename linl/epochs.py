"""One pass over the training images, as it adds up: told while it runs, saved half done, taken up again."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from linl.worlds import World

TELL_EVERY = 60.0
"""Seconds between two lines about an epoch that isn't done."""


class Epoch:
    """What a pass over the training images has added up so far.

    Args:
        number: of the epoch, from 1, and `of` how many.
        steps: batches in it.
        where: the device of the sums: nothing waits for it until something is asked.
        us: the processes that share the pass; each adds up its own images.
        before: what `saved` gave earlier, to go on from there.

    Attributes:
        step: batches done.
    """

    def __init__(self, number: int, of: int, steps: int, where: torch.device, us: World, before: dict | None) -> None:
        self.number, self.of, self.steps, self.where, self.us = number, of, steps, where, us
        before = before or {"step": 0, "loss": 0.0, "right": 0.0, "seen": 0, "seconds": 0.0}
        mine = before if us.first else {**before, "loss": 0.0, "right": 0.0, "seen": 0}  # the first one holds the sums
        self.step, self._seen, self._earlier = mine["step"], mine["seen"], mine["seconds"]
        self._loss = torch.tensor(mine["loss"], dtype=torch.float32, device=where)
        self._right = torch.tensor(mine["right"], dtype=torch.float32, device=where)
        self._began = self._told = time.perf_counter()
        self._first, self._here = self.step, 0

    def add(self, loss: Tensor, right: Tensor | float, images: int) -> None:
        """A batch: its mean loss, how many of its images were right."""
        self._loss += loss.detach() * images
        self._right += right
        self._seen += images
        self._here += images
        self.step += 1

    @property
    def seconds(self) -> float:
        """Over all starts."""
        return self._earlier + time.perf_counter() - self._began

    def sums(self) -> dict[str, float]:
        """loss, right, seen: over all processes. All of them must ask."""
        totals = self.us.totals(self._loss.item(), self._right.item(), self._seen)
        return dict(zip(("loss", "right", "seen"), totals, strict=True))

    def loss(self) -> float:
        """The sum of this process's losses."""
        return self._loss.item()

    def row(self, lr: float, accuracy: bool) -> dict[str, float]:
        """The epoch's line in `metrics.csv`; without an accuracy where the loss knows none. All processes must ask."""
        sums, seconds = self.sums(), self.seconds
        return {
            "epoch": self.number,
            "train_loss": sums["loss"] / sums["seen"],
            "train_accuracy": sums["right"] / sums["seen"] if accuracy else math.nan,
            "lr": lr,
            "seconds": seconds,
            "images_per_second": sums["seen"] / seconds,
        }

    def telling(self) -> str | None:
        """A line about how far it is, once in a while; None in between. By the images of this process alone."""
        now = time.perf_counter()
        if now - self._told < TELL_EVERY or self.step == self.steps:
            return None
        self._told = now
        rate = self._here * self.us.size / (now - self._began)
        left = (self.steps - self.step) * (now - self._began) / (self.step - self._first)
        return (
            f"epoch {self.number:3d}/{self.of}  {100 * self.step / self.steps:3.0f} %  loss "
            f"{self._loss.item() / self._seen:.4f}  {rate:.0f} images/s  {left / 60:.0f} min to its end"
        )

    def saved(self) -> dict:
        """What another start needs to go on: sums, and the state of chance in every process. All of them must ask."""
        state = self.us.gathered(_chance(self.where))
        return {"step": self.step, **self.sums(), "seconds": self.seconds, "chance": state}


def _chance(where: torch.device) -> Tensor:
    """The state of torch's random numbers, the processor's and then the GPU's."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(where)] if where.type == "cuda" else [])
    return torch.cat(states)


def take_up_chance(states: list[Tensor], where: torch.device, us: World) -> bool:
    """Random numbers go on where they were; whether they can: not by another number of processes or other devices."""
    if len(states) != us.size or states[us.rank].numel() != _chance(where).numel():
        return False
    mine, count = states[us.rank], torch.get_rng_state().numel()
    torch.set_rng_state(mine[:count])
    if where.type == "cuda":
        torch.cuda.set_rng_state(mine[count:], where)
    return True

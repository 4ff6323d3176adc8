"""Pruning in cycles: train, prune, rewind, train again under fewer weights, and so on."""

from __future__ import annotations

import inspect
import numbers
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from linl.checking import shown
from linl.checkpoints import load_state, plain_numbers, read_checkpoint
from linl.data import mixed_seed
from linl.dead_rates import watch
from linl.files import atomic
from linl.graph import clone
from linl.identities import START, in_short, network_identity
from linl.masks import mask_, masked_layers, masks_of
from linl.pruning import prune, pruned, refuse_settings
from linl.train import History

REWINDS = ("weights", "late", "fine-tune")
VARIANTS = ("lite", "pro")


@dataclass(frozen=True)
class CyclesReport:
    """What `prune_cycles` did.

    Attributes:
        table: a row a cycle, from 0, with all weights, to the last: cycle, weights (live while it was trained in it),
            share (of all), with images dynamic, static and observed (dead-neuron rates after the
            training), then the numbers that the training returned.
        curve: a row an epoch of every training that returned a `linl.train.History`: cycle, stage and its columns.
        net: the network after the last cycle's training, masked.
        resumed_from: cycles that were found finished.
    """

    table: pd.DataFrame
    curve: pd.DataFrame
    net: nn.Module = field(repr=False)
    resumed_from: int = 0

    def _repr_html_(self) -> str:
        return shown(self.table)


def prune_cycles(
    net: nn.Module,
    train: Callable,
    score: str = "magnitude",
    rate: float = 0.2,
    ap: float = 0.0,
    cycles: int = 5,
    *,
    rewind: str = "weights",
    early: Callable | None = None,
    variant: str = "lite",
    activate: str = "least-moved negative",
    batch: tuple[Tensor, Tensor] | None = None,
    images: Tensor | Iterable | None = None,
    loss: str = "cross_entropy",
    seed: int = 0,
    folder: str | Path | None = None,
    other_start: bool = False,
) -> CyclesReport:
    """Trains a network, then in each cycle prunes it, rewinds it and trains it again under its masks.

    Args:
        net: left alone.
        train: called as train(net), trains in place. Where it has parameters of these names it is given `cycle` (from
            0), `seed` (of this training) and `folder` (a path of this training's own for checkpoints, removed when the
            cycle is saved, or None). A number, a mapping of numbers or a `linl.train.History` that it returns goes into
            the table.
        score, rate, ap, activate, batch, loss: as in `linl.prune`; the rate is of what is live in each cycle.
        cycles: how often it is pruned; it is trained once more than that.
        rewind: before every training after the first, the weights that are left, biases, norms and running statistics
            go back to those given ("weights": Frankle & Carbin, ICLR 2019), to those that `early` left ("late": Frankle
            et al., ICML 2020), or stay ("fine-tune": Han et al., NeurIPS 2015).
        early: for "late": a function like `train`, called once at the beginning; `train` then goes on from there.
        variant: how AP comes in. "lite": right after the score, at no cost (as the published code). "pro": the score's
            part is pruned, the network rewound and trained again, and AP goes by this second training. That is our
            reading: which is which is told by no text that we could read in full.
        images: for the dead-neuron rates of every cycle, as in `linl.dead_rate`, but not an iterator.
        seed: of what is random in the scores, and of the trainings.
        folder: for `cycles.pt`, the state after the newest finished cycle, and `cycles.csv`. A run that was killed goes
            on from there, as does one that is given more cycles; with a training that is deterministic it ends with
            the same masks. What is there must be of the same settings and of the same network, as it is given here.
        other_start: go on with what is in the folder even if that network had other weights than this one, as networks
            have that are made without a seed.

    Raises:
        ValueError: as `linl.prune`; an unknown rewind or variant, "late" without `early`, cycles below 1, or a folder
            with another run's checkpoint, with what another run's training left, or with more cycles than these.
    """
    refuse_settings(score, rate, ap, batch, activate, loss)
    _refuse(cycles, rewind, early, variant)
    run = _Run(clone(net), train, Path(folder) if folder else None, seed)
    mask_(run.net, masks_of(run.net))
    identity = {
        "score": score, "rate": rate, "ap": ap, "rewind": rewind, "variant": variant, "activate": activate,
        "loss": loss, "seed": seed, START: None if other_start else network_identity(run.net),
        "batch": None if batch is None else [in_short(part) for part in batch],
    }  # fmt: skip
    resumed = run.resume(identity, cycles)
    if identity[START] is None:
        identity[START] = network_identity(run.net)
    if run.target is None:
        if rewind == "late":
            run.call(early, 0, "early")
        run.target = _copied(run.net)
    given = {"activate": activate, "batch": batch, "loss": loss}
    rates = None if images is None else watch(images)
    pro = variant == "pro" and 0 < ap < rate
    for cycle in range(resumed, cycles + 1):
        if cycle:
            options = {**given, "start": run.start, "seed": mixed_seed(seed, cycle)}
            if pro:
                live = _live(run.net)
                by_ap = round(ap * live)
                run.net = pruned(run.net, score, round(rate * live) - by_ap, 0, **options)
                run.rewind(rewind)
                run.train_(cycle, "between")
                run.net = pruned(run.net, score, 0, by_ap, **{**options, "start": run.start})
            else:
                run.net = prune(run.net, score, rate, ap, **options)
            run.rewind(rewind)
        result = run.train_(cycle, "after")
        weights, total = _live(run.net), sum(mask.numel() for mask in masks_of(run.net).values())
        row = {"cycle": cycle, "weights": weights, "share": weights / total}
        run.rows.append({**row, **(rates(run.net) if rates else {}), **result})
        run.save(identity)
    return CyclesReport(pd.DataFrame(run.rows), pd.DataFrame(run.curve), run.net.eval(), resumed)


def _refuse(cycles: int, rewind: str, early: Callable | None, variant: str) -> None:
    for what, name, known in (("rewind", rewind, REWINDS), ("variant", variant, VARIANTS)):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    if (rewind == "late") != (early is not None):
        raise ValueError('rewind="late" and early= belong together: early trains up to where the weights go back to')
    if cycles < 1:
        raise ValueError(f"cycles = {cycles}: must be at least 1")


class _Run:
    """A run's state.

    Attributes:
        net: masked, as it is now.
        start: its weights before its last training.
        target: the weights that it is rewound to.
        rows, curve: of the report.
        handed_out: trainings' folders that nothing needs once the cycle is saved.
    """

    def __init__(self, net: nn.Module, train: Callable, folder: Path | None, seed: int) -> None:
        self.net, self.train, self.folder, self.seed = net, train, folder, seed
        self.start: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] | None = None
        self.rows: list[dict] = []
        self.curve: list[dict] = []
        self.handed_out: list[Path] = []

    def train_(self, cycle: int, stage: str) -> dict:
        """One training; the numbers that it returned."""
        self.start = _copied(self.net)
        result = self.call(self.train, cycle, stage)
        if isinstance(result, nn.Module) and result is not self.net:
            raise ValueError("the training gave back another network: it must train the one it is given, in place")
        if isinstance(result, History):
            epochs = result.metrics.to_dict("records")
            self.curve += [{"cycle": cycle, "stage": stage, **plain_numbers(epoch)} for epoch in epochs]
            result = epochs[-1] if epochs else {}
        if isinstance(result, numbers.Real) or (isinstance(result, Tensor) and result.numel() == 1):
            result = {"result": result}
        return plain_numbers(result) if isinstance(result, Mapping) else {}

    def call(self, function: Callable, cycle: int, stage: str) -> object:
        """Calls a training function with as much as it wants to know."""
        folder = self.folder / f"cycle-{cycle:02d}-{stage}" if self.folder else None
        self.handed_out += [folder] if folder else []
        offered = {"cycle": cycle, "seed": mixed_seed(self.seed, cycle, stage == "between"), "folder": folder}
        try:
            wanted = inspect.signature(function).parameters
        except ValueError:  # some built-in callables have none
            wanted = {}
        return function(self.net.train(), **{name: value for name, value in offered.items() if name in wanted})

    @torch.no_grad()
    def rewind(self, how: str) -> None:
        """Everything but the masks back to the target."""
        if how == "fine-tune":
            return
        for name, tensor in _unmasked(self.net).items():
            tensor.copy_(self.target[name])

    def save(self, identity: dict) -> None:
        """A checkpoint, and the table as far as it goes."""
        if self.folder is None:
            return
        state = {"net": self.net.state_dict(), "start": self.start, "target": self.target, "rows": self.rows,
                 "curve": self.curve, "identity": identity}  # fmt: skip
        with atomic(self.folder / "cycles.pt") as part:
            torch.save(state, part)
        with atomic(self.folder / "cycles.csv") as part:
            pd.DataFrame(self.rows).to_csv(part, index=False)
        while self.handed_out:
            shutil.rmtree(self.handed_out.pop(), ignore_errors=True)

    def resume(self, identity: dict, cycles: int) -> int:
        """Goes on from a checkpoint where there is one; how many trainings are done."""
        path = self.folder / "cycles.pt" if self.folder else None
        if path is None or not path.is_file():
            self.clear(0)
            return 0
        saved = read_checkpoint(path, identity)
        done = len(saved["rows"])
        if done > cycles + 1:
            raise ValueError(f"{path} is of {done - 1} cycles: ask for as many, or more, or use another folder")
        self.clear(done)
        load_state(path, self.net, saved["net"])
        self.start, self.target, self.rows, self.curve = (saved[k] for k in ("start", "target", "rows", "curve"))
        return len(self.rows)

    def clear(self, cycle: int) -> None:
        """Removes what trainings before the next cycle's left when the run was killed.

        Raises:
            ValueError: there is something of a later cycle, which is another run's.
        """
        found = sorted(path for path in self.folder.glob("cycle-[0-9][0-9]-*") if path.is_dir()) if self.folder else []
        if later := [path.name for path in found if int(path.name[6:8]) > cycle]:
            raise ValueError(
                f"{self.folder} holds {', '.join(later)} of another run, where cycle {cycle} is next: use another "
                "folder, or delete these to start anew"
            )
        for path in found:
            if int(path.name[6:8]) < cycle:
                shutil.rmtree(path, ignore_errors=True)


def _unmasked(net: nn.Module) -> dict[str, Tensor]:
    """A network's state_dict without its masks."""
    masks = {f"{name}.weight_mask" if name else "weight_mask" for name in masked_layers(net)}
    return {name: tensor for name, tensor in net.state_dict().items() if name not in masks}


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _unmasked(net).items()}


def _live(net: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in masks_of(net).values())

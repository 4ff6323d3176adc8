"""Training: one function, recipes as data, a checkpoint every epoch.

A killed training, started again with the same arguments, goes on from its newest checkpoint, sees
the same batches and, on the same machine, ends with the same figures: order, augmentation and dropout
of an epoch follow from (seed, epoch) alone. Checkpoints are written after every epoch and, in long ones, every two
minutes. Test images are never looked at here.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from linl.checkpoints import load_state, plain_numbers, read_checkpoint, read_weights, save_weights
from linl.data import mixed_seed
from linl.devices import (
    autocast,
    fp32_where_bf16_is_slow,
    has_convolutions,
    keep_freed_memory,
    pick_device,
    pick_precision,
)
from linl.epochs import Epoch, take_up_chance
from linl.files import atomic
from linl.graph import evaluating
from linl.identities import START, begun
from linl.losses import ADVERSARIES, LOSSES, l1, pixel_range, stability
from linl.recipes import OPTIMIZERS, RECIPES, Recipe, recipe  # noqa: F401 - offered here too
from linl.small_images import products_where_images_are_small
from linl.teaching import Hints, Teacher
from linl.units import fuse_kernels_, nonlinearity, param_groups, penalty, project_
from linl.worlds import World, world

SPLITS = ("train", "validation", "test")
KEPT = ("checkpoint.pt", "model.safetensors")

# --- the loop --------------------------------------------------------------------------------------


@dataclass
class History:
    """What a training left behind.

    Attributes:
        metrics: a row an epoch: epoch, train_loss, train_accuracy, validation_loss,
            validation_accuracy (shares of 1; nan without a validation split), lr, seconds,
            images_per_second, and what `watch` gave.
        units: a row a unit and epoch, from before the first on: epoch and `nonlinearity`'s columns.
        resumed_from: finished epochs found in a checkpoint.
        precision, device: what was used.
    """

    metrics: pd.DataFrame
    units: pd.DataFrame
    resumed_from: int = 0
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def seconds(self) -> float:
        """Training time of all epochs, over all starts."""
        return float(self.metrics["seconds"].sum())


@dataclass
class _State:
    """What a checkpoint holds besides weights and optimizer."""

    epoch: int = 0
    metrics: list[dict] = field(default_factory=list)
    units: list[dict] = field(default_factory=list)
    within: dict | None = None  # an epoch half done, as `Epoch.saved`


def fit(
    net: nn.Module,
    data,
    settings: Recipe,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    fused_units: bool = False,
    verbose: bool = True,
    watch: Callable[[nn.Module], dict[str, float]] | None = None,
    save_every: float = 120.0,
    teacher: nn.Module | None = None,
    hints: Hints | None = None,
    other_start: bool = False,
) -> History:
    """Trains a network in place (units, where it has any, by their own group and projection).

    Args:
        net: the network; moved to the device, left in eval mode.
        data: `linl.data.Images` or `ImageFolderData`.
        settings: a `Recipe`.
        seed: of order, augmentation and dropout. Weights are initialized by whoever made the network.
        folder: for `checkpoint.pt`, `metrics.csv`, `units.csv` (while running) and, at the end,
            `model.safetensors`; None keeps nothing and can't resume. What lies there is taken up if it is of the same
            settings, seed, data and network, as it began.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto", "bf16" or "fp32".
        fused_units: compiled unit kernels (half a second once on the CPU, seconds on a GPU; needs a compiler).
        verbose: one line an epoch, and one a minute in long ones.
        watch: called with the network after every epoch; the numbers that it gives are columns of `metrics`.
        save_every: seconds after which a checkpoint is written although the epoch isn't done; more where writing
            would take over a fiftieth of the time.
        teacher: whose outputs are the aim, where the recipe's `distill` is above 0; left alone.
        hints: where the recipe's `hint` is above 0, the modules whose outputs are to be the teacher's, of the same
            name: each with None for all channels, or with the numbers of the teacher's channels, of which it has fewer.
        other_start: take up what lies in the folder even if it began with other weights than these, as networks do that
            are made without a seed.

    As one of torchrun's processes (`linl.distributed` starts them) it trains together with the others, by the rules of
    `linl.worlds`.

    Raises:
        ValueError: settings that can't be used (`distill` without a teacher, `hint` without hints, or the other way
            round), hints that can't be compared, or a checkpoint of another training in the folder.
        FloatingPointError: the loss is no longer a number; the newest checkpoint stays.
        OSError: a checkpoint can't be written (disk full); the one before it stays.
    """
    where, us = pick_device(device), world()
    precision = pick_precision(precision, where)
    folder = Path(folder) if folder else None
    if data.size("train") < 2:
        raise ValueError(f"{data.size('train')} training images: at least 2 are needed")
    us.refuse_batch(settings.batch_size, data.size("train"))
    if bool(settings.distill) != (teacher is not None):
        raise ValueError(
            f"distill = {settings.distill}: a recipe with distill above 0 needs teacher=, another takes none"
        )
    hints = hints or {}
    if bool(settings.hint) != bool(hints):
        raise ValueError(
            f"hint = {settings.hint}: a recipe with hint above 0 needs hints=, the modules that are compared; another "
            "takes none"
        )
    if hints and teacher is None:
        raise ValueError("hints without a teacher: whose values are to be aimed at?")
    verbose, watch = verbose and us.first, watch if us.first else None
    if where.type == "cpu":
        keep_freed_memory()
    data = data.to(where)
    if settings.augment:
        data = data.augmented(settings.augment)
    identity = {**settings.identity(), "seed": seed, "data": data.fingerprint()}
    how = {"seed": seed, "folder": folder, "where": where, "precision": precision, "us": us}
    how |= {"fused_units": fused_units, "verbose": verbose, "watch": watch, "save_every": save_every}
    if not folder:
        return _fitted(net, data, settings, identity, teacher, hints, **how)
    taken_up = any((folder / name).is_file() for name in KEPT)
    with begun(net, folder.resolve(), taken_up) as start:
        identity[START] = None if taken_up and other_start else start
        return _fitted(net, data, settings, identity, teacher, hints, **how)


def _fitted(
    net: nn.Module, data, settings: Recipe, identity: dict, teacher: nn.Module | None, hints: Hints, *,
    seed: int, folder: Path | None, where: torch.device, precision: str, us: World, fused_units: bool, verbose: bool,
    watch: Callable | None, save_every: float,
) -> History:  # fmt: skip
    """The training itself, or what is left of it."""
    net.to(where)
    if has_convolutions(net):
        net.to(memory_format=torch.channels_last)
    fuse_kernels_(net, fused_units)
    groups = param_groups(net, settings.lr, settings.unit_lr, settings.weight_decay, settings.unit_weight_decay)
    optimizer = OPTIMIZERS[settings.optimizer](groups, settings)
    if teacher is not None:
        like = torch.zeros(1, *data.input_size, device=where) if hints else None
        teacher = Teacher(teacher, net, settings, where, precision, hints, like)
    peaks = [group["lr"] for group in optimizer.param_groups]
    identity |= teacher.identity if teacher else {}
    if (done := _finished(folder, net, identity)) is not None:
        net.eval()
        return replace(done, precision=precision, device=where.type)
    state = _resume(folder, net, optimizer, identity) or _State(units=_unit_rows(net, 0))
    resumed = state.epoch
    steps = max(1, data.size("train") // min(settings.batch_size, data.size("train")))
    if verbose and (resumed or state.within):
        part = f", {100 * state.within['step'] / steps:.0f} % into the next" if state.within else ""
        print(f"resumed after epoch {resumed} of {settings.epochs}{part}", flush=True)
    model = us.wrapped(net, where)
    cuda = [where] if where.type == "cuda" else []
    saving = _Saving(folder if us.first else None, net, optimizer, state, identity, save_every)
    with (
        torch.random.fork_rng(devices=cuda),
        fp32_where_bf16_is_slow(net, where, precision),
        products_where_images_are_small(net, where, precision),
    ):
        for epoch in range(resumed, settings.epochs):
            current = Epoch(epoch + 1, settings.epochs, steps, where, us, state.within)
            if not (state.within and take_up_chance(state.within["chance"], where, us)):
                torch.manual_seed(mixed_seed(seed, epoch, *([current.step] if current.step else [])))
            how = (seed, precision, saving, verbose, teacher)
            with teacher or contextlib.nullcontext():
                row = _one_epoch(net, model, data, settings, optimizer, peaks, current, *how)
            row |= _validate(net, data, settings.batch_size, where, precision, settings.loss, us)
            row |= plain_numbers(watch(net)) if watch else {}
            state.epoch, state.within = epoch + 1, None
            state.metrics.append(row)
            state.units += _unit_rows(net, epoch + 1)
            saving.save()
            if verbose:
                print(_line(row, settings.epochs), flush=True)
    net.eval()
    if folder and us.first:
        _write_tables(folder, state)
        save_weights(net, folder / "model.safetensors", identity)
    return History(pd.DataFrame(state.metrics), pd.DataFrame(state.units), resumed, precision, where.type)


def _one_epoch(
    net, model, data, settings, optimizer, peaks, current, seed, precision, saving, verbose, teacher
) -> dict:
    net.train()
    limits, classifies, epoch = pixel_range(data), settings.loss == "cross_entropy", current.number - 1
    for images, labels in _batches(data, settings.batch_size, seed, epoch, current):
        factor = settings.factor(epoch * current.steps + current.step, current.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        for seen_images in _attacked(net, images, labels, settings, limits):
            with autocast(current.where, precision):
                logits = model(seen_images)
            loss = LOSSES[settings.loss](logits.float(), images, labels)
            if teacher:
                loss = teacher.mixed(loss, logits.float(), seen_images)
            total = loss + _terms(net, images, settings, limits)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            project_(net)
        current.add(loss, (logits.detach().argmax(1) == labels).sum() if classifies else 0, len(labels))
        if current.step == 21:
            _refuse_nan(current, settings)
        if verbose and (told := current.telling()):
            print(told, flush=True)
        saving.within(current, settings)
    _refuse_nan(current, settings)
    return current.row(optimizer.param_groups[0]["lr"], classifies)


def _batches(data, batch_size: int, seed: int, epoch: int, current: Epoch):
    """Training batches from the one on that isn't done yet; a data set may not know how to skip the others."""
    given = {"seed": seed, "epoch": epoch, **_share(current.us)}
    if current.step and "first" not in inspect.signature(data.batches).parameters:
        return itertools.islice(data.batches("train", batch_size, **given), current.step, None)
    return data.batches("train", batch_size, **given, **({"first": current.step} if current.step else {}))


def _share(us: World) -> dict:
    """For `batches`; a data set that knows nothing of shares can be trained on by one process."""
    return {"share": us.share} if us.share else {}


def _attacked(net, images, labels, settings, limits) -> list:
    """The images that a batch's steps see: one batch, or two for the published adversary."""
    if settings.adversary == "none":
        return [images]
    return ADVERSARIES[settings.adversary](net, images, labels, settings, limits)


def _terms(net, images, settings, limits):
    """What is added to the loss."""
    total = penalty(net, settings.penalty).to(images.device) if settings.penalty else 0.0
    if settings.l1:
        total = total + settings.l1 * l1(net)
    if settings.stability:
        total = total + settings.stability * stability(net, images, settings.stability_eps, limits)
    return total


def _refuse_nan(current: Epoch, settings: Recipe) -> None:
    if not math.isfinite(loss := current.loss()):
        raise FloatingPointError(
            f"the loss is {loss} in epoch {current.number}: a lower learning rate than {settings.lr} "
            "usually mends it. The newest checkpoint is kept."
        )


def _validate(net, data, batch_size, where, precision, loss, us) -> dict:
    if not data.size("validation"):
        return {"validation_loss": math.nan, "validation_accuracy": math.nan}
    options = {"precision": precision, "batch_size": max(batch_size, 256), "loss": loss, "together": us}
    score = evaluate(net, data, "validation", **options)
    return {"validation_loss": score.loss, "validation_accuracy": score.accuracy}


def _line(row: dict, epochs: int) -> str:
    validation = row["validation_accuracy"]
    told = "" if math.isnan(validation) else f"  validation {100 * validation:5.2f} %"
    return (
        f"epoch {row['epoch']:3d}/{epochs}  loss {row['train_loss']:.4f}  train {100 * row['train_accuracy']:5.2f} %"
        f"{told}  lr {row['lr']:.2g}  {row['seconds']:.1f} s"
    )


def _unit_rows(net: nn.Module, epoch: int) -> list[dict]:
    return [{"epoch": epoch, **row} for row in nonlinearity(net).to_dict("records")]


# --- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How a network did on a split.

    Attributes:
        loss: mean over images.
        accuracy, top5: shares of images, from 0 to 1, whose label is ranked first, or among the first five.
        images: how many there were.
    """

    loss: float
    accuracy: float
    top5: float
    images: int


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data,
    split: str = "test",
    *,
    precision: str = "fp32",
    batch_size: int = 500,
    loss: str = "cross_entropy",
    together: World | None = None,
) -> Score:
    """Scores a network on a split, in eval mode; its mode is restored.

    Args:
        net: on the device it is scored on.
        data: from `linl.data.load`, or anything that answers `batches` and `to` likewise.
        split: "test", "validation" or "train".
        precision: "fp32" or "bf16".
        batch_size: images at a time; the last batch may be smaller, none is left out.
        loss: a key of `linl.losses.LOSSES`; with another than cross-entropy there is no accuracy: nan.
        together: the processes that all call this, and share the images.

    Raises:
        ValueError: an unknown split or precision, or a split without images.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f'precision {precision!r}: "fp32" or "bf16"')
    us = together or World()
    of = LOSSES[loss]
    parameter = next(net.parameters(), None)
    where = parameter.device if parameter is not None else torch.device("cpu")
    total, first, five, seen = 0.0, 0, 0, 0
    with evaluating(net):
        for images, labels in data.to(where).batches(split, batch_size, **_share(us)):
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast(where, precision):
                logits = net(images).float()
            total += of(logits, images, labels).item() * len(labels)
            seen += len(labels)
            if loss != "cross_entropy":
                first = five = math.nan
                continue
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            first += ranked[:, 0].sum().item()
            five += ranked.any(1).sum().item()
    total, first, five, seen = us.totals(total, first, five, seen)
    if not seen:
        raise ValueError(f"no images in {split!r}: nothing to score")
    return Score(total / seen, first / seen, five / seen, int(seen))


# --- checkpoints -----------------------------------------------------------------------------------


class _Saving:
    """When and where checkpoints are written; nowhere without a folder."""

    def __init__(self, folder: Path | None, net, optimizer, state: _State, identity: dict, every: float) -> None:
        self.folder, self.net, self.optimizer, self.state, self.identity = folder, net, optimizer, state, identity
        self.every, self._last, self._took = every, time.perf_counter(), 0.0

    def save(self) -> None:
        began = time.perf_counter()
        if self.folder is not None:
            with atomic(self.folder / "checkpoint.pt") as part:
                content = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
                torch.save({**content, "identity": self.identity, **asdict(self.state)}, part)
            _write_tables(self.folder, self.state)
        self._last = time.perf_counter()
        self._took = self._last - began

    def within(self, current: Epoch, settings: Recipe) -> None:
        """Saves a long epoch half done. Processes that train together agree on it, now and then."""
        if (current.us.size > 1 and current.step % 20) or current.step == current.steps:
            return
        pause = max(self.every, 50 * self._took) if self.every else 0.0
        if current.us.agreed(time.perf_counter() - self._last >= pause):
            _refuse_nan(current, settings)
            self.state.within = current.saved()
            self.save()


def _write_tables(folder: Path, state: _State) -> None:
    for name, rows in (("metrics", state.metrics), ("units", state.units)):
        if rows:
            with atomic(folder / f"{name}.csv") as part:
                pd.DataFrame(rows).to_csv(part, index=False)


def _finished(folder: Path | None, net: nn.Module, identity: dict) -> History | None:
    """A training that went to its end earlier: its weights are loaded, its tables returned."""
    path = folder / "model.safetensors" if folder else None
    if path is None or not path.is_file() or not (folder / "metrics.csv").is_file():
        return None
    load_state(path, net, read_weights(path, identity))
    units = pd.read_csv(folder / "units.csv") if (folder / "units.csv").is_file() else pd.DataFrame()
    return History(pd.read_csv(folder / "metrics.csv"), units, identity["epochs"])


def _resume(folder: Path | None, net, optimizer, identity: dict) -> _State | None:
    path = folder / "checkpoint.pt" if folder else None
    if path is None or not path.is_file():
        return None
    saved = read_checkpoint(path, identity)
    load_state(path, net, saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return _State(saved["epoch"], saved["metrics"], saved["units"], saved.get("within"))

"""Training: one function, recipes as data, a checkpoint every epoch.

A killed training, started again with the same arguments, goes on after its newest finished epoch, sees
the same batches and, on the same machine, ends with the same figures: order, augmentation and dropout
of an epoch follow from (seed, epoch) alone. Test images are never looked at here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from linl.data import mixed_seed
from linl.devices import (
    autocast,
    fp32_where_bf16_is_slow,
    has_convolutions,
    keep_freed_memory,
    pick_device,
    pick_precision,
)
from linl.graph import evaluating
from linl.losses import ADVERSARIES, LOSSES, l1, pixel_range, stability
from linl.recipes import RECIPES, Recipe, recipe  # noqa: F401 - offered here too
from linl.units import fuse_kernels_, nonlinearity, param_groups, penalty, project_
from linl.worlds import World, world

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
) -> History:
    """Trains a network in place (units, where it has any, by their own group and projection).

    Args:
        net: the network; moved to the device, left in eval mode.
        data: `linl.data.Images` or `ImageFolderData`.
        settings: a `Recipe`.
        seed: of order, augmentation and dropout. Weights are initialized by whoever made the network.
        folder: for `checkpoint.pt`, `metrics.csv`, `units.csv` (while running) and, at the end,
            `model.safetensors`; None keeps nothing and can't resume.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto", "bf16" or "fp32".
        fused_units: compiled unit kernels (a few seconds once; needs a compiler).
        verbose: one line an epoch.
        watch: called with the network after every epoch; the numbers that it gives are columns of `metrics`.

    As one of torchrun's processes (`linl.distributed` starts them) it trains together with the others, by the rules of
    `linl.worlds`.

    Raises:
        ValueError: settings that can't be used, or a checkpoint of another training in the folder.
        FloatingPointError: the loss is no longer a number; the newest checkpoint stays.
        OSError: a checkpoint can't be written (disk full); the one before it stays.
    """
    where, us = pick_device(device), world()
    precision = pick_precision(precision, where)
    folder = Path(folder) if folder else None
    if data.size("train") < 2:
        raise ValueError(f"{data.size('train')} training images: at least 2 are needed")
    us.refuse_batch(settings.batch_size, data.size("train"))
    verbose, watch = verbose and us.first, watch if us.first else None
    if where.type == "cpu":
        keep_freed_memory()
    data = data.to(where)
    net.to(where)
    if has_convolutions(net):
        net.to(memory_format=torch.channels_last)
    fuse_kernels_(net, fused_units)
    optimizer = torch.optim.SGD(
        param_groups(net, settings.lr, settings.unit_lr, settings.weight_decay, settings.unit_weight_decay),
        momentum=settings.momentum,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    identity = {**settings.identity(), "seed": seed, "data": data.fingerprint()}
    if (done := _finished(folder, net, identity)) is not None:
        net.eval()
        return replace(done, precision=precision, device=where.type)
    state = _resume(folder, net, optimizer, identity) or _State(units=_unit_rows(net, 0))
    resumed = state.epoch
    if resumed and verbose:
        print(f"resumed after epoch {resumed} of {settings.epochs}", flush=True)
    steps = max(1, data.size("train") // min(settings.batch_size, data.size("train")))
    model = us.wrapped(net, where)
    cuda = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), fp32_where_bf16_is_slow(net, where, precision):
        for epoch in range(resumed, settings.epochs):
            torch.manual_seed(mixed_seed(seed, epoch))
            row = _one_epoch(net, model, data, settings, optimizer, peaks, epoch, steps, seed, where, precision, us)
            row |= _validate(net, data, settings.batch_size, where, precision, settings.loss, us)
            row |= watch(net) if watch else {}
            state.epoch = epoch + 1
            state.metrics.append(row)
            state.units += _unit_rows(net, epoch + 1)
            if folder and us.first:
                _checkpoint(folder, net, optimizer, state, identity)
            if verbose:
                print(_line(row, settings.epochs), flush=True)
    net.eval()
    if folder and us.first:
        _write_tables(folder, state)
        save_weights(net, folder / "model.safetensors", identity)
    return History(pd.DataFrame(state.metrics), pd.DataFrame(state.units), resumed, precision, where.type)


def _one_epoch(net, model, data, settings, optimizer, peaks, epoch, steps, seed, where, precision, us) -> dict:
    net.train()
    began, seen, limits = time.perf_counter(), 0, pixel_range(data)
    loss_sum = torch.zeros((), device=where)
    right = torch.zeros((), device=where, dtype=torch.long)
    batches = data.batches("train", settings.batch_size, seed=seed, epoch=epoch, **_share(us))
    for i, (images, labels) in enumerate(batches):
        factor = settings.factor(epoch * steps + i, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        for seen_images in _attacked(net, images, labels, settings, limits):
            with autocast(where, precision):
                logits = model(seen_images)
            loss = LOSSES[settings.loss](logits.float(), images, labels)
            total = loss + _terms(net, images, settings, limits)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            project_(net)
        loss_sum += loss.detach() * len(labels)
        right += (logits.detach().argmax(1) == labels).sum() if settings.loss == "cross_entropy" else 0
        seen += len(labels)
        if i == 20:
            _refuse_nan(loss_sum, epoch, settings)
    _refuse_nan(loss_sum, epoch, settings)
    loss_sum, right, seen = us.totals(loss_sum.item(), right.item(), seen)
    seconds = time.perf_counter() - began
    return {
        "epoch": epoch + 1,
        "train_loss": loss_sum / seen,
        "train_accuracy": right / seen if settings.loss == "cross_entropy" else math.nan,
        "lr": optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


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


def _refuse_nan(loss_sum, epoch, settings) -> None:
    if not torch.isfinite(loss_sum):
        raise FloatingPointError(
            f"the loss is {loss_sum.item()} in epoch {epoch + 1}: a lower learning rate than {settings.lr} "
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
    """Mean loss, and the shares of images whose label is the first, or among the first five."""

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

    With another loss than cross-entropy (a key of `linl.losses.LOSSES`) there is no accuracy: nan. `together`: the
    processes that all call this, and share the images.
    """
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
    return Score(total / seen, first / seen, five / seen, int(seen))


# --- checkpoints -----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given, it is renamed at the end.

    Raises:
        OSError: it can't be written; what was at `path` stays, the half-written file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        part.unlink(missing_ok=True)
        if not _is_write_error(error):
            raise
        raise OSError(
            f"could not write {path} ({_first_line(error)}). What was there before is untouched: "
            "make room (or make it writable) and run the same command again, it goes on from there."
        ) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _is_write_error(error: Exception) -> bool:
    """Whether a file couldn't be written; torch and safetensors have exceptions of their own for that."""
    torchs = isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("inline_container", "PytorchStreamWriter")
    )
    return isinstance(error, OSError) or torchs or type(error).__name__ == "SafetensorError"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def save_weights(net: nn.Module, path: Path, training: dict | None = None) -> None:
    """The state_dict as safetensors; how it was trained goes into the file's metadata."""
    from safetensors.torch import save_file

    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in net.state_dict().items()
    }
    with atomic(path) as part:
        save_file(tensors, part, {"training": json.dumps(training or {})})


def _checkpoint(folder: Path, net, optimizer, state: _State, identity: dict) -> None:
    with atomic(folder / "checkpoint.pt") as part:
        torch.save(
            {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "identity": identity, **asdict(state)}, part
        )
    _write_tables(folder, state)


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
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            training = json.loads((file.metadata() or {}).get("training", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"{path} can't be read ({_first_line(error)}): delete it to start anew") from error
    refuse_other(path, training, identity)
    load_state(path, net, state)
    units = pd.read_csv(folder / "units.csv") if (folder / "units.csv").is_file() else pd.DataFrame()
    return History(pd.read_csv(folder / "metrics.csv"), units, identity["epochs"])


def refuse_other(path: Path, saved: dict, identity: dict) -> None:
    """
    Raises:
        ValueError: a file whose identity is another than this one.
    """
    differ = sorted(key for key in identity if saved.get(key) != identity[key])
    if differ:
        raise ValueError(
            f"{path} belongs to another training ({', '.join(differ)} differ): use another folder, or delete it "
            "to start anew"
        )


def load_state(path: Path, net: nn.Module, state: dict) -> None:
    """Loads a state_dict.

    Raises:
        ValueError: it is of another network.
    """
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} belongs to another network ({' '.join(str(error).split()[:30])}): use another folder, or "
            "delete it to start anew"
        ) from error


def read_checkpoint(path: Path, identity: dict) -> dict:
    """What a checkpoint file holds.

    Raises:
        ValueError: it can't be read, or its own "identity" is another than this one.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} can't be read ({_first_line(error)}): delete it to start anew"
        ) from error
    refuse_other(path, saved["identity"], identity)
    return saved


def _resume(folder: Path | None, net, optimizer, identity: dict) -> _State | None:
    path = folder / "checkpoint.pt" if folder else None
    if path is None or not path.is_file():
        return None
    saved = read_checkpoint(path, identity)
    load_state(path, net, saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return _State(saved["epoch"], saved["metrics"], saved["units"])

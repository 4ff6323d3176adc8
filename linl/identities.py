"""What tells one training from another: settings, seed, data, and the network as it began.

A network is told by its modules and by two numbers for each tensor. They are compared to a thousandth, not to the bit:
a network that was itself computed (folded, tuned) comes out a little otherwise with other threads, and is the same.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

START = "weights or layers at its start"
ALL_THE_SAME = (
    "; where the same network was made without a seed, so that it began otherwise, other_start=True takes it up"
)
LOOKED = 65536  # of a tensor's numbers at most
NEAR = 1e-3

_BEGUN: WeakKeyDictionary[nn.Module, dict[str, dict]] = WeakKeyDictionary()


def network_identity(net: nn.Module) -> dict:
    """Modules and weights in short: {"modules": eight digits, "weights": {name: [norm, projection]}}.

    Functions called in forward, unless it is a traced network's, and what hooks do are not seen.
    """
    told = "\n".join(f"{name} {type(module).__name__} {_told(module)}" for name, module in net.named_modules())
    return {
        "modules": f"{zlib.crc32(told.encode()):08x}",
        "weights": {name: in_short(values) for name, values in net.state_dict().items() if isinstance(values, Tensor)},
    }


def as_begun(net: nn.Module, folder: Path, taken_up: bool) -> dict:
    """A network's identity; where a training in this folder is taken up, that from when this process began it there.

    So a cell that was interrupted, or is run once more, goes on though its network is no longer what it was.
    """
    begun = _BEGUN.setdefault(net, {})
    if not taken_up or str(folder) not in begun:
        begun[str(folder)] = network_identity(net)
    return begun[str(folder)]


def refuse_other(path: Path, saved: dict, identity: dict) -> None:
    """Nothing, if it is the same; a START of None is any, and becomes the file's.

    Raises:
        ValueError: a file whose identity is another than this one.
    """
    if START in identity and identity[START] is None:
        identity[START] = saved.get(START)
    differ = sorted(key for key in {*identity, *saved} if not _same(saved.get(key), identity.get(key)))
    if differ:
        raise ValueError(
            f"{path} belongs to another training ({', '.join(differ)} differ): use another folder, or delete it "
            f"to start anew{ALL_THE_SAME if differ == [START] else ''}"
        )


def _told(module: nn.Module) -> str:
    """A module's settings, as far as they are plain values or functions; of a traced network its forward as well."""
    told = {}
    for name, value in sorted(vars(module).items()):
        if isinstance(value, bool | int | float | str | tuple) and not name.startswith("_") and name != "training":
            told[name] = str(value)
        elif callable(value) and hasattr(value, "__name__"):
            told[name] = value.__name__
    return f"{told} {getattr(module, 'code', '')}"


def in_short(values: Tensor) -> list[float]:
    """Its norm, and its product with a wave; of a large tensor, of numbers evenly spread."""
    values = values.detach().reshape(-1)
    if not len(values):
        return [0.0, 0.0]
    values = values[:: max(1, len(values) // LOOKED)].cpu().double()
    return [values.norm().item(), (values @ torch.cos(2.4 * torch.arange(len(values), dtype=torch.float64))).item()]


def _same(saved: object, now: object) -> bool:
    if isinstance(saved, dict) and isinstance(now, dict) and "weights" in saved and "weights" in now:
        ours, theirs = now["weights"], saved["weights"]
        return (
            saved["modules"] == now["modules"]
            and ours.keys() == theirs.keys()
            and all(_near(theirs[name], ours[name]) for name in ours)
        )
    return saved == now


def _near(saved: list[float], now: list[float]) -> bool:
    """Each number to a thousandth of the larger norm; what is no number is near to what is none either."""
    allowed = NEAR * max(saved[0], now[0])
    return all(abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b)) for a, b in zip(saved, now, strict=True))

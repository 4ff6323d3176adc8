"""What tells one training from another: settings, seed, data, and the network as it began.

A network is told by its modules and by two numbers for each tensor. They are compared to a thousandth, not to the bit:
a network that was itself computed (folded, tuned) comes out a little otherwise with other threads, and is the same.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
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

_BEGUN: WeakKeyDictionary[nn.Module, dict[Path, tuple[dict, dict]]] = WeakKeyDictionary()  # as begun, as left


def network_identity(net: nn.Module) -> dict:
    """Modules and weights in short: {"modules": eight digits, "weights": {name: in short}}.

    Functions called in forward, unless it is a traced network's, and what hooks do are not seen.
    """
    told = "\n".join(f"{name} {type(module).__name__} {_told(module)}" for name, module in net.named_modules())
    told += "".join(f"\n{name} is frozen" for name, values in net.named_parameters() if not values.requires_grad)
    return {
        "modules": f"{zlib.crc32(told.encode()):08x}",
        "weights": {name: in_short(values) for name, values in net.state_dict().items() if isinstance(values, Tensor)},
    }


@contextlib.contextmanager
def begun(net: nn.Module, folder: Path, taken_up: bool) -> Iterator[dict]:
    """For as long as a network is trained in a folder: its identity; where a training there is taken up that this
    process began with this very network, the identity from then.

    So a cell that was interrupted, or is run once more, goes on though its network is no longer what it was. A network
    that was given other weights in between begins anew.
    """
    known, now = _BEGUN.setdefault(net, {}), network_identity(net)
    before = known.get(folder)
    if before and taken_up and any(_same(now, one) for one in before):
        now = before[0]
    try:
        yield now
    finally:
        known[folder] = (now, network_identity(net))


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


_HOW = ("training", "fused")  # how a module is run, not what it computes


def _told(module: nn.Module) -> str:
    """A module's settings, as far as they are plain values or functions; of a traced network its forward as well."""
    told = [(name, _plainly(value)) for name, value in sorted(vars(module).items()) if name not in _HOW]
    return f"{[one for one in told if one[1] and not one[0].startswith('_')]} {getattr(module, 'code', '')}"


def _plainly(value: object) -> str:
    """A setting without where it lies in memory; "" of what isn't one."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_plainly, value))})"
    if isinstance(value, bool | int | float | str):
        return repr(value)
    return getattr(value, "__name__", "") if callable(value) else ""


def in_short(values: Tensor) -> dict[str, float]:
    """Its norm, its product with a wave, and how many are no finite numbers; of a large tensor, of numbers evenly
    spread."""
    values = values.detach().reshape(-1)
    if not len(values):
        return {"norm": 0.0, "wave": 0.0, "odd": 0}
    values = values[:: max(1, len(values) // LOOKED)].cpu().double()
    odd = ~values.isfinite()
    values = values.masked_fill(odd, 0.0)
    wave = torch.cos(2.4 * torch.arange(len(values), dtype=torch.float64))
    return {"norm": values.norm().item(), "wave": (values @ wave).item(), "odd": int(odd.sum())}


def _same(saved: object, now: object) -> bool:
    """Equal; tensors in short to a thousandth of the larger norm."""
    if isinstance(saved, dict) and isinstance(now, dict) and saved.keys() == now.keys():
        if saved.keys() == {"norm", "wave", "odd"}:
            allowed = NEAR * max(saved["norm"], now["norm"])
            return saved["odd"] == now["odd"] and all(abs(saved[k] - now[k]) <= allowed for k in ("norm", "wave"))
        return all(_same(saved[name], now[name]) for name in now)
    if isinstance(saved, list) and isinstance(now, list):
        return len(saved) == len(now) and all(_same(*pair) for pair in zip(saved, now, strict=True))
    return saved == now

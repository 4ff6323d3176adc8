"""Where a training runs and how fast: device, precision, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import torch
from torch import nn


def cores() -> int:
    """Processor cores that this process may use: on a cluster fewer than its node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: as torch has it; "auto" is the first GPU, else Apple's, else the CPU.

    Raises:
        ValueError: a device that this machine doesn't have.
    """
    if name != "auto":
        device = torch.device(name)
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not available.get(device.type, True):
            raise ValueError(f"device {name!r} isn't available here; device='auto' picks one that is")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


PRECISIONS = ("auto", "fp32", "bf16")


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a name.

    Args:
        name: "bf16" or "fp32"; "auto" is bf16 where the hardware multiplies it, else fp32.
        device: as from `pick_device`.

    Raises:
        ValueError: neither "auto", "bf16" nor "fp32".
    """
    if name not in PRECISIONS:
        raise ValueError(f'precision {name!r}: choose "auto", "bf16" or "fp32"')
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision for the forward pass; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def fp32_where_bf16_is_slow(net: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Some depthwise convolutions leave bf16 autocast while this lasts (CPU only).

    torch's CPU library has no fast bf16 backward pass for depthwise convolutions with a stride (24 times
    slower than in float32 for 72 channels of 32×32 pixels, 3×3, stride 2) or with 5×5 kernels (2 times).
    """
    hooks = []
    if device.type == "cpu" and precision == "bf16":
        for module in net.modules():
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            if depthwise and (max(module.stride) > 1 or max(module.kernel_size) >= 5):
                hooks.append(module.register_forward_pre_hook(_leave_autocast))
                hooks.append(module.register_forward_hook(_enter_autocast))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leave_autocast(module: nn.Module, inputs: tuple) -> tuple | None:
    module._left_autocast = torch.is_autocast_enabled("cpu")  # not while evaluating in float32
    if not module._left_autocast:
        return None
    torch.set_autocast_enabled("cpu", False)
    return (inputs[0].float(),)


def _enter_autocast(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    if not module._left_autocast:
        return output
    torch.set_autocast_enabled("cpu", True)
    return output.bfloat16()


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed blocks for the next step instead of returning them to the system.

    A tensor above 32 MiB otherwise costs thousands of page faults each time it is made, several times
    the arithmetic of an activation. Returns whether it was done (Linux with glibc only).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, 2**31 - 1))


def has_convolutions(net: nn.Module) -> bool:
    """Whether channels_last pays."""
    return any(isinstance(module, nn.Conv2d) for module in net.modules())

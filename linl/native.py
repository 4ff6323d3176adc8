"""The two-slope activation as compiled code on the CPU: built once a process, with the C++ compiler at hand.

Half a second, nothing kept on disk: reruns side by side have nothing to share and nothing to spoil. Where there is no
compiler, or what it builds doesn't compute what it should, `kernels()` is None and says why in `why_not()`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("two_slope.cpp")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
GRAIN = 1 << 15  # elements: below this a second thread costs more than it brings, as torch has it
# The processor's own instructions and several threads where the compiler knows them.
FLAGS = (["-march=native", "-fopenmp"], ["-fopenmp"], ["-march=native"], [])


class Kernels:
    """Forward and backward for each dtype in `DTYPES`; tensors are dense, one parameter a layer."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._forward, self._backward = {}, {}
        for dtype, name in DTYPES.items():
            forward, backward = library[f"forward_{name}"], library[f"backward_{name}"]
            slope = ctypes.c_double
            forward.argtypes, forward.restype = [pointer] * 2 + [size] + [slope] * 2 + [integer], None
            backward.argtypes, backward.restype = [pointer] * 3 + [size] + [slope] * 4 + [integer], slope
            self._forward[dtype], self._backward[dtype] = forward, backward

    def forward(self, x: Tensor, positive: float, negative: float) -> Tensor:
        """x times its side's slope; same shape, strides and dtype."""
        y = torch.empty_like(x)
        n = x.numel()
        self._forward[x.dtype](x.data_ptr(), y.data_ptr(), n, positive, negative, _threads(n))
        return y

    def backward(self, g: Tensor, saved: Tensor, *numbers: float) -> tuple[Tensor, float]:
        """The gradient with respect to x, and Σ g·saved·(up or down).

        Args:
            g: the gradient of the output, same shape and dtype as `saved`.
            saved: what tells the sides apart: the input or the output.
            numbers: the slopes of the gradient (positive, negative), and up, down.
        """
        if g.stride() != saved.stride():
            g = torch.empty_like(saved).copy_(g)
        dx, n = torch.empty_like(saved), saved.numel()
        where = g.data_ptr(), saved.data_ptr(), dx.data_ptr()
        return dx, self._backward[saved.dtype](*where, n, *numbers, _threads(n))


def _threads(n: int) -> int:
    return torch.get_num_threads() if n > GRAIN else 1


@functools.cache
def _made() -> tuple[Kernels | None, str]:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++; apt install g++, conda install cxx-compiler)"
    why = ""
    for flags in FLAGS:
        try:
            made = Kernels(_build([compiler, *flags]))
            return (made, "") if _right(made) else (None, f"{compiler} {' '.join(flags)} computes something else")
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            why = why or f"{compiler} can't build them: {said.strip().splitlines()[0]}"
    return None, why


def _build(command: list[str]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "two_slope.so"
        command = [*command, "-O3", "-std=c++17", "-shared", "-fPIC", "-w", str(SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return ctypes.CDLL(str(library))  # stays loaded when the file is gone


def _right(made: Kernels) -> bool:
    """One short vector and one that needs padding, against torch."""
    for dtype in DTYPES:
        x = torch.linspace(-2, 3, 37, dtype=dtype)
        side = torch.where(x > 0, 0.75, 0.5).to(x)
        dx, total = made.backward(x, x, 0.75, 0.5, 1.0, 2.0)
        wanted = (x.double() ** 2 * torch.where(x > 0, 1, 2)).sum().item()
        same = all(torch.allclose(ours, x * side, rtol=1e-2) for ours in (made.forward(x, 0.75, 0.5), dx))
        if not same or abs(total - wanted) > 1e-4 * wanted:
            return False
    return True


def kernels() -> Kernels | None:
    """The compiled kernels, built at the first call; None where they can't be."""
    return _made()[0]


def why_not() -> str:
    """Why there are no compiled kernels; empty where there are."""
    return _made()[1]

"""The two-slope activation and its gradient: the arithmetic under every unit.

With a parameter θ, both slopes are affine in it:

    f(x) = (a0 + a1·θ)·x  for x > 0,      (b0 + b1·θ)·x  for x <= 0
    df/dx = the slope on x's side
    dL/dθ = Σ g·(a1·x⁺ + b1·x⁻)           summed in float32 (float64 stays float64)

LiNLU is (a0, a1, b0, b1) = (0, 1, -1, 2); Layer Folding's unit around a ReLU is (1, 0, 0, 1).

Ways to the same numbers. `formula` is differentiable, traceable and exportable. The eager CPU path walks
through the tensor in blocks that stay in the cache and reuses torch's own leaky-ReLU kernels. The fused path
(`fused=True`) is about as fast as a ReLU: on the CPU, with one θ a layer, our own C++ (`linl.native`: needs a
compiler, half a second once a process); elsewhere torch.compile builds both halves in a few seconds.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from linl import native

BLOCK = 1 << 18  # elements: 1 MiB of float32, about one core's second-level cache
MIN_SLOPE = 1 / 16  # below this, x can't be had back from y without losing digits
_aten = torch.ops.aten


def formula(x: Tensor, theta: Tensor, positive: tuple[float, float], negative: tuple[float, float]) -> Tensor:
    """f(x) written out with plain torch operations.

    Args:
        x: any shape, (N, C, ...) where θ is per channel.
        theta: () for one parameter a layer, (C,) for one a channel.
        positive: (a0, a1); the slope for x > 0 is a0 + a1·θ.
        negative: (b0, b1); the slope for x <= 0 is b0 + b1·θ.

    Returns: same shape and dtype as x; computed in float32 where x is narrower than that.
    """
    theta = _broad(theta, x)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    a, b = _slopes(theta, positive, negative)
    return torch.where(wide > 0, wide * a, wide * b).to(x.dtype)


def two_slope(
    x: Tensor,
    theta: Tensor,
    positive: tuple[float, float],
    negative: tuple[float, float],
    fused: bool = False,
) -> Tensor:
    """The two-slope activation, by the fastest path that this call allows. Arguments as in `formula`."""
    if not _plain(x) or not _plain(theta) or _transforming():
        return formula(x, theta, positive, negative)
    if fused and _goes_native(x, theta):
        return _Native.apply(x, theta, positive, negative)
    return _TwoSlope.apply(x, theta, positive, negative, fused)


def _plain(t: object) -> bool:
    """A real tensor with data: no fx proxy, fake or meta tensor, no subclass."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta


def _transforming() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._are_functorch_transforms_active()  # torch.func: vmap, jvp, grad


def _broad(theta: Tensor, x: Tensor) -> Tensor:
    """One parameter a channel, (C,), shaped to meet x's dimension 1; a scalar stays one."""
    return theta.view(-1, *[1] * (x.ndim - 2)) if theta.ndim else theta


def _slopes(theta, positive, negative):
    return positive[0] + positive[1] * theta, negative[0] + negative[1] * theta


# The layer that follows saves y anyway, so saving y for the backward pass costs no memory, as with nn.ReLU; x is then
# y / slope.


class _Native(torch.autograd.Function):
    """By compiled code, with as little Python as can be: a pass over a large tensor puts all else out of the cache, and
    every line of it is fetched from memory again."""

    @staticmethod
    def forward(ctx, x, theta, positive, negative):
        a, b = _slopes(theta.item(), positive, negative)
        y = native.kernels().forward(x, a, b)
        ctx.args, ctx.from_output = (positive, negative), a >= MIN_SLOPE and b >= MIN_SLOPE
        if ctx.from_output:
            ctx.numbers = a, b, positive[1] / a, negative[1] / b
            ctx.save_for_backward(y, theta)
        else:
            ctx.numbers = a, b, positive[1], negative[1]
            ctx.save_for_backward(x, theta)
        return y

    @staticmethod
    def backward(ctx, g):
        saved, theta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, g, saved, theta), None, None
        if g.dtype != saved.dtype:
            dx, dtheta = _backward(g, saved.detach(), theta.detach(), *ctx.args, ctx.from_output)
            return dx, dtheta.to(theta.dtype), None, None
        dx, total = native.kernels().backward(g, saved, *ctx.numbers)
        return dx, torch.tensor(total, dtype=theta.dtype), None, None


def _goes_native(x: Tensor, theta: Tensor) -> bool:
    """Whether compiled code takes it: on the CPU, dense, one θ for all of it."""
    return x.is_cpu and theta.ndim == 0 and x.dtype in native.DTYPES and _dense(x) and native.kernels() is not None


class _TwoSlope(torch.autograd.Function):
    """By torch's own operations, compiled or eager."""

    @staticmethod
    def forward(ctx, x, theta, positive, negative, fused):
        plain = x.is_cpu and theta.ndim == 0  # plain numbers: no small tensors on the way
        numbers = _slopes(theta.item() if plain else theta, positive, negative)
        lowest, highest = _ends(numbers) if x.is_cpu else (0.0, 0.0)  # reading them would stall an accelerator's queue
        ctx.args, ctx.numbers = (positive, negative), numbers if plain else None
        ctx.path = _path(x, plain, highest, fused)
        ctx.from_output = lowest >= MIN_SLOPE
        if ctx.path == "compiled":
            y = _fused("forward")(x, _packed(theta, *numbers))
        elif ctx.path == "blocks":
            y = _forward_blocks(x, *numbers)
        else:
            y = formula(x, theta, positive, negative)
        ctx.save_for_backward(y if ctx.from_output else x, theta)
        return y

    @staticmethod
    def backward(ctx, g):
        saved, theta = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate the formula instead
            return *_differentiable_backward(ctx, g, saved, theta), None, None, None
        args = (*ctx.args, ctx.from_output)
        saved, theta = saved.detach(), theta.detach()
        if ctx.path == "compiled":
            slopes = ctx.numbers or _slopes(theta, *ctx.args)
            bends = [d / s if ctx.from_output else d for (_, d), s in zip(ctx.args, slopes, strict=True)]
            dx, dtheta = _fused("backward")(g, saved, _packed(theta, *slopes, *bends))
        elif ctx.path == "blocks" and g.dtype == saved.dtype:
            dx, dtheta = _backward_blocks(g, saved, theta, *args)
        else:
            dx, dtheta = _backward(g, saved, theta, *args)
        return dx, dtheta.to(theta.dtype), None, None, None


def _path(x: Tensor, plain: bool, highest: float, fused: bool) -> str:
    """Which code works on x: "compiled", "blocks" or the "formula"."""
    if fused and _can_fuse(x.device.type):
        return "compiled"
    return "blocks" if plain and highest > 0 and _dense(x) else "formula"


def _ends(numbers: tuple) -> tuple[float, float]:
    """The lowest of all slopes, the highest on the positive side."""
    if not isinstance(numbers[0], Tensor):
        return min(numbers), numbers[0]
    return min(n.amin().item() for n in numbers), numbers[0].amin().item()


def _differentiable_backward(ctx, g, saved, theta):
    if ctx.from_output:
        a, b = _slopes(_broad(theta, saved), *ctx.args)
        saved = torch.where(saved > 0, saved / a, saved / b)
    wide = torch.promote_types(saved.dtype, torch.float32)
    x = saved.to(wide)
    a, b = _slopes(_broad(theta, x), *ctx.args)
    (_, a1), (_, b1) = ctx.args
    on = x > 0
    dx = torch.where(on, g * a, g * b).to(saved.dtype)
    each = g.to(wide) * torch.where(on, a1 * x, b1 * x)
    return dx, each.sum(_summed(x, theta)).to(theta.dtype)


def _summed(x: Tensor, theta: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if theta.ndim == 0 or d != 1]


# --- whole tensors, eager ---------------------------------------------------------------------------


def _backward(g, saved, theta, positive, negative, from_output):
    a, b = _slopes(_broad(theta, saved), positive, negative)
    bends = (positive[1] / a, negative[1] / b) if from_output else (positive[1], negative[1])
    wide = torch.promote_types(saved.dtype, torch.float32)
    s, g = saved.to(wide), g.to(wide)
    on = s > 0
    dx = torch.where(on, g * a, g * b).to(saved.dtype)
    return dx, (g * s * torch.where(on, *bends)).sum(_summed(saved, theta))


# --- whole tensors, compiled ------------------------------------------------------------------------


def _packed(theta: Tensor, *values: Tensor | float) -> Tensor:
    """The few numbers that a kernel needs as one tensor (n, *theta.shape), worked out beforehand: in the
    kernel they would be worked out again for every vector of elements."""
    if not any(isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=theta.dtype, device=theta.device)
    return torch.stack([v if isinstance(v, Tensor) else torch.full_like(theta, v) for v in values])


def _compiled_forward(x: Tensor, slopes: Tensor) -> Tensor:
    a, b = slopes.view(2, -1, *[1] * (x.ndim - 2)) if slopes.ndim == 2 else slopes
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide)
    return torch.where(s > 0, s * a, s * b).to(x.dtype)


def _compiled_backward(g: Tensor, saved: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    a, b, up, down = numbers.view(4, -1, *[1] * (saved.ndim - 2)) if numbers.ndim == 2 else numbers
    wide = torch.promote_types(saved.dtype, torch.float32)
    s, g = saved.to(wide), g.to(wide)
    on = s > 0
    dx = (g * torch.where(on, a, b)).to(saved.dtype)
    return dx, (g * s * torch.where(on, up, down)).sum(_summed(saved, numbers[0]))


@functools.cache
def _fused(half: str):
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    # Without this, a kernel first built for a small tensor runs on one thread ever after: how many threads are worth
    # it is settled at that first size, and the size isn't part of what torch's cache on disk goes by.
    options = {"cpp.dynamic_threads": True}
    made = {"forward": _compiled_forward, "backward": _compiled_backward}[half]
    return torch.compile(made, dynamic=True, options=options)


@functools.cache
def _can_fuse(device: str) -> bool:
    """Whether torch.compile works here; tried once on a small tensor, a failure is said once."""
    try:
        _fused("forward")(torch.ones(2, 3, device=device), torch.ones(2, device=device))
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"fused unit kernels can't be compiled here ({why}): eager ones are used", stacklevel=2)
        return False
    return True


# --- eager, CPU, one θ a layer: block by block -----------------------------------------------------


def _dense(x: Tensor) -> bool:
    return x.dtype.is_floating_point and (
        x.is_contiguous()
        or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one line in the order of memory, without a copy."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _forward_blocks(x: Tensor, a: float, b: float) -> Tensor:
    x = x.detach()
    if b == 0:  # a ReLU, and 0 for -inf as well
        return torch.relu(x) if a == 1 else torch.relu(x).mul_(a)
    if x.dtype not in (torch.float32, torch.float64):  # torch's kernel computes in float32 inside
        y = _aten.leaky_relu(x, b / a)
        return y if a == 1 else y.mul_(a)
    y = torch.empty_like(x)
    for xs, ys in zip(_flat(x).split(BLOCK), _flat(y).split(BLOCK), strict=True):
        _aten.leaky_relu.out(xs, b / a, out=ys)
        if a != 1:
            ys.mul_(a)
    return y


def _backward_blocks(g, saved, theta, positive, negative, from_output):
    """dx, dθ. On a block: dx = a·leaky(g), dθ += <g, h(saved)>, where h has the slopes (a1, b1)."""
    a, b = _slopes(theta.item(), positive, negative)
    h_pos, h_neg = (positive[1] / a, negative[1] / b) if from_output else (positive[1], negative[1])
    factor = h_pos or h_neg
    if g.stride() != saved.stride():
        g = torch.empty_like(saved).copy_(g)

    def bent(s, out=None):  # h(s) / factor
        if h_pos:
            return (
                _aten.leaky_relu(s, h_neg / h_pos) if out is None else _aten.leaky_relu.out(s, h_neg / h_pos, out=out)
            )
        return torch.clamp(s, max=0) if out is None else torch.clamp(s, max=0, out=out)

    if saved.dtype not in (torch.float32, torch.float64):
        dx = _aten.leaky_relu_backward(g, saved, b / a, False)
        return dx if a == 1 else dx.mul_(a), _sum(bent(saved).mul_(g)) * factor
    dx = torch.empty_like(saved)
    h = torch.empty(min(BLOCK, saved.numel()), dtype=saved.dtype)
    dtheta = torch.zeros((), dtype=saved.dtype)
    for gs, ss, ds in zip(_flat(g).split(BLOCK), _flat(saved).split(BLOCK), _flat(dx).split(BLOCK), strict=True):
        dtheta.add_(torch.dot(gs, bent(ss, h[: ss.numel()])), alpha=factor)
        _aten.leaky_relu_backward.grad_input(gs, ss, b / a, False, grad_input=ds)
        if a != 1:
            ds.mul_(a)
    return dx, dtheta


def _sum(products: Tensor, row: int = 4096) -> Tensor:
    """The float32 sum of a half-precision tensor: rows inside torch's kernel, then their sums.

    A row's sum is rounded once to half precision, which adds no more noise than rounding the products
    did, and is several times faster than converting them all.
    """
    line = _flat(products)
    if products.dtype != torch.bfloat16:  # float16 could overflow within a row
        return line.sum(dtype=torch.float32)
    whole = line.numel() // row * row
    return line[:whole].view(-1, row).sum(1).float().sum() + line[whole:].float().sum()

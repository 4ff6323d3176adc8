"""The two-slope activation: every path gives the formula's values and gradients."""

import warnings

import pytest
import torch
from torch import nn

from linl import kernels
from linl.kernels import formula, two_slope

SLOPES = {
    "linlu": ((0.0, 1.0), (-1.0, 2.0)),
    "partial": ((1.0, 0.0), (0.0, 1.0)),
    "leaky": ((1.0, 0.0), (0.1, 0.9)),
}


def values(shape=(3, 4, 5, 6), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def reference(x, theta, positive, negative, g):
    """Values and gradients by autograd through plain float64 arithmetic."""
    x, theta = (t.double().detach().requires_grad_() for t in (x, theta))
    broad = theta.view(-1, *[1] * (x.ndim - 2)) if theta.ndim else theta
    y = (positive[0] + positive[1] * broad) * x.clamp(min=0) + (negative[0] + negative[1] * broad) * x.clamp(max=0)
    return y.detach(), *torch.autograd.grad(y, (x, theta), g.double())


@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("theta", [0.5, 0.51, 0.75, 1.0])
@pytest.mark.parametrize("layout", ["rows", "channels_last", "strided", "blocks"])
def test_values_and_gradients(kind, theta, layout, monkeypatch):
    x = values()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = values((3, 4, 5, 12))[..., ::2]
    else:
        monkeypatch.setattr(kernels, "BLOCK", 97)  # several blocks, the last one short
    g = values(seed=1)
    t = torch.tensor(theta, dtype=torch.float64)
    want_y, want_dx, want_dt = reference(x, t, *SLOPES[kind], g)
    x, t = x.clone(memory_format=torch.preserve_format).requires_grad_(), t.requires_grad_()
    y = two_slope(x, t, *SLOPES[kind])
    y.backward(g)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, want_dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t.grad, want_dt, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SLOPES)
def test_one_parameter_a_channel(kind):
    x, g = values((3, 4, 5)), values((3, 4, 5), seed=1)
    t = torch.tensor([0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    want_y, want_dx, want_dt = reference(x, t, *SLOPES[kind], g)
    x, t = x.requires_grad_(), t.requires_grad_()
    y = two_slope(x, t, *SLOPES[kind])
    y.backward(g)
    for got, want in ((y, want_y), (x.grad, want_dx), (t.grad, want_dt)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", [0.52, 0.8])
def test_gradgrad(theta):
    """Double backward, by finite differences: the path that saves x and the one that saves y."""
    x = values((4, 3)).requires_grad_()
    t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: two_slope(x, t, *SLOPES["linlu"]), (x, t))
    assert torch.autograd.gradgradcheck(lambda x, t: two_slope(x, t, *SLOPES["linlu"]), (x, t))
    # y is bilinear, so its mixed second derivative is what matters: d²y/dx dθ = a1 or b1
    (dx,) = torch.autograd.grad(two_slope(x, t, *SLOPES["linlu"]).sum(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(dx.sum(), t)
    assert mixed.item() == (x > 0).sum() + 2 * (x <= 0).sum()


def test_bf16_parameter_gradient_is_summed_in_float32():
    """The published formula loses more than 1 % of p's gradient in bf16; ours at most 0.1 %."""
    x, g = values((64, 32, 16, 16), torch.bfloat16), values((64, 32, 16, 16), torch.bfloat16, seed=1)
    g = (g + 0.05 * x.sign()).to(torch.bfloat16)
    t = torch.tensor(0.75)
    _, want_dx, want = reference(x, t, *SLOPES["linlu"], g)
    x, t = x.requires_grad_(), t.requires_grad_()
    y = two_slope(x, t, *SLOPES["linlu"])
    y.backward(g)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and t.grad.dtype == torch.float32
    assert abs(t.grad.item() - want.item()) <= 1e-3 * abs(want.item())
    torch.testing.assert_close(x.grad.double(), want_dx, rtol=2**-7, atol=1e-30)  # rounded twice


def test_saves_its_output_as_relu_does():
    """What follows saves y anyway; x must not be kept beside it while the slopes allow to do without."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = values((8, 4)).requires_grad_()
        y = two_slope(x, torch.tensor(0.75, dtype=torch.float64, requires_grad=True), *SLOPES["linlu"])
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [y.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 3), (1,), ()])
def test_small_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    two_slope(x, t, *SLOPES["linlu"]).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(x > 0, 0.75, 0.5).double())


def test_function_transforms_and_meta_tensors():
    t = torch.tensor(0.75)
    x = values((5, 3), torch.float32)
    want = formula(x, t, *SLOPES["linlu"])
    torch.testing.assert_close(torch.func.vmap(lambda r: two_slope(r, t, *SLOPES["linlu"]))(x), want)
    jacobian = torch.func.jacrev(lambda t: two_slope(x, t, *SLOPES["linlu"]))(t)
    torch.testing.assert_close(jacobian, torch.where(x > 0, x, 2 * x))
    assert two_slope(x.to("meta"), t.to("meta"), *SLOPES["linlu"]).shape == x.shape


def test_fused_kernels_agree(monkeypatch):
    """Those that torch.compile builds (a GPU's, one parameter a channel); linl.native has tests of its own."""
    monkeypatch.setattr(kernels.native, "kernels", lambda: None)
    if not kernels._can_fuse("cpu"):
        pytest.skip("no C++ compiler: torch.compile can't build kernels here")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        for theta in (0.51, 0.75):
            x, g = values((4, 3, 5, 7), dtype), values((4, 3, 5, 7), dtype, seed=1)
            t = torch.tensor(theta)
            want = reference(x, t, *SLOPES["linlu"], g)
            x, t = x.requires_grad_(), t.requires_grad_()
            y = two_slope(x, t, *SLOPES["linlu"], fused=True)
            y.backward(g)
            for got, right in zip((y, x.grad, t.grad), want, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_without_a_compiler_fused_falls_back_with_a_word(monkeypatch):
    monkeypatch.setattr(kernels.native, "kernels", lambda: None)

    def broken(half):
        raise RuntimeError("no compiler found")

    kernels._can_fuse.cache_clear()
    monkeypatch.setattr(kernels, "_fused", broken)
    x = torch.tensor([-1.0, 2.0])
    with pytest.warns(UserWarning, match="no compiler found"):
        y = two_slope(x, torch.tensor(0.75), *SLOPES["linlu"], fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        two_slope(x, torch.tensor(0.75), *SLOPES["linlu"], fused=True)
    kernels._can_fuse.cache_clear()
    torch.testing.assert_close(y, torch.tensor([-0.5, 1.5]))


def test_an_in_place_layer_behind_it_is_noticed_not_silent():
    """As behind nn.ReLU: torch refuses the backward pass instead of giving a wrong gradient."""
    x = values((4, 4)).requires_grad_()
    t = nn.Parameter(torch.tensor(0.75, dtype=torch.float64))
    y = two_slope(x, t, *SLOPES["linlu"])
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_minus_infinity_is_zero_at_slope_zero_as_for_a_relu():
    x = torch.tensor([-torch.inf, 1.0])
    assert torch.equal(two_slope(x, torch.tensor(0.0), *SLOPES["partial"]), torch.relu(x))


def test_float16_gradients_do_not_overflow():
    x = torch.full((8192,), -5.0).half().requires_grad_()
    t = torch.tensor(0.75, requires_grad=True)
    two_slope(x, t, *SLOPES["linlu"]).backward(torch.full((8192,), 5.0).half())
    assert t.grad.item() == pytest.approx(-8192 * 5 * 5 * 2, rel=1e-3)

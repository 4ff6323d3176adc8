"""The compiled kernels: the formula's values and gradients, on every kind of memory they accept."""

import subprocess

import pytest
import torch

from linl import kernels, native
from linl.kernels import formula, two_slope
from linl.tests.test_kernels import SLOPES, reference, values

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.why_not())


def used(monkeypatch):
    """Notes which path each call took."""
    seen, native_takes, path = [], kernels._goes_native, kernels._path
    monkeypatch.setattr(kernels, "_goes_native", lambda *args: native_takes(*args) and not seen.append("native"))
    monkeypatch.setattr(kernels, "_path", lambda *args: seen.append(path(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("theta", [0.5, 0.51, 0.75, 1.0])
@pytest.mark.parametrize("layout", ["rows", "channels_last", "turned", "expanded"])
def test_values_and_gradients(kind, theta, layout, monkeypatch):
    seen = used(monkeypatch)
    x, g = values((3, 4, 5, 7)), values((3, 4, 5, 7), seed=1)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)  # and g not: it is brought into x's order
    elif layout == "turned":
        g = values((7, 5, 4, 3), seed=1).permute(3, 2, 1, 0)
    elif layout == "expanded":
        g = values((1, 4, 1, 7), seed=1).expand(3, 4, 5, 7)
    t = torch.tensor(theta, dtype=torch.float64)
    want_y, want_dx, want_dt = reference(x, t, *SLOPES[kind], g)
    x, t = x.clone(memory_format=torch.preserve_format).requires_grad_(), t.requires_grad_()
    y = two_slope(x, t, *SLOPES[kind], fused=True)
    y.backward(g)
    assert seen == ["native"] and y.stride() == x.stride()
    for got, want in ((y, want_y), (x.grad, want_dx), (t.grad, want_dt)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 32, 33, 4095, 4096, 4097, 2 * 4096 + 5, 40_000])
def test_every_length(n):
    """Shorter than a vector, a block and a bit, several threads: nothing left out, nothing beyond the end touched."""
    made = native.kernels()
    around = torch.full((n + 64,), 7.0, dtype=torch.float64)
    x, g = values((n,)), values((n,), seed=1)
    y = made.forward(x, 0.75, 0.5)
    assert torch.equal(y, x * torch.where(x > 0, 0.75, 0.5))
    dx = around[32 : 32 + n]
    where = g.data_ptr(), x.data_ptr(), dx.data_ptr()
    total = made._backward[torch.float64](*where, n, 0.75, 0.5, 1.0, 2.0, 2)
    assert torch.equal(dx, g * torch.where(x > 0, 0.75, 0.5))
    assert total == pytest.approx((g * x * torch.where(x > 0, 1, 2)).sum().item(), rel=1e-12, abs=1e-12)
    assert (around[:32] == 7).all() and (around[32 + n :] == 7).all()


def test_bfloat16_is_rounded_as_torch_rounds():
    """Every bfloat16 there is, through several slopes: the same bits as torch's, NaN where it has NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    for slopes in ((0.75, 0.5), (1.0, 0.3), (0.6, 0.2)):
        ours = native.kernels().forward(x, *slopes)
        wanted = (x.float() * torch.where(x.float() > 0, *map(torch.tensor, slopes))).to(torch.bfloat16)
        assert torch.equal(ours.isnan(), wanted.isnan())
        there = ~wanted.isnan()
        assert torch.equal(ours[there].view(torch.int16), wanted[there].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parameters_gradient_keeps_its_digits(dtype):
    x = values((64, 32, 16, 16), dtype)
    g = (values((64, 32, 16, 16), dtype, seed=1) + 0.05 * x.sign()).to(dtype)
    t = torch.tensor(0.75)
    *_, want = reference(x, t, *SLOPES["linlu"], g)
    x, t = x.requires_grad_(), t.requires_grad_()
    two_slope(x, t, *SLOPES["linlu"], fused=True).backward(g)
    assert t.grad.dtype == torch.float32
    assert abs(t.grad.item() - want.item()) <= (1e-3 if dtype == torch.bfloat16 else 1e-5) * abs(want.item())


def test_the_same_twice():
    x, g = values((50, 4001), torch.float32), values((50, 4001), torch.float32, seed=1)
    numbers = (0.75, 0.5, 1.0, 2.0)
    (dx, total), (again, same) = (native.kernels().backward(g, x, *numbers) for _ in range(2))
    assert torch.equal(dx, again) and total == same


def test_what_it_does_not_take_goes_elsewhere(monkeypatch):
    seen = used(monkeypatch)
    monkeypatch.setattr(kernels, "_can_fuse", lambda device: False)  # torch.compile has its own test
    t = torch.tensor(0.75)
    for x in (values((4, 6)).half(), values((4, 6))[:, ::2]):
        y = two_slope(x, t, *SLOPES["linlu"], fused=True)
        torch.testing.assert_close(y, formula(x, t, *SLOPES["linlu"]), rtol=1e-3, atol=1e-3)
    two_slope(values((4, 3)), torch.tensor([0.6, 0.7, 0.8]), *SLOPES["linlu"], fused=True)
    assert "native" not in seen


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("/nowhere/c++", "No such file"), ("false", "can't build them"), ("true", "can't build them")],
)
def test_a_compiler_that_fails_says_why(compiler, why, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    made, said = native._made.__wrapped__()
    assert made is None and why in said and compiler in said


def test_no_compiler_names_the_mend(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    made, said = native._made.__wrapped__()
    assert made is None and "apt install g++" in said


def test_code_that_computes_something_else_is_not_used(monkeypatch, tmp_path):
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text(native.SOURCE.read_text().replace("v > 0 ? a : b", "v > 1 ? a : b"))
    monkeypatch.setattr(native, "SOURCE", wrong)
    made, said = native._made.__wrapped__()
    assert made is None and "something else" in said


def test_plain_flags_do_as_well(monkeypatch):
    """Where the compiler knows neither this processor nor OpenMP: slower, the same numbers."""
    monkeypatch.setattr(native, "FLAGS", ([],))
    made, said = native._made.__wrapped__()
    assert made is not None, said
    x = values((3, 1000), torch.float32)
    assert torch.equal(made.forward(x, 0.75, 0.5), native.kernels().forward(x, 0.75, 0.5))


def test_a_compiler_that_hangs_is_given_up(monkeypatch):
    def hang(command, **kwargs):
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(native.subprocess, "run", hang)
    made, said = native._made.__wrapped__()
    assert made is None and "timed out" in said

"""The peak of a call's memory."""

import os

import pytest
import torch
from torch import nn

import linl
from linl.memory import peak

MB = 2**20
"""Bytes of the tensors below; float32, a quarter as many numbers."""


def new():
    return torch.empty(MB // 4)


def test_what_is_there_at_once_counts_and_what_follows_does_not():
    def at_once():
        return [new(), new(), new()]

    def one_after_the_other():
        for _ in range(3):
            new()

    for call in (at_once, one_after_the_other):
        call()
    assert peak(at_once) == 3 * MB
    assert peak(one_after_the_other) == MB
    assert peak(lambda: None) == 0


def test_what_was_there_before_does_not_count():
    before = [new() for _ in range(8)]
    assert peak(lambda: before[0].neg()) == MB


def test_an_argument_lives_as_long_as_its_operation():
    assert peak(lambda: new().neg()) == 2 * MB
    assert peak(lambda: new().neg_()) == MB


@pytest.mark.parametrize("fused", [False, True])
def test_a_units_step_needs_no_more_than_a_relus(fused):
    """Output and input's gradient; the published formula makes six."""
    x = torch.randn(64, 16, 16, 16, requires_grad=True)
    g = torch.randn_like(x)

    def step(unit):
        unit(x).backward(g)
        x.grad = None

    unit = linl.LiNLU()
    if fused:
        linl.fuse_kernels_(unit)
    relu = nn.ReLU()
    for one in (unit, relu):
        step(one)
    assert peak(lambda: step(relu)) == 2 * x.nbytes
    limit = 1.01 if fused else 2.1
    assert peak(lambda: step(unit)) <= limit * 2 * x.nbytes


def test_the_profilers_log_isnt_heard_and_others_are_again(capfd):
    peak(new)
    assert capfd.readouterr().err == ""
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_device_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match="'mps' isn't known: only cpu and cuda"):
        peak(new, "mps")

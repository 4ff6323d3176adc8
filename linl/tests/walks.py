"""Passes through small networks, with CROWN's ranges, for tests of what goes on from there."""

import torch

from linl.crown import Pass
from linl.program import Bend
from linl.reading import program


def walked(net, box, value=None):
    """A pass up to a value, with CROWN's ranges on the way."""
    walk = Pass(program(net, box.shape), box)
    with torch.no_grad():
        for op in walk.program.upto(walk.program.output if value is None else value):
            if isinstance(op, Bend):
                walk.tighten(op.sources[0], walk.open(op))
            walk.step(op)
    return walk

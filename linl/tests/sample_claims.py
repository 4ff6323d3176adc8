"""`python -m linl.tests.sample_claims RUNS [POINTS]`: looks for points that contradict what runs claim.

RUNS is a folder of finished stability runs (results/runs/stability). For each network POINTS inputs of its domain are
tried, ten million by default: evenly distributed ones, corners, sparse images, and the ends of gradient ascent towards
the bend that each stable unit is said never to reach. A unit that is seen where it is said never to be ends the search.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import linl
from linl import Box, Stability
from linl.program import Program
from linl.reading import program

BATCH = 20_000


def network(folder: Path) -> torch.nn.Module:
    """The network of a run, with its trained weights."""
    params = json.loads((folder / "params.json").read_text())
    size = tuple(Stability.load(folder / "state").box.shape)
    plain = {} if params["network"] == "autoencoder" else {"norm": False, "dropout": 0.0}
    widths = tuple(map(int, params["hidden"].split()))
    net = linl.models.create(params["network"], 10, size, hidden=widths, **plain)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval()


def worst(read: Program, state: Stability, points: torch.Tensor, reached: list[torch.Tensor]) -> None:
    """Notes how far beyond its piece each stable unit was seen; below 0 it never was."""
    values = read.run(points)
    for op in read.bends:
        seen, codes = values[op.sources[0]].flatten(1), state.codes[op.site]
        edges = torch.tensor(op.pieces.edges, dtype=seen.dtype)
        piece = codes.long().clamp(min=0)
        beyond = torch.maximum(edges[piece] - seen.amin(0), seen.amax(0) - edges[piece + 1])
        beyond[codes < 0] = -torch.inf
        reached[op.site] = torch.maximum(reached[op.site], beyond)


def attacked(read: Program, state: Stability, generator: torch.Generator) -> torch.Tensor:
    """Ends of gradient ascent of every stable unit towards the bend next to it."""
    box, found = state.box, []
    for op in read.bends:
        for unit in (state.codes[op.site] >= 0).nonzero()[:, 0].tolist():
            up = 1.0 if state.codes[op.site][unit] == 0 else -1.0
            at = box.sample(4, generator).float()
            path = Program(read.upto(op.sources[0]), read.shapes, op.sources[0])
            for step in range(25):
                at = at.detach().requires_grad_()
                value = path.run(at)[op.sources[0]].flatten(1)[:, unit].sum()
                slope = torch.autograd.grad(value, at)[0]
                at = box.clip((at + up * 0.3 * (1 - step / 25) * slope.sign()).detach())
            found.append(at)
    return torch.cat(found) if found else box.sample(1, generator).float()


def sparse(box: Box, n: int, generator: torch.Generator) -> torch.Tensor:
    """Points that are at the lower end almost everywhere."""
    share = torch.rand(n, *[1] * len(box.shape), generator=generator)
    on = torch.rand(n, *box.shape, generator=generator) < share
    return torch.where(on, box.sample(n, generator).float(), box.lower[0].float())


KINDS = (
    lambda box, n, generator: box.sample(n, generator).float(),
    lambda box, n, generator: box.corners(n, generator).float(),
    sparse,
)


def main(runs: Path, points: int) -> None:
    """Every run in the folder; networks of one domain see the same points."""
    generator = torch.Generator().manual_seed(1)
    claims = []
    for path in sorted(runs.glob("*/s*/result.json")):
        state = Stability.load(path.parent / "state")
        read = program(network(path.parent), state.box.shape).to(torch.float32)
        reached = [torch.full((len(codes),), -torch.inf) for codes in state.codes]
        special = attacked(read, state, generator)
        with torch.no_grad():
            worst(read, state, special, reached)
        claims.append((path.parent, read, state, reached))
    for shape in {state.box.shape for _, _, state, _ in claims}:
        same = [claim for claim in claims if claim[2].box.shape == shape]
        with torch.no_grad():
            for batch in range(-(-points // BATCH)):
                tried = KINDS[batch % len(KINDS)](same[0][2].box, BATCH, generator)
                for _, read, state, reached in same:
                    worst(read, state, tried, reached)
        for folder, _, state, reached in same:
            most = max(r.max().item() for r in reached)
            stable = sum(int((codes >= 0).sum()) for codes in state.codes)
            told = f"{stable} stable units, the nearest to its bend {-most:.2e} away" if stable else "no stable unit"
            print(f"{folder.parent.name} {folder.name}: {points:,} points, {told}", flush=True)
            assert most <= 1e-5, "a claim is contradicted (beyond float32 rounding)"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000)

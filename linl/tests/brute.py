"""Small networks whose units' states are found by enumerating every activation pattern with linear programs.

Independent of linl's bounds and of its solver model: scipy's `linprog` on the polytope of each pattern.
"""

import itertools

import numpy as np
import torch
from scipy.optimize import linprog
from torch import nn


def small_net(seed: int) -> tuple[nn.Sequential, int]:
    """A random ReLU network of one to three hidden layers of two to four units, on two or three inputs."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    inputs, depth = pick(2, 3), pick(1, 3)
    widths = [inputs, *(pick(2, 4) for _ in range(depth)), 2]
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(a, b).double()
        layer.weight.data = torch.randn(b, a, generator=generator, dtype=torch.float64)
        layer.bias.data = 1.5 * torch.randn(b, generator=generator, dtype=torch.float64)
        layers += [layer, nn.ReLU()] if i < depth else [layer]
    return nn.Sequential(*layers).eval(), inputs


def extremes(net: nn.Sequential, lower: np.ndarray, upper: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each ReLU layer, the exact least and greatest input of every unit over a box.

    Every pattern of the layers before is tried: inside its polytope the units are affine, so a linear program
    finds their extremes.
    """
    linears = [m for m in net if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linears]
    found = []
    polytopes = [(np.eye(len(lower)), np.zeros(len(lower)), np.zeros((0, len(lower))), np.zeros(0))]
    for weight, bias in weights[:-1]:
        low, high = np.full(len(bias), np.inf), np.full(len(bias), -np.inf)
        longer = []
        for slope, shift, sides, offsets in polytopes:
            a, c = weight @ slope, weight @ shift + bias
            for unit in range(len(bias)):
                least, most = (_extreme(sign * a[unit], sides, offsets, lower, upper) for sign in (1, -1))
                low[unit], high[unit] = min(low[unit], least + c[unit]), max(high[unit], -most + c[unit])
            for pattern in itertools.product((0, 1), repeat=len(bias)):
                on = np.array(pattern)
                sign = np.where(on, -1.0, 1.0)  # on: -(a·x + c) ≤ 0; off: a·x + c ≤ 0
                more = np.concatenate([sides, sign[:, None] * a]), np.concatenate([offsets, -sign * c])
                if np.isfinite(_extreme(np.zeros(len(lower)), *more, lower, upper)):
                    longer.append((on[:, None] * a, on * c, *more))
        found.append((low, high))
        polytopes = longer
    return found


def _extreme(cost, sides, offsets, lower, upper) -> float:
    """min cost·x over the box and sides·x ≤ offsets; inf where there is no such x."""
    kwargs = {"A_ub": sides, "b_ub": offsets} if len(sides) else {}
    answer = linprog(cost, bounds=np.stack([lower, upper], 1), method="highs", **kwargs)
    assert answer.status in (0, 2), answer.message
    return answer.fun if answer.status == 0 else np.inf


def dense_net(seed: int, most: int = 12) -> tuple[nn.Sequential, int]:
    """A random ReLU network of up to `most` units in one to three hidden layers, on one to four inputs."""
    rng = np.random.default_rng(seed)
    inputs, depth = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    units = int(rng.integers(depth, most + 1))
    cuts = np.sort(rng.choice(np.arange(1, units), depth - 1, replace=False))
    widths = [inputs, *np.diff([0, *cuts, units]).tolist(), 1]
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(a, b).double()
        layer.weight.data = torch.from_numpy(rng.normal(size=(b, a)))
        layer.bias.data = torch.from_numpy(0.7 * rng.normal(size=b))
        layers += [layer, nn.ReLU()] if i < depth else [layer]
    return nn.Sequential(*layers).eval(), inputs


def patterns(net: nn.Sequential, lower: np.ndarray, upper: np.ndarray, least: float = 1e-7) -> set[tuple[int, ...]]:
    """Every sign pattern of all ReLUs whose region in a box holds a ball (L2) larger than `least`, one by one."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linears[:-1]]
    found, n = set(), len(lower)
    sides = [np.concatenate([np.eye(n), -np.eye(n)]), np.concatenate([upper, -lower])]  # box: rows·x ≤ offsets
    for pattern in itertools.product((0, 1), repeat=sum(len(bias) for _, bias in weights)):
        slope, shift, rows, offsets, rest = np.eye(n), np.zeros(n), [sides[0]], [sides[1]], pattern
        for weight, bias in weights:
            on, rest = np.array(rest[: len(bias)]), rest[len(bias) :]
            slope, shift = weight @ slope, weight @ shift + bias
            sign = np.where(on, -1.0, 1.0)
            rows.append(sign[:, None] * slope)
            offsets.append(-sign * shift)
            slope, shift = on[:, None] * slope, on * shift
        rows, offsets = np.concatenate(rows), np.concatenate(offsets)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        cost = np.append(np.zeros(n), -1.0)  # the largest ball: rows·x + ‖row‖·r ≤ offsets
        answer = linprog(
            cost, np.append(rows, norms, axis=1), offsets, bounds=[(None, None)] * n + [(0, None)], method="highs"
        )
        assert answer.status in (0, 2), answer.message
        dead = norms[:, 0] == 0  # a unit that is constant: one side of it is all, the other nothing
        if answer.status == 0 and -answer.fun > least and (offsets[dead] > 0).all():
            found.add(pattern)
    return found

"""A convex polygon cut by straight lines, each given by its values at the corners.

Every cut goes through the edges where the line's value changes sign; a corner that lies on the line is taken as it
is. New corners are told by what they lie on: an edge of the polygon and a line, or two lines. So two neighbours that
are cut by the same line on their common edge get the same corner.
"""

from __future__ import annotations

import numpy as np


class Corners:
    """New corners of one round of cuts, shared by all polygons.

    Attributes:
        count: corners there are, old and new.
        parents: for each new corner, the old ones that it lies between.
        weights: their shares in it, not below 0, of sum 1.
        on: (corner, line) for each new corner and each line through it.
    """

    def __init__(self, count: int) -> None:
        self.first = self.count = count
        self.parents: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.on: list[tuple[int, int]] = []
        self.known: dict[tuple[int, int, int], int] = {}

    def add(self, parents: np.ndarray, weights: np.ndarray, lines: tuple[int, ...]) -> int:
        """A corner more; its number."""
        self.parents.append(parents)
        self.weights.append(weights)
        self.on.extend((self.count, line) for line in lines)
        self.count += 1
        return self.count - 1

    def matrix(self):
        """The new corners as sums of the old ones: scipy's sparse (new, old)."""
        from scipy.sparse import csr_matrix

        ends = np.cumsum([0, *map(len, self.parents)])
        index = np.concatenate(self.parents) if self.parents else np.zeros(0, dtype=np.int64)
        data = np.concatenate(self.weights) if self.weights else np.zeros(0)
        return csr_matrix((data, index, ends), shape=(len(self.parents), self.first))


class Cutter:
    """One polygon under the knife.

    Args:
        loop: its corners' numbers, in order around it.
        points: of its corners, (m, 2): they decide alone which end of an edge is the first.
        values: of k lines at its corners, (m, k).
        touch: how near to 0 counts as on the line.
        lines: the lines' own numbers, (k,), the same in every polygon.
        corners: where new ones are kept.
    """

    def __init__(self, loop, points, values, touch: float, lines, corners: Corners) -> None:
        self.loop, self.points, self.lines, self.corners, self.touch = loop, points, lines, corners, touch
        m, self.k = values.shape
        self.rows = np.concatenate([values, np.eye(m)], 1)  # lines' values, then shares of the old corners
        self.numbers = list(loop)
        self.size = m
        self.codes = self._codes(self.rows)
        self.inside: dict[tuple[int, int], int] = {}
        self.edge: dict[tuple[int, int], int] = {}

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        values = rows[:, : self.k]
        return (values > self.touch).astype(np.int8) - (values < -self.touch).astype(np.int8)

    def cut(self) -> list[list[int]]:
        """All parts, as corners' numbers."""
        m, done = self.size, []
        # an edge is told by what it lies on: −1 − i for the polygon's edge from its corner i, else a line's column
        parts = [(list(range(m)), [-1 - i for i in range(m)], np.arange(self.k))]
        while parts:
            loop, edges, open_ = parts.pop()
            codes = self.codes[np.ix_(loop, open_)]
            open_ = open_[(codes > 0).any(0) & (codes < 0).any(0)]
            if not len(open_):
                done.append([self.numbers[i] for i in loop])
                continue
            line = int(open_[len(open_) // 2])
            rest = open_[open_ != line]
            for loop_, edges_ in self._halves(loop, edges, line):
                parts.append((loop_, edges_, rest))
        return done

    def tile(self, windows: list[np.ndarray]) -> list[list[int]]:
        """All parts in which one of several values is the largest, for each of some windows; as corners' numbers.

        Args:
            windows: for each, (size, size) columns: that of the line "value i minus value j" for i below j.
        """
        m = self.size
        parts = [(list(range(m)), [-1 - i for i in range(m)])]
        for columns in windows:
            parts = [piece for part in parts for piece in self._envelope(part, columns)]
        return [[self.numbers[i] for i in loop] for loop, _ in parts]

    def _envelope(self, part: tuple[list[int], list[int]], columns: np.ndarray) -> list:
        """A part's parts, one for each value that is the largest somewhere in it."""
        many = range(len(columns))
        found = [won for i in many if (won := self._won(part, columns, i)) is not None]
        if len(columns) < 3:
            return found
        # three lines that are equal but for rounding needn't meet in a point, and what is cut out by them may overlap
        whole, pieces = self._area(part[0]), sum(self._area(loop) for loop, _ in found)
        if abs(pieces - whole) <= 1e-9 * whole + 1e-14 * np.ptp(self.points, 0).max() ** 2:
            return found
        found = [(part, 0)]
        for new in many[1:]:  # then one line at a time, though a value may get several parts
            found = [piece for old, value in found for piece in self._against(old, columns, value, new)]
        return [loop_and_edges for loop_and_edges, _ in found]

    def _against(self, part: tuple[list[int], list[int]], columns: np.ndarray, old: int, new: int) -> list:
        """A part in which value `old` was the largest, and which is now: [(part, value)]; old is below new."""
        line = int(columns[old, new])
        codes = self.codes[part[0], line]
        if not (codes < 0).any():
            return [(part, old)]
        if not (codes > 0).any():
            return [(part, new)]
        above, below = self._halves(*part, line)
        return [(above, old), (below, new)]

    def _area(self, loop: list[int]) -> float:
        x, y = (self.rows[loop, self.k :] @ self.points).T
        x, y = x - x[0], y - y[0]
        return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))

    def _won(self, part: tuple[list[int], list[int]], columns: np.ndarray, mine: int):
        """The part of a part in which value `mine` is the largest; of values that are equal all over, the first."""
        for other in range(len(columns)):
            if other == mine:
                continue
            line, sign = (columns[mine, other], 1) if mine < other else (columns[other, mine], -1)
            codes = sign * self.codes[part[0], line]
            above, below = (codes > 0).any(), (codes < 0).any()
            if not above and (below or other < mine):
                return None
            if above and below:
                part = self._halves(*part, int(line))[0 if sign > 0 else 1]
        return part

    def _halves(self, loop: list[int], edges: list[int], line: int):
        """The part above the line and the part below."""
        sides = self._sides(loop, line)
        above: tuple[list, list] = ([], [])
        below: tuple[list, list] = ([], [])
        for at, (here, edge, side) in enumerate(zip(loop, edges, sides, strict=True)):
            after = (at + 1) % len(loop)
            for part, sign in ((above, 1), (below, -1)):
                if side * sign >= 0:
                    leaves = side == 0 and sides[after] * sign < 0  # from here on along the cut
                    part[0].append(here)
                    part[1].append(line if leaves else edge)
            if side * sides[after] < 0:
                new = self._crossing(here, loop[after], edge, line)
                for part, sign in ((above, 1), (below, -1)):
                    part[0].append(new)
                    part[1].append(edge if sides[after] * sign > 0 else line)
        return above, below

    def _sides(self, loop: list[int], line: int) -> list[int]:
        """On which side of a line each corner is: 1, −1, or 0 on it.

        A line enters a convex polygon once and leaves it once. So of several corners in a row that lie on it, as far as
        can be told, one is taken for on it, the others go with their neighbours; none where it only comes near.
        """
        sides = self.codes[loop, line].tolist()
        if 0 not in sides:
            return sides
        size = len(sides)
        first = next(i for i in range(size) if sides[i])
        at = first
        while at < first + size:
            end = at + 1
            while not sides[end % size]:
                end += 1
            run = [i % size for i in range(at + 1, end)]
            before, after = sides[at % size], sides[end % size]
            keeper = min(run, key=lambda i: abs(self.rows[loop[i], line]), default=None) if before != after else None
            passed = False
            for i in run:
                passed |= i == keeper
                sides[i] = 0 if i == keeper else after if passed else before
            at = end
        return sides

    def _crossing(self, a: int, b: int, edge: int, line: int) -> int:
        """The corner where a line crosses an edge, by its local number."""
        if edge >= 0:
            key = (min(edge, line), max(edge, line))
            if key not in self.inside:
                row = self._between(a, b, line)
                row[edge] = 0.0
                self.inside[key] = self._keep(row, line)
                share = row[self.k :]
                used = share.nonzero()[0]
                lines = (int(self.lines[edge]), int(self.lines[line]))
                number = self.corners.add(np.asarray(self.loop)[used], share[used], lines)
                self.numbers.append(number)
            return self.inside[key]
        start = -1 - edge
        if (start, line) not in self.edge:
            a, b = start, (start + 1) % len(self.loop)
            if tuple(self.points[b]) < tuple(self.points[a]):
                a, b = b, a
            row = self._between(a, b, line)
            self.edge[start, line] = self._keep(row, line)
            key = (self.loop[a], self.loop[b], int(self.lines[line]))
            if key not in self.corners.known:
                self.corners.known[key] = self.corners.add(
                    np.array([self.loop[a], self.loop[b]]), row[self.k + np.array([a, b])], (int(self.lines[line]),)
                )
            self.numbers.append(self.corners.known[key])
        return self.edge[start, line]

    def _between(self, a: int, b: int, line: int) -> np.ndarray:
        u, v = self.rows[a, line], self.rows[b, line]
        share = u / (u - v)
        row = (1 - share) * self.rows[a] + share * self.rows[b]
        row[line] = 0.0
        return row

    def _keep(self, row: np.ndarray, line: int) -> int:
        if self.size == len(self.rows):
            more = np.zeros((self.size, self.rows.shape[1]))
            self.rows = np.concatenate([self.rows, more])
            self.codes = np.concatenate([self.codes, np.zeros((self.size, self.k), dtype=np.int8)])
        self.rows[self.size] = row
        self.codes[self.size] = self._codes(row[None])[0]
        self.size += 1
        return self.size - 1

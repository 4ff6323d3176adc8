"""What a published figure and ours say of each other: a word, by rule and not by hand."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure with its standard deviation over seeds, where that is known."""

    mean: float
    sd: float = 0.0

    @classmethod
    def read(cls, text: str) -> Figure | None:
        """ "97.92±0.09", "97.92 ± 0.09" or "67.88"; None of an empty text.

        Raises:
            ValueError: something else.
        """
        if not text.strip():
            return None
        found = re.fullmatch(r"\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*(?:±\s*([\d.]+))?\s*", text)
        if found is None:
            raise ValueError(f"{text!r} is no figure: write it as 97.92 or 97.92±0.09")
        return cls(float(found[1]), float(found[2] or 0))

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """Of one value a seed; None of none."""
        known = [v for v in values if v is not None and math.isfinite(v)]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0)


UNLIKE = {
    "shorter schedule": "on a shorter schedule", "another recipe": "by another recipe",
    "another solver": "by another solver",
}  # fmt: skip
"""What may be unlike in ours, and how it is told."""


def rounding(published: str) -> float:
    """What a published mean was rounded to: half a unit of its last digit, 0.5 of "31±3" and 0.05 of "20.8±0.6".

    A trailing zero may have been dropped ("98±0.1"), so it is an upper bound.
    """
    digits = re.match(r"\s*[+-]?\d+(?:\.(\d+))?", published)[1] or ""
    return 0.5 * 10.0 ** -len(digits)


def verdict(published: str, ours: Sequence[float], *, unlike: str = "", within: float = 0.0, digits: int = 2) -> str:
    """Whether ours is the published figure.

    They agree if their bars, mean ± one standard deviation, touch, where ours counts no wider than the published one
    (else noise would make agreement), or if they differ by at most `within`: what two trainings of one recipe may
    differ by where no deviation is known, or what a figure was rounded to.

    Args:
        published: as `Figure.read` takes it; empty: unknown, and there is no verdict.
        ours: a value a seed.
        unlike: one of `UNLIKE`, where ours isn't trained as published.
        within: see above.
        digits: of a difference that is told.

    Returns: "reproduced", "reproduced, on a shorter schedule", "differs by +1.20", "-3.40, on a shorter schedule",
        "+0.30, by another recipe", "not run", or "".
    """
    theirs, mine = Figure.read(published), Figure.of(ours)
    if theirs is None:
        return ""
    if mine is None:
        return "not run"
    apart = mine.mean - theirs.mean
    if abs(apart) <= max(within, theirs.sd + min(mine.sd, theirs.sd)) + 1e-9:
        return otherwise("reproduced", unlike)
    return differs(apart, unlike, digits)


def differs(by: float, unlike: str = "", digits: int = 2) -> str:
    """A word for a figure that isn't reproduced: by how much, and what was unlike."""
    return f"{by:+.{digits}f}, {UNLIKE[unlike]}" if unlike else f"differs by {by:+.{digits}f}"


def otherwise(word: str, unlike: str) -> str:
    """A word that holds, and what was unlike."""
    return f"{word}, {UNLIKE[unlike]}" if unlike else word


def together(verdicts: Mapping[str, str]) -> str:
    """One line of several: "accuracy, neurons: reproduced; connections: differs by -7.10"."""
    words: dict[str, list[str]] = {}
    for name, word in verdicts.items():
        if word:
            words.setdefault(word, []).append(name)
    if len(words) == 1:
        return next(iter(words))
    return "; ".join(f"{', '.join(names)}: {word}" for word, names in words.items())


KINDS = ("reproduced", "reproduced, otherwise", "in part", *UNLIKE, "differs", "needs ImageNet", "not run")


def kind(word: str) -> str:
    """Which of `KINDS` a verdict is, for counting them."""
    parts = {_kind(re.sub(r"^[\w, ]+: ", "", part)) for part in word.split("; ")}
    return next(iter(parts)) if len(parts) == 1 else "in part"


def _kind(word: str) -> str:
    unlike = next((name for name, told in UNLIKE.items() if word.endswith(f", {told}")), "")
    if word.startswith("reproduced"):
        return "reproduced, otherwise" if unlike else "reproduced"
    if unlike or word in KINDS:
        return unlike or word
    return "in part" if re.match(r"in \d+ of", word) else "differs"


def share(
    holds: Sequence[bool], what: str = "settings", words: tuple[str, str] = ("reproduced", "not reproduced")
) -> str:
    """Of a claim about several: "reproduced", "not reproduced", or "in 3 of 5 settings"; "not run" of none.

    Args:
        holds: of each whether it does.
        what: they are; empty: it isn't said.
        words: for all and for none.
    """
    if not len(holds):
        return "not run"
    count = sum(map(bool, holds))
    if count in (0, len(holds)):
        return words[0] if count else words[1]
    return f"in {count} of {len(holds)} {what}".rstrip()
